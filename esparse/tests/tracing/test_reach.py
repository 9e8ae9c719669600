"""Which experts tokens reach with groups, against the choices under every subset."""

import itertools
from collections.abc import Callable

import pytest
import torch

from esparse.measure.search_cost import grouped_layer, normal
from esparse.moe.masking import masked_layer
from esparse.moe.routers import Router
from esparse.pruning.search import all_subsets
from esparse.tracing.losses import reconstruction_loss
from esparse.tracing.reach import reach, within_reach
from esparse.tracing.recorder import trace_block


def chosen_under_any_subset(choose: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor, groups: int, lost: int):
    """Which experts some subset lets each token choose, bool [tokens, n]; every group loses `lost`."""
    numbers, found = torch.arange(like.shape[1]).view(groups, -1).tolist(), torch.zeros_like(like, dtype=torch.bool)
    for parts in itertools.product(*(itertools.combinations(group, len(group) - lost) for group in numbers)):
        kept = torch.tensor(list(itertools.chain(*parts)))
        found.scatter_(1, kept[choose(kept)], True)
    return found


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("groups", "top"), [(4, 1), (4, 2), (3, 2), (3, 3), (2, 2)])
@pytest.mark.parametrize("lost", [1, 2])
def test_no_subset_lets_a_token_choose_beyond_its_reach(groups, top, size, lost):
    """The bound is exact if a token may choose within any `top` groups; a router that takes the best ones reaches no more."""
    lost = min(lost, 12 // groups - size)
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, 12, generator=generator)
    router = Router(score="sigmoid", bias=(0.1, 0.4) * 6, groups=groups, top_groups=top, group_size=size)
    k, ranking = min(2, top * (12 // groups - lost)), router.ungrouped(logits)
    found = within_reach(ranking, k, lost, router)
    assert found.sum(1).max() <= reach(12, k, 12 - groups * lost, router)
    by_router = chosen_under_any_subset(
        lambda kept: router.ranking(logits[:, kept], kept).topk(k).indices, logits, groups, lost
    )
    assert not (by_router & ~found).any()
    expected = torch.zeros_like(found)
    for some in itertools.combinations(range(groups), top):
        outside = ~torch.isin(torch.arange(12) // (12 // groups), torch.tensor(some))
        inside = ranking.masked_fill(outside, float("-inf"))
        expected |= chosen_under_any_subset(lambda kept: inside[:, kept].topk(k).indices, logits, groups, lost)  # noqa: B023
    assert torch.equal(found, expected)


@pytest.mark.parametrize("r", [8, 12])
@torch.no_grad()
def test_a_trace_holds_what_its_subsets_choose_and_the_losses_of_running_them(r):
    layer, states = grouped_layer(16, 2, 4, hidden=32, inner=16), normal(200, 32)
    traced, target = trace_block(layer, states, r), layer.block(states[None])
    real = traced.order < 16
    assert traced.order.shape[1] == reach(16, 2, r, traced.router) < 16
    assert not real.all() and torch.equal(real, real.cummin(1).values)  # the number n comes last
    i, j = torch.triu_indices(real.shape[1], real.shape[1])
    assert torch.equal(traced.gram[:, i == j] > 0, real)  # no other expert ran
    for kept in all_subsets(traced, r)[::97]:
        with masked_layer(layer, kept):
            again = layer.block(states[None])
        assert reconstruction_loss(traced, kept) == pytest.approx((again - target).norm().item(), rel=1e-4)
