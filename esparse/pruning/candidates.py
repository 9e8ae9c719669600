"""Candidates for the experts of each layer: the best subsets of every method under every loss."""

import itertools
from collections.abc import Sequence

from ..tracing.losses import LOSSES, weighed
from ..tracing.trace import LayerTrace, Trace
from .scores import available_scores, ranked
from .search import affordable, choose_experts, subset_losses

Kept = tuple[int, ...]  # the experts that one layer keeps


def ranked_subsets(trace: Trace, r: int, count: int) -> list[dict[str, list[Kept]]]:
    """For each layer, subsets of r experts, best first, by method and loss ("enumerate, residual"): the `count` best by
    enumeration, and one by each score. Where to enumerate all layers under all losses is more work than one layer may be, one
    subset by greedy removal takes their place. r must be in range."""
    searches = len(trace.layers) * len(LOSSES)
    search = "enumerate" if all(affordable(layer, r, searches) for layer in trace.layers) else "greedy"
    methods = list(itertools.product((search, *available_scores(trace)), LOSSES))
    return [{", ".join(key): _ranked(layer, r, *key, count) for key in methods} for layer in trace.layers]


def _ranked(layer: LayerTrace, r: int, method: str, loss: str, count: int) -> list[Kept]:
    layer = weighed(layer, loss)
    if method != "enumerate":
        return [tuple(choose_experts(layer, r, method))]
    subsets, losses = subset_losses(layer, r)
    return [subsets[i] for i in ranked(losses)[: max(1, count)].tolist()]


def in_turn(sources: Sequence[Sequence[Kept]], count: int) -> list[Kept]:
    """Every source's first subset, then every source's second and so on, without repeats: `count` of them, or all first ones
    where these are more."""
    merged = dict.fromkeys(subset for row in itertools.zip_longest(*sources) for subset in row if subset)
    return list(merged)[: max(count, len({source[0] for source in sources}))]
