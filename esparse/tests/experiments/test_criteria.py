"""The study of criteria scores each plan as if its method were called by hand, and its table and figure are plain means."""

import math
import statistics

import pytest

import esparse
from esparse.experiments import criteria
from esparse.experiments.run import Run
from esparse.experiments.tables import pick
from esparse.pruning import search
from esparse.tracing.losses import LOSSES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return Run(folder=folder, sequences=4, length=64, keep=[6], tasks=["web_facts"], limit=4)


@pytest.fixture(scope="module")
def rows(run):
    return [{"seed": 0, **row} for row in criteria.criteria_rows(run)]


def test_every_method_is_scored_on_both_corpora(run, rows):
    trace = esparse.trace(run.model, run.tokens("arithmetic"), keep=6)
    held_out = [run.held_out(corpus) for corpus in ("web", "arithmetic")]
    for method, loss in (("enumerate", "residual"), ("frequency", "eq3"), ("easy-ep", "eq3"), ("contribution", "residual")):
        plan = esparse.search_experts(trace, 6, method=method, loss=loss)
        with esparse.masked(run.model, plan):
            expected = [esparse.perplexity(run.model, tokens) for tokens in held_out]
        [row] = pick(rows, method=method, loss=loss, calibration="arithmetic")
        assert row["perplexity"] == pytest.approx(expected, rel=1e-4) and row["tasks"]
    with esparse.novices(run.model, run.plan("web", 6, "frequency"), esparse.mean_outputs(run.model, run.tokens("web"))):
        expected = [esparse.perplexity(run.model, tokens) for tokens in held_out]
    [row] = pick(rows, method="frequency, constants", calibration="web")
    assert row["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert len(pick(rows, method="random")) == criteria.DRAWS and len(pick(rows, method="by output")) == 2


def test_where_subsets_are_too_many_greedy_removal_stands_in(run, monkeypatch):
    assert set(criteria.possible_cases(run)) == set(criteria.CASES)
    monkeypatch.setattr(search, "MAX_SUBSETS", 27)  # of the 28 subsets of 6 of 8 experts
    cases = criteria.possible_cases(run)
    assert {case for case in cases if case not in criteria.CASES} == {("greedy", loss) for loss in LOSSES}
    assert not {"enumerate", "progressive"} & {method for method, _ in cases} and len(cases) == len(criteria.CASES) - 1
    rows = [{"seed": 0, "method": "none", "perplexity": [2.0, 4.0]}]
    rows += [{"seed": 0, "r": 6, "method": "greedy", "loss": "eq3", "calibration": "web", "perplexity": [3.0, 8.0]}]
    [line, *_] = criteria.redundancy(run, {"many": rows})["panels"][0]["lines"]
    assert (line["label"], line["mean"]) == ("Eq. 3", [1.5])


@pytest.mark.slow
def test_a_model_of_sixteen_experts_is_studied_and_what_a_corpus_gives_is_computed_once(tmp_path, monkeypatch):
    """With random weights, which prove nothing of the numbers: every case is possible, at every size."""
    calls = []
    counted = lambda own: lambda *given: calls.append(own) or own(*given)  # noqa: E731
    for name in ("super_experts", "mean_outputs"):
        monkeypatch.setattr(criteria, name, counted(getattr(criteria, name)))
    monkeypatch.setattr(criteria, "DRAWS", 1)
    run = Run("tiny-16", sequences=2, length=16, keep=[15, 14], tasks=[], folder=tmp_path)
    assert set(criteria.possible_cases(run)) == set(criteria.CASES)
    rows = list(criteria.criteria_rows(run))
    assert len(rows) == 1 + 2 * 2 * (len(criteria.CASES) + 3) + 2 and len(calls) == 2 * len(set(calls)) == 4
    assert all(math.isfinite(value) for row in rows for value in row["perplexity"])
    means = esparse.mean_outputs(run.model, run.tokens("arithmetic"))
    for r in (15, 14):
        [row] = pick(rows, r=r, method="frequency, constants", calibration="arithmetic")
        with esparse.novices(run.model, run.plan("arithmetic", r, "frequency"), means):
            expected = [esparse.perplexity(run.model, run.held_out(corpus)) for corpus in ("web", "arithmetic")]
        assert row["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_the_ranking_is_a_geometric_mean_on_the_own_and_on_the_other_corpus(rows):
    table = criteria.ranking(rows, [6])
    web, arithmetic = (pick(rows, method="reap", calibration=corpus)[0]["perplexity"] for corpus in ("web", "arithmetic"))
    assert table.loc["reap", ("own", 0)] == pytest.approx(math.sqrt(web[0] * arithmetic[1]))
    assert table.loc["reap", ("other", 0)] == pytest.approx(math.sqrt(web[1] * arithmetic[0]))
    logs = [math.log(value) for row in pick(rows, method="random") for value in row["perplexity"]]
    assert table.loc["random"].tolist() == pytest.approx([math.exp(statistics.mean(logs))] * 2)
    assert table[("own", 0)].is_monotonic_increasing and "none" not in table.index


def test_redundancy_is_perplexity_over_the_full_models(run, rows):
    found = criteria.redundancy(run, {"from nothing": rows})["panels"]
    full = pick(rows, method="none")[0]["perplexity"][1]
    lines = {line["label"]: line for line in found[1]["lines"]}
    [row] = pick(rows, method="enumerate", loss="residual", calibration="arithmetic")
    assert lines["residual"]["mean"] == [pytest.approx(row["perplexity"][1] / full)]
    draws = [row["perplexity"][1] / full for row in pick(rows, method="random")]
    assert (lines["random"]["least"], lines["random"]["most"]) == ([min(draws)], [max(draws)])
