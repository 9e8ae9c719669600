"""The best subsets for every mixture of two corpora, and the subset whose larger loss is smallest.

For a share s of the second corpus, a squared loss is (1 - s) A + s B, with A and B those per token of the two corpora. So a
subset is best for some s if its point (A, B) is a vertex of all points' lower left convex hull, and two vertices tie at one s.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..tracing.losses import output_norm, token_count, weighed
from ..tracing.trace import LayerTrace, Trace
from .plan import PruningPlan
from .search import mixture_digest, mixture_shares, subset_losses


@dataclass
class LayerMixtures:
    """One layer's subsets, with their losses on two corpora.

    squares: squared losses per token, float64 [subsets, 2]. norms: squared norms per token of the layer's own output, as the
    loss measures them, float64 [2].
    """

    subsets: list[tuple[int, ...]]
    squares: Tensor
    norms: Tensor

    @cached_property
    def relative(self) -> Tensor:
        """Every subset's loss on each corpus, divided by the norm of the layer's output there: [subsets, 2]."""
        return (self.squares / self.norms).sqrt()

    @cached_property
    def frontier(self) -> list[int]:
        """The numbers of the subsets that are best for some share, by rising share (Andrew's monotone chain, 1979)."""
        hull: list[tuple[float, float, int]] = []
        for x, y, number in sorted((*point, number) for number, point in enumerate(self.squares.tolist())):
            if not hull or y < hull[-1][1]:
                while len(hull) > 1 and _tie(hull[-2], hull[-1]) >= _tie(hull[-1], (x, y)):
                    hull.pop()  # the new point beats it at a smaller share than that at which it beats the point before
                hull.append((x, y, number))
        return [number for _, _, number in hull]

    @cached_property
    def breakpoints(self) -> list[float]:
        """The shares of the second corpus, rising, at which the next subset of `frontier` takes over."""
        return [_tie(*pair) for pair in itertools.pairwise(self.squares[self.frontier].tolist())]

    def best(self, share: float) -> int:
        """The number of the best subset for a share of the second corpus; at a breakpoint, the one that takes over."""
        return self.frontier[bisect_right(self.breakpoints, share)]

    @property
    def minimax(self) -> int:
        """The number of the subset whose larger `relative` loss is smallest."""
        return int(self.relative.amax(1).argmin())


def _tie(one: Sequence[float], other: Sequence[float]) -> float:
    """The share at which two points tie; the second is worse on the first corpus and better on the second."""
    worse, better = other[0] - one[0], one[1] - other[1]
    return worse / (worse + better)


@dataclass
class Mixtures:
    """All mixtures of two traces at r experts, by layer, from `mixtures`."""

    layers: list[LayerMixtures]
    traces: Sequence[Trace]
    r: int
    loss: str

    def plan(self, share: float) -> PruningPlan:
        """As `search_experts(traces, r, weights=[1 - share, share])`, and raises as it does; the plan holds no runners-up."""
        traces, shares = mixture_shares(self.traces, [1 - share, share])
        tokens = sum(part * token_count(one.layers[0]) for one, part in zip(traces, shares, strict=True))
        numbers = [layer.best(share) for layer in self.layers]
        squares = [layer.squares[number].tolist() for layer, number in zip(self.layers, numbers, strict=True)]
        losses = [math.sqrt(tokens * ((1 - share) * one + share * other)) for one, other in squares]
        return self._plan("enumerate", numbers, losses, traces, shares)

    def minimax(self) -> PruningPlan:
        """Each layer's subset whose larger relative loss is smallest; the plan's losses are these larger ones."""
        losses = [layer.relative.amax(1).min().item() for layer in self.layers]
        return self._plan("minimax", [layer.minimax for layer in self.layers], losses, *mixture_shares(self.traces))

    def _plan(self, method, numbers: Sequence[int], losses: list[float], traces, shares) -> PruningPlan:
        kept = [list(layer.subsets[number]) for layer, number in zip(self.layers, numbers, strict=True)]
        return PruningPlan(method, self.r, kept, losses, traces[0].model, mixture_digest(traces, shares), loss=self.loss)


def mixtures(one: Trace, other: Trace, r: int, *, loss: str = "residual") -> Mixtures:
    """The best subsets of r experts for every mixture of two traces; raises as `search_experts(..., method="enumerate")`."""
    mixture_shares([one, other])
    layers = [layer_mixtures(pair, r, loss) for pair in zip(one.layers, other.layers, strict=True)]
    return Mixtures(layers, [one, other], r, loss)


def layer_mixtures(layers: Sequence[LayerTrace], r: int, loss: str) -> LayerMixtures:
    """The losses of all subsets of r experts of one layer, from its traces on two corpora."""
    layers = [weighed(layer, loss) for layer in layers]
    (subsets, one), (_, other) = (subset_losses(layer, r) for layer in layers)
    tokens = one.new_tensor(list(map(token_count, layers)))
    squares, norms = torch.stack([one, other], 1).square(), one.new_tensor(list(map(output_norm, layers))).square()
    return LayerMixtures(subsets, squares / tokens, norms / tokens)
