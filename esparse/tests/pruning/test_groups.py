"""Greedy search where tokens choose within their best groups: its losses and its result, against routing every swap again."""

import pytest
import torch

from esparse.measure.search_cost import grouped_layer as grouped_layer_of
from esparse.measure.search_cost import normal
from esparse.moe.routers import Router
from esparse.pruning.greedy import remove_greedily, remove_greedily_anew
from esparse.pruning.scores import best_by_score, expert_groups, expert_scores, ranked
from esparse.tracing.losses import losses_of, reconstruction_loss
from esparse.tracing.recorder import trace_block
from esparse.tracing.removals import GroupRemovals
from esparse.tracing.trace import LayerTrace

KINDS = {
    "sigmoid": {},
    "best one": {"group_size": 1},
    "no bias": {"bias": None},
    "zero fill": {"zero_fill": True},
    "one group": {"top_groups": 1},
    "every group": {"top_groups": 3},
    "not renormalised": {"renormalise": False},
    "sqrtsoftplus": {"score": "sqrtsoftplus"},
    "softmax": {"score": "softmax", "bias": None},
    "softmax of all": {"score": "softmax", "bias": None, "group_size": 1, "renormalise": False},
}
AGAIN = {  # whose ranking, or choice outside the best groups, depends on the kept experts
    "softmax and bias": {"score": "softmax"},
    "negative scores": {"zero_fill": True, "bias": (-0.6,) * 12},
}


def grouped_layer(k: int = 3, seed: int = 0, twins: bool = False, **kind) -> LayerTrace:
    """12 experts in 3 groups, made of nothing but logits and output vectors. twins: in pairs that are the same expert."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(12) // 2 * 2 if twins else torch.arange(12)
    logits = torch.randn(150, 12, generator=generator)[:, own]
    outputs = torch.randn(150, 12, 5, generator=generator, dtype=torch.float64)[:, own]
    bias = torch.rand(12, generator=generator)[own]
    about = {"score": "sigmoid", "renormalise": True, "scale": 1.5, "bias": tuple(bias.tolist()), "groups": 3, "top_groups": 2}
    router = Router(**about | kind)
    order, (i, j) = router.ranking(logits).topk(12).indices, torch.triu_indices(12, 12)
    ranking = outputs.gather(1, order[..., None].expand(-1, -1, 5))
    return LayerTrace("layer", k, router, logits, order, (ranking @ ranking.mT)[:, i, j], keep=k)


def swaps(layer: LayerTrace, kept: list[int], back: int) -> list[list[int]]:
    """The kept experts after each swap of a removed expert for one of its group."""
    group = next(group for group in expert_groups(layer) if back in group)
    return [sorted({*kept, back} - {out}) for out in kept if out in group]


def search_again(layer: LayerTrace, r: int) -> list[int]:
    """The search that routes all tokens again for every swap."""
    kept = best_by_score(layer, r, expert_scores(layer, "reap"))
    now, before = reconstruction_loss(layer, kept), float("inf")
    while now < before:
        before = now
        for back in sorted(set(range(layer.n)) - set(kept)):
            options = swaps(layer, kept, back)
            losses = losses_of(layer, options)
            best = ranked(losses)[0]
            if losses[best] < now * (1 - 1e-6):
                kept, now = options[best], losses[best].item()
    return sorted(kept)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_swaps_within_groups_would_cost_is_what_they_cost(kind, k):
    """Kept up to date over swaps that help or not."""
    layer = grouped_layer(k, **KINDS[kind])
    state = GroupRemovals(layer, best_by_score(layer, 9, expert_scores(layer, "reap")))
    for step in range(6):
        kept = state.kept.nonzero()[:, 0].tolist()
        assert state.loss() ** 0.5 == pytest.approx(reconstruction_loss(layer, kept), rel=1e-6)
        for back in sorted(set(range(12)) - set(kept)):
            costs, options = state.swap_costs(back), swaps(layer, kept, back)
            assert torch.allclose(costs[costs.isfinite()].sqrt(), losses_of(layer, options), rtol=1e-6)
        back = sorted(set(range(12)) - set(kept))[step % 3]
        out = state.swap_costs(back).argsort()[step % 3]
        state.change(back)
        state.change(int(out))


@torch.no_grad()
def test_swaps_cost_what_they_cost_where_tokens_reach_less_than_half_of_the_experts():
    layer = grouped_layer_of(64, 4, 4, hidden=32, inner=16)
    traced = trace_block(layer, normal(300, 32), 48)
    state = GroupRemovals(traced, kept := sorted(best_by_score(traced, 48, expert_scores(traced, "reap"))))
    assert traced.order.shape[1] == 28 and (traced.order == 64).any()
    for back in sorted(set(range(64)) - set(kept)):
        costs, options = state.swap_costs(back), swaps(traced, kept, back)
        assert torch.allclose(costs[costs.isfinite()].sqrt(), losses_of(traced, options), rtol=1e-5)
    assert remove_greedily(traced, 48) == search_again(traced, 48)


@pytest.mark.parametrize("r", [6, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_keeps_what_routing_every_swap_again_keeps(kind, r):
    for seed in range(3):
        layer = grouped_layer(2, seed, **KINDS[kind])
        assert remove_greedily(layer, r) == search_again(layer, r)


@pytest.mark.parametrize("kind", AGAIN)
def test_a_router_whose_choice_depends_on_the_kept_experts_is_routed_again(kind):
    layer = grouped_layer(**AGAIN[kind])
    assert remove_greedily(layer, 9) == remove_greedily_anew(layer, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_where_experts_are_the_same_greedy_loses_as_little(kind):
    """Scores, group scores and losses then have ties, of which any may be taken."""
    for seed in range(3):
        layer = grouped_layer(seed=seed, twins=True, **KINDS[kind])
        found, expected = (reconstruction_loss(layer, search(layer, 9)) for search in (remove_greedily, search_again))
        assert found <= expected * (1 + 1e-9)
