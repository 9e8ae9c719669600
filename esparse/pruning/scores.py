"""Scores of single experts, and the ranking of losses."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..tracing.losses import full_gram
from ..tracing.statistics import selection_frequency
from ..tracing.trace import LayerTrace

ROUNDING = 2**-23  # of sums of float32 products, relative to a layer's largest squared loss


def expert_groups(layer: LayerTrace) -> list[range]:
    size = layer.n // layer.router.groups
    return [range(start, start + size) for start in range(0, layer.n, size)]


def ranked(losses: Tensor) -> Tensor:
    """The indices of a layer's losses [subsets] by rising loss. Losses that differ by rounding alone keep their order, so that
    every machine ranks them alike."""
    squares, order = losses.square().sort(stable=True)
    apart = torch.cat([squares.new_zeros(1), squares.diff()]) > ROUNDING * squares[-1]
    return order[(apart.cumsum(0) * len(order) + order).argsort()]


def expert_scores(layer: LayerTrace, kind: str) -> Tensor:
    """A score of each expert, float64 [n]; 0 for an expert without tokens. kind: one of `EXPERT_SCORES`, else ValueError.

    "frequency": the share of tokens that choose it (the paper's baseline). "reap": the mean of routing weight times
    output norm over its tokens (REAP, arXiv 2510.13999). "activation": the mean output norm without the weight.
    """
    if kind not in EXPERT_SCORES:
        raise ValueError(f"Unknown score {kind!r}: choose from {', '.join(EXPERT_SCORES)}.")
    return EXPERT_SCORES[kind](layer)


def _reap(layer: LayerTrace) -> Tensor:
    return _mean_norm(layer, layer.weights.double())


def _activation(layer: LayerTrace) -> Tensor:
    return _mean_norm(layer, 1.0)


def _mean_norm(layer: LayerTrace, factors: Tensor | float) -> Tensor:
    """The mean of ||f_i|| times factors [tokens, k] over the tokens that chose each expert, float64 [n]."""
    values = full_gram(layer, layer.k).diagonal(dim1=1, dim2=2).double().clamp(min=0).sqrt() * factors
    chosen = layer.order[:, : layer.k].flatten()
    total = values.new_zeros(layer.n + 1).index_add_(0, chosen, values.flatten())
    counts = torch.bincount(chosen, minlength=layer.n + 1)
    return (layer.sum_over_ranks(total) / layer.sum_over_ranks(counts).clamp(min=1))[: layer.n]


# A new score is a function here; the searches, the command line and the explorer take its name from this table.
EXPERT_SCORES: dict[str, Callable[[LayerTrace], Tensor]] = {
    "frequency": selection_frequency,
    "reap": _reap,
    "activation": _activation,
}


def best_by_score(layer: LayerTrace, r: int, scores: Tensor) -> list[int]:
    """The r experts with the highest scores, equally many from each group."""
    groups = expert_groups(layer)
    order = scores.argsort(descending=True, stable=True).tolist()
    return [e for group in groups for e in [e for e in order if e in group][: r // len(groups)]]
