"""Pruning weights instead of experts (Table 1): magnitude, Wanda and MoE-Pruner, unstructured or N:M, layer by layer.

A linear map's weight [out, in] loses the entries with the smallest scores within each output row, or within each group of
M of a row's inputs. Scores: magnitude |W_ij|; Wanda |W_ij| ||x_j||_2 over the calibration tokens (arXiv 2306.11695,
Eq. 1); MoE-Pruner |W_ij| ||x_j g||_2 over the tokens routed to an expert, g their routing weight (arXiv 2410.12013).
"""

import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..machine import summed
from ..moe.experts import one_expert
from ..moe.layers import MoELayer, decoder_layers, find_moe, moe_layers, replaced_experts
from ..moe.running import check_held, check_tokens
from ..tracing.walk import BATCH, Walk, single_layer

WEIGHT_SCORES = ("magnitude", "wanda", "moe-pruner")
SCOPES = ("experts", "linear")
SMALL_GROUP = 8  # up to which comparing each two is faster than sorting


@dataclass(frozen=True)
class Sparsity:
    """The weights to remove: a share of every output row (0.5), or M - N of every M neighbouring inputs ("2:4": two of 4)."""

    share: float
    group: int | None = None  # M

    @classmethod
    def read(cls, sparsity: float | str) -> "Sparsity":
        """Raises ValueError for a share outside (0, 1), and for N:M unless 0 < N < M."""
        if isinstance(sparsity, str) and (found := re.fullmatch(r"(\d+):(\d+)", sparsity)):
            n, m = int(found[1]), int(found[2])
            if not 0 < n < m:
                raise ValueError(f"{sparsity} keeps {n} of {m} weights: N:M needs N from 1 to M - 1, such as 2:4.")
            return cls(1 - n / m, m)
        try:
            share = float(sparsity)
        except ValueError:
            raise ValueError(f"Cannot read the sparsity {sparsity!r}: give a share such as 0.5, or N:M such as 2:4.") from None
        if not 0 < share < 1:
            raise ValueError(f"The sparsity must lie between 0 and 1, got {share}: it is the share of weights to remove.")
        return cls(share)

    def check(self, width: int) -> None:
        """ValueError unless a row of `width` weights divides into groups of M, and loses some but not all."""
        if not 0 < round(self.share * (self.group or width)) < (self.group or width):
            raise ValueError(f"The sparsity {self} of a row of {width} weights removes none, or all: take one in between.")
        if self.group and width % self.group:
            raise ValueError(f"Rows of {width} weights do not divide into groups of {self.group} ({self}).")

    def __str__(self) -> str:
        return f"{round((1 - self.share) * self.group)}:{self.group}" if self.group else f"{self.share:g}"


def keep_mask(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """The weights to keep: bool [..., out, in] for scores [..., out, in]; of equal scores the first are removed. Exactly
    round(share * in) entries of every row go, or M - N of every group. Raises ValueError where M does not divide in."""
    sparsity.check(scores.shape[-1])
    size = sparsity.group or scores.shape[-1]
    groups, removed = scores.unflatten(-1, (-1, size)), round(sparsity.share * size)
    if size > SMALL_GROUP:
        gone = groups.argsort(dim=-1, stable=True)[..., :removed]
        return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, gone, False).flatten(-2)
    places = [place.contiguous() for place in groups.unbind(-1)]
    below = [torch.zeros_like(place, dtype=torch.uint8) for place in places]  # how many of its group each one is above
    for first, second in itertools.combinations(range(size), 2):
        above = places[second] >= places[first]
        below[second] += above
        below[first] += ~above
    return torch.stack([count >= removed for count in below], -1).flatten(-2)


def score(weight: Tensor, squares: Tensor | None) -> Tensor:
    """|W_ij| ||x_j||_2, float32 (float64 for float64) [..., out, in]; squares: sum over tokens of x_j^2 [..., in]."""
    size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    return size if squares is None else size * squares.sqrt().to(size)[..., None, :]


@dataclass
class InputSquares:
    """Sums over the calibration tokens of squared inputs, for each linear map of one decoder layer.

    experts: by parameter, float64 [n, in], over the tokens routed to each expert, times their squared routing weights if
    `weighted` (MoE-Pruner). linear: by name within the layer, float64 [in]. tokens: how many were routed to each expert, [n].
    """

    weighted: bool
    experts: dict[str, Tensor] = field(default_factory=dict)
    linear: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None

    def __call__(self, experts: nn.Module, hidden_states: Tensor, index: Tensor, weights: Tensor):
        """Runs in place of a layer's experts, one expert after the other: [tokens, d] -> [tokens, d]."""
        counts = torch.bincount(index.flatten(), minlength=experts.num_experts)[: experts.num_experts]
        self.tokens = counts if self.tokens is None else self.tokens + counts
        result = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        for number in range(experts.num_experts):
            token, place = (index == number).nonzero(as_tuple=True)
            if len(token):
                gates = weights[token, place, None]  # [rows, 1]
                add = partial(self._add_expert, experts.num_experts, number, gates if self.weighted else 1)
                output = one_expert(experts, number, hidden_states[token], on_input=add)
                result.index_add_(0, token, output.to(result.dtype) * gates)
        return result.to(hidden_states.dtype)

    def _add_expert(self, n: int, number: int, factor: Tensor | int, name: str, x: Tensor) -> None:
        if name not in self.experts:
            self.experts[name] = torch.zeros(n, x.shape[1], dtype=torch.float64, device=x.device)
        self.experts[name][number] += _sum_of_squares(x * factor)

    def add_linear(self, name: str, _module, inputs: tuple, _output) -> None:
        """A forward hook of the linear map `name`."""
        self.linear[name] = self.linear.get(name, 0.0) + _sum_of_squares(inputs[0].flatten(0, -2))

    def sum_over_ranks(self) -> None:
        """Makes the sums and counts those over the tokens of all ranks."""
        for total in (*self.experts.values(), *self.linear.values(), self.tokens):
            if total is not None:
                summed(total)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Over rows, float64 [in] for [rows, in]."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(0, dtype=torch.float64)


def linear_maps(decoder: nn.Module, layer: MoELayer | None, scope: str) -> dict[str, nn.Linear]:
    """The linear maps in scope by name: attention, dense and shared experts; no router, no gate with one output."""
    if scope == "experts":
        return {}
    routing = set() if layer is None else {id(module) for module in layer.gate.modules()}
    maps = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in maps.items() if id(module) not in routing and module.out_features > 1}


@contextmanager
def capture_inputs(decoder: nn.Module, layer: MoELayer | None, inputs: InputSquares, scope: str) -> Iterator[None]:
    """Adds the inputs of a decoder layer's experts, and of its other linear maps where they are in scope, to `inputs`."""
    layers = [] if layer is None else [layer]
    with ExitStack() as stack, replaced_experts(layers, [inputs] * len(layers)):
        for name, module in linear_maps(decoder, layer, scope).items():
            stack.enter_context(module.register_forward_hook(partial(inputs.add_linear, name)))
        yield


@dataclass(frozen=True)
class WeightPruner:
    """Prunes the weights of one decoder layer after the other, with the options of `prune_weights`."""

    sparsity: Sparsity
    method: str
    scope: str
    dense: bool

    def __post_init__(self):
        """ValueError for an unknown score or scope."""
        if self.method not in WEIGHT_SCORES:
            raise ValueError(f"Unknown score {self.method!r}: choose from {', '.join(WEIGHT_SCORES)}.")
        if self.scope not in SCOPES:
            raise ValueError(f"Unknown scope {self.scope!r}: choose from {', '.join(SCOPES)}.")

    def check(self, model) -> None:
        """ValueError unless the model has MoE layers and every row in scope divides into groups of M."""
        moe_layers(model)
        for decoder in decoder_layers(model):
            layer = find_moe(decoder)
            widths = [module.in_features for module in linear_maps(decoder, layer, self.scope).values()]
            if layer is not None:
                stacked = [p for name, p in layer.experts.named_parameters(recurse=False) if name.endswith("_proj")]
                widths += [p.shape[1 if layer.experts.is_transposed else 2] for p in stacked]
            for width in widths:
                self.sparsity.check(width)

    @torch.no_grad()
    def prune_layer(self, walk: Walk, number: int) -> dict:
        """Prune one decoder layer in place and take the walk past it; returns counts and names, for JSON."""
        with single_layer(walk.model, number) as decoder:
            layer = find_moe(decoder)
            if layer is None and self.scope == "experts":
                walk.advance(decoder, number)
                return {}
            inputs = InputSquares(self.method == "moe-pruner")
            with capture_inputs(decoder, layer, inputs, self.scope):
                if self.dense:
                    walk.advance(decoder, number)
                else:
                    for b in range(len(walk.batches)):
                        walk.forward(decoder, b)
            if walk.split:
                inputs.sum_over_ranks()
            report = self._cut(number, decoder, layer, inputs)
            if not self.dense:
                walk.advance(decoder, number)
        return report

    def _cut(self, number: int, decoder: nn.Module, layer: MoELayer | None, inputs: InputSquares) -> dict:
        """Set weights to zero by their scores; returns the layer's report."""
        report = {"removed": 0, "weights": 0}
        for weight, squares in self._targets(decoder, layer, inputs):
            mask = keep_mask(score(weight, None if self.method == "magnitude" else squares), self.sparsity)
            weight.mul_(mask)
            report["removed"] += mask.numel() - mask.count_nonzero().item()
            report["weights"] += mask.numel()
        if uncalled := sorted(linear_maps(decoder, layer, self.scope).keys() - inputs.linear.keys()):
            report["unheard"] = uncalled
            _warn(number, f"{', '.join(uncalled)} is not called during calibration; left unpruned.")
        if layer is not None and (unrouted := (inputs.tokens == 0).nonzero().flatten().tolist()):
            report["unrouted"] = unrouted
            missed = f"the calibration set routes no token to the experts {unrouted}"
            _warn(number, f"{missed}, whose weights are pruned by magnitude: take more or other text.")
        return report

    def _targets(self, decoder, layer, inputs: InputSquares) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Every weight [out, in] in scope, as a view to change in place, and its squared inputs [in], if there were any."""
        for name, squares in inputs.experts.items():
            stacked = getattr(layer.experts, name)
            for number in range(layer.n):
                weight = stacked[number].T if layer.experts.is_transposed else stacked[number]
                yield weight, squares[number] if inputs.tokens[number] else None
        for name, module in linear_maps(decoder, layer, self.scope).items():
            if name in inputs.linear:  # some modules use a map's weight and never call it
                yield module.weight, inputs.linear[name]

    def summary(self, layers: Sequence[dict]) -> dict:
        """The report of `prune_weights`, from the reports of `prune_layer`."""
        total = {key: sum(layer.get(key, 0) for layer in layers) for key in ("removed", "weights")}
        for key in ("unrouted", "unheard"):
            total[key] = {str(number): layer[key] for number, layer in enumerate(layers) if layer.get(key)}
        return {"sparsity": str(self.sparsity), "method": self.method, "scope": self.scope, **total}


def _warn(number: int, sentence: str) -> None:
    warnings.warn(f"Decoder layer {number}: {sentence}", stacklevel=3)


def prune_weights(
    model,
    tokens: Tensor,
    sparsity: float | str,
    *,
    method: str = "moe-pruner",
    scope: str = "experts",
    dense: bool = False,
    batch_size: int = BATCH,
) -> dict:
    """Set weights to zero in place, layer by layer, by their scores on a calibration set [sequences, length].

        report = esparse.prune_weights(model, tokens, "2:4", method="wanda")

    sparsity: the share of each output row to remove, or "N:M". method: "magnitude", "wanda" or "moe-pruner". scope:
    "experts", the stacked expert matrices, or "linear", these and every other linear map of the decoder layers (for
    which MoE-Pruner is Wanda); routers, embeddings and the output layer are never pruned. dense: score on the outputs of
    unpruned earlier layers, as MoE-Pruner does, instead of pruned ones, as Wanda does. An expert to which no token was
    routed is pruned by magnitude. Returns {"sparsity", "method", "scope", "removed" and "weights" (counts), "unrouted"
    (decoder layer to experts without tokens), "unheard" (decoder layer to linear maps that are never called, only
    their weight used, as in Mamba; they stay unpruned)}.
    Raises ValueError for another method or scope, a sparsity outside (0, 1), N >= M, M that does not divide a row, token
    ids outside the vocabulary, and decoder layers that accelerate has offloaded, before any weight changes.
    """
    pruner = WeightPruner(Sparsity.read(sparsity), method, scope, dense)
    check_tokens(model, tokens)
    pruner.check(model)
    check_held(decoder_layers(model), "prune from disk to disk, with prune_weights_checkpoint")
    walk = Walk(model, tokens, batch_size=batch_size)
    numbers = tqdm(range(len(decoder_layers(model))), desc=f"{method} {pruner.sparsity}", unit="layer")
    return pruner.summary([pruner.prune_layer(walk, number) for number in numbers])


def zeros(model) -> dict[nn.Parameter, Tensor]:
    """Masks of the nonzero weights of a pruned model, bool by parameter: for matrices with zeros, except embeddings, whose
    padding is zero."""
    apart = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    present = {parameter: parameter != 0 for parameter in model.parameters() if parameter.ndim > 1 and parameter not in apart}
    return {parameter: mask for parameter, mask in present.items() if not mask.all()}


@torch.no_grad()
def restore_zeros(model, present: dict[nn.Parameter, Tensor]) -> None:
    """Set weights outside the masks to zero, after an optimiser's step. Raises ValueError for another model's masks."""
    if not present.keys() <= set(model.parameters()):  # before any weight changes
        raise ValueError("These masks belong to another model: take those of the model that is trained, zeros(model).")
    for parameter, mask in present.items():
        parameter.mul_(mask)


def equal_share(n: int, r: int, bits: int = 16) -> float:
    """The sparsity at which the kept weights and a mask of one bit per weight take as many bytes as r of n experts."""
    return 1 - r / n + 1 / bits
