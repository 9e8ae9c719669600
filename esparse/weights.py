"""Pruning weights instead of experts (Table 1): magnitude, Wanda and MoE-Pruner, unstructured or N:M, layer by layer.

A linear map's weight [out, in] loses the entries with the smallest scores within each output row, or within each group of
M of a row's inputs. Scores: magnitude |W_ij|; Wanda |W_ij| ||x_j||_2 over the calibration tokens (arXiv 2306.11695,
Eq. 1); MoE-Pruner |W_ij| ||x_j g||_2 over the tokens routed to an expert, g their routing weight (arXiv 2410.12013).
"""

import re
import warnings
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts import one_expert, run_experts
from .models import (
    MoELayer,
    check_held,
    check_tokens,
    decoder_layers,
    experts_implementation,
    find_moe,
    input_device,
    moe_layers,
)
from .walk import BATCH, at, only, through

METHODS = ("magnitude", "wanda", "moe-pruner")
SCOPES = ("experts", "linear")
IMPLEMENTATION = "esparse_weighing"


# --- scores and masks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sparsity:
    """A share of every output row (0.5), or M - N of every M neighbouring inputs ("2:4" keeps two of four)."""

    share: float
    group: int | None = None  # M

    @classmethod
    def read(cls, asked: "float | str | Sparsity") -> "Sparsity":
        """Raises ValueError for a share outside (0, 1), and for N:M unless 0 < N < M."""
        if isinstance(asked, Sparsity):
            return asked
        if isinstance(asked, str) and (found := re.fullmatch(r"(\d+):(\d+)", asked)):
            n, m = int(found[1]), int(found[2])
            if not 0 < n < m:
                raise ValueError(f"{asked} keeps {n} of {m} weights: N:M needs N from 1 to M - 1, such as 2:4.")
            return cls(1 - n / m, m)
        try:
            share = float(asked)
        except ValueError:
            raise ValueError(f"Cannot read the sparsity {asked!r}: give a share such as 0.5, or N:M such as 2:4.") from None
        if not 0 < share < 1:
            raise ValueError(f"The sparsity must lie between 0 and 1, got {share}: it is the share of weights to remove.")
        return cls(share)

    def check(self, width: int) -> None:
        """ValueError unless a row of so many weights divides into groups of M, and loses some but not all."""
        if not 0 < round(self.share * (self.group or width)) < (self.group or width):
            raise ValueError(f"The sparsity {self} of a row of {width} weights removes none, or all: take one in between.")
        if self.group and width % self.group:
            raise ValueError(f"Rows of {width} weights do not divide into groups of {self.group} ({self}).")

    def __str__(self) -> str:
        return f"{round((1 - self.share) * self.group)}:{self.group}" if self.group else f"{self.share:g}"


def keep_mask(scores: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Which weights stay: bool [..., out, in] for scores [..., out, in]; ties fall by position.

    Exactly round(share * in) entries of every row go, or M - N of every group. Raises ValueError where M does not divide in.
    """
    sparsity.check(scores.shape[-1])
    size = sparsity.group or scores.shape[-1]
    groups = scores.unflatten(-1, (-1, size))
    gone = groups.argsort(dim=-1, stable=True)[..., : round(sparsity.share * size)]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, gone, False).flatten(-2)


def score(weight: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
    """|W_ij| ||x_j||_2, float32 (float64 for float64) [..., out, in]; squares: sum over tokens of x_j^2 [..., in]."""
    size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    return size if squares is None else size * squares.sqrt().to(size)[..., None, :]


# --- what enters the weights ----------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """Sums over the calibration tokens of the squares of what enters each linear map of one decoder layer.

    experts: by parameter, float64 [n, in], over the tokens routed to each expert, times their routing weights squared
    for MoE-Pruner. linear: by name within the layer, float64 [in]. tokens: how many reached each expert, [n].
    """

    weighted: bool
    experts: dict[str, torch.Tensor] = field(default_factory=dict)
    linear: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: torch.Tensor | None = None

    def __call__(self, experts: nn.Module, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor):
        """Takes the place of a layer's experts: [tokens, d] -> [tokens, d], one expert after the other."""
        if self.tokens is None:
            self.tokens = torch.zeros(experts.num_experts, dtype=torch.long, device=index.device)
        self.tokens += torch.bincount(index.flatten(), minlength=experts.num_experts)[: experts.num_experts]
        result = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        for number in range(experts.num_experts):
            token, place = (index == number).nonzero(as_tuple=True)
            if len(token):
                gates = weights[token, place, None]  # [rows, 1]
                hear = lambda name, x: self._add_expert(name, experts, number, x * gates if self.weighted else x)  # noqa: B023, E731
                output = one_expert(experts, number, hidden_states[token], hear=hear)
                result.index_add_(0, token, output.to(result.dtype) * gates)
        return result.to(hidden_states.dtype)

    def _add_expert(self, name: str, experts: nn.Module, number: int, x: torch.Tensor) -> None:
        if name not in self.experts:
            self.experts[name] = torch.zeros(experts.num_experts, x.shape[1], dtype=torch.float64, device=x.device)
        self.experts[name][number] += squares(x)

    def hear(self, name: str):
        """A forward hook of a linear map."""

        def hook(_module, inputs, _output) -> None:
            x = inputs[0].flatten(0, -2)
            self.linear[name] = self.linear.get(name, 0.0) + squares(x)

        return hook


def squares(x: torch.Tensor) -> torch.Tensor:
    """Sums of squares over rows, float64 [in] for [rows, in]."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(0, dtype=torch.float64)


def _weighing_forward(experts, hidden_states, top_k_index, top_k_weights):
    inputs = getattr(experts, "esparse_inputs", None)
    if inputs is None:  # a layer of the same model whose turn it is not
        return run_experts(experts, hidden_states, top_k_index, top_k_weights)
    return inputs(experts, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _weighing_forward)


def linear_maps(decoder: nn.Module, layer: MoELayer | None) -> dict[str, nn.Linear]:
    """The linear maps of a decoder layer by name: attention, dense and shared experts; a router, or a gate of one output, is
    none of them."""
    routing = set() if layer is None else {id(module) for module in layer.gate.modules()}
    maps = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in maps.items() if id(module) not in routing and module.out_features > 1}


@contextmanager
def weighing(decoder: nn.Module, layer: MoELayer | None, inputs: Inputs, scope: str) -> Iterator[None]:
    """`inputs` listening to what enters the experts of a decoder layer, and its other linear maps where they are in scope."""
    with ExitStack() as stack:
        if layer is not None:
            stack.enter_context(experts_implementation([layer], IMPLEMENTATION))
            stack.callback(delattr, layer.experts, "esparse_inputs")
            layer.experts.esparse_inputs = inputs
        for name, module in linear_maps(decoder, layer).items() if scope == "linear" else ():
            stack.callback(module.register_forward_hook(inputs.hear(name)).remove)
        yield


# --- one layer after the other --------------------------------------------------------------------------------------


class Weigher:
    """Takes a calibration set through a decoder, pruning each layer's weights on the way."""

    def __init__(
        self,
        model: nn.Module,
        tokens: torch.Tensor,
        sparsity: Sparsity,
        *,
        method: str,
        scope: str,
        dense: bool = False,
        batch_size: int = BATCH,
        stream=None,
    ):
        """dense: layers hear what the dense model's layers give out (as MoE-Pruner), else the pruned one's (as Wanda).
        stream: makes what holds the hidden states after a layer, from a name and the layer's number."""
        self.model, self.batches, self.sparsity = model, tokens.split(batch_size), sparsity
        self.method, self.scope, self.dense = method, scope, dense
        self.stream = stream or (lambda name, number: [None] * len(self.batches))
        self.original: MutableSequence | None = None  # before the first layer: the embeddings
        self.together = lambda total: total  # a sum over these tokens, made one over those of all processes

    @torch.no_grad()
    def prune_layer(self, number: int) -> dict:
        """Prune one decoder layer in place and take the calibration set past it; what happened, for JSON."""
        with only(self.model, number) as decoder:
            layer = find_moe(decoder)
            if layer is None and self.scope == "experts":
                self.original = self._pass(decoder, number)
                return {}
            inputs = Inputs(self.method == "moe-pruner")
            with weighing(decoder, layer, inputs, self.scope):
                dense = self._pass(decoder, number, keep=self.dense)
            found = self._cut(number, decoder, layer, inputs)
            self.original = dense if self.dense else self._pass(decoder, number)
        return found

    def _pass(self, decoder: nn.Module, number: int, keep: bool = True) -> MutableSequence | None:
        """What the decoder layer gives out for all batches, if it is wanted."""
        after = self.stream("original", number) if keep else None
        for b, batch in enumerate(self.batches):
            batch = batch.to(input_device(self.model))
            states = through(self.model, decoder, batch, at(self.original, b, batch))
            if keep:
                after[b] = states
        return after

    def _cut(self, number: int, decoder: nn.Module, layer: MoELayer | None, inputs: Inputs) -> dict:
        removed, whole = 0, 0
        tokens = None if layer is None else self.together(inputs.tokens)
        for weight, squares_in in _targets(decoder, layer, inputs, tokens, self.scope):
            squares_in = None if self.method == "magnitude" else self.together(squares_in)
            mask = keep_mask(score(weight, squares_in), self.sparsity)
            weight.mul_(mask)
            removed, whole = removed + (~mask).sum().item(), whole + mask.numel()
        found = {"removed": removed, "weights": whole}
        if self.scope == "linear" and (unheard := sorted(linear_maps(decoder, layer).keys() - inputs.linear.keys())):
            found["unheard"] = unheard
            warnings.warn(
                f"Decoder layer {number}: {', '.join(unheard)} is not called, so that nobody knows what enters it: it stays.",
                stacklevel=2,
            )
        if layer is not None and (unrouted := (tokens == 0).nonzero().flatten().tolist()):
            found["unrouted"] = unrouted
            warnings.warn(
                f"Decoder layer {number}: the calibration set routes no token to the experts {unrouted}, whose weights are "
                "pruned by magnitude: take more or other text.",
                stacklevel=2,
            )
        return found


def _targets(
    decoder: nn.Module, layer: MoELayer | None, inputs: Inputs, tokens: torch.Tensor | None, scope: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every weight [out, in] in scope, a view that can be changed, and the squares of what enters it [in]."""
    if layer is not None:
        experts = layer.experts
        for name, into in inputs.experts.items():
            stacked = getattr(experts, name)
            for number in range(layer.n):
                weight = stacked[number].T if experts.is_transposed else stacked[number]
                routed = tokens[number] > 0  # without tokens every score would be 0: magnitude decides
                yield weight, into[number] if routed else torch.ones_like(into[number])
    if scope == "linear":
        for name, module in linear_maps(decoder, layer).items():
            if name in inputs.linear:  # else it was not called, but its weight used
                yield module.weight, inputs.linear[name]


def check_options(method: str, scope: str) -> None:
    """ValueError for a score or a scope that is not there."""
    if method not in METHODS:
        raise ValueError(f"Unknown score {method!r}: choose from {', '.join(METHODS)}.")
    if scope not in SCOPES:
        raise ValueError(f"Unknown scope {scope!r}: choose from {', '.join(SCOPES)}.")


def prune_weights(
    model,
    tokens: torch.Tensor,
    sparsity: float | str,
    *,
    method: str = "moe-pruner",
    scope: str = "experts",
    dense: bool = False,
    batch_size: int = BATCH,
) -> dict:
    """Set weights to zero in place, layer by layer, by their scores on a calibration set [sequences, length].

        report = esparse.prune_weights(model, tokens, "2:4", method="wanda")

    sparsity: the share of each output row that goes, or "N:M". method: "magnitude", "wanda" or "moe-pruner". scope:
    "experts", the stacked expert matrices, or "linear", these and every other linear map of the decoder layers (on
    which MoE-Pruner is Wanda); routers, embeddings and the output layer stay. dense: score on what the dense layers give
    out, as MoE-Pruner's algorithm does, instead of the pruned ones', as Wanda's. Experts to which no token was routed
    have no score but their weights' magnitude, and are named: returns {"sparsity", "method", "scope", "removed" and
    "weights" (counts), "unrouted" (decoder layer to experts), "unheard" (decoder layer to linear maps that are not called
    but used by their weight, as in Mamba: they stay)}.
    Raises ValueError for another method or scope, a sparsity outside (0, 1), N >= M, M that does not divide a row, token
    ids outside the vocabulary, and decoder layers that accelerate has offloaded, before any weight changes.
    """
    check_options(method, scope)
    asked = Sparsity.read(sparsity)
    check_tokens(model, tokens)
    check_model(model, asked, scope)
    check_held(decoder_layers(model), "prune from disk to disk, with prune_weights_checkpoint")
    weigher = Weigher(model, tokens, asked, method=method, scope=scope, dense=dense, batch_size=batch_size)
    numbers = tqdm(range(len(decoder_layers(model))), desc=f"{method} {asked}", unit="layer")
    return summary(asked, method, scope, [weigher.prune_layer(number) for number in numbers])


def check_model(model, sparsity: Sparsity, scope: str) -> None:
    """ValueError unless the model has MoE layers and every row in scope divides into groups of M."""
    moe_layers(model)
    for decoder in decoder_layers(model):
        layer = find_moe(decoder)
        widths = [] if layer is None else [_inputs_of(layer.experts, name) for name in expert_weights(layer.experts)]
        widths += [m.in_features for m in linear_maps(decoder, layer).values()] if scope == "linear" else []
        for width in widths:
            sparsity.check(width)


def expert_weights(experts: nn.Module) -> list[str]:
    """The stacked matrices [n, ., .] of an experts module, by name."""
    return [name for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")]


def _inputs_of(experts: nn.Module, name: str) -> int:
    return getattr(experts, name).shape[1 if experts.is_transposed else 2]


def summary(sparsity: Sparsity, method: str, scope: str, layers: Sequence[dict]) -> dict:
    """What `prune_weights` returns, from what it did in each decoder layer."""
    total = {key: sum(layer.get(key, 0) for layer in layers) for key in ("removed", "weights")}
    apart = {
        key: {str(number): layer[key] for number, layer in enumerate(layers) if layer.get(key)}
        for key in ("unrouted", "unheard")
    }
    return {"sparsity": str(sparsity), "method": method, "scope": scope, **total, **apart}


# --- zeros that stay ------------------------------------------------------------------------------------------------


def zeros(model) -> dict[nn.Parameter, torch.Tensor]:
    """Which weights of a pruned model are there: bool by parameter, for matrices of which some are zero (embeddings, whose
    padding is, apart)."""
    apart = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim > 1 and p not in apart]
    present = {parameter: parameter != 0 for parameter in matrices}
    return {parameter: mask for parameter, mask in present.items() if not mask.all()}


@torch.no_grad()
def restore_zeros(model, present: dict[nn.Parameter, torch.Tensor]) -> None:
    """Set what is not `present` to zero again, after a step of an optimiser. Raises ValueError for another model's masks."""
    if not present.keys() <= set(model.parameters()):  # before any weight changes
        raise ValueError("These masks belong to another model: take those of the model that is trained, zeros(model).")
    for parameter, mask in present.items():
        parameter.mul_(mask)


def equal_share(n: int, r: int, bits: int = 16) -> float:
    """The sparsity of experts at which weights kept, with one bit for each place, take the bytes of r of n experts."""
    return 1 - r / n + 1 / bits
