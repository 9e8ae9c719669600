"""The numbers of the two figures of mixtures against plans searched, and models evaluated, one by one; both are drawn."""

import pytest

import esparse
from esparse.experiments import divergence, domain, figures
from esparse.tracing.losses import output_norm, weighed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return esparse.Run(sequences=6, length=48, keep=[6, 5], folder=tmp_path_factory.mktemp("run"))


def relative(traces, kept) -> list[float]:
    """Mean over layers of loss / output norm, both relative to the residual stream, on each corpus."""
    means = []
    for one in traces:
        layers = [weighed(layer, "residual") for layer in one.layers]
        ratios = [esparse.reconstruction_loss(*pair) / output_norm(pair[0]) for pair in zip(layers, kept, strict=True)]
        means.append(sum(ratios) / len(kept))
    return means


def test_the_frontier_of_losses(run):
    data, traces = divergence.mixture(run), [run.trace("web"), run.trace("arithmetic")]
    for row in data["rows"]:
        assert row["shares"][0] == 0 and row["shares"][-1] == 1 and len(row["shares"]) > 5
        middles = [(start + end) / 2 for start, end in zip(row["shares"][:-1], row["shares"][1:], strict=True)]
        for share, pair in zip([*middles, 0.5], [*row["frontier"][:-1], row["equal"]], strict=True):
            plan = esparse.search_experts(traces, row["r"], weights=[1 - share, share])
            assert pair == pytest.approx(relative(traces, plan.kept), rel=1e-4)
        for corpus, at in (("web", 0), ("arithmetic", -1)):
            assert row["frontier"][at] == pytest.approx(relative(traces, run.plan(corpus, row["r"]).kept), rel=1e-4)
        kept = esparse.mixtures(*traces, row["r"]).minimax().kept
        assert row["minimax"] == pytest.approx(relative(traces, kept), rel=1e-4)
        assert row["frontier"] == sorted(row["frontier"]) and row["frontier"][::-1] == sorted(
            row["frontier"], key=lambda pair: pair[1]
        )
    axes = figures.draw("02_mixture", figures.rounded(data)).axes[0]
    assert [line.get_label() for line in axes.lines][:2] == ["r = 6", "r = 5"] and len(axes.lines) == 6


def test_the_frontier_of_perplexities(run):
    data = domain.mixture(run)
    for row in data["rows"]:
        for at, corpus in ((0, "web"), (-1, "arithmetic")):
            plan = run.plan(corpus, row["r"])
            assert row["frontier"][at] == [run.perplexity(name, plan) for name in ("web", "arithmetic")]
        plan = esparse.mixtures(run.trace("web"), run.trace("arithmetic"), row["r"]).plan(0.25)
        with esparse.masked(run.model, plan):
            found = [esparse.perplexity(run.model, run.held_out(corpus)) for corpus in ("web", "arithmetic")]
        assert row["frontier"][1] == pytest.approx(found, rel=1e-4)
        mixed = esparse.trace(run.model, run.tokens("web+arithmetic"), keep=5)
        with esparse.masked(run.model, esparse.search_experts(mixed, row["r"])):
            found = [esparse.perplexity(run.model, run.held_out(corpus)) for corpus in ("web", "arithmetic")]
        assert row["mixed text"] == pytest.approx(found, rel=1e-4)
    figure = figures.draw("07_mixture", figures.rounded(data))
    assert [axes.get_title() for axes in figure.axes] == ["r = 5"] and len(figure.axes[0].lines) == 4
