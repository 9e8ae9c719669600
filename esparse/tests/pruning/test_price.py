"""A plan's price is what brute force over all subsets says: losses, ranks, optima and gains, and the sums over layers."""

import itertools
import math

import pytest

import esparse
from esparse.pruning.scores import ranked
from esparse.tests.conftest import random_model, random_tokens
from esparse.tests.families import family_model
from esparse.tracing.losses import LOSSES, weighed

MODELS = {
    "softmax": lambda: random_model("mixtral", 6, 2),
    "groups": lambda: family_model("deepseek_v3", 8, 2, n_group=2, topk_group=2),
}


def brute_force(layer, r: int) -> dict[tuple[int, ...], float]:
    """The loss of every subset that the router can keep."""
    losses = {}
    for subset in itertools.combinations(range(layer.n), r):
        each = [sum(e * layer.router.groups // layer.n == group for e in subset) for group in range(layer.router.groups)]
        if len(set(each)) == 1:
            losses[subset] = esparse.reconstruction_loss(layer, subset)
    return losses


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_every_column_is_that_of_brute_force(model, loss):
    trace = esparse.trace(MODELS[model](), random_tokens(), keep=4)
    plan = esparse.search_experts(trace, 4, method="random", seed=3)
    *rows, total = esparse.price(trace, plan, loss=loss)
    all_losses = [brute_force(weighed(layer, loss), 4) for layer in trace.layers]
    whole = sum(losses[tuple(kept)] ** 2 for losses, kept in zip(all_losses, plan.kept, strict=True))
    for row, layer, losses, kept in zip(rows, trace.layers, all_losses, plan.kept, strict=True):
        own, best = losses[tuple(kept)], min(losses.values())
        assert (row["layer"], row["method"], row["of"]) == (layer.name, "enumerate", len(losses))
        assert row["rank"] == 1 + sum(other < own for other in losses.values())
        assert (row["loss"], row["optimum"]) == (pytest.approx(own, rel=1e-6), pytest.approx(best, rel=1e-6))
        assert row["ratio"] == pytest.approx(own / best, rel=1e-6)
        assert row["gain"] == pytest.approx((own**2 - best**2) / whole, rel=1e-5, abs=1e-9)
    assert max(row["rank"] for row in rows) > 1
    best = math.sqrt(sum(min(losses.values()) ** 2 for losses in all_losses))
    assert total["loss"] == pytest.approx(math.sqrt(whole), rel=1e-6) and total["optimum"] == pytest.approx(best, rel=1e-6)
    assert total["gain"] == pytest.approx(sum(row["gain"] for row in rows), rel=1e-9) and total["rank"] is None
    assert total["ratio"] == pytest.approx(math.sqrt(whole) / best, rel=1e-6)


def test_what_enumeration_chose_ranks_first_and_gains_nothing(tiny_trace):
    for row in esparse.price(tiny_trace, esparse.search_experts(tiny_trace, 6)):
        assert row["rank"] in (1, None) and (row["ratio"], row["gain"]) == (1, 0)
    subsets, losses = esparse.subset_losses(weighed(tiny_trace.layers[0], "residual"), 6)
    plan = esparse.search_experts(tiny_trace, 6)
    for place in (1, 27):  # the second best and the worst
        plan.kept[0] = list(subsets[ranked(losses)[place]])
        assert esparse.price(tiny_trace, plan)[0]["rank"] == place + 1


def test_all_experts_cost_nothing(tiny_trace):
    for row in esparse.price(tiny_trace, esparse.search_experts(tiny_trace, 8)):
        assert (row["loss"], row["optimum"], row["ratio"], row["gain"]) == (0, 0, 1, 0)


def test_greedy_stands_in_where_subsets_are_too_many(tiny_trace, monkeypatch):
    greedy = esparse.search_experts(tiny_trace, 6, method="greedy")
    other = esparse.search_experts(tiny_trace, 6, method="reap")
    monkeypatch.setattr("esparse.pruning.search.MAX_SUBSETS", 27)
    rows = esparse.price(tiny_trace, other)
    assert all(row["method"] == "greedy" and row["rank"] is row["of"] is None for row in rows)
    assert [row["optimum"] for row in rows[:-1]] == pytest.approx(greedy.losses, rel=1e-6)
    assert [row["gain"] for row in esparse.price(tiny_trace, greedy)] == pytest.approx([0] * 7, abs=1e-9)


def test_plans_that_cannot_be_priced(tiny_trace):
    plan = esparse.search_experts(tiny_trace, 6)
    another = esparse.trace(random_model("mixtral", 8, 2), random_tokens())
    with pytest.raises(ValueError, match="another model"):
        esparse.price(another, plan)
    with pytest.raises(ValueError, match="Unknown loss 'l1'"):
        esparse.price(tiny_trace, plan, loss="l1")
    plan.r, plan.kept = 3, [[0, 1, 2]] * 6
    with pytest.raises(ValueError, match="trace again with keep=3"):
        esparse.price(tiny_trace, plan)
    plan.r = 4
    with pytest.raises(ValueError, match="must keep 4 different experts"):
        esparse.price(tiny_trace, plan)
