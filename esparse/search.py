"""Choosing the experts to keep (Section 3.2): every subset where that is affordable, greedy removal with swaps beyond."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm

from .models import MoELayer, Scratch, check_fingerprint, check_tokens, decoder_layers, moe_layers, silenced
from .pruning import PruningPlan, masked_layer
from .routers import SPARSEMIXER
from .traces import (
    CHUNK_TOKENS,
    LayerTrace,
    Recorder,
    Trace,
    full_gram,
    reconstruction_loss,
    recording,
    selection_frequency,
    tokens_digest,
)

MAX_SUBSETS = 200_000
MAX_ROUTINGS = 5e9  # subsets times tokens: some ten minutes a layer on two cores
SWEEPS = 20  # at most, over the removed experts
ROWS = 16384  # tokens whose small Grams are in memory at once


def _groups(layer: LayerTrace) -> list[range]:
    size = layer.n // layer.router.groups
    return [range(start, start + size) for start in range(0, layer.n, size)]


def all_subsets(layer: LayerTrace, r: int) -> list[tuple[int, ...]]:
    """Every subset of r experts, as many from each of the router's groups.

    Raises ValueError where r is out of range, or the subsets are too many to try on this many tokens.
    """
    layer.check_size(r)
    groups = _groups(layer)
    count = math.comb(len(groups[0]), r // len(groups)) ** len(groups)
    if count > MAX_SUBSETS or count * len(layer.order) > MAX_ROUTINGS:
        raise ValueError(
            f"{count:.2g} subsets of {r} out of {layer.n} experts on {len(layer.order)} tokens are too many to enumerate "
            f"(at most {MAX_SUBSETS}, and {MAX_ROUTINGS:.0e} routings): use method='greedy'."
        )
    parts = [itertools.combinations(group, r // len(groups)) for group in groups]
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*parts)]


def subset_losses(layer: LayerTrace, r: int) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Every subset of r experts and its reconstruction loss, float64 [subsets] (Eq. 3, the whole landscape).

    Raises ValueError where r is out of range, or the subsets are too many to enumerate.
    """
    subsets = all_subsets(layer, r)
    return subsets, layer.losses(subsets)


def best_subset(layer: LayerTrace, r: int) -> tuple[list[int], float, float]:
    """The subset of r experts with the smallest loss, that loss, and the runner-up's (the same where there is none)."""
    subsets, losses = subset_losses(layer, r)
    best = losses.argsort(stable=True)[:2].tolist()
    return list(subsets[best[0]]), losses[best[0]].item(), losses[best[-1]].item()


# --- scores ---------------------------------------------------------------------------------------------------------


def expert_scores(layer: LayerTrace, kind: str) -> torch.Tensor:
    """How much each expert matters by a score of the field, float64 [n]; 0 for one that no token was routed to.

    "frequency": how often it is chosen (the paper's baseline). "reap": the mean of routing weight times output norm over
    the tokens routed to it (REAP, arXiv 2510.13999). "activation": the mean output norm without the weight.
    """
    if kind == "frequency":
        return selection_frequency(layer)
    chosen = layer.order[:, : layer.k]
    norms = full_gram(layer, layer.k).diagonal(dim1=1, dim2=2).double().clamp(min=0).sqrt()  # [tokens, k]
    values = norms * layer.weights.double() if kind == "reap" else norms
    total = values.new_zeros(layer.n).index_add_(0, chosen.flatten(), values.flatten())
    return total / torch.bincount(chosen.flatten(), minlength=layer.n).clamp(min=1)


def _best_scores(layer: LayerTrace, r: int, scores: torch.Tensor) -> list[int]:
    """The r experts with the highest scores, as many from each group."""
    groups = _groups(layer)
    order = scores.argsort(descending=True, stable=True).tolist()
    return [e for group in groups for e in [e for e in order if e in group][: r // len(groups)]]


# --- greedy removal and swaps ---------------------------------------------------------------------------------------


class Removals:
    """What removing each expert from a kept set would cost, for all tokens, brought up to date after each change.

    A token's loss depends on its k chosen experts and the next in line. Removing an expert touches the tokens that chose
    it alone (and, where a softmax is not renormalised, scales the weights of all). Nothing but the trace is used.
    """

    def __init__(self, layer: LayerTrace):
        (tokens, m), device = layer.order.shape, layer.order.device
        self.layer, self.k = layer, layer.k
        i, j = torch.triu_indices(m, m, device=device)
        self.entry = torch.empty(m, m, dtype=torch.long, device=device)
        self.entry[i, j] = self.entry[j, i] = torch.arange(len(i), device=device)
        scores = _raw_scores(layer)  # [tokens, n]
        self.raw = scores.gather(1, layer.order)  # [tokens, m]: routing weights before they are divided and scaled
        self.parts = scores if layer.router.score == "softmax" and not layer.router.renormalise else None
        self.all = torch.arange(tokens, device=device)
        targets = [_target(layer, self.entry, rows) for rows in self.all.split(ROWS)]
        self.dot, self.norm = (torch.cat(column) for column in zip(*targets, strict=True))  # [tokens, m], [tokens]
        self.kept = torch.ones(layer.n, dtype=torch.bool, device=device)
        self.places = torch.empty(tokens, self.k + 1, dtype=torch.long, device=device)
        self.losses = torch.empty(tokens, self.k + 1, dtype=torch.float64, device=device)
        self._update(self.all)

    def remove(self, expert: int) -> None:
        rows = self._holding(expert)
        self.kept[expert] = False
        self._update(rows)

    def swap(self, back: int, out: int) -> None:
        self.kept[back] = True
        self._update(self._reached(back))
        self.remove(out)

    def costs(self) -> torch.Tensor:
        """The squared loss without each expert, float64 [n]; infinite for those not kept."""
        return self._sum(self.all, self.places, self.losses, self.kept)

    def swap_costs(self, back: int, costs: torch.Tensor) -> torch.Tensor:
        """The squared loss when a removed expert comes back and each other goes, [n], given `costs()`."""
        kept = self.kept.clone()
        kept[back] = True
        rows = self._reached(back)
        after = self._sum(rows, *self._evaluate(rows, kept), kept)
        if self.parts is None:  # the other tokens lose what they did before
            after += costs - self._sum(rows, self.places[rows], self.losses[rows], kept)
        after[back] = float("inf")
        return after

    def _update(self, rows: torch.Tensor) -> None:
        for some in rows.split(ROWS):
            self.places[some], self.losses[some] = self._evaluate(some, self.kept)

    def _evaluate(self, rows: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in `order` of the chosen and the next (m, where none is), and the squared loss without each of them.

        Both [rows, k + 1]; without the next, things are as they are.
        """
        alive, m = kept[self.layer.order[rows]], self.layer.order.shape[1]
        ranks = torch.arange(m, device=alive.device).expand_as(alive)
        places = torch.where(alive, ranks, m).topk(self.k + 1, dim=1, largest=False).values
        inside = places.clamp(max=m - 1)
        x = self.raw[rows].gather(1, inside).masked_fill(places == m, 0.0)
        gram = self._gram(rows, inside)
        pulled = (gram @ x[:, :, None])[:, :, 0]
        square = (x * pulled).sum(1, keepdim=True) - 2 * x * pulled + x * x * gram.diagonal(dim1=1, dim2=2)
        along = x * self.dot[rows].gather(1, inside)
        total = self._total(rows, x, kept) / self.layer.router.scale
        return places, square / total**2 - 2 * (along.sum(1, keepdim=True) - along) / total + self.norm[rows, None]

    def _gram(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        entries = self.entry[places[:, :, None], places[:, None]]
        return self.layer.gram[rows].gather(1, entries.flatten(1)).view(entries.shape).double()

    def _total(self, rows: torch.Tensor, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """What weights are divided by without each of the k + 1: [rows, k + 1]."""
        if self.parts is not None:
            total = (self.parts[rows] * kept).sum(1, keepdim=True)
            return torch.cat([total - x[:, :-1], total], 1)
        router = self.layer.router
        return x.sum(1, keepdim=True) - x + router.eps if router.normalises else torch.ones_like(x)

    def _holding(self, expert: int) -> torch.Tensor:
        """The tokens that have an expert among their k + 1 (all, where it is part of everybody's softmax)."""
        if self.parts is not None:
            return self.all
        inside = self.places.clamp(max=self.layer.order.shape[1] - 1)
        return (self.layer.order.gather(1, inside) == expert).any(1).nonzero()[:, 0]

    def _reached(self, expert: int) -> torch.Tensor:
        """The tokens that would have a removed expert among their k + 1 if it came back (all, as above)."""
        if self.parts is not None:
            return self.all
        better = torch.arange(self.layer.order.shape[1], device=self.places.device) < self.places[:, -1:]
        return ((self.layer.order == expert) & better).any(1).nonzero()[:, 0]

    def _sum(self, rows, places, losses, kept) -> torch.Tensor:
        chosen = self.layer.order[rows].gather(1, places[:, :-1])  # [rows, k]
        change = losses[:, :-1] - losses[:, -1:]
        cost = losses.new_zeros(self.layer.n).index_add_(0, chosen.flatten(), change.flatten())
        if self.parts is not None:
            cost += torch.stack([self._rescaled(s, places[s], kept, chosen[s]) for s in rows.split(ROWS)]).sum(0)
        return (cost + losses[:, -1].sum()).masked_fill(~kept, float("inf"))

    def _rescaled(self, rows, places, kept, chosen) -> torch.Tensor:
        """What removing experts that a token did not choose changes, for it leaves the others a larger share: [n]."""
        x = self.raw[rows].gather(1, places[:, :-1])
        square = (x[:, None] @ self._gram(rows, places[:, :-1]) @ x[:, :, None]).flatten(1)  # [rows, 1]
        along = (x * self.dot[rows].gather(1, places[:, :-1])).sum(1, keepdim=True)
        parts = self.parts[rows] * kept / self.layer.router.scale
        total = parts.sum(1, keepdim=True)
        less = total - parts
        change = square * (less**-2 - total**-2) - 2 * along * (1 / less - 1 / total)
        return change.scatter(1, chosen, 0.0).sum(0)


def _raw_scores(layer: LayerTrace) -> torch.Tensor:
    """Numbers [tokens, n] that routing weights are proportional to, whatever is kept."""
    logits = layer.logits.double()
    if layer.router.score in ("softmax", "softmax of chosen"):
        return (logits - logits.amax(1, keepdim=True)).exp()
    return layer.router.scores(layer.logits).double()


def _target(layer: LayerTrace, entry: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """<f_i, z> [rows, m] and ||z||^2 [rows] of what the output should be."""
    if layer.target_dot is not None:
        return layer.target_dot[rows].double(), layer.target_norm[rows].double()
    weights = layer.weights[rows].double()
    cross = layer.gram[rows][:, entry[: layer.k].flatten()].view(len(rows), layer.k, -1).double()  # [rows, k, m]
    dot = (weights[:, None] @ cross)[:, 0]
    return dot, (weights * dot[:, : layer.k]).sum(1)


def _greedy(layer: LayerTrace, r: int) -> list[int]:
    """Remove the expert whose removal costs least, again and again; then swap a removed for a kept one while it helps."""
    if not layer.router.local or layer.router.score == SPARSEMIXER or layer.router.expert_scale:
        return _greedy_anew(layer, r)
    state = Removals(layer)
    for _ in range(layer.n - r):
        state.remove(int(state.costs().argmin()))
    for _ in range(SWEEPS):
        if not _swap(state):
            break
    return state.kept.nonzero()[:, 0].tolist()


def _swap(state: Removals) -> bool:
    """One sweep over the removed experts, each put in the place where it helps most; whether any did."""
    changed = False
    for back in (~state.kept).nonzero()[:, 0].tolist():
        costs, now = state.costs(), state.losses[:, -1].sum()
        after = state.swap_costs(back, costs)
        if after.min() < now * (1 - 1e-9):
            state.swap(back, int(after.argmin()))
            changed = True
    return changed


def _greedy_anew(layer: LayerTrace, r: int) -> list[int]:
    """The same where removing one expert changes how the others rank: every candidate is routed again.

    Routers with groups have no answer while the groups differ in size: there swaps start from the REAP scores.
    """
    groups, kept = _groups(layer), list(range(layer.n))
    if len(groups) > 1:
        kept = _best_scores(layer, r, expert_scores(layer, "reap"))
    while len(kept) > r:
        without = [[e for e in kept if e != out] for out in kept]
        kept = without[int(layer.losses(without).argmin())]
    now = layer.losses([kept]).item()
    for _ in range(SWEEPS):
        before = now
        for back in set(range(layer.n)) - set(kept):
            group = next(group for group in groups if back in group)
            options = [sorted({*kept, back} - {out}) for out in kept if out in group]
            losses = layer.losses(options)
            if losses.min() < now * (1 - 1e-9):
                kept, now = options[int(losses.argmin())], losses.min().item()
        if now == before:
            break
    return kept


def _random(layer: LayerTrace, r: int, generator: torch.Generator) -> list[int]:
    return _best_scores(layer, r, torch.rand(layer.n, generator=generator))


SCORES = ("frequency", "reap", "activation")
METHODS = ("enumerate", "greedy", *SCORES, "random", "progressive")


def search_layer(
    layer: LayerTrace, r: int, method: str, generator: torch.Generator | None = None
) -> tuple[list[int], float, float | None]:
    """The r experts to keep in one layer, their loss, and the runner-up's where all subsets were tried.

    Raises ValueError for r out of range and an unknown method.
    """
    layer.check_size(r)
    if method == "enumerate":
        return best_subset(layer, r)
    if method == "greedy":
        kept = _greedy(layer, r)
    elif method in SCORES:
        kept = _best_scores(layer, r, expert_scores(layer, method))
    else:
        kept = _random(layer, r, generator or torch.Generator().manual_seed(0))
    return sorted(kept), reconstruction_loss(layer, kept), None


def check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}: choose from {', '.join(METHODS)}.")


def search_experts(
    trace: Trace, r: int, *, method: str = "enumerate", model=None, tokens: torch.Tensor | None = None, seed: int = 0
) -> PruningPlan:
    """Choose r experts to keep in every layer.

    method: "enumerate" (Eq. 3, exact, layer by layer), "greedy" (removal one by one, then swaps: for more experts than
    can be enumerated), "progressive" (Table 6: each layer is searched on what the already pruned layers feed it; needs
    `model` and the `tokens` of the trace), the scores of `expert_scores` ("frequency", "reap", "activation"), "random"
    (drawn from `seed`). Raises ValueError for r out of range, an unknown method, or a model that is not the trace's.
    """
    check_method(method)
    for layer in trace.layers:
        layer.check_size(r)
    if method == "progressive":
        return _progressive_plan(trace, r, model, tokens)
    generator = torch.Generator().manual_seed(seed)
    layers = tqdm(trace.layers, desc=method, unit="layer", leave=False)
    return make_plan(method, r, [search_layer(layer, r, method, generator) for layer in layers], trace.model, trace.tokens)


def make_plan(
    method: str, r: int, found: Sequence[tuple[list[int], float, float | None]], model: str, tokens: str
) -> PruningPlan:
    """A plan of what `search_layer` found for each layer."""
    kept, losses, runner_up = (list(column) for column in zip(*found, strict=True))
    return PruningPlan(method, r, kept, losses, model, tokens, None if None in runner_up else runner_up)


# --- progressive search ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _progressive_plan(trace: Trace, r: int, model, tokens: torch.Tensor | None) -> PruningPlan:
    if model is None or tokens is None:
        raise ValueError("method='progressive' runs the model again: pass model= and the tokens= of the trace.")
    check_fingerprint(model, trace.model, "trace")
    check_tokens(model, tokens)
    if tokens_digest(tokens) != trace.tokens:
        raise ValueError("These are not the tokens the trace was made from: pass the same calibration set.")
    walk = _Walk(model, tokens)
    by_block = {id(layer.block): layer for layer in moe_layers(model)}
    found = []
    for decoder in tqdm(decoder_layers(model), desc="progressive", unit="layer", leave=False):
        layer = next((by_block[id(m)] for m in decoder.modules() if id(m) in by_block), None)
        found += walk.through(decoder, layer, r)
    return make_plan("progressive", r, found, trace.model, trace.tokens)


class _Walk:
    """Two streams of hidden states through the decoder: the original model's, and that of the layers pruned so far."""

    def __init__(self, model, tokens: torch.Tensor, batch_size: int = 8):
        self.model = model
        self.original, self.arguments = [], []
        for batch in tokens.split(batch_size):
            hidden_states, arguments = _layer_inputs(model, batch.to(model.device))
            self.original.append(hidden_states)
            self.arguments.append(arguments)
        self.pruned = list(self.original)
        self.depth = 0
        self.scratch = Scratch()

    def _advance(self, decoder: nn.Module, stream: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = [decoder(h, **a[self.depth]) for h, a in zip(stream, self.arguments, strict=True)]
        return [o[0] if isinstance(o, tuple) else o for o in outputs]

    def through(self, decoder: nn.Module, layer: MoELayer | None, r: int) -> list[tuple[list[int], float, float]]:
        """Both streams past one decoder layer; what was found for it, or nothing where it has no experts."""
        with _outputs(layer) as targets:
            original = self._advance(decoder, self.original)
        found = []
        if layer is None:
            self.pruned = self._advance(decoder, self.pruned)
        else:
            recorder = Recorder(layer, r, CHUNK_TOKENS, self.scratch, iter(self._without_rest(decoder, layer, targets)))
            with recording(self.model, [recorder]):
                self._advance(decoder, self.pruned)
            found = [best_subset(recorder.finish(), r)]
            with masked_layer(layer, found[0][0]):
                self.pruned = self._advance(decoder, self.pruned)
        self.original = original
        self.depth += 1
        return found

    def _without_rest(self, decoder: nn.Module, layer: MoELayer, targets: list[torch.Tensor]) -> list[torch.Tensor]:
        """The part of each target that experts must make up for: all but what shared experts add on the pruned stream."""
        if not (layer.linear and layer.shared):
            return targets
        with _outputs(layer) as rests, silenced(layer):
            self._advance(decoder, self.pruned)
        return [target - rest for target, rest in zip(targets, rests, strict=True)]


@contextmanager
def _outputs(layer: MoELayer | None) -> Iterator[list[torch.Tensor]]:
    """A list that collects what the layer's block (or its experts, see `MoELayer.linear`) gives out, [tokens, d] a call."""
    collected: list[torch.Tensor] = []
    if layer is None:
        yield collected
        return
    source = layer.block if layer.linear else layer.experts
    hook = source.register_forward_hook(lambda module, inputs, out: collected.append(out.flatten(0, -2)))
    try:
        yield collected
    finally:
        hook.remove()


def _layer_inputs(model, batch: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
    """The hidden states entering the first decoder layer, and the other arguments each layer is called with."""
    calls = []

    def note(_module, args, kwargs):
        calls.append((args[0] if args else kwargs["hidden_states"], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder_layers(model)]
    try:
        model.base_model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls[0][0], [kwargs for _, kwargs in calls]
