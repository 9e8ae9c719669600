"""Statistics of router logits alone: frequencies, betas, shares of dropped pairs."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..moe.routers import skip_ratios
from .trace import LayerTrace, Trace, check_beta

NEGLIGIBLE = 0.01  # of the first expert's weight
ROUNDING = 1e-6  # between two ratios, whose order may differ between machines
ABOVE = 1 + 2**-20  # this times the largest ratio is a beta that drops every pair, in float32 too


def median_betas(trace: Trace, kept: Sequence[Sequence[int]] | None = None) -> list[float]:
    """The median over tokens and droppable pairs of rho, one per MoE layer (Section 3.3 and A.7).

    kept: one subset a layer, for a model pruned to it (on the full model's hidden states). Warns as `nearly_top1` does.
    """
    subsets = kept if kept is not None else [None] * len(trace.layers)
    if len(subsets) != len(trace.layers):
        raise ValueError(f"Got kept experts for {len(subsets)} layers, but the trace has {len(trace.layers)}.")
    found = [median_ratios(layer, subset) for layer, subset in zip(trace.layers, subsets, strict=True)]
    if warning := nearly_top1([after_first for _, after_first in found]):
        warnings.warn(warning, stacklevel=2)
    return [beta for beta, _ in found]


def median_ratios(layer: LayerTrace, kept: Sequence[int] | None = None) -> tuple[float, float]:
    """The median of rho over all droppable pairs, and over the second pairs alone: there rho is the weight of all experts
    after the first, divided by the first's. For k = 2 both are equal."""
    check_beta(0.0, layer.k)
    ratios = skip_ratios(layer.choice(kept)[1]).double()
    beta = _median(layer.over_ranks(ratios.flatten()))
    return beta, beta if layer.k == 2 else _median(layer.over_ranks(ratios[:, 0]))


def _median(values: Tensor) -> float:
    values = values.sort().values
    return ((values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2).item()


def nearly_top1(after_first: Sequence[float]) -> str | None:
    """A warning if, in any layer, all experts after the first together carry less than `NEGLIGIBLE` of the first's weight for
    half of the tokens or more, else None; after_first: the second value of `median_ratios`, for each layer."""
    few = sum(ratio < NEGLIGIBLE for ratio in after_first)
    if not few:
        return None
    return (
        f"In {few} of {len(after_first)} MoE layers the experts after the first carry less than {NEGLIGIBLE:.0%} of its weight "
        "for most tokens: there skipping cannot be told from top-1 routing, and betas say next to nothing."
    )


def dropped_share(layer: LayerTrace, beta: float, kept: Sequence[int] | None = None) -> float:
    """The share of droppable pairs (2..k) that skipping at beta drops on the trace."""
    check_beta(beta, layer.k)
    return (skip_ratios(layer.choice(kept)[1]) < beta).double().mean().item()


def selection_frequency(layer: LayerTrace, kept: Sequence[int] | None = None) -> Tensor:
    """How often a token chooses each expert, as a share of tokens: float64 [n], summing to k."""
    return co_selection(layer, kept).diagonal()


def co_selection(layer: LayerTrace, kept: Sequence[int] | None = None) -> Tensor:
    """How often two experts are chosen together, as a share of tokens: float64 [n, n] (Fig. 5). The diagonal holds the
    selection frequency."""
    chosen = layer.choice(kept)[0]  # [tokens, k]
    hot = torch.zeros(len(chosen), layer.n + 1, dtype=torch.float64, device=chosen.device).scatter_(1, chosen, 1.0)
    hot, counts = hot[:, : layer.n], layer.token_counts
    return layer.sum_over_ranks(hot.T @ (hot * counts[:, None])) / layer.sum_over_ranks(counts.sum())


def routing_divergence(one: LayerTrace, other: LayerTrace) -> float:
    """Total variation distance, from 0 to 1, of two corpora's selection frequencies, each normalised to sum to 1."""
    difference = selection_frequency(one) - selection_frequency(other).to(one.order.device)
    return (difference.abs().sum() / (2 * one.k)).item()


def betas_of_shares(ratios: Tensor, shares: Sequence[float]) -> list[float]:
    """Betas that drop these shares of the droppable pairs: 0.5 gives the median, 1 drops all. ratios: rising, float64 [pairs].

    Each beta lies between two ratios that differ by more than rounding, at the share's place or before it, so that every
    machine drops the same pairs.
    """
    apart = torch.cat([ratios.new_ones(1), ratios.diff()]) > ROUNDING
    first = torch.arange(len(ratios), device=ratios.device).where(apart, 0).cummax(0).values
    found = []
    for share in shares:
        at = first[min(int(share * len(ratios)), len(ratios) - 1)].item()
        between = (ratios[at - 1] + ratios[at]).item() / 2 if at else 0.0
        found.append(ratios[-1].item() * ABOVE if share == 1 else between)
    return found
