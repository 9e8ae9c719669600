"""Choosing the experts to keep (Section 3.2): every subset where that is affordable, greedy removal with swaps beyond."""

import itertools
import math
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from .models import check_fingerprint, check_tokens, decoder_layers
from .pruning import PruningPlan
from .routers import SPARSEMIXER
from .traces import LayerTrace, Trace, full_gram, part, reconstruction_loss, selection_frequency, tokens_digest
from .walk import Walk

MAX_SUBSETS = 200_000
MAX_TABLE = 2**24  # sums held at once, 128 MiB
FAR = 60.0  # between logits, whose softmax float32 still holds to its last digits
ROUNDING = 2**-23  # of a layer's largest squared loss: what sums of float32 products leave undecided
MAX_ROUTINGS = 5e9  # subsets times tokens: some ten minutes a layer on two cores
SWEEPS = 20  # at most, over the removed experts
MAX_PAIRS = 28  # of removed experts, up to which two are exchanged at once
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
    if count > MAX_SUBSETS or (count * len(layer.order) > MAX_ROUTINGS and not _by_choice(layer)):
        raise ValueError(
            f"{count:.2g} subsets of {r} out of {layer.n} experts on {len(layer.order)} tokens are too many to enumerate: "
            f"use method='greedy' (up to {MAX_SUBSETS:,} subsets, and {MAX_ROUTINGS:.0e} subsets times tokens, are tried)."
        )
    parts = [itertools.combinations(group, r // len(groups)) for group in groups]
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*parts)]


def subset_losses(layer: LayerTrace, r: int) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Every subset of r experts and its reconstruction loss, float64 [subsets] (Eq. 3, the whole landscape).

    Raises ValueError where r is out of range, or the subsets are too many to enumerate.
    """
    subsets = all_subsets(layer, r)
    return subsets, _losses_by_choice(layer, subsets) if _by_choice(layer) else layer.losses(subsets)


def _by_choice(layer: LayerTrace) -> bool:
    """Whether `_losses_by_choice` gives this layer's losses, in little memory."""
    # Among r experts and among all n a float32 softmax rounds differently, by 1e-7: nothing beside such a Gram.
    rounded = torch.float32 if layer.router.wide else layer.logits.dtype
    exact = layer.router.score != "softmax" or (layer.gram.dtype, rounded) == (torch.float32, torch.float32)
    return layer.router.by_choice and exact and math.comb(layer.n, layer.k) << layer.n <= MAX_TABLE


def _losses_by_choice(layer: LayerTrace, subsets: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """`LayerTrace.losses` of all subsets of one size, from what each choice that a token can make would cost it.

    A token chooses the experts c under every subset that holds c and lacks those it ranks between them. Its loss goes to
    one place of a table [choices, removed experts as bits], whose sums over subsets of the removed ones are the losses:
    work for tokens times choices (15 for k = 2 and r = 4 of 8), not for tokens times subsets (70).
    """
    n, k, m, device = layer.n, layer.k, layer.order.shape[1], layer.order.device
    combinations = lambda size: torch.tensor(list(itertools.combinations(range(size), k)), device=device)  # noqa: E731
    number = torch.zeros(1 << n, dtype=torch.long, device=device)  # of a choice, by its bits
    number[(1 << combinations(n)).sum(1)] = torch.arange(math.comb(n, k), device=device)
    table, ranks = torch.zeros(math.comb(n, k) << n, dtype=torch.float64, device=device), combinations(m)
    for tokens in torch.arange(len(layer.order), device=device).split(max(1, 4 * ROWS // len(ranks))):
        some = part(layer, tokens)
        chosen = some.order[:, ranks]  # [tokens, choices, k]
        losses = some.token_losses(ranks.expand_as(chosen), _weights_of(some, chosen))
        bits = (1 << chosen).sum(2)
        passed = (1 << some.order).cumsum(1)[:, ranks[:, -1]] - bits
        table.index_add_(0, ((number[bits] << n) + passed).flatten(), losses.double().flatten())
    table = layer.together(table)
    for bit in range(n):
        without, also = table.view(-1, 2, 1 << bit).unbind(1)
        also += without
    kept = torch.tensor(subsets, device=device)
    removed = (1 << n) - 1 - (1 << kept).sum(1, keepdim=True)
    chosen = number[(1 << kept[:, combinations(kept.shape[1])]).sum(2)]  # [subsets, choices]
    return table[(chosen << n) + removed].sum(1).clamp(min=0).sqrt()


def _weights_of(layer: LayerTrace, chosen: torch.Tensor) -> torch.Tensor:
    """Routing weights [tokens, choices, k] if these are all that is left to a token."""
    weights = layer.router.weights(layer.logits, chosen)
    spread = layer.logits.amax(1) - layer.logits.amin(1)
    if layer.router.score == "softmax" and (far := spread > FAR).any():  # both would round to 0 beside the largest
        weights = torch.where(far[:, None, None], layer.router.of_chosen.weights(layer.logits, chosen), weights)
    return weights


def ranked(losses: torch.Tensor) -> torch.Tensor:
    """The indices of a layer's losses [subsets] by rising loss; those that rounding alone tells apart keep their order, so
    that every machine ranks them alike."""
    squares, order = losses.square().sort(stable=True)
    apart = torch.cat([squares.new_zeros(1), squares.diff()]) > ROUNDING * squares[-1]
    return order[(apart.cumsum(0) * len(order) + order).argsort()]


def best_subset(layer: LayerTrace, r: int) -> tuple[list[int], float, float]:
    """The subset of r experts with the smallest loss, that loss, and the runner-up's (the same where there is none)."""
    subsets, losses = subset_losses(layer, r)
    first = [subsets[i] for i in ranked(losses)[:2].tolist()]
    found = [reconstruction_loss(layer, subset) for subset in first]  # what is said of every plan, however it was found
    return list(first[0]), found[0], max(found)


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
    total = values.new_zeros(layer.n + 1).index_add_(0, chosen.flatten(), values.flatten())[: layer.n]
    counts = torch.bincount(chosen.flatten(), minlength=layer.n)[: layer.n]
    return layer.together(total) / layer.together(counts).clamp(min=1)


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

    def add(self, expert: int) -> None:
        self.kept[expert] = True
        self._update(self._reached(expert))

    def restart(self, kept: Sequence[int]) -> None:
        """Go on from these experts."""
        self.kept[:] = False
        self.kept[torch.tensor(kept, device=self.kept.device)] = True
        self._update(self.all)

    def loss(self) -> float:
        """The squared loss as things are."""
        return self.layer.together(self.losses[:, -1].sum()).item()

    def costs(self) -> torch.Tensor:
        """The squared loss without each expert, float64 [n]; infinite for those not kept."""
        return self.layer.together(self._without()).masked_fill(~self.kept, float("inf"))

    def swap_costs(self, back: int) -> torch.Tensor:
        """The squared loss when a removed expert comes back and each other goes, float64 [n]; infinite for those not kept."""
        kept = self.kept.clone()
        kept[back] = True
        rows = self._reached(back)
        costs = self._sum(rows, *self._evaluate(rows, kept), kept)
        if self.parts is None:  # the other tokens lose what they would have lost before
            costs += self._without() - self._sum(rows, self.places[rows], self.losses[rows], self.kept)
        return self.layer.together(costs).masked_fill(~self.kept, float("inf"))

    def _without(self) -> torch.Tensor:
        if self.sums is None:
            self.sums = self._sum(self.all, self.places, self.losses, self.kept)
        return self.sums.clone()

    def _update(self, rows: torch.Tensor) -> None:
        self.sums = None
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
            cost += sum(
                self._rescaled(*some, kept) for some in zip(*(x.split(ROWS) for x in (rows, places, chosen)), strict=True)
            )
        return cost + losses[:, -1].sum()

    def _rescaled(self, rows, places, chosen, kept) -> torch.Tensor:
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
    """Remove the expert whose removal costs least, again and again, then swap a removed for a kept one while that helps.

    Where few are removed, that is cheap enough to do more: exchange two for two, and start from the REAP scores as well.
    """
    router = layer.router
    if r == layer.n:  # nothing to remove, and no next expert in line
        return list(range(r))
    if not router.local or router.beside or router.score == SPARSEMIXER or router.expert_scale:
        return _greedy_anew(layer, r)
    state = Removals(layer)
    for _ in range(layer.n - r):
        state.remove(int(state.costs().argmin()))
    few = math.comb(layer.n - r, 2) <= MAX_PAIRS
    found = _exchanged(state, few)
    if not few:
        return found[1]
    state.restart(_best_scores(layer, r, expert_scores(layer, "reap")))
    return min(found, _exchanged(state, few))[1]


def _exchanged(state: Removals, pairs: bool) -> tuple[float, list[int]]:
    """The squared loss and the experts once no swap helps, nor, with `pairs`, an exchange of two for two."""
    for _ in range(SWEEPS):
        if not (_swap(state) or (pairs and _swap_pair(state))):
            break
    return state.loss(), state.kept.nonzero()[:, 0].tolist()


def _swap(state: Removals) -> bool:
    """One sweep over the removed experts, each put in the place where it helps most; whether any did."""
    changed = False
    for back in (~state.kept).nonzero()[:, 0].tolist():
        costs = state.swap_costs(back)
        if costs.min() < state.loss() * (1 - 1e-9):
            state.add(back)
            state.remove(int(costs.argmin()))
            changed = True
    return changed


def _swap_pair(state: Removals) -> bool:
    """Two removed experts come back and the two that then cost least go; whether that helped for some pair."""
    removed = (~state.kept).nonzero()[:, 0].tolist()
    before = state.loss(), state.kept, state.places, state.losses
    for pair in itertools.combinations(removed, 2):
        state.kept, state.places, state.losses = (held.clone() for held in before[1:])
        for back in pair:
            state.add(back)
        for _ in pair:
            state.remove(int(state.costs().argmin()))
        if state.loss() < before[0] * (1 - 1e-9):
            return True
    _, state.kept, state.places, state.losses = before
    state.sums = None
    return False


def _greedy_anew(layer: LayerTrace, r: int) -> list[int]:
    """The same where removing one expert changes how the others rank: every candidate is routed again.

    Routers with groups have no answer while the groups differ in size: there swaps start from the REAP scores.
    """
    groups, kept = _groups(layer), list(range(layer.n))
    if len(groups) > 1:
        kept = _best_scores(layer, r, expert_scores(layer, "reap"))
    while len(kept) > r:
        without = [[e for e in kept if e != out] for out in kept]
        kept = without[ranked(layer.losses(without))[0]]
    now = layer.losses([kept]).item()
    for _ in range(SWEEPS):
        before = now
        for back in set(range(layer.n)) - set(kept):
            group = next(group for group in groups if back in group)
            options = [sorted({*kept, back} - {out}) for out in kept if out in group]
            losses = layer.losses(options)
            best = ranked(losses)[0]
            if losses[best] < now * (1 - 1e-6):  # more than float32 rounds when options are fewer or more
                kept, now = options[best], losses[best].item()
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
    walk, found = Walk(model, tokens, progressive=True), []
    for number in tqdm(range(len(decoder_layers(model))), desc="progressive", unit="layer", leave=False):
        traced = walk.trace_layer(number, r)
        if traced is not None:
            found.append(best_subset(traced, r))
            walk.follow(number, found[-1][0])
    return make_plan("progressive", r, found, trace.model, trace.tokens)
