"""Tables and figures' numbers, mostly from made-up rows of studies."""

import pandas as pd
import pytest

import esparse
from esparse.experiments import domain, recovery, skipping, tables


def fake(seed: int, r: int, perplexity: float, **more) -> dict:
    own = {"perplexity": [perplexity, 2 * perplexity], "average": 50.0 + seed, "tasks": {"arithmetic_problems": 40.0 - r}}
    return {"seed": seed, "r": r, **own, **more}


def test_what_a_method_wins_back_is_a_share_of_what_was_lost():
    about = {"calibration": "web", "seconds": 1.0, "trained": 2}
    rows = [fake(0, 8, 2.0, method="full"), fake(0, 6, 8.0, method="pruned", **about), fake(0, 6, 4.0, method="tune", **about)]
    rows[2]["tasks"] = {"arithmetic_problems": 33.5}
    (found,) = recovery.won_back(rows)
    assert "of tuned" not in found
    (tuned,) = recovery.won_back([*rows, fake(0, 8, 1.0, method="full, tuned")])
    assert tuned["of tuned"] == pytest.approx(100 / 3) and tuned["in perplexity"] == found["in perplexity"]
    assert found["in perplexity"] == pytest.approx(50)  # log 8 to log 2, log 4 reached
    assert found["points"] == pytest.approx(33.5 - 34)


def test_exact_match_is_that_of_a_task_that_is_scored_so():
    rows = [{"tasks": tasks, "average": 64.2} for tasks in ({"arithmetic_problems": 91.0}, {"gsm8k": 51.0}, {"boolq": 80.0})]
    assert [tables.MEASURES["exact match"](row) for row in rows] == [91.0, 51.0, pytest.approx(float("nan"), nan_ok=True)]


def test_lines_are_means_and_ranges_over_seeds():
    rows = [fake(seed, r, 2.0 + seed) for seed in (0, 1, 2) for r in (7, 6)]
    line = tables.line("some", rows, "r", tables.MEASURES["general"])
    assert line == {"label": "some", "x": [7, 6], "mean": [3.0, 3.0], "least": [2.0, 2.0], "most": [4.0, 4.0]}
    assert tables.means([fake(0, 6, 5.0)], ["r"])["general"].to_list() == ["5.00 ± 0.00"]


def test_figures_show_every_seed_and_the_paper():
    rows = [
        fake(seed, r, 2.0 + 0.1 * (8 - r) + seed + (9 if betas else 0), calibration=corpus, method=method, betas=betas)
        for seed in (0, 1)
        for r, method, corpora in ((8, "none", (None,)), (6, "enumerate", ("web", "arithmetic")), (6, "random", (None,)))
        for corpus in corpora
        for betas in (None, "web")
    ]
    data = domain.domain_figure(esparse.Run(), rows, esparse.paper("table3"))
    line = data["panels"][0]["lines"][0]
    assert (line["label"], line["x"], line["mean"]) == ("web (synthetic)", [8, 6], [2.5, pytest.approx(2.7)])
    assert (line["least"][0], line["most"][0]) == (2.0, 3.0)
    random = data["panels"][0]["lines"][2]
    assert (random["label"], random["mean"]) == ("random", [2.5, pytest.approx(2.7)])  # of the rows without skipping
    for drawn in (data, domain.beta_figure(esparse.Run(), rows, esparse.paper("table8"))):
        figure = tables.NotebookFigure()
        tables.panels(figure, drawn)
        assert len(figure.axes) == 4 and figure.axes[3].get_title().startswith("the paper")


def test_the_figure_of_betas_shows_the_papers_sizes():
    rows = [fake(0, 8, 2.0, method="none", betas=b) for b in (None, "web")]
    rows += [
        fake(0, r, 3.0, method="enumerate", calibration="arithmetic", betas=b) for r in (7, 6, 5, 4) for b in (None, "web")
    ]
    panels = domain.beta_figure(esparse.Run(), rows, esparse.paper("table8"))["panels"]
    assert [[line["label"] for line in panel["lines"]] for panel in panels] == [["r = 8", "r = 6", "r = 4"]] * 4


def test_tables_are_means_and_comparisons_go_seed_by_seed():
    rows = [fake(seed, r, 2.0 + seed + (8 - r), method=m) for seed in (0, 1) for r in (7, 6) for m in ("a",)]
    rows += [fake(seed, r, (2.0 + seed + (8 - r)) * 2**draw, method="b") for seed in (0, 1) for r in (7, 6) for draw in (0, 1)]
    shown = tables.means(rows, ["r", "method"])
    assert shown.loc[(7, "a"), "general"] == "3.50 ± 0.71" and shown.loc[(6, "a"), "domain"] == "9.00 ± 1.41"
    found = tables.compared(rows, {"method": "a"}, {"method": "b"}, ["r"])
    assert list(found.index) == [7, 6]
    assert found["general"].to_numpy() == pytest.approx(2 / 3)  # b's two draws are once and twice a's
    assert (found["average"].to_numpy() == 0).all()
    with pytest.raises(ValueError, match="seeds of .* differ"):
        tables.compared(rows[1:], {"method": "a"}, {"method": "b"}, ["r"])


def test_a_comparison_by_size_has_a_column_for_each_r():
    columns = pd.MultiIndex.from_product([("general",), ("mean", "least", "most")])
    index = pd.MultiIndex.from_tuples([(8, "a"), (8, "b"), (6, "a")], names=["r", "method"])
    found = pd.DataFrame([[1.004, 0.9, 1.25], [2, 2, 2], [3, 2, 4]], index, columns)
    shown = tables.by_size(found, "general").map(lambda cell: cell.replace("\N{NO-BREAK SPACE}", " "))
    assert list(shown.columns) == [8, 6] and shown.loc["a"].to_list() == ["0.90 to 1.25", "2.00 to 4.00"]
    assert shown.loc["b"].to_list() == ["2.00 to 2.00", ""]


def test_tail_rule_halves_the_droppable_pairs_at_the_median():
    tail = skipping.tail_rule()
    left = dict(zip(tail["beta"], tail["left"], strict=True))
    assert left[0.0] == tail["k"] and min(tail["left"]) >= 1
    below = max(b for b in tail["beta"] if b <= tail["median"])
    above = min(b for b in tail["beta"] if b >= tail["median"])
    assert left[above] <= 1 + (tail["k"] - 1) / 2 + 0.01 and left[below] >= 1 + (tail["k"] - 1) / 2 - 0.01
