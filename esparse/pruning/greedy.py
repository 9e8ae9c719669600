"""Greedy removal of experts with swaps, for layers with too many subsets to try."""

import itertools
import math

from ..moe.routers import SPARSEMIXER
from ..tracing.losses import losses_of
from ..tracing.removals import Removals
from ..tracing.trace import LayerTrace
from .scores import best_by_score, expert_groups, expert_scores, ranked

SWEEPS = 20  # at most
MAX_PAIRS = 28  # of removed experts, up to which two are exchanged at once


def remove_greedily(layer: LayerTrace, r: int) -> list[int]:
    """Remove the expert whose removal costs least, again and again, then swap a removed for a kept one while that helps. Where
    few are removed, also exchange two for two, and start from the REAP scores as well."""
    router = layer.router
    if r == layer.n:
        return list(range(r))
    if not router.keeps_ranking or router.extra_logits or router.score == SPARSEMIXER or router.expert_scale:
        return remove_greedily_anew(layer, r)
    state = Removals(layer)
    for _ in range(layer.n - r):
        state.remove(int(state.costs().argmin()))
    few = math.comb(layer.n - r, 2) <= MAX_PAIRS
    found = [_exchanged(state, few)]
    if few:
        found.append(_exchanged(Removals(layer, best_by_score(layer, r, expert_scores(layer, "reap"))), few))
    return min(found)[1]


def _exchanged(state: Removals, pairs: bool) -> tuple[float, list[int]]:
    """The squared loss and the experts when no swap (and, if `pairs`, no exchange of two for two) helps any more."""
    for _ in range(SWEEPS):
        if _swap(state):
            continue
        better = _swap_pair(state) if pairs else None
        if better is None:
            break
        state = better
    return state.loss(), state.kept.nonzero()[:, 0].tolist()


def _swap(state: Removals) -> bool:
    """One sweep over the removed experts, each swapped in where that helps most; returns whether any swap did."""
    changed = False
    for back in (~state.kept).nonzero()[:, 0].tolist():
        costs = state.swap_costs(back)
        if costs.min() < state.loss() * (1 - 1e-9):
            state.add(back)
            state.remove(int(costs.argmin()))
            changed = True
    return changed


def _swap_pair(state: Removals) -> Removals | None:
    """The state after the first exchange of two removed experts, for the two that then cost least, that helps; else None."""
    loss = state.loss()
    for pair in itertools.combinations((~state.kept).nonzero()[:, 0].tolist(), 2):
        trial = state.copy()
        for back in pair:
            trial.add(back)
        for _ in pair:
            trial.remove(int(trial.costs().argmin()))
        if trial.loss() < loss * (1 - 1e-9):
            return trial
    return None


def remove_greedily_anew(layer: LayerTrace, r: int) -> list[int]:
    """`remove_greedily` where removing an expert changes the ranking of the others: every candidate is routed again. Groups
    must keep equally many experts: the search starts from the REAP scores and swaps within groups."""
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
