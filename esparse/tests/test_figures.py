"""Figures are drawn from saved numbers alone; the paper's numbers are the paper's; widgets answer every value."""

import json
import re
import shutil

import pytest

import esparse
from esparse import plots
from esparse.files import checkout, data_folder

FIGURES = checkout() / "figures"


def test_every_figure_is_committed_with_its_numbers_and_listed_in_the_readme():
    readme = (checkout() / "README.md").read_text()
    for name in plots.FIGURES:
        for kind in ("png", "pdf", "json"):
            assert (FIGURES / f"{name}.{kind}").exists(), name
        assert f"`{name}`" in readme, name


@pytest.mark.parametrize("name", plots.FIGURES)
def test_redrawing_from_the_numbers_gives_the_same_figure(name, tmp_path):
    shutil.copy(FIGURES / f"{name}.json", tmp_path)
    (drawn,) = plots.redraw([name], tmp_path)
    assert drawn.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (tmp_path / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
    first = drawn.read_bytes()
    plots.redraw([name], tmp_path)
    assert drawn.read_bytes() == first
    figure = plots.draw(name, json.loads((FIGURES / f"{name}.json").read_text()))
    axes = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    assert figure.get_supxlabel() or any(a.get_xlabel() or a.get_ylabel() for a in axes)


def test_synthetic_axes_are_never_called_c4_or_math():
    for name in plots.FIGURES:
        for axes in plots.draw(name, json.loads((FIGURES / f"{name}.json").read_text())).axes:
            words = " ".join([axes.get_title(), axes.get_xlabel(), axes.get_ylabel()])
            assert not re.search(r"\b(C4|MATH)\b", words) or axes.get_title().startswith("the paper"), name


def test_bad_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no figure '99_nothing'"):
        plots.draw("99_nothing", {})
    with pytest.raises(FileNotFoundError, match="run the notebooks first"):
        plots.redraw([], tmp_path)


def test_the_papers_averages_are_the_averages_of_its_columns():
    for table in ("table1", "table2"):
        for row in esparse.paper(table):
            assert len(row["scores"]) == 8
            assert sum(row["scores"].values()) / 8 == pytest.approx(row["average"], abs=0.0051)


def test_the_papers_numbers_agree_with_each_other_and_with_facts_about_the_model():
    full = {(r["model"], r["r"], r["method"]): r["average"] for r in esparse.paper("table2")}
    for row in esparse.paper("table5"):
        if not row["skipping"]:
            assert full[row["model"], row["r"], "none" if row["r"] == 8 else "enumerate"] == row["average"]
    for row in esparse.paper("table6"):
        assert row["method"] == "progressive" or full[row["model"], row["r"], "enumerate"] == row["average"]
    assert [len(values) for values in esparse.paper("betas").values()] == [32, 32]
    # 32 layers of r experts of 3 x 4096 x 14336 bf16 weights: the differences between rows of Table 9
    memory = {row["r"]: row["memory_mib"] for row in esparse.paper("table9") if row["method"] != "wanda 2:4"}
    for r in (8, 6):
        assert memory[r] - memory[r - 2] == pytest.approx(32 * 2 * 3 * 4096 * 14336 * 2 / 2**20, rel=0.01)
    assert esparse.paper("figure4")["identical_layers"] == [2, 4, 16, 31]


def test_figures_hold_the_papers_own_numbers():
    saved = json.loads((FIGURES / "04_betas.json").read_text())["paper"]
    assert saved == json.loads((data_folder() / "paper.json").read_text())["betas"]
