"""Losses for greedy removal, updated after each expert that is removed or added back."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

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
        self.group = torch.arange(layer.n, device=device) // (layer.n // layer.router.groups)
        found = [targets(some) for some in parts(layer, SMALL_GRAMS)]
        self.dot, self.norm = (torch.cat(column) for column in zip(*found, strict=True))  # [tokens, m], [tokens]
        self.kept = torch.zeros(layer.n, dtype=torch.bool, device=device)
        self.kept[list(range(layer.n) if kept is None else kept)] = True
        several = [self._evaluate(some, self.kept) for some in self.all.split(SMALL_GRAMS)]
        self.held = [torch.cat(column) for column in zip(*several, strict=True)]
        self.sums = self._sum(self.held)  # the squared loss of this rank's tokens without each expert

    def remove(self, expert: int) -> None:
        self.kept[expert] = False
        self._update(self._tokens_reaching(expert), expert)

    def add(self, expert: int) -> None:
        self.kept[expert] = True
        self._update(self._tokens_reaching(expert), expert)

    def swap(self, back: int, out: int) -> None:
        """Add one expert and remove another one of its group."""
        rows = torch.cat([self._tokens_reaching(expert) for expert in (back, out)]).unique()
        self.kept[back], self.kept[out] = True, False
        self._update(rows, back)

    def copy(self) -> "Removals":
        """A state of its own with the same kept experts."""
        other = copy.copy(self)
        other.kept, other.sums, other.held = self.kept.clone(), self.sums.clone(), [column.clone() for column in self.held]
        return other

    def loss(self) -> float:
        """The squared loss of the kept experts."""
        return self.layer.sum_over_ranks(self.held[1].sum()).item()

    def costs(self) -> Tensor:
        """The squared loss without each expert, float64 [n]; infinite for those not kept."""
        return self.layer.sum_over_ranks(self.sums.clone()).masked_fill(~self.kept, float("inf"))

    def swap_costs(self, back: int) -> Tensor:
        """The squared loss when a removed expert replaces each kept one of its group, float64 [n]; infinite for the others."""
        kept = self.kept.clone()
        kept[back] = True
        rows = self._tokens_reaching(back, swap=True)
        now, before = self._evaluate(rows, kept, back, swap=True), [column[rows] for column in self.held[:3]]
        costs = self.sums + self._sum(now) - self._sum(before)
        return self.layer.sum_over_ranks(costs).masked_fill(~self.kept | (self.group != self.group[back]), float("inf"))

    def _update(self, rows: Tensor, changed: int) -> None:
        for some in rows.split(SMALL_GRAMS):
            now = self._evaluate(some, self.kept, changed)
            self.sums += self._sum(now) - self._sum([column[some] for column in self.held[:3]])
            for column, values in zip(self.held, now, strict=True):
                column[some] = values

    def _sum(self, held: Sequence[Tensor]) -> Tensor:
        """The squared loss of some tokens without each expert, float64 [n]."""
        return held[1].sum() + held[2].sum(0)

    def _evaluate(self, rows: Tensor, kept: Tensor, changed: int | None = None, swap: bool = False) -> list[Tensor]:
        """What is held of some tokens, see `_changes`. changed: an expert in whose group alone `kept` differs from what is held
        (None: nothing is held yet); swap: only experts of this group can be removed."""
        alive, m = kept[self.layer.order[rows]], self.layer.order.shape[1]
        ranks = torch.arange(m, device=alive.device).expand_as(alive)
        return self._changes(rows, torch.where(alive, ranks, m).topk(self.k + 1, dim=1, largest=False).values, kept)

    def _changes(self, rows: Tensor, places: Tensor, kept: Tensor) -> list[Tensor]:
        """places: in `order`, of the k chosen experts and the next one (m if there is none), [rows, k + 1]. Returns them, the
        squared loss [rows], and its change from removing each expert, [rows, n]."""
        losses, chosen = self._losses(rows, places, kept), self.layer.order[rows[:, None], places[:, :-1]]
        loss = losses[:, -1]
        changes = losses.new_zeros(len(rows), self.layer.n) if self.all_scores is None else self._rescaled(rows, places, kept)
        return [places, loss, changes.scatter_(1, chosen, losses[:, :-1] - loss[:, None])]

    def _losses(self, rows: Tensor, places: Tensor, kept: Tensor, gone: Tensor | float = 0.0) -> Tensor:
        """The squared loss without each of the k + 1 experts at `places`, [rows, k + 1]. The last one, without the next expert,
        is that of the kept experts. gone: the scores [rows, 1] of experts that are removed from `kept` as well."""
        m = self.layer.order.shape[1]
        inside = places.clamp(max=m - 1)
        x = self.raw[rows[:, None], inside].masked_fill(places == m, 0.0)
        gram = gram_between(self.layer.gram, inside, inside, rows).double()
        pulled = (gram @ x[:, :, None])[:, :, 0]
        square = (x * pulled).sum(1, keepdim=True) - 2 * x * pulled + x * x * gram.diagonal(dim1=1, dim2=2)
        along = x * self.dot[rows[:, None], inside]
        total = (self._total(rows, x, kept) - gone) / self.layer.router.scale
        return square / total**2 - 2 * (along.sum(1, keepdim=True) - along) / total + self.norm[rows, None]

    def _total(self, rows: Tensor, x: Tensor, kept: Tensor) -> Tensor:
        """The divisor of the routing weights [rows, k + 1] when each of the k + 1 experts is left out."""
        if self.all_scores is not None:
            total = (self.all_scores[rows] * kept).sum(1, keepdim=True)
            return torch.cat([total - x[:, :-1], total], 1)
        router = self.layer.router
        return x.sum(1, keepdim=True) - x + router.eps if router.normalises else torch.ones_like(x)

    def _tokens_reaching(self, expert: int, swap: bool = False) -> Tensor:
        """The tokens that have an expert among their k + 1 best while it is kept (all, for a softmax not renormalised)."""
        if self.all_scores is not None:
            return self.all
        within = torch.arange(self.layer.order.shape[1], device=self.kept.device) <= self.held[0][:, -1:]
        return ((self.layer.order == expert) & within).any(1).nonzero()[:, 0]

    def _rescaled(self, rows: Tensor, places: Tensor, kept: Tensor) -> Tensor:
        """The change of loss [rows, n] from removing experts that a token did not choose, which rescales its weights."""
        places = places[:, :-1]
        x, gram = self.raw[rows[:, None], places], gram_between(self.layer.gram, places, places, rows).double()
        square = (x[:, None] @ gram @ x[:, :, None]).flatten(1)  # [rows, 1]
        along = (x * self.dot[rows[:, None], places]).sum(1, keepdim=True)
        shares = self.all_scores[rows] * kept / self.layer.router.scale
        total = shares.sum(1, keepdim=True)
        less = total - shares
        return square * (less**-2 - total**-2) - 2 * along * (1 / less - 1 / total)


class GroupRemovals(Removals):
    """`Removals` for a router with groups, whose tokens choose within their best ones.

    A group's score is the sum of its best experts' scores. Removing one of these may lose a token the group: it then chooses
    within the next group instead.
    """

    def __init__(self, layer: LayerTrace, kept: Sequence[int] | None = None):
        self.ranking = replace(layer.router, groups=1).ranking(layer.logits)  # [tokens, n]
        self.place = layer.order.argsort(1)  # of each expert in `order`
        super().__init__(layer, kept)

    def _evaluate(self, rows: Tensor, kept: Tensor, changed: int | None = None, swap: bool = False) -> list[Tensor]:
        """In addition, what `_tokens_reaching` compares with: the lowest score among the experts chosen and the next one; the
        same with the experts chosen where a group is lost, both [rows]; the sums of the last group chosen and of the next one,
        [rows, 2]; each group's best scores and their experts, both [rows, groups, group_size + 1]."""
        ranking = self.ranking[rows].masked_fill(~kept, float("-inf")).unflatten(1, (self.layer.router.groups, -1))
        best = self._best(rows, ranking, changed)
        sums = nn.functional.pad(best[0][..., :-1].sum(2), (0, 1), value=float("-inf"))  # the last one is no group
        top = sums.topk(self.layer.router.top_groups + 1)
        places, scores = self._choose(rows, ranking, top.indices[:, :-1])
        held = self._changes(rows, places, kept)
        row, slot, out = self._losing(best, top, changed if swap else None)
        others = top.indices[row].scatter(1, slot[:, None], top.indices[row, -1:])[:, :-1]  # the next group instead
        places, instead = self._choose(rows[row], ranking[row], others)
        gone = 0.0 if self.all_scores is None else self.all_scores[rows[row], out][:, None]
        held[2][row, out] = self._losses(rows[row], places, kept, gone)[:, -1] - held[1][row]
        lowest = scores[:, -1].scatter_reduce(0, row, instead[:, -2], "amin")
        return [*held, scores[:, -1], lowest, top.values[:, -2:], *best]

    def _update(self, rows: Tensor, changed: int) -> None:
        super()._update(rows, changed)
        group = self.group == self.group[changed]
        best = self.ranking[:, group].masked_fill(~self.kept[group], float("-inf")).topk(self.layer.router.group_size + 1)
        for column, values in zip(self.held[-2:], best, strict=True):  # of all tokens, for the next `_best`
            column[:, self.group[changed]] = values

    def _best(self, rows: Tensor, ranking: Tensor, changed: int | None) -> list[Tensor]:
        """Each group's best scores and their experts, both [rows, groups, group_size + 1]."""
        if changed is None:
            return list(ranking.topk(self.layer.router.group_size + 1))
        best, group = [column[rows] for column in self.held[-2:]], int(self.group[changed])
        for column, values in zip(best, ranking[:, group].topk(self.layer.router.group_size + 1), strict=True):
            column[:, group] = values
        return best

    def _choose(self, rows: Tensor, ranking: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Places in `order` of the k best experts in some groups [rows, top_groups] and the next one (m if there is none), and
        their scores, both [rows, k + 1]."""
        size, m = ranking.shape[2], self.layer.order.shape[1]
        scores, found = ranking.gather(1, groups[:, :, None].expand(-1, -1, size)).flatten(1).topk(self.k + 1)
        experts = groups.gather(1, found // size) * size + found % size
        return self.place[rows[:, None], experts].masked_fill(scores == float("-inf"), m), scores

    def _losing(self, best: Sequence[Tensor], top: tuple[Tensor, Tensor], back: int | None) -> tuple[Tensor, ...]:
        """The tokens that lose a group without an expert, that group's index in `top`, and the expert, each [cases]. best: see
        `_best`; top: the groups chosen and the next one, [rows, top_groups + 1]; back: see to its group alone."""
        groups, size = top.indices[:, :-1], self.layer.n // self.layer.router.groups
        scores = best[0].gather(1, groups[:, :, None].expand(-1, -1, best[0].shape[2]))
        each = torch.eye(scores.shape[2], dtype=torch.bool, device=scores.device)[:-1]
        lost = scores[:, :, None].masked_fill(each, 0.0).sum(3) < top.values[:, -1:, None]  # [rows, top_groups, group_size]
        if back is not None:
            lost &= (groups == self.group[back])[:, :, None]
        row, slot, which = lost.nonzero().unbind(1)
        return row, slot, best[1][row, groups[row, slot], which] + groups[row, slot] * size

    def _tokens_reaching(self, expert: int, swap: bool = False) -> Tensor:
        """The tokens whose choice, or whose choice without any other expert, depends on an expert. swap: without any other
        expert of its group."""
        if self.all_scores is not None:
            return self.all
        lowest, last, best = self.held[3 if swap else 4], self.held[5][:, 0 if swap else 1], self.held[6]
        group, score = self.group[expert], self.ranking[:, expert]
        rows = (score >= torch.minimum(best[:, group, -1], lowest)).nonzero()[:, 0]
        best = torch.cat([best[rows, group, :-1], score[rows, None]], 1)  # the expert may be among the best already
        return rows[best.topk(self.layer.router.group_size).values.sum(1) >= last[rows]]
