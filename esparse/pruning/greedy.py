"""Greedy removal of experts with swaps, for layers with too many subsets to try."""

import math
from collections.abc import Sequence
from dataclasses import replace

from ..moe.routers import SPARSEMIXER
from ..tracing.losses import losses_of
from ..tracing.removals import GroupRemovals, Removals
from ..tracing.trace import LayerTrace
from .scores import best_by_score, expert_groups, expert_scores, ranked

SWEEPS = 20  # at most
MAX_PAIRS = 28  # of removed experts, up to which two are exchanged at once


def remove_greedily(layer: LayerTrace, r: int) -> list[int]:
    """Remove the expert whose removal costs least, again and again, then swap a removed for a kept one while that helps. Where
    few are removed, also exchange two for two, and start from the REAP scores as well.

    Groups must keep equally many experts: the search starts from the REAP scores and swaps within groups."""
    if r == layer.n:
        return list(range(r))
    if not _keeps_ranks(layer):
        return remove_greedily_anew(layer, r)
    if layer.router.groups > 1:
        return _exchanged(GroupRemovals(layer, best_by_score(layer, r, expert_scores(layer, "reap"))), False)[1]
    state = Removals(layer)
    for _ in range(layer.n - r):
        state.change(int(state.costs().argmin()))
    few = math.comb(layer.n - r, 2) <= MAX_PAIRS
    found = _exchanged(state, few)
    if few:
        other = Removals(layer, best_by_score(layer, r, expert_scores(layer, "reap")))
        found = min(found, _exchanged(other, few, found[1]))
    return found[1]


def _keeps_ranks(layer: LayerTrace) -> bool:
    """Whether `Removals` or `GroupRemovals` can compute the losses: removing experts leaves the ranking of the others within
    the same groups unchanged, and nobody is chosen outside the best groups."""
    router = layer.router
    if not replace(router, groups=1).keeps_ranking or router.extra_logits or router.score == SPARSEMIXER or router.expert_scale:
        return False
    return not router.zero_fill or not layer.sum_over_ranks((router.ungrouped(layer.logits) <= 0).sum())


def _exchanged(state: Removals, pairs: bool, known: Sequence[int] = ()) -> tuple[float, list[int]]:
    """The squared loss and the experts when no swap (and, if `pairs`, no exchange of two for two) helps any more. known:
    experts of which that is known."""
    useless = set()
    for _ in range(SWEEPS):
        if _swap(state, useless):
            continue
        better = _swap_pair(state) if pairs and state.kept.nonzero()[:, 0].tolist() != known else None
        if better is None:
            break
        state, useless = better, set()
    return state.loss(), state.kept.nonzero()[:, 0].tolist()


def _swap(state: Removals, useless: set[int]) -> bool:
    """One sweep over the removed experts, each swapped in where that helps most; returns whether any swap did. useless: those
    known not to help since the last swap, updated."""
    changed = False
    for back in (~state.kept).nonzero()[:, 0].tolist():
        if back in useless:
            continue
        costs = state.swap_costs(back)
        if costs.min() < state.loss() * (1 - 1e-9):
            state.change(back)
            state.change(int(costs.argmin()))
            useless.clear()
            changed = True
        else:
            useless.add(back)
    return changed


def _swap_pair(state: Removals) -> Removals | None:
    """The state after the first exchange of two removed experts, for the two that then cost least, that helps; else None."""
    loss, removed = state.loss(), (~state.kept).nonzero()[:, 0].tolist()
    for place, back in enumerate(removed):
        one = state.copy()
        one.change(back)
        for other in removed[place + 1 :]:
            costs = one.swap_costs(other)
            out = int(costs.argmin())
            if out == back or costs[out] >= one.loss():  # `back` or `other` goes first: that is a swap, and none helps
                continue
            trial = one.copy()
            trial.change(other)
            trial.change(out)
            costs = trial.costs()
            if costs.min() < loss * (1 - 1e-9):
                trial.change(int(costs.argmin()))
                return trial
    return None


def remove_greedily_anew(layer: LayerTrace, r: int) -> list[int]:
    """`remove_greedily` where removing an expert changes the ranking of the others: every candidate is routed again."""
    groups, kept = expert_groups(layer), list(range(layer.n))
    if len(groups) > 1:
        kept = best_by_score(layer, r, expert_scores(layer, "reap"))
    while len(kept) > r:
        without = [[e for e in kept if e != out] for out in kept]
        kept = without[ranked(losses_of(layer, without))[0]]
    now = losses_of(layer, [kept]).item()
    for _ in range(SWEEPS):
        before = now
        for back in set(range(layer.n)) - set(kept):
            group = next(group for group in groups if back in group)
            options = [sorted({*kept, back} - {out}) for out in kept if out in group]
            losses = losses_of(layer, options)
            best = ranked(losses)[0]
            if losses[best] < now * (1 - 1e-6):  # more than the rounding of float32
                kept, now = options[best], losses[best].item()
        if now == before:
            break
    return kept
