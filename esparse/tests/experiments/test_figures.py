"""Figures are drawn from saved numbers alone; the paper's numbers equal the paper's; widgets respond to every value."""

import functools
import itertools
import json
import re
import shutil

import nbformat
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

import esparse
from esparse import __main__, style
from esparse.experiments import figures, notebooks
from esparse.experiments import run as runs
from esparse.files import checkout
from esparse.tests.conftest import sampled

FIGURES = checkout() / "figures"


def test_every_figure_is_committed_with_its_numbers_and_in_the_manifest():
    assert json.loads((FIGURES / "manifest.json").read_text()) == figures.manifest()
    assert (FIGURES / "README.md").read_text() == figures.gallery()  # python -m esparse figures writes both
    for name, entry in figures.manifest().items():
        for kind in ("png", "pdf", "json"):
            assert (FIGURES / f"{name}.{kind}").exists(), name
        assert f'run.figure("{name}"' in (checkout() / "notebooks" / entry["notebook"]).read_text().replace('\\"', '"')
        assert __main__._parser().parse_args(entry["command"].split()[3:]).names == [name]
    assert {path.stem for path in FIGURES.iterdir() if path.name != "README.md"} == {*figures.figures(), "manifest"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Figures from their committed numbers, each drawn and saved once, when it is first asked for: its PNG and itself."""
    folder = tmp_path_factory.mktemp("drawn")

    @functools.cache
    def draw(name: str):
        figure = figures.save_figure(name, json.loads((FIGURES / f"{name}.json").read_text()), folder)
        return folder / f"{name}.png", figure

    return draw


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


@pytest.mark.parametrize("name", figures.figures())
def test_redrawing_from_the_numbers_gives_the_same_figure(name, drawn):
    path, figure = drawn(name)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.with_suffix(".pdf").read_bytes()[:5] == b"%PDF-"
    one, committed = pixels(path), pixels(FIGURES / f"{name}.png")
    assert one.shape == committed.shape and (abs(one - committed) > 8).mean() < 1e-3  # the last bit of a curve is rounded
    axes = [a for a in figure.axes if a.get_label() != "<colorbar>"]
    assert figure.get_supxlabel() or any(a.get_xlabel() or a.get_ylabel() for a in axes)


# Of the sample, one has the simplest layout and one a legend and panels that share an axis.
@pytest.mark.parametrize("name", sampled(figures.figures(), ("00_quickstart", "04_betas")))
def test_drawing_twice_gives_the_same_picture(name, drawn, tmp_path):
    shutil.copy(FIGURES / f"{name}.json", tmp_path)
    (again,) = figures.redraw([name], tmp_path)
    first = pixels(drawn(name)[0])
    assert abs(pixels(again) - first).max() <= 2  # the layout's solver takes its variables in the order of their addresses


@pytest.mark.parametrize("name", figures.figures())
def test_text_is_legible_at_the_width_of_a_page(name, drawn):
    """At 830 pixels, the width of GitHub's pages, the smallest letter is 8 pixels high and nothing leaves the figure."""
    figure = drawn(name)[1]
    figure.set_layout_engine("none")  # laid out when it was saved
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


def test_synthetic_axes_are_never_called_c4_or_math(drawn):
    for name in figures.figures():
        for axes in drawn(name)[1].axes:
            words = " ".join([axes.get_title(), axes.get_xlabel(), axes.get_ylabel()])
            assert not re.search(r"\b(C4|MATH)\b", words) or axes.get_title().startswith("the paper"), name


def test_numbers_are_saved_to_as_many_digits_as_cpus_agree_on(tmp_path):
    given = {"a": [0.123456, 2.00004, 89079.27, 12, True, None, 0.0], "b": ({"c": -1.23456e-7}, float("inf"), "1.23456")}
    expected = {"a": [0.1235, 2.0, 89079.0, 12, True, None, 0.0], "b": [{"c": -1.235e-7}, float("inf"), "1.23456"]}
    assert figures.rounded(given) == expected
    for name in figures.figures():
        data = json.loads((FIGURES / f"{name}.json").read_text())
        assert figures.rounded(data) == data, name
    figures.save_figure(
        "02_divergence", {"between": [1 / 3, 2 / 3], "within": [0.01, 1 / 70], "labels": ["one", "other"]}, tmp_path
    )
    assert json.loads((tmp_path / "02_divergence.json").read_text())["between"] == [0.3333, 0.6667]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (0.5908, 0.5933, True),
        (0.5908, 0.5943, False),
        (20.58, 20.6, True),
        (20.58, 20.7, False),
        (0.0, 0.0008, True),
        (0.0, 0.002, False),
        ([1.0, {"a": 2.0}], [1.0, {"a": 2.001}], True),
        ([1.0], [1.0, 2.0], False),
        ({"a": 1.0}, {"b": 1.0}, False),
        (3, 4, False),
        (True, 1, False),
        ("r = 6", "r = 5", False),
    ],
)
def test_two_figures_say_the_same_where_a_few_tokens_make_the_difference(one, other, same):
    assert figures.alike(one, other) is figures.alike(other, one) is same


@pytest.fixture
def published(drawn, tmp_path, monkeypatch):
    """A checkout of its own with figures and a notebook that shows two of them, and a run that draws them."""
    for kind in ("notebooks", "figures"):
        (tmp_path / "checkout" / kind).mkdir(parents=True)
    cell = lambda source, **data: nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output("display_data", data)])  # noqa: E731
    notebook = nbformat.v4.new_notebook(
        cells=[
            cell('run.figure("02_divergence", apart)', **{"image/png": "old", "text/plain": "Lines."}),
            cell('run.figure("02_kept_experts", data)', **{"image/png": "old", "text/plain": "A grid."}),
            cell("table.round(3)", **{"text/plain": "layer 0  0.123 and 8.1e-06"}),
        ]
    )
    nbformat.write(notebook, tmp_path / "checkout" / "notebooks" / "02_c4_vs_math.ipynb")
    (tmp_path / "run" / "figures").mkdir(parents=True)
    for name in ("02_divergence", "02_kept_experts", "02_mixture"):
        for folder, kind in itertools.product(("checkout", "run"), ("png", "pdf", "json")):
            shutil.copy(drawn(name)[0].with_suffix(f".{kind}"), tmp_path / folder / "figures")
    monkeypatch.setattr(notebooks, "checkout", lambda: tmp_path / "checkout")
    return tmp_path


def update(folder, change) -> tuple[list[str], set[str]]:
    """What the notebook shows after a run that showed this, and which files of the checkout were written."""
    path, files = folder / "checkout" / "notebooks" / "02_c4_vs_math.ipynb", [*(folder / "checkout" / "figures").iterdir()]
    ran, before = nbformat.read(path, as_version=4), {file: file.stat().st_mtime_ns for file in files}
    for cell in ran.cells:
        cell.outputs[0].data |= {"image/png": "new"} if "image/png" in cell.outputs[0].data else {}
    change(ran)
    notebooks._update(ran, path, folder / "run" / "figures")
    shown = [cell.outputs[0].data for cell in nbformat.read(path, as_version=4).cells]
    return [d.get("image/png", d["text/plain"]) for d in shown], {f.name for f in files if f.stat().st_mtime_ns != before[f]}


def test_an_update_leaves_what_says_the_same(published):
    data = json.loads((FIGURES / "02_divergence.json").read_text())
    data["between"][0] *= 1 + 2e-6
    figures.save_figure("02_divergence", data, published / "run" / "figures")

    def change(ran):
        ran.cells[2].outputs[0].data["text/plain"] = "layer 0  0.124 and 8.1e-06"

    assert update(published, change) == (["old", "old", "layer 0  0.123 and 8.1e-06"], set())


def test_an_update_writes_what_says_something_else(published):
    data = json.loads((FIGURES / "02_divergence.json").read_text())
    data["between"][0] *= 1.01
    figures.save_figure("02_divergence", data, published / "run" / "figures")

    def change(ran):
        ran.cells[2].outputs[0].data["text/plain"] = "layer 0  0.125 and 8.1e-06"

    files = {f"02_divergence.{kind}" for kind in ("png", "pdf", "json")}
    assert update(published, change) == (["new", "old", "layer 0  0.125 and 8.1e-06"], files)


def test_an_update_writes_a_figure_that_is_drawn_otherwise(published, monkeypatch):
    monkeypatch.setitem(style.STYLE, "axes.titlesize", 20)
    figures.redraw(["02_kept_experts"], published / "run" / "figures")
    shown, files = update(published, lambda ran: None)
    assert shown[:2] == ["old", "new"] and files == {f"02_kept_experts.{kind}" for kind in ("png", "pdf", "json")}


def test_a_plain_run_writes_nothing_into_the_checkout(tmp_path, monkeypatch):
    state = lambda: {p: p.stat().st_mtime_ns for name in ("figures", "notebooks") for p in (checkout() / name).iterdir()}  # noqa: E731
    monkeypatch.setattr(runs, "default_folder", lambda _name: tmp_path)
    before, run = state(), esparse.Run()
    assert run.embedded
    run.figure("02_divergence", {"between": [0.3], "within": [0.1], "labels": ["one", "other"]})
    assert state() == before and (tmp_path / "figures" / "02_divergence.png").exists()
    with pytest.raises(ValueError, match="as they stand: run it without --set"):
        notebooks.run_notebooks(["02"], settings={"LIMIT": 3}, update=True)


def test_bad_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no figure '99_nothing'"):
        figures.draw("99_nothing", {})
    with pytest.raises(FileNotFoundError, match="run the notebooks first"):
        figures.redraw([], tmp_path)


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
