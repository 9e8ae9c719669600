"""Routers: the selection of experts, routing weights, and the pairs that skipping drops."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

CHOSEN_SOFTMAX = "softmax of chosen"
SPARSEMIXER = "sparsemixer"


@dataclass(frozen=True)
class Router:
    """The arithmetic of a router, repeatable for any subset of the experts.

    score: "softmax" over the experts (Mixtral, OLMoE), "softmax of chosen" (gpt-oss, Granite: top-k first), "sigmoid"
    (DeepSeek-V3, MiniMax-M2), "sqrtsoftplus" (DeepSeek-V4), "given" (the router returns probabilities, Gemma 4) or
    "sparsemixer" (PhiMoE, with its `jitter`). Scores are float32 if `float32_scores`, else of the logits' dtype. Experts are
    ranked by score (`by_logits`: by logit) plus `bias`, within the `top_groups` best of `groups`. Weights are divided by their
    sum plus `eps` if `renormalise`, then multiplied by `scale` and by each expert's own `expert_scale`, and are of `dtype`.
    Operations have the stock routers' order, so that weights agree to the last bit.

    table: a table looked up by token id gives a token's experts, instead of a ranking (see `table_ranking`). shared, idle:
    the number of extra logits after the experts', which pruning never removes. The sigmoids of `shared` experts enter the sum
    that divides the chosen experts' sigmoids (Inkling). A token that chooses `idle` uses no expert (ZAYA).
    """

    score: str = "softmax"
    float32_scores: bool = True
    renormalise: bool = False
    eps: float = 0.0
    scale: float = 1.0
    dtype: str = "float32"
    by_logits: bool = False
    bias: tuple[float, ...] | None = None
    expert_scale: tuple[float, ...] | None = None
    groups: int = 1
    top_groups: int = 1
    group_size: int = 2  # a group's score is the sum of this many best scores in it
    zero_fill: bool = False  # experts outside the best groups score 0, else -inf
    jitter: float = 0.0
    table: bool = False
    shared: int = 0
    idle: int = 0

    @property
    def extra_logits(self) -> int:
        """The number of logits after those of the experts."""
        return self.shared + self.idle

    @property
    def keeps_ranking(self) -> bool:
        """Whether removing experts leaves the ranking of the others unchanged, so that a token's reach is known beforehand."""
        return self.groups == 1 and self.ranks_within_groups

    @property
    def ranks_within_groups(self) -> bool:
        """Whether removing experts leaves the ranking of those in the same group unchanged, and no token chooses outside its
        best groups, where a zero may exceed a biased score."""
        return not (self.bias and ((self.score == "softmax" and not self.by_logits) or (self.groups > 1 and self.zero_fill)))

    def ungrouped(self, logits: Tensor) -> Tensor:
        """`ranking` of all experts as if there were no groups."""
        return replace(self, groups=1).ranking(logits)

    @property
    def normalises(self) -> bool:
        """Whether a token's weights have the same sum for every choice; skipping then keeps that sum."""
        return self.renormalise or bool(self.shared) or self.score == CHOSEN_SOFTMAX

    @property
    def depends_on_chosen_only(self) -> bool:
        """Whether the chosen experts' logits alone determine the weights (up to rounding, for a renormalised softmax)."""
        kind = self.score != SPARSEMIXER and (self.score != "softmax" or (self.renormalise and not self.eps))
        return self.keeps_ranking and not self.extra_logits and kind

    @property
    def sorted(self) -> bool:
        """Whether experts are selected in the order of falling weights."""
        return not (self.bias or self.expert_scale or self.table or self.score == SPARSEMIXER)

    def scores(self, logits: Tensor) -> Tensor:
        """The scores [tokens, r] from which routing weights are computed."""
        logits = logits.float() if self.float32_scores else logits
        match self.score:
            case "sigmoid":
                return logits.sigmoid()
            case "sqrtsoftplus":
                return nn.functional.softplus(logits).sqrt()
            case "given":
                return logits
            case _:
                return logits.softmax(-1)

    def ranking(self, logits: Tensor, columns: Tensor | None = None) -> Tensor:
        """The values [tokens, ..., r] whose top-k are chosen, of all experts or of `columns` [..., r], followed by `idle`."""
        if self.shared:
            logits, columns = logits[..., : -self.shared], None if columns is None else columns[..., : -self.shared]
        scores = logits if self.by_logits or self.score in (CHOSEN_SOFTMAX, SPARSEMIXER) else self.scores(logits)
        if self.bias:
            scores = scores + _column(self.bias, logits, columns)
        return self._within_groups(scores) if self.groups > 1 else scores

    def _within_groups(self, scores: Tensor) -> Tensor:
        grouped = scores.unflatten(-1, (self.groups, -1))  # [tokens, groups, r / groups]
        best = grouped.topk(self.group_size, -1).values.sum(-1).topk(self.top_groups, -1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        return grouped.masked_fill(~allowed[..., None], 0.0 if self.zero_fill else float("-inf")).flatten(-2)

    def weights(self, logits: Tensor, chosen: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Routing weights [tokens, ..., k] of the `chosen` columns of `logits` [tokens, r]; numbers: the experts' own numbers
        where the columns are a subset (None: `chosen`)."""
        if self.shared:
            weights = self._among_shared(logits, chosen)[:, : chosen.shape[1]]
        elif self.score == SPARSEMIXER:
            weights = self._sparsemixer(logits, chosen)
        elif self.score in ("softmax", "given"):
            weights = self.scores(logits).gather(1, chosen.flatten(1)).view(chosen.shape)
        else:
            weights = self.scores(logits.gather(1, chosen.flatten(1)).view(chosen.shape))
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + self.eps)
        if self.scale != 1:
            weights = weights * self.scale
        if self.expert_scale:
            weights = weights * _column(self.expert_scale, logits, chosen if numbers is None else numbers)
        return weights.to(getattr(torch, self.dtype))

    def shared_weights(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """The weights [tokens, shared] of the shared experts, given the chosen ones."""
        weights = self._among_shared(logits, chosen)[:, chosen.shape[1] :] * self.scale
        return (weights * self.expert_scale[0]).to(getattr(torch, self.dtype))

    def _among_shared(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """The chosen and the shared experts' sigmoids, divided by the sum of all: [tokens, k + shared]."""
        logs = nn.functional.logsigmoid(torch.cat([logits.gather(1, chosen), logits[:, -self.shared :]], 1))
        return (logs - logs.logsumexp(1, keepdim=True)).exp()

    @property
    def total_weight(self) -> float:
        """The sum of a token's weights and those of the `shared` experts."""
        return self.scale * self.expert_scale[0]

    def _sparsemixer(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Each choice's softmax over the experts not yet chosen whose logits are close to the best (arXiv 2409.12136)."""
        weights, left = [], logits
        for expert in chosen.split(1, 1):
            best = left.amax(1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.jitter
            weights.append(left.masked_fill(far, float("-inf")).softmax(1).gather(1, expert))
            left = left.scatter(1, expert, float("-inf"))
        return torch.cat(weights, 1)


def read_router(entry: dict) -> Router:
    """A router from its `asdict`, as read from JSON."""
    return Router(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})


def _column(values: tuple[float, ...], like: Tensor, numbers: Tensor | None) -> Tensor:
    column = torch.tensor(values, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return column if numbers is None else column[numbers]


def table_ranking(chosen: Tensor, n: int) -> Tensor:
    """A ranking float32 [tokens, n] that replaces a table of token ids when experts are removed.

    A token keeps its table entries among e_1..e_k whose experts stay, in their order. Each removed entry is replaced by the
    next kept expert that the token does not use yet, by number from (e_1 + ... + e_k) mod n on. The result depends on the
    token's row alone, so the smaller model's table can hold it. A removed expert's token ids spread over the others as evenly
    as the table spreads all token ids.
    """
    start, numbers = chosen.sum(1, keepdim=True), torch.arange(n, device=chosen.device)
    own = torch.arange(chosen.shape[1], 0, -1, device=chosen.device).expand_as(chosen)
    return (-((numbers - start) % n)).scatter(1, chosen, own).float()


def pruned_table(table: Tensor, kept: Sequence[int], n: int) -> Tensor:
    """The table [vocabulary, k] of a model with the experts `kept` alone, in their new numbers."""
    columns = torch.tensor(kept, device=table.device)
    return table_ranking(table.long(), n)[:, columns].topk(table.shape[1]).indices.to(table.dtype)


def skip_ratios(weights: Tensor) -> Tensor:
    """rho of the pairs 2..k: the tail's weight over the head's, (w_j + ... + w_k) / (w_1 + ... + w_{j-1}), [tokens, k - 1].

    `weights` [tokens, k] and the ratios fall. For k = 2 it is w_2 / w_1 (Section 3.3 of the paper). For k > 2 it is the tail
    rule of A.2 with beta = H / (D - H), where D is the distance of two experts' outputs and H bounds the loss.
    """
    weights = weights.float() if weights.dtype in (torch.bfloat16, torch.float16) else weights
    if weights.shape[1] == 2:  # the same numbers in one operation, for fast decoding
        return weights[:, 1:] / weights[:, :1]
    tails = weights.flip(1).cumsum(1).flip(1)[:, 1:]
    heads = weights.cumsum(1)[:, :-1]
    return tails / heads


def skip_pairs(weights: Tensor, beta: float | Tensor, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Which pairs stay, and the routing weights after skipping, both [tokens, k]; `weights` [tokens, k] in falling order.

    A pair j >= 2 whose ratio is below beta gets the weight 0. If `renormalise`, the others are rescaled to the token's former
    sum; the factor is computed first, so that a token without dropped pairs keeps every bit.
    """
    first = torch.ones_like(weights[:, :1], dtype=torch.bool)
    keep = torch.cat([first, skip_ratios(weights) >= beta], 1)
    kept = weights * keep
    if renormalise:
        kept = kept * (weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True))
    return keep, kept
