"""Figures are drawn from saved numbers alone; the paper's numbers are the paper's; widgets answer every value."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

import esparse
from esparse import __main__, gallery, plots, style
from esparse.files import checkout, data_folder

FIGURES = checkout() / "figures"


def test_every_figure_is_committed_with_its_numbers_and_in_the_manifest():
    assert list(plots.FIGURES) == list(gallery.ABOUT)
    assert json.loads((FIGURES / "manifest.json").read_text()) == gallery.manifest()
    for name, entry in gallery.manifest().items():
        for kind in ("png", "pdf", "json"):
            assert (FIGURES / f"{name}.{kind}").exists(), name
        assert f'run.figure("{name}"' in (checkout() / "notebooks" / entry["notebook"]).read_text().replace('\\"', '"')
        assert __main__._parser().parse_args(entry["command"].split()[3:]).names == [name]
    assert {path.stem for path in FIGURES.iterdir()} == {*plots.FIGURES, "manifest"}


@pytest.mark.parametrize("name", plots.FIGURES)
def test_redrawing_from_the_numbers_gives_the_same_figure(name, tmp_path):
    shutil.copy(FIGURES / f"{name}.json", tmp_path)
    (drawn,) = plots.redraw([name], tmp_path)
    assert drawn.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (tmp_path / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
    first = drawn.read_bytes()
    plots.redraw([name], tmp_path)
    assert drawn.read_bytes() == first
    one, other = (np.asarray(Image.open(path).convert("RGB"), dtype=int) for path in (drawn, FIGURES / f"{name}.png"))
    assert one.shape == other.shape and (abs(one - other) > 8).mean() < 1e-3  # whatever rounds the last bit of a curve
    figure = plots.draw(name, json.loads((FIGURES / f"{name}.json").read_text()))
    axes = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    assert figure.get_supxlabel() or any(a.get_xlabel() or a.get_ylabel() for a in axes)


@pytest.mark.parametrize("name", plots.FIGURES)
def test_text_is_legible_at_the_width_of_a_page(name):
    """At 830 pixels, the width of GitHub's pages, the smallest letter is 8 pixels high and nothing leaves the figure."""
    figure = plots.draw(name, json.loads((FIGURES / f"{name}.json").read_text()))
    FigureCanvasAgg(figure).draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) / 72 * 830 / figure.get_figwidth() >= 8
    for text in texts:
        inside = text.axes is None or not text.get_clip_on()
        box = text.get_window_extent()
        whole = box.x0 >= -2 and box.x1 <= figure.bbox.x1 + 2 and box.y0 >= -2 and box.y1 <= figure.bbox.y1 + 2
        assert whole or not inside or _hidden_tick(figure, text), text.get_text()


def _hidden_tick(figure, text) -> bool:
    """Labels of ticks outside their axis' range exist, and are not drawn; spare ones belong to no axes, nor to the figure."""
    axes = text.axes
    if axes is None:
        return text not in [*figure.texts, *(entry for legend in figure.legends for entry in legend.get_texts())]
    return text in [*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both")]


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLIND)
def test_colours_are_told_apart_without_one_kind_of_cone(kind):
    """The first four, which most figures use, by CIE 1976 distance; and markers differ where colours come close."""
    colours = np.array(style.COLOURS[:4])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.array(BLIND[kind]).T).clip(0, 1)
    xyz = seen @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)]
    assert min(apart) > 10
    assert len(set(style.MARKERS)) == len(style.MARKERS) >= len(set(style.COLOURS[:8]))


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
