"""Losses for greedy removal, updated after each expert that is removed or added back."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..moe.routers import CHOSEN_SOFTMAX
from .losses import gram_between, targets
from .trace import LayerTrace, parts

SMALL_GRAMS = 4096  # tokens whose small Grams are in memory at once


class Removals:
    """The squared loss without each expert of a kept set, updated after each change of the set.

    A token's loss depends on its k chosen experts and the next in line. Removing an expert changes only the tokens that chose
    it (and, where a softmax is not renormalised, scales the weights of all tokens).
    """

    def __init__(self, layer: LayerTrace, kept: Sequence[int] | None = None):
        """kept: the experts to start from (None: all)."""
        self.layer, (tokens, m), device = layer, layer.order.shape, layer.order.device
        if layer.router.score in ("softmax", CHOSEN_SOFTMAX):  # proportional to the weights, whichever experts are kept
            scores = (layer.logits.double() - layer.logits.double().amax(1, keepdim=True)).exp()  # [tokens, n]
        else:
            scores = layer.router.scores(layer.logits).double()
        # [tokens, m]: routing weights before normalisation and scaling
        self.raw = nn.functional.pad(scores, (0, 1)).gather(1, layer.order)
        self.all_scores = scores if layer.router.score == "softmax" and not layer.router.renormalise else None
        self.all, ranks = torch.arange(tokens, device=device), torch.arange(m, device=device)
        self.place = layer.order.new_full((tokens, layer.n + 1), m).scatter_(1, layer.order, ranks.expand(tokens, -1))[:, :-1]
        self.group = torch.arange(layer.n, device=device) // (layer.n // layer.router.groups)
        found = [targets(some) for some in parts(layer, SMALL_GRAMS)]
        self.dot, self.norm = (torch.cat(column) for column in zip(*found, strict=True))  # [tokens, m], [tokens]
        self.kept = torch.zeros(layer.n, dtype=torch.bool, device=device)
        self.kept[list(range(layer.n) if kept is None else kept)] = True
        self.tried: dict[int, tuple] = {}  # the last result of `_after`
        self._start()

    def _start(self) -> None:
        several = [self._evaluate(some, self.kept) for some in self.all.split(SMALL_GRAMS)]
        self.held = [torch.cat(column) for column in zip(*several, strict=True)]
        self.sums = self._sum(self.all, self.held, self.kept)

    def change(self, expert: int) -> None:
        """Remove an expert, or add it back if it is removed."""
        self.kept, rows, now, self.sums = self._after(expert)
        self.tried = {}
        for column, values in zip(self.held, now, strict=True):
            column[rows] = values

    def copy(self) -> "Removals":
        """A state of its own with the same kept experts."""
        other = copy.copy(self)
        other.held = [column.clone() for column in self.held]
        return other

    def loss(self) -> float:
        """The squared loss of the kept experts."""
        return self.layer.sum_over_ranks(self.sums.sum(0))[-1].item()

    def costs(self) -> Tensor:
        """The squared loss without each expert, float64 [n]; infinite for those not kept."""
        return self.layer.sum_over_ranks(self.sums.sum(0))[:-1].masked_fill(~self.kept, float("inf"))

    def swap_costs(self, back: int) -> Tensor:
        """The squared loss when a removed expert replaces each kept one of its group, float64 [n]; infinite for the others."""
        *_, sums = self._after(back)
        others = ~self.kept | (self.group != self.group[back])
        return self.layer.sum_over_ranks(sums.sum(0))[:-1].masked_fill(others, float("inf"))

    def _after(self, expert: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """What `change` makes of `kept`; the tokens whose choice it changes; what is then held of them; `sums`."""
        if expert not in self.tried:
            kept, rows = self.kept.clone(), self._reached(expert).nonzero()[:, 0]
            kept[expert] ^= True
            before = [column[rows] for column in self.held]
            now = self._evaluate(rows, kept) if self.kept[expert] else self._add(rows, expert, before, kept)
            if self.all_scores is None:
                sums = self.sums + self._sum(rows, now, kept) - self._sum(rows, before, self.kept)
            else:
                held = [column.index_copy(0, rows, values) for column, values in zip(self.held, now, strict=True)]
                sums = self._sum(self.all, held, kept)
            self.tried = {expert: (kept, rows, now, sums)}
        return self.tried[expert]

    def _reached(self, expert: int) -> Tensor:
        """Which tokens have an expert among their k + 1 best while it is kept, [tokens]."""
        return self.place[:, expert] <= self.held[0][:, -1]

    def _evaluate(self, rows: Tensor, kept: Tensor) -> list[Tensor]:
        """What is held of some tokens: the places in `order` of their k chosen experts and the next one (m if there is none),
        [rows, k + 1], and their `_terms`."""
        alive, m = kept[self.layer.order[rows]], self.layer.order.shape[1]
        places = torch.where(alive, torch.arange(m, device=alive.device), m)
        places = places.topk(self.layer.k + 1, dim=1, largest=False).values
        return [places, self._terms(rows, places)]

    def _add(self, rows: Tensor, expert: int, held: Sequence[Tensor], kept: Tensor) -> list[Tensor]:
        """`_evaluate` with an expert added to what is held of some tokens."""
        places = torch.cat([held[0], self.place[rows, expert, None]], 1).sort(1).values[:, :-1]
        return [places, self._terms(rows, places)]

    def _terms(self, rows: Tensor, places: Tensor) -> Tensor:
        """The squared loss without each of the k + 1 experts at `places`, [rows, 1, k + 1]; the last one, without the next
        expert, is that of the kept experts. With `all_scores`, two numbers that `_losses` needs instead, [rows, 2, k + 1]."""
        m, router = self.layer.order.shape[1], self.layer.router
        inside = places.clamp(max=m - 1)
        x = self.raw[rows[:, None], inside].masked_fill(places == m, 0.0)
        gram = gram_between(self.layer.gram, inside, inside, rows).double()
        pulled = (gram @ x[:, :, None])[:, :, 0]
        square = (x * pulled).sum(1, keepdim=True) - 2 * x * pulled + x * x * gram.diagonal(dim1=1, dim2=2)
        along = x * self.dot[rows[:, None], inside]
        along = along.sum(1, keepdim=True) - along
        if self.all_scores is not None:
            return torch.stack([square, along], 1)
        total = x.sum(1, keepdim=True) - x + router.eps if router.normalises else torch.ones_like(x)
        return self._loss(rows, square, along, total)[:, None]

    def _loss(self, rows: Tensor, square: Tensor, along: Tensor, total: Tensor) -> Tensor:
        """||y - z||^2 for y = scale / total sum_i x_i f_i, from the sum's squared norm and its product with z, [rows, ...]."""
        total = total / self.layer.router.scale
        return square / total**2 - 2 * along / total + self.norm[rows, None]

    def _losses(self, rows: Tensor, terms: Tensor, experts: Tensor, kept: Tensor) -> Tensor:
        """The squared loss [rows, e] for terms [rows, 1 or 2, e] when each of the experts [rows, e] is removed from `kept`; the
        number n removes none."""
        if self.all_scores is None:
            return terms[:, 0]
        shares = nn.functional.pad(self.all_scores[rows] * kept, (0, 1))
        return self._loss(rows, *terms.unbind(1), shares.sum(1, keepdim=True) - shares.gather(1, experts))

    def _sum(self, rows: Tensor, held: Sequence[Tensor], kept: Tensor) -> Tensor:
        """The squared loss of some tokens without each expert, and with all kept ones, as parts that add up to it: float64
        [parts, n + 1]."""
        several = zip(*(column.split(SMALL_GRAMS) for column in (rows, *held)), strict=True)
        return sum(self._sum_of(some, now, kept) for some, *now in several)

    def _sum_of(self, rows: Tensor, held: Sequence[Tensor], kept: Tensor) -> Tensor:
        chosen, terms, last = self.layer.order[rows[:, None], held[0][:, :-1]], held[1][..., :-1], held[1][..., -1:]
        if self.all_scores is None:
            sums = last.sum().repeat(self.layer.n + 1)
        else:
            everyone = torch.arange(self.layer.n + 1, device=rows.device).expand(len(rows), -1)
            sums = self._losses(rows, last, everyone, kept).sum(0)
        changes = self._losses(rows, terms, chosen, kept) - self._losses(rows, last, chosen, kept)
        return sums.index_add_(0, chosen.flatten(), changes.flatten())[None]


class GroupRemovals(Removals):
    """`Removals` for a router with groups, whose tokens choose within their best ones.

    A group's score is the sum of its best experts' scores. Removing one of these may lose a token the group: it then chooses
    outside, whatever is left of the group. The second part of `sums` is what this adds to the loss, right for one group at a
    time: that of the last expert that was changed or tried.
    """

    def _start(self) -> None:
        router, tokens, self.size = self.layer.router, len(self.all), self.layer.n // self.layer.router.groups
        self.ranking = router.ungrouped(self.layer.logits)  # [tokens, n]
        self.within = self.ranking.masked_fill(self.place == self.layer.order.shape[1], float("-inf"))
        self.best = self._best(slice(None), slice(None), self.kept)  # both [tokens, groups, group_size + 1]
        # the terms outside each group and the score of the next in line there, nan while not known: [tokens, groups, 2 or 3]
        self.outside = self.norm.new_full((tokens, router.groups, 2 + (self.all_scores is not None)), float("nan"))
        self._compare(0)
        super()._start()
        self.swept = None

    def _compare(self, group: int) -> None:
        """Find each token's best groups outside one, and the score above which this one is among the best."""
        self.swept, count = group, self.layer.router.top_groups
        scores = self.best[0][..., :-1].sum(2).index_fill_(1, torch.tensor(group, device=self.all.device), float("-inf"))
        scores, others = scores.sort(dim=1, descending=True, stable=True)
        self.others, bar = others[:, :count], scores[:, count - 1]
        below = bar.nextafter(torch.full_like(bar, float("-inf")))
        self.bar = torch.where(others[:, count - 1] > group, below, bar)  # of equal groups, the first is better

    def change(self, expert: int) -> None:
        super().change(expert)
        best, score = self.held[3], self.ranking[:, expert, None]
        rows = (score >= best[:, -1:]).nonzero()[:, 0]
        for column, values in zip(self.held[3:], self._best(rows, self.swept, self.kept), strict=True):
            column[rows] = values
        stale = score >= torch.minimum(self.outside[..., -1], best[:, -1:])
        stale[:, self.swept] = False
        self.outside[..., -1].masked_fill_(stale, float("nan"))

    def _after(self, expert: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        if self.swept != (group := int(self.group[expert])):
            self._compare(group)
            self.held[3:] = [column[:, group] for column in self.best]
            self.sums = torch.stack([self.sums[0], self._lost(self.all, self.held, self.kept)])
        return super()._after(expert)

    def _reached(self, expert: int) -> Tensor:
        """Also those for which an expert, while it is kept, decides whether they choose within its group, or lose it."""
        (scores, best), score = self.held[2:4], self.ranking[:, expert]
        most = best[:, :-2].sum(1) + torch.maximum(best[:, -2], score)
        return (score >= torch.minimum(scores[:, -1], best[:, -1])) & (most > self.bar)

    def _evaluate(self, rows: Tensor, kept: Tensor) -> list[Tensor]:
        """In addition, the scores of the k + 1, [rows, k + 1], and of the swept group the `_best`."""
        best, experts = self._best(rows, self.swept, kept)
        groups = self.others[rows]
        groups[:, -1] = torch.where(best[:, :-1].sum(1) > self.bar[rows], self.swept, groups[:, -1])
        places, scores = self._choose(rows, groups, kept)
        return [places, self._terms(rows, places), scores, best, experts]

    def _add(self, rows: Tensor, expert: int, held: Sequence[Tensor], kept: Tensor) -> list[Tensor]:
        places, _, scores, best, experts = held
        new = (best[:, :-1].sum(1) <= self.bar[rows]).nonzero()[:, 0]  # they choose within the group, and did not before
        best, experts = _inserted(best, self.ranking[rows, expert], experts, torch.full_like(rows, expert % self.size))
        scores, places = _inserted(scores, self.within[rows, expert], places, self.place[rows, expert])
        groups = self.others[rows[new]]
        groups[:, -1] = self.swept
        places[new], scores[new] = self._choose(rows[new], groups, kept)
        return [places, self._terms(rows, places), scores, best, experts]

    def _best(self, rows: Tensor | slice, groups: int | slice, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The best scores in some groups and their experts, counted within the group, [rows, groups, group_size + 1]."""
        return self._kept(self.ranking, rows, groups, kept).topk(self.layer.router.group_size + 1)

    def _kept(self, scores: Tensor, rows: Tensor | slice, groups: Tensor | int | slice, kept: Tensor) -> Tensor:
        """The scores of the experts in some groups, -inf for those not kept, [rows, groups, size]."""
        removed = ~kept.view(-1, self.size)[groups]
        return scores.unflatten(1, (-1, self.size))[rows, groups].masked_fill(removed, float("-inf"))

    def _choose(self, rows: Tensor, groups: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Places in `order` of the k best experts in some groups [rows, top_groups] and the next one (m if there is none),
        and their scores, both [rows, k + 1]."""
        scores, found = self._kept(self.within, rows[:, None], groups, kept).flatten(1).topk(self.layer.k + 1)
        experts = groups.gather(1, found // self.size) * self.size + found % self.size
        places = self.place[rows[:, None], experts]
        return places.masked_fill(scores == float("-inf"), self.layer.order.shape[1]), scores

    def _sum_of(self, rows: Tensor, held: Sequence[Tensor], kept: Tensor) -> Tensor:
        return torch.cat([super()._sum_of(rows, held, kept), self._lost(rows, held, kept)[None]])

    def _lost(self, rows: Tensor, held: Sequence[Tensor], kept: Tensor) -> Tensor:
        """What some tokens that lose the swept group add to the loss without each expert, [n + 1]."""
        places, terms, _, best, experts = held
        each = torch.eye(best.shape[1], dtype=torch.bool, device=best.device)[:-1]
        without, bar = best[:, None].masked_fill(each, 0.0).sum(2), self.bar[rows, None]  # [rows, group_size]
        row, which = ((without <= bar) & (best[:, :-1].sum(1, keepdim=True) > bar)).nonzero().unbind(1)
        lost, rows, terms = experts[row, which, None] + self.swept * self.size, rows[row], terms[row]
        chosen = nn.functional.pad(self.layer.order[rows[:, None], places[row, :-1]] == lost, (0, 1), value=True)
        inside = terms.gather(2, chosen.int().argmax(1)[:, None, None].expand(-1, terms.shape[1], 1))
        changes = self._losses(rows, self._outside(rows), lost, kept) - self._losses(rows, inside, lost, kept)
        return self.norm.new_zeros(self.layer.n + 1).index_add_(0, lost.flatten(), changes.flatten())

    def _outside(self, rows: Tensor) -> Tensor:
        """The terms when some tokens choose outside the swept group, [rows, 1 or 2, 1]."""
        outside = self.outside[:, self.swept]
        if len(missing := rows[outside[rows, -1].isnan()].unique()):
            places, scores = self._choose(missing, self.others[missing], self.kept)
            outside[missing] = torch.cat([self._terms(missing, places)[..., -1], scores[:, -1:]], 1)
        return outside[rows, :-1, None]


def _inserted(values: Tensor, value: Tensor, labels: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Falling values [rows, size] and their labels, with one more value [rows] in its place and without the last one."""
    values, order = torch.cat([values, value[:, None]], 1).sort(dim=1, descending=True, stable=True)
    return values[:, :-1], torch.cat([labels, label[:, None]], 1).gather(1, order)[:, :-1]
