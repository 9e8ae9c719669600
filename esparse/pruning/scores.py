"""Scores of single experts, and the ranking of losses."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..tracing.losses import full_gram, targets
from ..tracing.statistics import selection_frequency
from ..tracing.trace import LayerTrace, Trace

ROUNDING = 2**-23  # of sums of float32 products, relative to a layer's largest squared loss


def expert_groups(layer: LayerTrace) -> list[range]:
    size = layer.n // layer.router.groups
    return [range(start, start + size) for start in range(0, layer.n, size)]


def ranked(losses: Tensor) -> Tensor:
    """The indices of a layer's losses [..., subsets] by rising loss. Losses that differ by rounding alone keep their order, so
    that every machine ranks them alike."""
    squares, order = losses.square().sort(stable=True)
    apart = squares.diff(prepend=squares[..., :1]) > ROUNDING * squares[..., -1:]
    return order.gather(-1, (apart.cumsum(-1) * order.shape[-1] + order).argsort())


def expert_scores(layer: LayerTrace, kind: str) -> Tensor:
    """A score of each expert, float64 [n]; 0 for an expert without tokens. kind: one of `EXPERT_SCORES`, else ValueError.

    "frequency": the share of tokens that choose it (the paper's baseline). "reap": the mean of routing weight times
    output norm over its tokens (REAP, arXiv 2510.13999). "activation": the mean output norm without the weight.
    "contribution": the sum, not the mean, of what "reap" averages. "easy-ep": that sum with each token's share weighed by
    1 - cos(h, h + z), how much the layer turns the residual stream (EASY-EP, arXiv 2504.06792, which leaves shared experts
    out of z; here they are in it). "cosine": the sum over its tokens of 1 - cos(z, z - w_i f_i), how much the layer's
    output z turns without it. Raises ValueError where the trace does not hold what the score needs.
    """
    if kind not in EXPERT_SCORES:
        raise ValueError(f"Unknown score {kind!r}: choose from {', '.join(EXPERT_SCORES)}.")
    return EXPERT_SCORES[kind](layer)


def _reap(layer: LayerTrace) -> Tensor:
    return _contribution(layer) / _tokens_of(layer)


def _activation(layer: LayerTrace) -> Tensor:
    return _sum_over_tokens(layer, _norms(layer)) / _tokens_of(layer)


def _contribution(layer: LayerTrace) -> Tensor:
    return _sum_over_tokens(layer, _norms(layer) * layer.weights.double())


def _easy_ep(layer: LayerTrace) -> Tensor:
    if layer.stream_cosine is None:
        raise ValueError(f"{layer.name}: this trace lacks the residual stream before the block, which easy-ep needs.")
    turned = (1 - layer.stream_cosine.double()).clamp(min=0)
    return _sum_over_tokens(layer, turned[:, None] * _norms(layer) * layer.weights.double())


def _cosine(layer: LayerTrace) -> Tensor:
    along, square = (product.view(len(product), -1) / layer.token_counts[:, None] for product in targets(layer))
    weights, along = layer.weights.double(), along[:, : layer.k]
    rest = (square - 2 * weights * along + (weights * _norms(layer)).square()).clamp(min=0)  # ||z - w f||^2
    norms = (square * rest).sqrt()
    return _sum_over_tokens(layer, 1 - torch.where(norms > 0, (square - weights * along) / norms, 0.0))


def _norms(layer: LayerTrace) -> Tensor:
    """||f_i|| of each token's chosen experts, float64 [tokens, k]."""
    squares = full_gram(layer, layer.k).diagonal(dim1=1, dim2=2).double() / layer.token_counts[:, None]
    return squares.clamp(min=0).sqrt()


def _sum_over_tokens(layer: LayerTrace, values: Tensor) -> Tensor:
    """The sum of values [tokens, k] of each token's chosen experts by expert, float64 [n]."""
    values = values * layer.token_counts[:, None]
    total = values.new_zeros(layer.n + 1).index_add_(0, layer.order[:, : layer.k].flatten(), values.flatten())
    return layer.sum_over_ranks(total)[: layer.n]


def _tokens_of(layer: LayerTrace) -> Tensor:
    """How many tokens chose each expert, float64 [n]; 1 where none did."""
    counts = _sum_over_tokens(layer, torch.ones_like(layer.weights, dtype=torch.float64))
    return counts.where(counts > 0, 1.0)


# A new score is a function here; the searches, the command line and the explorer take its name from this table.
EXPERT_SCORES: dict[str, Callable[[LayerTrace], Tensor]] = {
    "frequency": selection_frequency,
    "reap": _reap,
    "activation": _activation,
    "contribution": _contribution,
    "easy-ep": _easy_ep,
    "cosine": _cosine,
}


def super_experts(trace: Trace) -> list[list[int]]:
    """The experts of each layer whose largest output norm is above the 99.5th percentile over all experts of the model, and
    above a tenth of the largest. (Su et al., arXiv 2507.23279, take the largest entry instead of the norm.)"""
    largest = []
    for layer in trace.layers:
        chosen = layer.over_ranks(layer.order[:, : layer.k]).flatten()
        norms = layer.over_ranks(_norms(layer)).flatten()
        found = norms.new_zeros(layer.n + 1).scatter_reduce_(0, chosen, norms, "amax")
        largest.append(found[: layer.n].cpu())
    every = torch.cat(largest)
    bound = max(every.quantile(0.995).item(), every.max().item() / 10)
    return [(norms > bound).nonzero()[:, 0].tolist() for norms in largest]


def available_scores(trace: Trace) -> list[str]:
    """The scores that this trace can answer: "easy-ep" needs the residual stream before each block."""
    turned = all(layer.stream_cosine is not None for layer in trace.layers)
    return [name for name in EXPERT_SCORES if turned or name != "easy-ep"]


def best_by_score(layer: LayerTrace, r: int, scores: Tensor) -> list[int]:
    """The r experts with the highest scores, equally many from each group."""
    groups = expert_groups(layer)
    order = scores.argsort(descending=True, stable=True).tolist()
    return [e for group in groups for e in [e for e in order if e in group][: r // len(groups)]]
