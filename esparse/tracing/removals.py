"""Losses for greedy removal, updated after each expert that is removed or added back."""

from collections.abc import Sequence

import torch

from .trace import LayerTrace

SMALL_GRAMS = 16384  # tokens whose small Grams are in memory at once


class Removals:
    """The squared loss without each expert of a kept set, updated after each change of the set.

    A token's loss depends on its k chosen experts and the next in line. Removing an expert changes only the tokens that chose
    it (and, where a softmax is not renormalised, scales the weights of all tokens).
    """

    def __init__(self, layer: LayerTrace):
        (tokens, m), device = layer.order.shape, layer.order.device
        self.layer, self.k = layer, layer.k
        i, j = torch.triu_indices(m, m, device=device)
        self.entry = torch.empty(m, m, dtype=torch.long, device=device)
        self.entry[i, j] = self.entry[j, i] = torch.arange(len(i), device=device)
        scores = _raw_scores(layer)  # [tokens, n]
        self.raw = scores.gather(1, layer.order)  # [tokens, m]: routing weights before normalisation and scaling
        self.parts = scores if layer.router.score == "softmax" and not layer.router.renormalise else None
        self.all = torch.arange(tokens, device=device)
        targets = [_target(layer, self.entry, rows) for rows in self.all.split(SMALL_GRAMS)]
        self.dot, self.norm = (torch.cat(column) for column in zip(*targets, strict=True))  # [tokens, m], [tokens]
        self.kept = torch.ones(layer.n, dtype=torch.bool, device=device)
        self.places = torch.empty(tokens, self.k + 1, dtype=torch.long, device=device)
        self.losses = torch.empty(tokens, self.k + 1, dtype=torch.float64, device=device)
        self._update(self.all)

    def remove(self, expert: int) -> None:
        rows = self._tokens_with(expert)
        self.kept[expert] = False
        self._update(rows)

    def add(self, expert: int) -> None:
        self.kept[expert] = True
        self._update(self._tokens_gaining(expert))

    def restart(self, kept: Sequence[int]) -> None:
        """Start again from these kept experts."""
        self.kept[:] = False
        self.kept[torch.tensor(kept, device=self.kept.device)] = True
        self._update(self.all)

    def loss(self) -> float:
        """The squared loss of the kept experts."""
        return self.layer.sum_over_ranks(self.losses[:, -1].sum()).item()

    def costs(self) -> torch.Tensor:
        """The squared loss without each expert, float64 [n]; infinite for those not kept."""
        return self.layer.sum_over_ranks(self._without()).masked_fill(~self.kept, float("inf"))

    def swap_costs(self, back: int) -> torch.Tensor:
        """The squared loss when a removed expert replaces each kept one, float64 [n]; infinite for those not kept."""
        kept = self.kept.clone()
        kept[back] = True
        rows = self._tokens_gaining(back)
        costs = self._sum(rows, *self._evaluate(rows, kept), kept)
        if self.parts is None:  # the other tokens' losses are unchanged
            costs += self._without() - self._sum(rows, self.places[rows], self.losses[rows], self.kept)
        return self.layer.sum_over_ranks(costs).masked_fill(~self.kept, float("inf"))

    def _without(self) -> torch.Tensor:
        if self.sums is None:
            self.sums = self._sum(self.all, self.places, self.losses, self.kept)
        return self.sums.clone()

    def _update(self, rows: torch.Tensor) -> None:
        self.sums = None
        for some in rows.split(SMALL_GRAMS):
            self.places[some], self.losses[some] = self._evaluate(some, self.kept)

    def _evaluate(self, rows: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in `order` of the k chosen experts and the next one (m if there is none), and the squared loss without each.

        Both [rows, k + 1]. The last loss, without the next one, is that of the kept experts.
        """
        alive, m = kept[self.layer.order[rows]], self.layer.order.shape[1]
        ranks = torch.arange(m, device=alive.device).expand_as(alive)
        places = torch.where(alive, ranks, m).topk(self.k + 1, dim=1, largest=False).values
        inside = places.clamp(max=m - 1)
        x = self.raw[rows].gather(1, inside).masked_fill(places == m, 0.0)
        gram = self._gram(rows, inside)
        pulled = (gram @ x[:, :, None])[:, :, 0]
        square = (x * pulled).sum(1, keepdim=True) - 2 * x * pulled + x * x * gram.diagonal(dim1=1, dim2=2)
        along = x * self.dot[rows].gather(1, inside)
        total = self._total(rows, x, kept) / self.layer.router.scale
        return places, square / total**2 - 2 * (along.sum(1, keepdim=True) - along) / total + self.norm[rows, None]

    def _gram(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        entries = self.entry[places[:, :, None], places[:, None]]
        return self.layer.gram[rows].gather(1, entries.flatten(1)).view(entries.shape).double()

    def _total(self, rows: torch.Tensor, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The divisor of the routing weights [rows, k + 1] when each of the k + 1 experts is left out."""
        if self.parts is not None:
            total = (self.parts[rows] * kept).sum(1, keepdim=True)
            return torch.cat([total - x[:, :-1], total], 1)
        router = self.layer.router
        return x.sum(1, keepdim=True) - x + router.eps if router.normalises else torch.ones_like(x)

    def _tokens_with(self, expert: int) -> torch.Tensor:
        """The tokens with an expert among their k + 1 best (all, for a softmax that is not renormalised)."""
        if self.parts is not None:
            return self.all
        inside = self.places.clamp(max=self.layer.order.shape[1] - 1)
        return (self.layer.order.gather(1, inside) == expert).any(1).nonzero()[:, 0]

    def _tokens_gaining(self, expert: int) -> torch.Tensor:
        """The tokens that get a removed expert among their k + 1 best if it comes back (or all, as above)."""
        if self.parts is not None:
            return self.all
        better = torch.arange(self.layer.order.shape[1], device=self.places.device) < self.places[:, -1:]
        return ((self.layer.order == expert) & better).any(1).nonzero()[:, 0]

    def _sum(self, rows, places, losses, kept) -> torch.Tensor:
        chosen = self.layer.order[rows].gather(1, places[:, :-1])  # [rows, k]
        change = losses[:, :-1] - losses[:, -1:]
        cost = losses.new_zeros(self.layer.n).index_add_(0, chosen.flatten(), change.flatten())
        if self.parts is not None:
            cost += sum(
                self._rescaled(*some, kept)
                for some in zip(*(x.split(SMALL_GRAMS) for x in (rows, places, chosen)), strict=True)
            )
        return cost + losses[:, -1].sum()

    def _rescaled(self, rows, places, chosen, kept) -> torch.Tensor:
        """The change of loss [n] from removing experts that a token did not choose, which rescales its weights."""
        x = self.raw[rows].gather(1, places[:, :-1])
        square = (x[:, None] @ self._gram(rows, places[:, :-1]) @ x[:, :, None]).flatten(1)  # [rows, 1]
        along = (x * self.dot[rows].gather(1, places[:, :-1])).sum(1, keepdim=True)
        parts = self.parts[rows] * kept / self.layer.router.scale
        total = parts.sum(1, keepdim=True)
        less = total - parts
        change = square * (less**-2 - total**-2) - 2 * along * (1 / less - 1 / total)
        return change.scatter(1, chosen, 0.0).sum(0)


def _raw_scores(layer: LayerTrace) -> torch.Tensor:
    """Numbers [tokens, n] that are proportional to routing weights for every kept set."""
    logits = layer.logits.double()
    if layer.router.score in ("softmax", "softmax of chosen"):
        return (logits - logits.amax(1, keepdim=True)).exp()
    return layer.router.scores(layer.logits).double()


def _target(layer: LayerTrace, entry: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """<f_i, z> [rows, m] and ||z||^2 [rows] for the output z to compare with."""
    if layer.target_dot is not None:
        return layer.target_dot[rows].double(), layer.target_norm[rows].double()
    weights = layer.weights[rows].double()
    cross = layer.gram[rows][:, entry[: layer.k].flatten()].view(len(rows), layer.k, -1).double()  # [rows, k, m]
    dot = (weights[:, None] @ cross)[:, 0]
    return dot, (weights * dot[:, : layer.k]).sum(1)
