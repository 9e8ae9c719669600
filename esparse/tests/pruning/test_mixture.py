"""Mixtures of corpora: every choice, loss and score against the weighted sum over each trace alone, every subset tried."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import esparse
from esparse.pruning.scores import EXPERT_SCORES, expert_scores
from esparse.tests.conftest import apart, random_model, random_tokens
from esparse.tracing.losses import LOSSES, mixed, output_norm, weighed

SIZES = [60, 28]  # tokens of the two corpora
WEIGHTS = [(1, 1), (3, 1), (0.2, 0.9), (1e-3, 1), (1e300, 5e299)]
SUBSETS = list(itertools.combinations(range(6), 4))


@pytest.fixture(scope="module", params=["mixtral", "qwen3", "olmoe"])
def traces(request):
    """Two corpora that use the experts differently: the second knows half of the words."""
    model = random_model(request.param, 6, 2)
    return [esparse.trace(model, random_tokens(3, 20)), esparse.trace(model, random_tokens(2, 14, seed=1) // 2 + 1)]


def squares(traces, number: int, loss: str) -> np.ndarray:
    """Squared losses per token of every subset in a layer, [subsets, traces]."""
    layers = [weighed(one.layers[number], loss) for one in traces]
    losses = [[esparse.reconstruction_loss(layer, subset) for layer in layers] for subset in SUBSETS]
    return np.array(losses) ** 2 / SIZES


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_method_minimises_and_tells_the_weighted_sum(traces, weights, loss):
    shares = np.array(weights) / max(weights) / (np.array(weights) / max(weights)).sum()
    plans = {
        method: esparse.search_experts(traces, 4, method=method, loss=loss, weights=weights)
        for method in ("enumerate", "greedy", *EXPERT_SCORES, "random")
    }
    for number in range(3):
        sums = squares(traces, number, loss) @ shares * (shares @ SIZES)
        assert plans["enumerate"].kept[number] == list(SUBSETS[sums.argmin()])
        greedy = set(plans["greedy"].kept[number])  # which no swap improves
        swapped = [total for subset, total in zip(SUBSETS, sums, strict=True) if len(greedy & set(subset)) >= 3]
        assert len(swapped) == 9 and sums[SUBSETS.index(tuple(sorted(greedy)))] == pytest.approx(min(swapped), rel=1e-6)
        assert plans["enumerate"].runner_up[number] == pytest.approx(np.sort(sums)[1] ** 0.5, rel=1e-9)
        for plan in plans.values():
            expected = sums[SUBSETS.index(tuple(plan.kept[number]))] ** 0.5
            assert plan.losses[number] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_count_each_token_as_its_corpus_weighs(traces, loss):
    """Frequency as shares of the counted tokens; the others as means over them, from each trace's sums."""
    shares = (0.7, 0.3)
    layers = [weighed(one.layers[1], loss) for one in traces]
    together = mixed(layers, shares)
    used = torch.stack([expert_scores(layer, "frequency") for layer in layers])  # [traces, n]
    counted = used * used.new_tensor(shares)[:, None]
    assert apart(expert_scores(together, "frequency"), counted.sum(0)) < 1e-9
    for kind in ("reap", "activation"):
        each = torch.stack([expert_scores(layer, kind) for layer in layers])
        assert apart(expert_scores(together, kind), (each * counted).sum(0) / counted.sum(0)) < 1e-9


def test_an_expert_that_hardly_counts_keeps_its_mean(traces):
    """Used by the second corpus alone, whose tokens count next to nothing."""
    one, other = (replace(trace.layers[0]) for trace in traces)
    only = other.order[:, 0].mode().values.item()
    unused = (one.order[:, :2] != only).all(1)
    one = esparse.tracing.trace.part(one, unused.nonzero()[:, 0])
    scores = expert_scores(mixed([one, other], (1 - 1e-6, 1e-6)), "reap")
    assert scores[only].item() == pytest.approx(expert_scores(other, "reap")[only].item(), rel=1e-9)


def test_with_one_corpus_of_weight_the_plan_is_its_own(traces):
    for method, loss in itertools.product(("enumerate", "greedy", "reap", "random"), LOSSES):
        options = {"method": method, "loss": loss}
        for number, weights in enumerate(((1, 0), (0, 2.5))):
            alone = esparse.search_experts(traces[number], 4, **options)
            assert esparse.search_experts(traces, 4, weights=weights, **options) == alone
            almost = esparse.search_experts(traces, 4, weights=[w or 1e-13 for w in weights], **options)
            assert almost.kept == alone.kept and almost.losses == pytest.approx(alone.losses, rel=1e-6)
            assert almost.tokens != alone.tokens


def test_equal_traces_choose_as_one_whatever_their_weights(traces):
    alone = esparse.search_experts(traces[0], 4)
    for weights in (None, (2, 1, 5)):
        plan = esparse.search_experts([traces[0]] * 3, 4, weights=weights)
        assert plan.kept == alone.kept and plan.losses == pytest.approx(alone.losses, rel=1e-9)


def test_a_corpus_counts_alike_however_long_it_is(traces):
    """Twice the same tokens are as the tokens once."""
    doubled = [replace(layer, **{n: torch.cat([v, v]) for n, v in layer.tensors().items()}) for layer in traces[1].layers]
    longer = [traces[0], esparse.Trace(doubled, traces[1].model, traces[1].tokens)]
    for method in ("enumerate", "frequency", "reap"):
        assert esparse.search_experts(longer, 4, method=method).kept == esparse.search_experts(traces, 4, method=method).kept


def test_what_cannot_be_mixed_is_said_in_a_sentence(traces):
    other = esparse.trace(random_model("mixtral", 6, 2, seed=1), random_tokens(3, 20))
    shallow = esparse.trace(random_model("mixtral", 6, 2), random_tokens(3, 20), keep=5)
    for wrong in ([traces[0], other], [esparse.trace(random_model("mixtral", 6, 2), random_tokens()), shallow], []):
        with pytest.raises(ValueError, match="A mixture needs traces of one model that answer down to the same number"):
            esparse.search_experts(wrong, 5)
    for weights in ((1,), (1, 2, 3), (1, -1), (0, 0), (1, float("nan")), (1, float("inf"))):
        with pytest.raises(ValueError, match="Give 2 finite weights, one for each trace, none negative and not all 0, got"):
            esparse.search_experts(traces, 5, weights=weights)
    with pytest.raises(ValueError, match="'progressive' walks through one calibration set"):
        esparse.search_experts(traces, 5, method="progressive")
    with pytest.raises(ValueError, match="got \\[1.5, -0.5\\]"):
        esparse.mixtures(*traces, 5).plan(-0.5)
    with pytest.raises(ValueError, match="a token is routed to 2 of 6"):
        esparse.mixtures(*traces, 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_frontier_holds_every_mixtures_best_subset(traces, loss):
    """Against 2,001 shares by brute force; between two breakpoints one subset is best, and at each two tie."""
    found = esparse.mixtures(*traces, 4, loss=loss)
    for number, layer in enumerate(found.layers):
        points = squares(traces, number, loss)
        assert layer.subsets == SUBSETS and len(layer.breakpoints) == len(layer.frontier) - 1
        for share in np.linspace(0, 1, 2001):
            sums = points @ [1 - share, share]
            assert sums[layer.best(share)] == pytest.approx(sums.min(), rel=1e-9)
        ends = [0.0, *layer.breakpoints, 1.0]
        assert ends == sorted(set(ends))
        for at, share in enumerate(layer.breakpoints):
            before, after = (points[place] @ [1 - share, share] for place in layer.frontier[at : at + 2])
            assert before == pytest.approx(after, rel=1e-9) and before == pytest.approx(
                (points @ [1 - share, share]).min(), rel=1e-9
            )
        for at, (start, end) in enumerate(itertools.pairwise(ends)):
            middle = (start + end) / 2
            assert layer.best(middle) == layer.frontier[at] == (points @ [1 - middle, middle]).argmin()


def test_a_frontier_with_many_subsets():
    """Random points, whose hull has more vertices than a small model's losses."""
    angle, radius = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = 1.1 - torch.stack([(angle * np.pi / 2).cos(), (angle * np.pi / 2).sin()], 1) * radius[:, None].sqrt()
    layer = esparse.pruning.mixture.LayerMixtures([], torch.cat([points, points]), torch.ones(2).double())
    best = {int((points @ points.new_tensor([1 - s, s])).argmin()) for s in np.linspace(0, 1, 5001)}
    assert best <= set(layer.frontier) and len(layer.frontier) >= len(best) > 20
    for left, right, share in zip(layer.frontier[:-1], layer.frontier[1:], layer.breakpoints, strict=True):
        sums = points @ points.new_tensor([1 - share, share])
        assert sums[left].item() == pytest.approx(sums.min().item(), rel=1e-9) == pytest.approx(sums[right].item(), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_plans_and_the_minimax_of_the_whole_model(traces, loss):
    found = esparse.mixtures(*traces, 4, loss=loss)
    for share in (0, 0.05, 0.3, 0.5, 0.75, 1):
        plan, searched = found.plan(share), esparse.search_experts(traces, 4, loss=loss, weights=[1 - share, share])
        assert plan.losses == pytest.approx(searched.losses, rel=1e-9)
        assert replace(plan, losses=[], runner_up=None) == replace(searched, losses=[], runner_up=None)
    plan = found.minimax()
    for number, layers in enumerate(zip(*(one.layers for one in traces), strict=True)):
        norms = [output_norm(weighed(layer, loss)) ** 2 for layer in layers]
        worse = np.sqrt(squares(traces, number, loss) * SIZES / norms).max(1)
        assert plan.kept[number] == list(SUBSETS[worse.argmin()])
        assert plan.losses[number] == pytest.approx(worse.min(), rel=1e-9)
