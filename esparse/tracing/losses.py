"""Arithmetic on Gram matrices: reconstruction losses (Eq. 3) and norms."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..moe.routers import CHOSEN_SOFTMAX, skip_pairs, skip_ratios
from .trace import LayerTrace, check_beta, part

ROUTINGS = 65536  # tokens times subsets in memory at once
SUBSETS = 256
MAX_TABLE = 2**24  # sums held at once, 128 MiB
MAX_SPREAD = 60.0  # of a token's logits; beyond it, two weights may both be 0 in float32
FULL_GRAMS = 4096  # tokens whose Gram is unpacked at once


def full_gram(layer: LayerTrace, size: int | None = None) -> torch.Tensor:
    """Each token's Gram matrix of its first `size` experts (None: all), [tokens, size, size]."""
    m = layer.order.shape[1]
    i, j = torch.triu_indices(m, m, device=layer.gram.device)
    entries = (j < (size or m)).nonzero()[:, 0]
    i, j, triangle = i[entries], j[entries], layer.gram[:, entries]
    full = triangle.new_empty(len(triangle), size or m, size or m)
    full[:, i, j] = triangle
    full[:, j, i] = triangle
    return full


def reconstruction_loss(layer: LayerTrace, kept: Sequence[int] | None = None, beta: float | None = None) -> float:
    """Eq. 3 for one layer: the Frobenius norm over all traced tokens of the change in the layer's output.

    kept: the experts that stay (None: all); beta: for skipping as well, by the rule of `routers.skip_pairs`.
    Raises ValueError for subsets outside the trace and bad betas.
    """
    if beta is not None:
        check_beta(beta, layer.k)

    def route(part: LayerTrace) -> tuple[torch.Tensor, torch.Tensor]:
        positions, weights = part.routing(kept)
        if beta is not None:
            weights = skip_pairs(weights, beta, layer.router.normalises)[1]
        return positions[:, None], weights[:, None]

    return squared_losses(layer, route, 1).sqrt().item()


def output_norms(layer: LayerTrace) -> torch.Tensor:
    """The norm of the layer's own output for every token, float64 [tokens]."""
    weights = layer.weights[:, None].to(layer.gram.dtype)  # [tokens, 1, k]
    squares = weights @ full_gram(layer, layer.k) @ weights.mT
    return squares.flatten().double().clamp(min=0).sqrt()


def output_norm(layer: LayerTrace) -> float:
    """The Frobenius norm of the layer's own output over all traced tokens."""
    return output_norms(layer).norm().item()


def expert_distances(layer: LayerTrace) -> torch.Tensor:
    """||f_1 - f_2|| of each token's two best experts, float64 [tokens]; A.2 assumes it nearly constant."""
    best = full_gram(layer, 2).double()
    return (best[:, 0, 0] + best[:, 1, 1] - 2 * best[:, 0, 1]).clamp(min=0).sqrt()


def losses_of(layer: LayerTrace, subsets: Sequence[Sequence[int]]) -> torch.Tensor:
    """`reconstruction_loss` of subsets of one size, float64 [subsets]."""
    some = torch.tensor(subsets, device=layer.order.device).split(SUBSETS)
    return torch.cat([squared_losses(layer, lambda part, s=s: part.routings(s), len(s)) for s in some]).sqrt()


def squared_losses(
    layer: LayerTrace, route: Callable[[LayerTrace], tuple[torch.Tensor, torch.Tensor]], count: int
) -> torch.Tensor:
    """Sum over tokens of ||sum_i w'_i f_i - z||^2, float64 [count], for `count` ways of routing at once.

    route: maps a part of the trace to places in `order` and weights, both [tokens of the part, count, k].
    """
    total = torch.zeros(count, dtype=torch.float64, device=layer.order.device)
    rows = max(1, ROUTINGS // count)
    for start in range(0, len(layer.order), rows):
        some = part(layer, slice(start, start + rows))
        total += token_losses(some, *route(some)).sum(0, dtype=torch.float64)
    return layer.sum_over_ranks(total).clamp(min=0)


def token_losses(layer: LayerTrace, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """||sum_i w'_i f_i - z||^2 [tokens, count] for weights of experts at `positions` in `order`, [tokens, count, k]."""
    change = layer.gram.new_zeros(*weights.shape[:2], layer.order.shape[1])
    change.scatter_(2, positions, weights.to(change.dtype))
    if layer.target_dot is None:
        change[:, :, : layer.k] -= layer.weights[:, None].to(change.dtype)
    if layer.router.shared:
        now = layer.router.total_weight if layer.target_dot is not None else layer.weights.sum(1, keepdim=True)
        change[:, :, -1] = now - weights.sum(2)
    squares = (change @ full_gram(layer)).mul_(change).sum(2)
    if layer.target_dot is None:
        return squares
    cross = (change @ layer.target_dot[:, :, None]).squeeze(2)
    return squares.double() - 2 * cross.double() + layer.target_norm[:, None]


def has_choice_table(layer: LayerTrace) -> bool:
    """Whether `losses_from_choices` gives this layer's losses with a table of at most `MAX_TABLE` sums."""
    # float32 softmaxes over r and n experts differ by 1e-7, as little as a float32 Gram is rounded.
    rounded = torch.float32 if layer.router.float32_scores else layer.logits.dtype
    exact = layer.router.score != "softmax" or (layer.gram.dtype, rounded) == (torch.float32, torch.float32)
    return layer.router.depends_on_chosen_only and exact and math.comb(layer.n, layer.k) << layer.n <= MAX_TABLE


def losses_from_choices(layer: LayerTrace, subsets: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """`losses_of` for subsets of one size, from each token's loss for every choice of k experts within its reach.

    A token chooses c under every subset that holds c and lacks the other experts that it ranks above the last of c. Its loss
    is added to one table entry: [c, those other experts as bits]. A subset's squared loss sums, over its choices c, all
    entries whose bits are removed experts. The work is tokens times choices (15 for k = 2 and r = 4 of 8) instead of tokens
    times subsets (70).
    """
    n, k, m, device = layer.n, layer.k, layer.order.shape[1], layer.order.device
    combinations = lambda size: torch.tensor(list(itertools.combinations(range(size), k)), device=device)  # noqa: E731
    number = torch.zeros(1 << n, dtype=torch.long, device=device)  # a choice's row in the table, by its bits
    number[(1 << combinations(n)).sum(1)] = torch.arange(math.comb(n, k), device=device)
    table, ranks = torch.zeros(math.comb(n, k) << n, dtype=torch.float64, device=device), combinations(m)
    for tokens in torch.arange(len(layer.order), device=device).split(max(1, ROUTINGS // len(ranks))):
        some = part(layer, tokens)
        chosen = some.order[:, ranks]  # [tokens, choices, k]
        losses = token_losses(some, ranks.expand_as(chosen), _weights_of(some, chosen))
        bits = (1 << chosen).sum(2)
        passed = (1 << some.order).cumsum(1)[:, ranks[:, -1]] - bits
        table.index_add_(0, ((number[bits] << n) + passed).flatten(), losses.double().flatten())
    table = layer.sum_over_ranks(table)
    for bit in range(n):
        without, also = table.view(-1, 2, 1 << bit).unbind(1)
        also += without
    kept = torch.tensor(subsets, device=device)
    removed = (1 << n) - 1 - (1 << kept).sum(1, keepdim=True)
    chosen = number[(1 << kept[:, combinations(kept.shape[1])]).sum(2)]  # [subsets, choices]
    return table[(chosen << n) + removed].sum(1).clamp(min=0).sqrt()


def _weights_of(layer: LayerTrace, chosen: torch.Tensor) -> torch.Tensor:
    """Routing weights [tokens, choices, k] of each choice, if no other experts existed."""
    weights = layer.router.weights(layer.logits, chosen)
    spread = layer.logits.amax(1) - layer.logits.amin(1)
    if layer.router.score == "softmax" and (far := spread > MAX_SPREAD).any():
        of_chosen = replace(layer.router, score=CHOSEN_SOFTMAX, renormalise=False)
        weights = torch.where(far[:, None, None], of_chosen.weights(layer.logits, chosen), weights)
    return weights


def expert_scales(layer: LayerTrace, kept: Sequence[int]) -> torch.Tensor:
    """Factors s, float64 [r], of the kept experts' outputs that minimise sum_t ||sum_i s_i w_i f_i - z||^2 on the trace.

    The normal equations are r x r: A_ij = sum_t w_i w_j <f_i, f_j>, b_i = sum_t w_i <f_i, z>. The pseudo-inverse solves them
    for s - 1, so that an expert that no token uses keeps the scale 1. Raises ValueError for subsets outside the trace.
    """
    kept = layer.check(kept)
    column = torch.zeros(layer.n + 1, dtype=torch.long, device=layer.order.device)
    column[kept] = torch.arange(len(kept), device=column.device)
    system = torch.zeros(len(kept), len(kept), dtype=torch.float64, device=column.device)
    target = torch.zeros(len(kept), dtype=torch.float64, device=column.device)
    for start in range(0, len(layer.order), FULL_GRAMS):
        some = part(layer, slice(start, start + FULL_GRAMS))
        positions, weights = some.routing(kept)  # [tokens, k]
        at, weights = column[some.order.gather(1, positions)], weights.double()
        gram = full_gram(some).double().gather(1, positions[:, :, None].expand(-1, -1, some.order.shape[1]))  # [tokens, k, m]
        inner = gram.gather(2, positions[:, None, :].expand(-1, some.k, -1))  # [tokens, k, k]
        pairs = weights[:, :, None] * inner * weights[:, None, :]
        system.index_put_((at[:, :, None].expand_as(pairs), at[:, None, :].expand_as(pairs)), pairs, accumulate=True)
        if some.target_dot is None:
            toward = (gram[:, :, : some.k] @ some.weights.double()[:, :, None]).squeeze(2)  # <f_i, z>, z the layer's own output
        else:
            toward = some.target_dot.double().gather(1, positions)
        if some.router.shared:  # the shared experts' contribution differs from that in z
            before = some.weights.double().sum(1) if some.target_dot is None else some.router.total_weight
            toward = toward - gram[:, :, -1] * (before - weights.sum(1))[:, None]
        target.index_put_((at,), weights * toward, accumulate=True)
    system, target = layer.sum_over_ranks(system), layer.sum_over_ranks(target)
    return 1 + torch.linalg.pinv(system, hermitian=True) @ (target - system.sum(1))


def skip_curve(layer: LayerTrace, kept: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Skipping at every beta at once: the ratios of all droppable pairs, rising, float64 [pairs], and the squared
    reconstruction loss (Eq. 3) when the first 0, 1, ... of them are dropped, float64 [pairs + 1].

    A token drops its last pair first, since its ratios fall, so it has k states. The loss is a running sum over pairs in the
    order in which a rising beta drops them.
    """
    ratios, changes, whole = [], [], 0.0
    for start in range(0, len(layer.order), ROUTINGS):
        some = part(layer, slice(start, start + ROUTINGS))
        positions, weights = some.routing(kept)
        first = torch.ones(layer.k, layer.k, device=weights.device).tril()  # row j: the first j + 1 pairs stay
        states = weights[:, None] * first.to(weights.dtype)  # [tokens, k, k]
        if layer.router.normalises:
            states = states * (weights.sum(1)[:, None, None] / states.sum(2, keepdim=True))
        losses = token_losses(some, positions[:, None].expand_as(states), states).double()  # [tokens, k]
        whole += losses[:, -1].sum().item()
        ratios.append(skip_ratios(weights).double().flatten())
        changes.append((losses[:, :-1] - losses[:, 1:]).flatten())
    ordered = torch.cat(ratios).sort()
    running = torch.cat(changes)[ordered.indices].cumsum(0) + whole
    return ordered.values, torch.cat([running.new_tensor([whole]), running]).clamp(min=0)
