"""Losses for greedy removal, updated after each expert that is removed or added back."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..moe.routers import CHOSEN_SOFTMAX
from .losses import gram_between, targets
from .trace import LayerTrace, parts

SMALL_GRAMS = 16384  # tokens whose small Grams are in memory at once


class Removals:
    """The squared loss without each expert of a kept set, updated after each change of the set.

    A token's loss depends on its k chosen experts and the next in line. Removing an expert changes only the tokens that chose
    it (and, where a softmax is not renormalised, scales the weights of all tokens).
    """

    def __init__(self, layer: LayerTrace, kept: Sequence[int] | None = None):
        """kept: the experts to start from (None: all)."""
        self.layer, self.k, tokens, device = layer, layer.k, len(layer.order), layer.order.device
        if layer.router.score in ("softmax", CHOSEN_SOFTMAX):  # proportional to the weights, whichever experts are kept
            scores = (layer.logits.double() - layer.logits.double().amax(1, keepdim=True)).exp()  # [tokens, n]
        else:
            scores = layer.router.scores(layer.logits).double()
        self.raw = scores.gather(1, layer.order)  # [tokens, m]: routing weights before normalisation and scaling
        self.all_scores = scores if layer.router.score == "softmax" and not layer.router.renormalise else None
        self.all = torch.arange(tokens, device=device)
        found = [targets(some) for some in parts(layer, SMALL_GRAMS)]
        self.dot, self.norm = (torch.cat(column) for column in zip(*found, strict=True))  # [tokens, m], [tokens]
        self.kept = torch.zeros(layer.n, dtype=torch.bool, device=device)
        self.kept[list(range(layer.n) if kept is None else kept)] = True
        self.places = torch.empty(tokens, self.k + 1, dtype=torch.long, device=device)
        self.losses = torch.empty(tokens, self.k + 1, dtype=torch.float64, device=device)
        self._update(self.all)

    def remove(self, expert: int) -> None:
        self.kept[expert] = False
        self._update(self._tokens_reaching(expert))

    def add(self, expert: int) -> None:
        self.kept[expert] = True
        self._update(self._tokens_reaching(expert))

    def copy(self) -> "Removals":
        """A state of its own with the same kept experts."""
        other = copy.copy(self)
        other.kept, other.places, other.losses = self.kept.clone(), self.places.clone(), self.losses.clone()
        return other

    def loss(self) -> float:
        """The squared loss of the kept experts."""
        return self.layer.sum_over_ranks(self.losses[:, -1].sum()).item()

    def costs(self) -> Tensor:
        """The squared loss without each expert, float64 [n]; infinite for those not kept."""
        return self.layer.sum_over_ranks(self._without()).masked_fill(~self.kept, float("inf"))

    def swap_costs(self, back: int) -> Tensor:
        """The squared loss when a removed expert replaces each kept one, float64 [n]; infinite for those not kept."""
        kept = self.kept.clone()
        kept[back] = True
        rows = self._tokens_reaching(back)
        costs = self._sum(rows, *self._evaluate(rows, kept), kept)
        if self.all_scores is None:  # the other tokens' losses are unchanged
            costs += self._without() - self._sum(rows, self.places[rows], self.losses[rows], self.kept)
        return self.layer.sum_over_ranks(costs).masked_fill(~self.kept, float("inf"))

    def _without(self) -> Tensor:
        """The squared loss of this rank's tokens without each expert, float64 [n]."""
        if self.sums is None:
            self.sums = self._sum(self.all, self.places, self.losses, self.kept)
        return self.sums.clone()

    def _update(self, rows: Tensor) -> None:
        self.sums = None
        for some in rows.split(SMALL_GRAMS):
            self.places[some], self.losses[some] = self._evaluate(some, self.kept)

    def _evaluate(self, rows: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Places in `order` of the k chosen experts and the next one (m if there is none), and the squared loss without each,
        both [rows, k + 1]. The last loss, without the next one, is that of the kept experts."""
        alive, m = kept[self.layer.order[rows]], self.layer.order.shape[1]
        ranks = torch.arange(m, device=alive.device).expand_as(alive)
        places = torch.where(alive, ranks, m).topk(self.k + 1, dim=1, largest=False).values
        inside = places.clamp(max=m - 1)
        x = self.raw[rows].gather(1, inside).masked_fill(places == m, 0.0)
        gram = gram_between(self.layer.gram[rows], inside, inside).double()
        pulled = (gram @ x[:, :, None])[:, :, 0]
        square = (x * pulled).sum(1, keepdim=True) - 2 * x * pulled + x * x * gram.diagonal(dim1=1, dim2=2)
        along = x * self.dot[rows].gather(1, inside)
        total = self._total(rows, x, kept) / self.layer.router.scale
        return places, square / total**2 - 2 * (along.sum(1, keepdim=True) - along) / total + self.norm[rows, None]

    def _total(self, rows: Tensor, x: Tensor, kept: Tensor) -> Tensor:
        """The divisor of the routing weights [rows, k + 1] when each of the k + 1 experts is left out."""
        if self.all_scores is not None:
            total = (self.all_scores[rows] * kept).sum(1, keepdim=True)
            return torch.cat([total - x[:, :-1], total], 1)
        router = self.layer.router
        return x.sum(1, keepdim=True) - x + router.eps if router.normalises else torch.ones_like(x)

    def _tokens_reaching(self, expert: int) -> Tensor:
        """The tokens that have an expert among their k + 1 best while it is kept (all, for a softmax not renormalised)."""
        if self.all_scores is not None:
            return self.all
        within = torch.arange(self.layer.order.shape[1], device=self.places.device) <= self.places[:, -1:]
        return ((self.layer.order == expert) & within).any(1).nonzero()[:, 0]

    def _sum(self, rows, places, losses, kept) -> Tensor:
        """`_without` for some tokens."""
        places = places[:, :-1]
        chosen = self.layer.order[rows].gather(1, places)  # [rows, k]
        change = losses[:, :-1] - losses[:, -1:]
        cost = losses.new_zeros(self.layer.n).index_add_(0, chosen.flatten(), change.flatten())
        if self.all_scores is not None:
            pieces = zip(*(held.split(SMALL_GRAMS) for held in (rows, places, chosen)), strict=True)
            cost += sum(self._rescaled(*piece, kept) for piece in pieces)
        return cost + losses[:, -1].sum()

    def _rescaled(self, rows, places, chosen, kept) -> Tensor:
        """The change of loss [n] from removing experts that a token did not choose, which rescales its weights."""
        x, gram = self.raw[rows].gather(1, places), gram_between(self.layer.gram[rows], places, places).double()
        square = (x[:, None] @ gram @ x[:, :, None]).flatten(1)  # [rows, 1]
        along = (x * self.dot[rows].gather(1, places)).sum(1, keepdim=True)
        shares = self.all_scores[rows] * kept / self.layer.router.scale
        total = shares.sum(1, keepdim=True)
        less = total - shares
        change = square * (less**-2 - total**-2) - 2 * along * (1 / less - 1 / total)
        return change.scatter(1, chosen, 0.0).sum(0)
