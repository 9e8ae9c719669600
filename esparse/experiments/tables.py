"""Tables and panels of lines from a study's rows, over seeds and draws."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from ..style import NotebookFigure, legend_below, line_style, log_axis, of_the_paper
from .run import Run

EXACT = ("arithmetic_problems", "gsm8k")  # tasks scored by exact match; models without them show none
MEASURES = {
    "general": lambda row: row["perplexity"][0],
    "domain": lambda row: row["perplexity"][1],
    "exact match": lambda row: next((row["tasks"][task] for task in EXACT if task in row["tasks"]), math.nan),
    "average": lambda row: math.nan if row["average"] is None else row["average"],  # no tasks were scored
}
RATIOS = ["general", "domain"]  # the measures that are perplexities

Groups = Mapping[str, Sequence[dict]]  # rows by the label of their line
Place = str | Callable[[dict], object]  # of a row on the x axis: a key, or a function


def pick(rows: Sequence[dict], **wanted) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def means(rows: Sequence[dict], by: Sequence[str]) -> pd.DataFrame:
    """Mean and standard deviation (0 for a single row) of each of `MEASURES` over rows that agree in `by` (seeds or draws),
    as text."""
    text = lambda values: f"{values.mean():.2f} ± {values.std() if len(values) > 1 else 0:.2f}"  # noqa: E731
    return _measures(rows, by).groupby(level=by, sort=False).agg(text)


def compared(rows: Sequence[dict], one: dict, other: dict, by: Sequence[str]) -> pd.DataFrame:
    """Compare rows with the values `one` and rows with the values `other` within each seed: mean, least and most over seeds
    for rows that agree in `by`.

    Perplexities are compared by ratio, scores by difference. Several rows of a seed (draws) are averaged first. The seeds
    agree if least to most excludes 1 (ratios) or 0 (differences). Raises ValueError if the two kinds have other seeds.
    """
    place = [*by, "seed"]
    mine, theirs = (_measures(pick(rows, **kind), place).groupby(level=place, sort=False).mean() for kind in (one, other))
    theirs = theirs[theirs.index.droplevel("seed").isin(mine.index.droplevel("seed"))]
    if set(mine.index) != set(theirs.index):
        raise ValueError(f"The seeds of {one} and {other} differ: these rows cannot be compared.")
    apart = mine - theirs
    apart[RATIOS] = mine[RATIOS] / theirs[RATIOS]
    found = apart.loc[mine.index].groupby(level=by, sort=False).agg(["mean", "min", "max"])
    return found.rename(columns={"min": "least", "max": "most"}, level=1)


def _measures(rows: Sequence[dict], by: Sequence[str]) -> pd.DataFrame:
    """All `MEASURES` of rows, indexed by their values of `by`; a missing value becomes an empty text."""
    keys = [tuple("" if row.get(key) is None else row[key] for key in by) for row in rows]
    values = [{name: value(row) for name, value in MEASURES.items()} for row in rows]
    return pd.DataFrame(values, index=pd.MultiIndex.from_tuples(keys, names=by))


def by_size(found: pd.DataFrame, measure: str, digits: int = 2) -> pd.DataFrame:
    """One measure of a table from `compared` as text: a column for each r, least to most in each cell. Rows without it go."""
    text = "{:.{d}f} to {:.{d}f}".replace(" ", "\N{NO-BREAK SPACE}")
    cells = found[measure][["least", "most"]].dropna().apply(lambda row: text.format(*row, d=digits), axis=1)
    wide = cells.unstack("r", fill_value="")  # sorted: pandas 2 mixes up unsorted levels
    return wide.reindex(index=cells.index.droplevel("r").unique(), columns=cells.index.unique("r"))


def line(label: str, rows: Sequence[dict], x: Place, value: Callable[[dict], float]) -> dict:
    """One line of a panel: at every x the mean, least and most over rows (seeds or draws)."""
    groups: dict = {}
    for row in rows:
        groups.setdefault(x(row) if callable(x) else row[x], []).append(value(row))
    ends = {"mean": statistics.mean, "least": min, "most": max}
    return {"label": label, "x": list(groups)} | {name: [end(group) for group in groups.values()] for name, end in ends.items()}


def measure_panels(run: Run, keys: Sequence[str], groups: Groups, x: Place, **about) -> list[dict]:
    """A panel for each of these `MEASURES` of a run, with a line for each group of rows; about: more of a panel's keys."""
    names, made = {"general": run.label(run.general), "domain": run.label(run.domain)}, []
    for key in keys:
        own = {"title": names.get(key, "tasks"), "ylabel": "perplexity, held-out" if key in names else f"{key}, %"}
        lines = [line(name, rows, x, MEASURES[key]) for name, rows in groups.items()]
        made.append(own | {"log": key in names, "lines": lines} | about)
    return made


def paper_panel(table: str, shots: int, groups: Groups, x: Place, **about) -> dict:
    """A panel of GSM8K of Mixtral 8x7B as one of the paper's tables prints it, with lines as in `measure_panels`."""
    own = {"title": f"Mixtral 8x7B ({table})", "ylabel": f"GSM8K, {shots}-shot, %", "paper": True}
    return own | {"lines": [line(name, rows, x, itemgetter("gsm8k")) for name, rows in groups.items()]} | about


def panels(figure: NotebookFigure, data: dict) -> None:
    """Draw panels of lines with bars from the least to the most over seeds, or of points; the first panel's legend below all.

    A panel is a dictionary: title, xlabel, ylabel, `lines` or `points`, and where they apply `log`, `falling`, `paper`.
    """
    count = len(data["panels"])
    columns = 2 if count == 4 else count
    rows = count // columns
    grid = figure.panels(3.2 * columns, 2.7 * rows + 0.3, rows, columns)
    for axes, panel in zip(grid.flatten(), data["panels"], strict=True):
        for i, one in enumerate(panel.get("lines", ())):
            _draw_line(axes, i, one)
        for i, points in enumerate(panel.get("points", ())):
            axes.plot(points["x"], points["y"], ls="none", label=points["label"], **line_style(i))
            axes.set_xscale("symlog")
        axes.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"], title=panel["title"])
        if panel.get("log"):
            log_axis(axes)
        if panel.get("falling"):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.invert_xaxis()
        if panel.get("paper"):
            of_the_paper(axes, panel["title"])
            axes.legend(fontsize=7)
    legend_below(grid[0, 0], 5)


def _draw_line(axes, i: int, line: dict) -> None:
    """One line with its error bars, a little beside those of the others; names in the place of numbers stand side by side."""
    named = isinstance(line["x"][0], str)
    at = np.arange(len(line["x"])) if named else np.array(line["x"])
    if named:
        axes.set_xticks(at, line["x"], fontsize=7)
    order = at.argsort(kind="stable")
    at, mean, least, most = (np.array(values)[order] for values in (at, line["mean"], line["least"], line["most"]))
    aside, style = 0.012 * i * (at[-1] - at[0]), line_style(i) | {"ls": ":" if named else "-"}
    axes.errorbar(at + aside, mean, [mean - least, most - mean], label=line["label"], capsize=2, **style)
