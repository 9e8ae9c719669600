"""Arithmetic on Gram matrices: reconstruction losses (Eq. 3) and norms."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from operator import mul

import torch
from torch import Tensor, nn

from ..moe.routers import CHOSEN_SOFTMAX, skip_pairs, skip_ratios
from .trace import LayerTrace, check_beta, parts

# What the squared change of a token's output is divided by: nothing (the paper), the squared norm of the residual stream
# behind the layer, by which the next norm divides it, or that of the layer's output.
LOSSES = ("eq3", "residual", "output")
ROUTINGS = 65536  # tokens times subsets in memory at once
SUBSETS = 256
MAX_TABLE = 2**24  # sums held at once, 128 MiB
MAX_SPREAD = 60.0  # of a token's logits; beyond it, two weights may both be 0 in float32
FULL_GRAMS = 4096  # tokens whose Gram is unpacked at once


def packed_places(gram: Tensor) -> Tensor:
    """Where packed Gram matrices [tokens, m (m + 1) / 2] hold <f_i, f_j>, int64 [m, m]."""
    m = math.isqrt(2 * gram.shape[1])
    i, j = torch.triu_indices(m, m, device=gram.device)
    places = torch.empty(m, m, dtype=torch.long, device=gram.device)
    places[i, j] = places[j, i] = torch.arange(len(i), device=gram.device)
    return places


def full_gram(layer: LayerTrace, size: int | None = None) -> Tensor:
    """Each token's Gram matrix of its first `size` experts (None: all), [tokens, size, size]."""
    places = packed_places(layer.gram)[:size, :size]
    return layer.gram.index_select(1, places.flatten()).view(-1, *places.shape)


def gram_between(gram: Tensor, some: Tensor, others: Tensor, rows: Tensor | None = None) -> Tensor:
    """Entries [tokens, a, b] of packed Gram matrices, for experts at places [tokens, a] and [tokens, b] in `order`. rows: the
    tokens' rows in `gram` (None: all)."""
    rows = torch.arange(len(gram), device=gram.device) if rows is None else rows
    kind = torch.int32 if gram.numel() < 2**31 else torch.int64  # the narrow one is three times as fast
    m, first = math.isqrt(2 * gram.shape[1]), rows.to(kind)[:, None] * gram.shape[1]
    some, others = some.to(kind), others.to(kind)
    one, other = (places * (2 * m - 1 - places) // 2 + first for places in (some, others))  # rises with the place
    at = torch.minimum(one[:, :, None], other[:, None]) + torch.maximum(some[:, :, None], others[:, None])
    return gram.flatten().index_select(0, at.flatten()).view(at.shape)  # no row is copied


def targets(layer: LayerTrace) -> tuple[Tensor, Tensor]:
    """<f_i, z> [tokens, m] and ||z||^2 [tokens], both float64, for the output z that losses compare with."""
    if layer.target_dot is not None:
        return layer.target_dot.double(), layer.target_norm.double()
    weights, places = layer.weights.double(), packed_places(layer.gram)[: layer.k]
    chosen = layer.gram[:, places.flatten()].view(-1, *places.shape).double()  # [tokens, k, m]
    dot = (weights[:, None] @ chosen)[:, 0]
    return dot, (weights * dot[:, : layer.k]).sum(1)


def reconstruction_loss(layer: LayerTrace, kept: Sequence[int] | None = None, beta: float | None = None) -> float:
    """Eq. 3 for one layer: the Frobenius norm over all traced tokens of the change in the layer's output.

    kept: the experts that stay (None: all); beta: for skipping as well, by the rule of `routers.skip_pairs`.
    Raises ValueError for subsets outside the trace and bad betas.
    """
    if beta is not None:
        check_beta(beta, layer.k)
    total = torch.zeros(1, dtype=torch.float64, device=layer.order.device)
    for some in parts(layer, ROUTINGS):
        positions, weights = some.routing(kept)
        if beta is not None:
            weights = skip_pairs(weights, beta, layer.router.normalises)[1]
        total += token_losses(some, positions[:, None], weights[:, None]).sum(0, dtype=torch.float64)
    return layer.sum_over_ranks(total).clamp(min=0).sqrt().item()


def output_norms(layer: LayerTrace) -> Tensor:
    """The norm of the layer's own output for every token, float64 [tokens]."""
    weights = layer.weights[:, None].to(layer.gram.dtype)  # [tokens, 1, k]
    squares = weights @ full_gram(layer, layer.k) @ weights.mT
    return squares.flatten().double().clamp(min=0).sqrt()


def output_norm(layer: LayerTrace) -> float:
    """The Frobenius norm of the layer's own output over all traced tokens."""
    return output_norms(layer).norm().item()


def expert_distances(layer: LayerTrace) -> Tensor:
    """||f_1 - f_2|| of each token's two best experts, float64 [tokens]; A.2 assumes it nearly constant."""
    best = full_gram(layer, 2).double()
    return (best[:, 0, 0] + best[:, 1, 1] - 2 * best[:, 0, 1]).clamp(min=0).sqrt()


def check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(f"Unknown loss {loss!r}: choose from {', '.join(LOSSES)}.")


def weighed(layer: LayerTrace, loss: str) -> LayerTrace:
    """The trace on which every loss, score and scale is that of `loss`, one of `LOSSES`, else ValueError.

    A squared loss is quadratic in a token's outputs, so that it is enough to divide the token's inner products. A token whose
    norm is 0 counts nothing. Raises ValueError where the trace does not hold the norms.
    """
    check_loss(loss)
    if loss == "eq3":
        return layer
    norm = layer.stream_norm if loss == "residual" else targets(layer)[1]
    if norm is None:
        remedy = "trace the whole model, or take loss='eq3'"
        raise ValueError(f"{layer.name}: this trace lacks the norms of the residual stream: {remedy}.")
    return _scaled(layer, torch.where(norm > 0, 1 / norm, 0.0))


def _scaled(layer: LayerTrace, factors: Tensor) -> LayerTrace:
    """The trace with each token's inner products multiplied by its factor, [tokens]."""
    products = {"gram": layer.gram * factors[:, None].to(layer.gram.dtype)}
    if layer.target_dot is not None:
        products["target_dot"] = layer.target_dot * factors[:, None].to(layer.target_dot.dtype)
        products["target_norm"] = layer.target_norm * factors
    return replace(layer, **products)


def token_count(layer: LayerTrace) -> int:
    """The number of traced tokens, over all ranks."""
    return int(layer.sum_over_ranks(torch.tensor(len(layer.order), device=layer.order.device)))


def mixed(layers: Sequence[LayerTrace], shares: Sequence[float]) -> LayerTrace:
    """The trace of one layer on a mixture of corpora, from its traces on each, already `weighed`.

    shares: each corpus's, positive, of sum 1. Every squared loss is T sum_i share_i L_i^2 / T_i for the losses L_i on the T_i
    tokens of corpus i, T = sum_i share_i T_i: equal shares count the corpora equally, however long they are. In scores, a token
    of corpus i counts as T share_i / T_i tokens.
    """
    if len(layers) == 1:
        return layers[0]
    sizes = list(map(token_count, layers))
    total, pieces = sum(map(mul, shares, sizes)), []
    for layer, share, size in zip(layers, shares, sizes, strict=True):
        counts = torch.full_like(layer.token_counts, total * share / size)
        pieces.append(replace(_scaled(layer, counts), counts=counts).tensors())
    length = layers[0].length if len({layer.length for layer in layers}) == 1 else None
    return replace(layers[0], length=length, **{name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})


def losses_of(layer: LayerTrace, subsets: Sequence[Sequence[int]]) -> Tensor:
    """`reconstruction_loss` of subsets of one size, float64 [subsets]."""
    total = torch.zeros(len(subsets), dtype=torch.float64, device=layer.order.device)
    several, unpacked = torch.tensor(subsets, device=total.device).split(SUBSETS), layer.order.shape[1] ** 2
    for some, sums in zip(several, total.split(SUBSETS), strict=True):
        for tokens in parts(layer, max(1, ROUTINGS // max(len(some), unpacked // SUBSETS))):
            sums += token_losses(tokens, *tokens.routings(some)).sum(0, dtype=torch.float64)
    return layer.sum_over_ranks(total).clamp(min=0).sqrt()


def token_losses(layer: LayerTrace, positions: Tensor, weights: Tensor) -> Tensor:
    """||sum_i w'_i f_i - z||^2 [tokens, count] for weights [tokens, count, k] of experts at `positions` in `order`, [tokens,
    count, k] or, where they are the same, [tokens, 1, k]."""
    change = layer.gram.new_zeros(*weights.shape[:2], layer.order.shape[1])
    change.scatter_(2, positions.expand_as(weights), weights.to(change.dtype))
    if layer.target_dot is None:
        change[:, :, : layer.k] -= layer.weights[:, None].to(change.dtype)
    if layer.router.shared:
        now = layer.router.total_weight if layer.target_dot is not None else layer.weights.sum(1, keepdim=True)
        change[:, :, -1] = now - weights.sum(2)
    few = positions.shape[1] == 1 and 2 * layer.k + 1 < change.shape[2]
    places, change = _changed(layer, positions[:, 0], change) if few else (None, change)
    squares = (change @ (gram_between(layer.gram, places, places) if few else full_gram(layer))).mul_(change).sum(2)
    if layer.target_dot is None:
        return squares
    cross = (change @ (layer.target_dot.gather(1, places) if few else layer.target_dot)[:, :, None]).squeeze(2)
    return squares.double() - 2 * cross.double() + layer.target_norm[:, None]


def _changed(layer: LayerTrace, positions: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """The places where `change` [tokens, count, m] may differ from 0, [tokens, e], and the changes there."""
    own = torch.arange(layer.k, device=positions.device).expand_as(positions)
    places = torch.cat([own, positions, torch.full_like(own[:, :1], change.shape[2] - 1)[:, : layer.router.shared]], 1)
    twice = nn.functional.pad(positions < layer.k, (layer.k, places.shape[1] - 2 * layer.k))
    return places, change.gather(2, places[:, None].expand(-1, change.shape[1], -1)).masked_fill(twice[:, None], 0.0)


def has_choice_table(layer: LayerTrace) -> bool:
    """Whether `losses_from_choices` gives this layer's losses with a table of at most `MAX_TABLE` sums."""
    # float32 softmaxes over r and n experts differ by 1e-7, as little as a float32 Gram is rounded.
    rounded = torch.float32 if layer.router.float32_scores else layer.logits.dtype
    exact = layer.router.score != "softmax" or (layer.gram.dtype, rounded) == (torch.float32, torch.float32)
    return layer.router.depends_on_chosen_only and exact and math.comb(layer.n, layer.k) << layer.n <= MAX_TABLE


def losses_from_choices(layer: LayerTrace, subsets: Sequence[tuple[int, ...]]) -> Tensor:
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
    for some in parts(layer, max(1, ROUTINGS // len(ranks))):
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


def _weights_of(layer: LayerTrace, chosen: Tensor) -> Tensor:
    """Routing weights [tokens, choices, k] of each choice, if no other experts existed."""
    weights = layer.router.weights(layer.logits, chosen)
    spread = layer.logits.amax(1) - layer.logits.amin(1)
    if layer.router.score == "softmax" and (far := spread > MAX_SPREAD).any():
        of_chosen = replace(layer.router, score=CHOSEN_SOFTMAX, renormalise=False)
        weights = torch.where(far[:, None, None], of_chosen.weights(layer.logits, chosen), weights)
    return weights


def expert_scales(layer: LayerTrace, kept: Sequence[int]) -> Tensor:
    """Factors s, float64 [r], of the kept experts' outputs that minimise sum_t ||sum_i s_i w_i f_i - z||^2 on the trace.

    The normal equations are r x r: A_ij = sum_t w_i w_j <f_i, f_j>, b_i = sum_t w_i <f_i, z>. The pseudo-inverse solves them
    for s - 1, so that an expert that no token uses keeps the scale 1. Raises ValueError for subsets outside the trace.
    """
    kept = layer.check(kept)
    column = torch.zeros(layer.n + 1, dtype=torch.long, device=layer.order.device)
    column[kept] = torch.arange(len(kept), device=column.device)
    system = torch.zeros(len(kept), len(kept), dtype=torch.float64, device=column.device)
    target = system.new_zeros(len(kept))
    for some in parts(layer, FULL_GRAMS):
        positions, weights = some.routing(kept)  # [tokens, k]
        chosen, weights = column[some.order.gather(1, positions)], weights.double()
        inner = gram_between(some.gram, positions, positions).double()  # [tokens, k, k]
        pairs = weights[:, :, None] * inner * weights[:, None]
        system.index_put_((chosen[:, :, None], chosen[:, None]), pairs, accumulate=True)
        toward = targets(some)[0].gather(1, positions)  # <f_i, z>
        if some.router.shared:  # the shared experts' contribution differs from that in z
            before = some.weights.double().sum(1) if some.target_dot is None else some.router.total_weight
            last = torch.full_like(positions[:, :1], some.order.shape[1] - 1)
            toward -= gram_between(some.gram, positions, last)[:, :, 0] * (before - weights.sum(1))[:, None]
        target.index_put_((chosen,), weights * toward, accumulate=True)
    system, target = layer.sum_over_ranks(system), layer.sum_over_ranks(target)
    return 1 + torch.linalg.pinv(system, hermitian=True) @ (target - system.sum(1))


def skip_curve(layer: LayerTrace, kept: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Skipping at every beta at once: the ratios of all droppable pairs, rising, float64 [pairs], and the squared
    reconstruction loss (Eq. 3) when the first 0, 1, ... of them are dropped, float64 [pairs + 1].

    A token drops its last pair first, since its ratios fall, so it has k states. The loss is a running sum over pairs in the
    order in which a rising beta drops them.
    """
    ratios, changes, whole = [], [], 0.0
    for some in parts(layer, ROUTINGS):
        positions, weights = some.routing(kept)
        first = torch.ones(layer.k, layer.k, device=weights.device).tril()  # row j: the first j + 1 pairs stay
        states = weights[:, None] * first.to(weights.dtype)  # [tokens, k, k]
        if layer.router.normalises:
            states = states * (weights.sum(1)[:, None, None] / states.sum(2, keepdim=True))
        losses = token_losses(some, positions[:, None], states).double()  # [tokens, k]
        whole += losses[:, -1].sum().item()
        ratios.append(skip_ratios(weights).double().flatten())
        changes.append((losses[:, :-1] - losses[:, 1:]).flatten())
    ordered = torch.cat(ratios).sort()
    running = torch.cat(changes)[ordered.indices].cumsum(0) + whole
    return ordered.values, torch.cat([running.new_tensor([whole]), running]).clamp(min=0)
