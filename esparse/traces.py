"""The trace: one calibration pass, after which pruning and skipping are arithmetic.

For every token of a layer it keeps the router logits, the experts the token can reach in falling order of score, and
the Gram matrix of those experts' contributions. Changing the routing weights from w to w' moves the layer's output by
sum_i (w' - w)_i f_i, whose squared norm is (w' - w)^T G (w' - w): Eq. 3 for every subset, and nothing runs again.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts import Scratch, mixed, pair_outputs, run_experts
from .files import new_folder, read_json, write_json
from .models import (
    MoELayer,
    check_tokens,
    evaluating,
    experts_implementation,
    fingerprint,
    free_memory,
    input_device,
    moe_layers,
    silenced,
    uncompiled,
)
from .processes import everyone, summed
from .routers import Router, all_logits, read_router, skip_pairs, skip_ratios, table_ranking, unpack

FORMAT = 2  # of saved traces
CHUNK_TOKENS = 2048
ROWS = 65536  # tokens times subsets that are searched at once
SUBSETS = 256
NOTHING = 0.01  # of the first expert's weight: what carries less beside it changes next to nothing


def reach(n: int, k: int, keep: int | None, router: Router) -> int:
    """How many of its best-ranked experts a token can ever use when at least `keep` of n stay: min(n, k + n - keep).

    All n where removing experts changes how the others rank (groups; a bias added to a softmax). One more where something
    stays beside the experts (see `LayerTrace`).
    """
    return (min(n, k + n - (k if keep is None else keep)) if router.local else n) + (router.beside > 0)


@dataclass
class LayerTrace:
    """What one MoE layer did with the calibration tokens.

    logits: [tokens, n] in the router's dtype, and those of `Router.beside` behind. order: [tokens, m] int64, the experts
    within reach, best first: the k that were chosen, then the others. What stays beside the experts is number n in it: using
    none, which contributes 0, in its place; or, last, all shared experts that the router weighs, as one contribution whose
    weight is what the chosen experts leave of the total: removing experts changes that weight too, and with it the output.
    gram: [tokens, m (m + 1) / 2], <f_i, f_j> in `order`, upper triangle by rows, float64 for float64 models, else
    float32. A progressive trace compares with another layer's output z: target_dot [tokens, m] holds <f_i, z>,
    target_norm [tokens] ||z||^2; without them z is the layer's own output.
    """

    name: str
    k: int
    router: Router
    logits: torch.Tensor
    order: torch.Tensor
    gram: torch.Tensor
    target_dot: torch.Tensor | None = None
    target_norm: torch.Tensor | None = None
    keep: int | None = None  # the smallest r this trace can answer for
    split: bool = False  # whether other ranks of torch.distributed hold the other tokens: sums are then over all

    def __post_init__(self):
        within = self.order.shape[1] - (self.router.beside > 0)
        self.keep = self.n - (within - self.k) if self.keep is None else self.keep

    @property
    def n(self) -> int:
        return self.logits.shape[1] - self.router.beside

    @cached_property
    def weights(self) -> torch.Tensor:
        """Routing weights [tokens, k] of the full layer, as in `order`."""
        return self.router.weights(self.logits, self.order[:, : self.k])

    def check(self, kept: Sequence[int]) -> list[int]:
        """The kept experts in rising order; ValueError if they are no subset this trace can answer for."""
        kept = sorted(int(e) for e in kept)
        if len(set(kept)) != len(kept) or not kept or kept[0] < 0 or kept[-1] >= self.n:
            raise ValueError(f"Kept experts must be different numbers from 0 to {self.n - 1}, got {kept}.")
        self.check_size(len(kept))
        size = self.n // self.router.groups
        if len({sum(e // size == group for e in kept) for group in range(self.router.groups)}) > 1:
            raise ValueError(f"Keep as many experts in each of the router's {self.router.groups} groups, got {kept}.")
        return kept

    def check_size(self, r: int) -> None:
        """ValueError if the router cannot keep r experts, or this trace not answer for them."""
        check_experts(r, self.n, self.k, self.keep, self.router)

    def routing(self, kept: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in `order` each token's k experts stand and their weights, which fall, both [tokens, k], when only `kept`
        exist (all, if None)."""
        if kept is None:
            return self._falling(torch.arange(self.k, device=self.order.device).expand(len(self.order), -1), self.weights)
        positions, weights = self._routing(torch.tensor([self.check(kept)], device=self.order.device))
        return positions[:, 0], weights[:, 0]

    def _routing(self, subsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`routing` for subsets [s, r] at once: both [tokens, s, k]. Nothing depends on the data but the values."""
        if not self.router.local:
            routed = [self._routing_anew(subset) for subset in subsets]
            return tuple(torch.stack(column, 1) for column in zip(*routed, strict=True))
        (s, r), (tokens, m), device = subsets.shape, self.order.shape, self.order.device
        columns = torch.arange(r, device=device).expand(s, -1)
        column = torch.full((s, self.n + 1), -1, device=device).scatter_(1, subsets, columns).T.contiguous()  # [n + 1, s]
        local = column.index_select(0, self.order.flatten()).view(tokens, m, s)  # a kept expert's column, or -1
        alive = local >= 0
        counted = alive.to(torch.int16)  # narrow integers: less to move
        place = counted.cumsum(1, dtype=torch.int16).mul_(counted).clamp_(max=self.k + 1).long()  # 1..k, else 0 or k + 1
        ranks = torch.arange(m, device=device)[:, None].expand_as(place)
        positions = ranks.new_zeros(tokens, self.k + 2, s).scatter_(1, place, ranks)[:, 1:-1]  # k each: bound on reach
        chosen = local.gather(1, positions).mT.reshape(-1, self.k)
        numbers = self.order.gather(1, positions.mT.flatten(1)).view(-1, self.k) if self.router.expert_scale else None
        logits = self.logits.index_select(1, subsets.flatten()).view(-1, r)  # [tokens * s, r]
        if self.router.beside:
            logits = torch.cat([logits, self.logits[:, self.n :].repeat_interleave(s, 0)], 1)
        return self._falling(positions.mT, self.router.weights(logits, chosen, numbers).view(tokens, s, self.k))

    def _routing_anew(self, subset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`routing` where nothing is known beforehand of how fewer experts rank: the router chooses again."""
        subset = torch.cat([subset, torch.arange(self.n, self.logits.shape[1], device=subset.device)])
        logits = self.logits[:, subset]
        chosen = self.router.select(logits, self.k, subset)
        weights = self.router.weights(logits, chosen, subset[chosen])
        return self._falling(self.order.argsort(1).gather(1, subset[chosen]), weights)

    def _falling(self, positions: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [..., k] by falling weight, where the order of selection is another."""
        if self.router.sorted:
            return positions, weights
        order = weights.argsort(dim=-1, descending=True, stable=True)
        return positions.gather(-1, order), weights.gather(-1, order)

    def squared_losses(self, route: Callable[["LayerTrace"], tuple[torch.Tensor, torch.Tensor]], count: int) -> torch.Tensor:
        """Sum over tokens of ||sum_i w'_i f_i - z||^2, float64 [count], for `count` ways of routing at once.

        route: from a part of this trace to places in `order` and weights, both [its tokens, count, k].
        """
        total = torch.zeros(count, dtype=torch.float64, device=self.order.device)
        rows = max(1, ROWS // count)
        for start in range(0, len(self.order), rows):
            some = part(self, slice(start, start + rows))
            total += some.token_losses(*route(some)).sum(0, dtype=torch.float64)
        return self.together(total).clamp(min=0)

    def together(self, total: torch.Tensor) -> torch.Tensor:
        """A sum over this trace's tokens, made one over the tokens of all ranks."""
        return summed(total) if self.split else total

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Values [tokens, ...] of this trace's tokens, and those of all ranks behind each other."""
        if not self.split:
            return values
        found = [value for part in everyone(values.tolist()) for value in part]
        return torch.tensor(found, dtype=values.dtype, device=values.device)

    def token_losses(self, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """||sum_i w'_i f_i - z||^2 [tokens, count] for weights of experts at `positions` in `order`, [tokens, count, k]."""
        change = self.gram.new_zeros(*weights.shape[:2], self.order.shape[1])
        change.scatter_(2, positions, weights.to(change.dtype))
        if self.target_dot is None:
            change[:, :, : self.k] -= self.weights[:, None].to(change.dtype)
        if self.router.shared:
            now = self.router.total if self.target_dot is not None else self.weights.sum(1, keepdim=True)
            change[:, :, -1] = now - weights.sum(2)
        squares = (change @ full_gram(self)).mul_(change).sum(2)
        if self.target_dot is None:
            return squares
        cross = (change @ self.target_dot[:, :, None]).squeeze(2)
        return squares.double() - 2 * cross.double() + self.target_norm[:, None]

    def losses(self, subsets: Sequence[Sequence[int]]) -> torch.Tensor:
        """`reconstruction_loss` of subsets of one size, float64 [subsets]."""
        some = torch.tensor(subsets, device=self.order.device).split(SUBSETS)
        return torch.cat([self.squared_losses(lambda part, s=s: part._routing(s), len(s)) for s in some]).sqrt()


def full_gram(layer: LayerTrace, size: int | None = None) -> torch.Tensor:
    """The symmetric matrices [tokens, size, size] of each token's first `size` experts (all, if None), from the triangles."""
    m = layer.order.shape[1]
    i, j = torch.triu_indices(m, m, device=layer.gram.device)
    entries = (j < (size or m)).nonzero()[:, 0]
    i, j, triangle = i[entries], j[entries], layer.gram[:, entries]
    full = triangle.new_empty(len(triangle), size or m, size or m)
    full[:, i, j] = triangle
    full[:, j, i] = triangle
    return full


def check_experts(r: int, n: int, k: int, keep: int | None = None, router: Router | None = None) -> None:
    """ValueError unless r experts can be kept: at least k, at most n, as many in each group of the router, and no fewer
    than the trace was made for."""
    if not k <= r <= n:
        raise ValueError(f"Cannot keep {r} experts: a token is routed to {k} of {n}, so keep from {k} to {n}.")
    if router and router.groups > 1:
        each = r // router.groups
        if r % router.groups or each < router.group_size or each * router.top_groups < k:
            least = max(router.group_size, -(-k // router.top_groups))
            raise ValueError(
                f"Cannot keep {r} experts: the router's {router.groups} groups must keep equally many, at least {least}, "
                f"since tokens choose {k} from {router.top_groups} groups."
            )
    if keep is not None and r < keep:
        raise ValueError(f"This trace answers down to {keep} experts, not {r}: trace again with keep={r}.")


def check_beta(beta: float, k: int) -> None:
    """ValueError unless beta is a number >= 0 and there is a second expert to skip."""
    if k == 1:
        raise ValueError("Nothing can be skipped: this model routes each token to one expert (k = 1).")
    if not (isinstance(beta, int | float) and 0 <= beta < float("inf")):
        raise ValueError(f"beta must be a finite number that is not negative, got {beta!r}.")


def reconstruction_loss(layer: LayerTrace, kept: Sequence[int] | None = None, beta: float | None = None) -> float:
    """Eq. 3 for one layer: the Frobenius norm over all traced tokens of the change in the layer's output.

    kept: the experts that stay (all, if None); beta: skipping on top of it, with the rule of `routers.skip_pairs`.
    Exact up to the rounding of the Gram. Raises ValueError for subsets outside the trace and bad betas.
    """
    if beta is not None:
        check_beta(beta, layer.k)

    def route(part: LayerTrace) -> tuple[torch.Tensor, torch.Tensor]:
        positions, weights = part.routing(kept)
        if beta is not None:
            weights = skip_pairs(weights, beta, layer.router.normalises)[1]
        return positions[:, None], weights[:, None]

    return layer.squared_losses(route, 1).sqrt().item()


def median_betas(trace: "Trace", kept: Sequence[Sequence[int]] | None = None) -> list[float]:
    """The median over tokens and droppable pairs of rho, one per MoE layer (Section 3.3 and A.7).

    kept: one subset a layer, for a model pruned to it (as seen by the full model's hidden states). Warns of layers that
    `nearly_top1` names.
    """
    subsets = kept if kept is not None else [None] * len(trace.layers)
    if len(subsets) != len(trace.layers):
        raise ValueError(f"Got kept experts for {len(subsets)} layers, but the trace has {len(trace.layers)}.")
    found = [median_ratios(layer, subset) for layer, subset in zip(trace.layers, subsets, strict=True)]
    if told := nearly_top1([after_first for _, after_first in found]):
        warnings.warn(told, stacklevel=2)
    return [beta for beta, _ in found]


def median_ratios(layer: LayerTrace, kept: Sequence[int] | None = None) -> tuple[float, float]:
    """The median of rho over tokens and droppable pairs, and over tokens of the second pair's alone: what all experts after
    the first carry, over what the first carries. For k = 2 they are the same."""
    check_beta(0.0, layer.k)
    ratios = skip_ratios(layer.routing(kept)[1]).double()
    beta = _median(layer.gathered(ratios.flatten()))
    return beta, beta if layer.k == 2 else _median(layer.gathered(ratios[:, 0]))


def _median(values: torch.Tensor) -> float:
    values = values.sort().values
    return ((values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2).item()


def nearly_top1(after_first: Sequence[float]) -> str | None:
    """A sentence, where in some layers all experts after the first carry less than `NOTHING` of its weight for half of the
    tokens or more, by `median_ratios`; a beta says nothing there."""
    few = sum(ratio < NOTHING for ratio in after_first)
    if not few:
        return None
    return (
        f"In {few} of {len(after_first)} MoE layers the experts after the first carry less than {NOTHING:.0%} of its weight "
        "for most tokens: there skipping cannot be told from top-1 routing, and betas say next to nothing."
    )


def dropped_share(layer: LayerTrace, beta: float, kept: Sequence[int] | None = None) -> float:
    """The share of droppable pairs (2..k) that skipping at beta drops on the trace."""
    check_beta(beta, layer.k)
    return (skip_ratios(layer.routing(kept)[1]) < beta).double().mean().item()


def selection_frequency(layer: LayerTrace, kept: Sequence[int] | None = None) -> torch.Tensor:
    """How often each expert is among a token's k, as a share of tokens: float64 [n], summing to k."""
    return co_selection(layer, kept).diagonal()


def co_selection(layer: LayerTrace, kept: Sequence[int] | None = None) -> torch.Tensor:
    """How often two experts are chosen together, as a share of tokens: float64 [n, n] (Fig. 5).

    The diagonal holds the selection frequency.
    """
    chosen = layer.order.gather(1, layer.routing(kept)[0])  # [tokens, k]
    hot = torch.zeros(len(chosen), layer.n + 1, dtype=torch.float64, device=chosen.device).scatter_(1, chosen, 1.0)
    hot = hot[:, : layer.n]
    return layer.together(hot.T @ hot) / layer.together(torch.tensor(len(hot), device=hot.device))


def routing_divergence(one: LayerTrace, other: LayerTrace) -> float:
    """Total variation between the selection frequencies of two corpora, normalised to sum to 1: from 0 to 1."""
    difference = selection_frequency(one) - selection_frequency(other).to(one.order.device)
    return (difference.abs().sum() / (2 * one.k)).item()


def output_norms(layer: LayerTrace) -> torch.Tensor:
    """The norm of the layer's own output for every token, float64 [tokens]."""
    weights = layer.weights[:, None].to(layer.gram.dtype)  # [tokens, 1, k]
    squares = weights @ full_gram(layer, layer.k) @ weights.mT
    return squares.flatten().double().clamp(min=0).sqrt()


def output_norm(layer: LayerTrace) -> float:
    """The Frobenius norm of the layer's own output over all traced tokens, to set losses against."""
    return output_norms(layer).norm().item()


def expert_distances(layer: LayerTrace) -> torch.Tensor:
    """||f_1 - f_2|| of each token's two best experts, float64 [tokens], which A.2 takes to be nearly constant."""
    best = full_gram(layer, 2).double()
    return (best[:, 0, 0] + best[:, 1, 1] - 2 * best[:, 0, 1]).clamp(min=0).sqrt()


def part(layer: LayerTrace, tokens: torch.Tensor | slice) -> LayerTrace:
    """The trace of some of the tokens, by their numbers: what tracing these alone would have given."""
    cut = {name: value[tokens] for name, value in vars(layer).items() if torch.is_tensor(value) and name != "weights"}
    return LayerTrace(layer.name, layer.k, layer.router, keep=layer.keep, **cut)


@dataclass
class Trace:
    """The traces of all MoE layers, the model's fingerprint, and what the calibration tokens were."""

    layers: list[LayerTrace]
    model: str
    tokens: str

    @property
    def keep(self) -> int:
        return max(layer.keep for layer in self.layers)

    def save(self, folder: str | Path) -> None:
        """Write one safetensors file a layer and `trace.json`; raises FileExistsError if `folder` exists."""
        with new_folder(folder) as temporary:
            for number, layer in enumerate(self.layers):
                save_layer(layer, temporary / layer_file(number))
            write_about(temporary, self.model, self.tokens, [about_layer(layer) for layer in self.layers])

    @classmethod
    def load(cls, folder: str | Path) -> "Trace":
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError naming a truncated or foreign file."""
        folder = Path(folder)
        about = read_json(folder / "trace.json", "trace")
        if about.get("format") != FORMAT or not {"layers", "model", "tokens"} <= about.keys():
            raise ValueError(f"{folder} was saved by another version of esparse: trace again.")
        layers = [_load_layer(folder / layer_file(i), entry) for i, entry in enumerate(about["layers"])]
        return cls(layers, about["model"], about["tokens"])


def layer_file(number: int) -> str:
    """The name of an MoE layer's file in a saved trace."""
    return f"layer_{number:02d}.safetensors"


def save_layer(layer: LayerTrace, path: Path) -> None:
    tensors = {name: value.cpu().contiguous() for name, value in vars(layer).items() if torch.is_tensor(value)}
    tensors.pop("weights", None)  # derived, if it was asked for
    tensors["order"] = tensors["order"].to(torch.int16)
    save_file(tensors, path)


def about_layer(layer: LayerTrace) -> dict:
    """What `trace.json` says of a layer."""
    return {"name": layer.name, "k": layer.k, "keep": layer.keep, "router": asdict(layer.router)}


def write_about(folder: Path, model: str, tokens: str, layers: list[dict]) -> None:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"format": FORMAT, "model": model, "tokens": tokens, "layers": layers, "versions": versions}
    write_json(folder / "trace.json", about)


def _load_layer(path: Path, about: dict) -> LayerTrace:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or truncated ({error}): trace again.") from None
    tensors["order"] = tensors["order"].long()
    return LayerTrace(about["name"], about["k"], read_router(about["router"]), keep=about["keep"], **tensors)


class Recorder:
    """Takes the place of a layer's experts during tracing: runs those within reach, keeps their Gram, and returns the
    layer's own result from the same outputs. Recorders that run one after the other share `scratch`. `target` yields
    z [tokens, d] for each call, in a progressive trace.
    """

    def __init__(
        self,
        layer: MoELayer,
        keep: int | None,
        chunk: int | None,
        scratch: Scratch,
        target: Iterator[torch.Tensor] | None = None,
    ):
        self.layer, self.chunk, self.scratch, self.target = layer, chunk, scratch, target
        self.stock = layer.experts.config._experts_implementation
        _ = layer.after  # asked before anybody listens
        self.keep, self.m = keep or layer.k, reach(layer.n, layer.k, keep, layer.router)
        self.logits, self.order, self.gram, self.target_dot, self.target_norm = [], [], [], [], []
        self.deaf = False

    def route(self, gate, inputs, output) -> None:
        """Forward hook of the gate: the logits, and the experts within reach, the chosen ones first."""
        if self.deaf:
            return
        router, (logits, weights, chosen) = self.layer.router, unpack(output)
        logits = all_logits(router, gate, inputs, logits)
        removed = (logits == float("-inf")).all(0)  # by `masked`
        if not torch.isfinite(logits).logical_or(removed).all():
            raise ValueError(f"{self.layer.name}: router logits are not finite; the model or its dtype overflows on this text.")
        ranking = self._ranking(logits, chosen)
        if router.idle:  # the gate names some expert, with no weight, where none is used
            chosen = ranking.topk(self.layer.k).indices
        strength = weights if router.sorted else ranking.gather(1, chosen)
        self.sorting = strength.argsort(dim=1, descending=True, stable=True)
        chosen = chosen.gather(1, self.sorting)
        within = self.m - (router.shared > 0)
        rest = ranking.scatter(1, chosen, float("inf")).topk(within).indices[:, self.layer.k :]
        more = [torch.full_like(chosen[:, :1], self.layer.n)] if router.shared else []
        self.given = output[3].sum(1) if router.shared else None
        self.logits.append(logits)
        self.order.append(torch.cat([chosen, rest, *more], 1))

    def _ranking(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        if not self.layer.router.table:
            return self.layer.router.ranking(logits)
        return table_ranking(chosen, self.layer.n).masked_fill(logits == float("-inf"), float("-inf"))

    def __call__(self, hidden_states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[tokens, d] -> [tokens, d], a chunk of tokens at a time: contributions are never held for all tokens.

        Where memory does not suffice for a chunk, it is halved and tried again.
        """
        result = torch.empty_like(hidden_states)
        weights = weights.gather(1, self.sorting)  # as in `order`
        ranks = self.sorting.argsort(1)  # where in `order` stands what the router gave first
        shared = self._shared(hidden_states) if self.layer.router.shared else None
        target = next(self.target) if self.target else None
        self.chunk = self.chunk or chunk_size(self.layer, self.m, hidden_states)
        start, first = 0, len(self.gram)
        while start < len(hidden_states):
            part = slice(start, start + self.chunk)
            try:
                there = None if target is None else target[part]
                beside = None if shared is None else shared[part]
                result[part] = self._run(hidden_states[part], self.order[-1][part], weights[part], ranks[part], there, beside)
                start = part.stop
                continue
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or self.chunk == 1:
                    raise
            self.chunk //= 2  # the error is gone, and with it what it held
            self.scratch.held.clear()
            if hidden_states.is_cuda:
                torch.cuda.empty_cache()
        if not torch.stack([gram.isfinite().all() for gram in self.gram[first:]]).all():
            raise ValueError(
                f"{self.layer.name}: expert outputs are not finite; the model or its dtype overflows on this text."
            )
        return result

    def _shared(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the shared experts add to each token, [tokens, d], over the weight that the router gave them together."""
        self.deaf = True
        try:
            with silenced(self.layer):
                output = self.layer.block(hidden_states[None])
        finally:
            self.deaf = False
        wide = (output[0] if isinstance(output, tuple) else output).flatten(0, -2)
        wide = wide if wide.dtype == torch.float64 else wide.float()
        return wide / self.given[:, None].to(wide.dtype).clamp(min=torch.finfo(torch.float32).tiny)

    def _run(self, hidden_states, order, weights, ranks, target, shared) -> torch.Tensor:
        """The layer's own result [chunk, d]; the Gram of its experts' contributions is kept."""
        outputs = pair_outputs(self.layer.experts, hidden_states, order, self.scratch)  # [chunk, m, d]
        result = mixed(outputs[:, : self.layer.k], order[:, : self.layer.k], weights, ranks, self.stock)
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        outputs = leaving(self.layer, outputs)
        if shared is not None:
            outputs[:, -1] = shared
        self._accumulate(outputs, target)  # last: after it nothing can fail, and be tried again
        return result

    def _accumulate(self, outputs: torch.Tensor, target: torch.Tensor | None) -> None:
        i, j = torch.triu_indices(self.m, self.m, device=outputs.device)
        gram = (outputs @ outputs.mT)[:, i, j]
        if target is not None:
            target = target.to(outputs.dtype)
            dot, norm = (outputs @ target.unsqueeze(2)).squeeze(2), target.double().square().sum(1)
            self.target_dot.append(dot)
            self.target_norm.append(norm)
        self.gram.append(gram)

    def finish(self) -> LayerTrace:
        parts = {name: torch.cat(getattr(self, name)) for name in ("logits", "order", "gram")}
        if self.target:
            parts.update(target_dot=torch.cat(self.target_dot), target_norm=torch.cat(self.target_norm))
        return LayerTrace(self.layer.name, self.layer.k, self.layer.router, keep=self.keep, **parts)


def chunk_size(layer: MoELayer, m: int, like: torch.Tensor) -> int:
    """Tokens whose expert outputs fit into a quarter of the free memory; beyond a few thousand nothing is gained."""
    experts = layer.experts
    inner = experts.down_proj[0].numel() // like.shape[1]
    each = m * ((3 * inner + 3 * like.shape[1]) * like.element_size() + 8 * like.shape[1])  # bytes a token
    most = 8 * CHUNK_TOKENS if like.is_cuda else CHUNK_TOKENS
    return int(min(most, max(1, free_memory(like.device) / 4 / each)))


def _out_of_memory(error: Exception) -> bool:
    """A GPU and Python say so by type, a CPU's allocator in words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def leaving(layer: MoELayer, outputs: torch.Tensor) -> torch.Tensor:
    """What experts' outputs [..., inner] add to the block's output [..., d]."""
    after = None if layer.after is None else layer.after.to(outputs.dtype)
    return outputs if after is None else outputs @ after if after.ndim else outputs * after


def _tracing_forward(experts, hidden_states, top_k_index, top_k_weights):
    recorder = getattr(experts, "esparse_recorder", None)
    if recorder is None:  # a layer of the same model that is not being traced
        return run_experts(experts, hidden_states, top_k_index, top_k_weights)
    return recorder(hidden_states, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register("esparse_tracing", _tracing_forward)


@contextmanager
def recording(recorders: Sequence[Recorder]) -> Iterator[None]:
    """These recorders in the place of their layers' experts."""
    with ExitStack() as stack, uncompiled():
        stack.enter_context(experts_implementation([recorder.layer for recorder in recorders], "esparse_tracing"))
        for recorder in recorders:
            stack.callback(recorder.layer.gate.register_forward_hook(recorder.route).remove)
            stack.callback(delattr, recorder.layer.experts, "esparse_recorder")
            recorder.layer.experts.esparse_recorder = recorder
        yield


def tokens_digest(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def check_gram(layers: Sequence[MoELayer], tokens: int, keep: int | None, device: torch.device) -> None:
    """ValueError unless the Gram matrices of these layers on so many tokens fit into the memory that is free."""
    entries = [(m := reach(layer.n, layer.k, keep, layer.router)) * (m + 1) // 2 for layer in layers]
    size, free = 4 * tokens * sum(entries), free_memory(device)
    if size > free:
        raise ValueError(
            f"The Gram of {len(layers)} layers and {tokens} tokens would take {size / 1e9:.2g} GB where {free / 1e9:.2g} "
            "are free: use fewer sequences, keep more experts, or trace from disk, where one layer is held."
        )


@torch.no_grad()
def trace(
    model, tokens: torch.Tensor, *, keep: int | None = None, batch_size: int = 8, chunk_tokens: int | None = None
) -> Trace:
    """Run the model over a calibration set once and keep what Eq. 3, betas and frequencies need.

        tokens = esparse.calibration_tokens("web", tokenizer, sequences=64, length=256)
        plan = esparse.search_experts(esparse.trace(model, tokens), 6)

    tokens: [sequences, length] ids. keep: the smallest number of experts the trace must answer for (None: k); fewer
    experts run the larger it is. batch_size: sequences a forward pass. chunk_tokens: tokens whose expert outputs are
    in memory at a time, which bounds the extra memory (from the free memory, if None). The result lies on the model's device.
    The model runs in evaluation mode, and is as it was afterwards. In half precision the experts' outputs are added up as the
    model's experts implementation does, so that it routes as in a stock forward pass; generated token by token, stock
    transformers itself routes up to 1% of the tokens otherwise (bfloat16, tiny model, CPU).
    Raises ValueError for models without MoE layers, token ids outside the vocabulary, keep outside k..n, and for
    logits or outputs that are not finite.
    """
    check_tokens(model, tokens)
    layers = moe_layers(model)
    for layer in layers:
        check_experts(layer.k if keep is None else keep, layer.n, layer.k)
    check_gram(layers, tokens.numel(), keep, input_device(model))
    scratch = Scratch()
    recorders = [Recorder(layer, keep, chunk_tokens, scratch) for layer in layers]
    with evaluating(model), recording(recorders):
        for batch in tqdm(tokens.split(batch_size), desc="trace", unit="batch"):
            model.base_model(batch.to(input_device(model)), use_cache=False)
    return Trace([recorder.finish() for recorder in recorders], fingerprint(model), tokens_digest(tokens))


@torch.no_grad()
def trace_block(layer: MoELayer, hidden_states: torch.Tensor, keep: int | None, scratch: Scratch | None = None) -> LayerTrace:
    """The trace of one block alone, on hidden states [tokens, d]."""
    recorder = Recorder(layer, keep, None, scratch or Scratch())
    with evaluating(layer.block), recording([recorder]):
        layer.block(hidden_states[None])
    return recorder.finish()
