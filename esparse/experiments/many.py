"""Notebook 10: search among many experts, past the paper."""

import math

from ..measure.search_cost import compare, over
from ..style import NotebookFigure, line_style
from .figures import PAST, draws
from .run import Run


def searches(run: Run, shipped: dict) -> dict:
    """Each layer's loss over the best found, for each method: this run's model, then trained models with more experts."""
    r, layers = run.sizes[-1], run.trace(run.general).layers
    found = run.cached(lambda: compare(layers, r), run.model_key, run.general, "searches", r)
    own = {"model": run.model_name, "r": r, "n": layers[0].n, "methods": found}
    return {"panels": [_search_panel(row) for row in (own, *shipped["trained"])]}


def _search_panel(row: dict) -> dict:
    best = "enumerate" if "enumerate" in row["methods"] else "greedy"
    optimum = row["methods"][best]["losses"]
    ratios = {method: list(map(over, found["losses"], optimum)) for method, found in row["methods"].items()}
    return {"title": f"{row['model']}, {row['n']} to {row['r']}", "best": best, "ratios": ratios}


def search_costs(shipped: dict) -> dict:
    """Seconds for one synthetic layer of 16,384 tokens, and the measured or estimated time to try every subset."""
    layers = [row for row in shipped["synthetic"] if row["twins"]]
    names = {"trace": "trace", "its experts alone": "experts", "greedy search": "search"}
    return {
        "n": [row["n"] for row in layers],
        "seconds": {name: [row["seconds"][key] for row in layers] for name, key in names.items()},
        "enumeration": [_enumeration(row) for row in layers],
    }


def _enumeration(row: dict) -> float:
    done = row["methods"].get("enumerate")
    return done["seconds"] if done else math.comb(row["n"], row["r"]) * row["seconds"]["one subset"]


@draws("10_searches", PAST)
def _searches(figure: NotebookFigure, data: dict) -> None:
    """Points, a layer each: losses of the search methods over the best known, for several models."""
    panels = data["panels"]
    methods = [method for method in panels[-1]["ratios"] if method != "enumerate"]
    [row] = figure.panels(1.8 * len(panels) + 0.8, 2.8, 1, len(panels), sharey=True)
    for axes, panel in zip(row, panels, strict=True):
        for i, method in enumerate(methods):
            ratios = panel["ratios"][method]
            axes.plot(ratios, [i] * len(ratios), ls="none", alpha=0.7, **line_style(i))
        axes.axvline(1, color="0.6", linewidth=0.8, zorder=0)
        axes.set(title=panel["title"], xscale="log", xlim=(0.9, 11), xlabel=f"loss over that\nof {panel['best']}")
        axes.set(xticks=[1, 2, 4, 8], xticklabels=[1, 2, 4, 8], yticks=range(len(methods)), yticklabels=methods)
        axes.minorticks_off()
    row[0].invert_yaxis()


@draws("10_search_costs", PAST)
def _search_costs(figure: NotebookFigure, data: dict) -> None:
    """Seconds over the number of experts: trace, searches, and enumeration far above them."""
    [[axes]] = figure.panels(5.5, 3.4)
    for i, (name, seconds) in enumerate(data["seconds"].items()):
        axes.plot(data["n"], seconds, label=name, **line_style(i))
    axes.plot(data["n"], data["enumeration"], "--", color="0.4", label="enumeration (arithmetic)")
    axes.set(xscale="log", yscale="log", xlabel="experts, of which three quarters stay", ylabel="seconds")
    axes.set(xticks=data["n"], xticklabels=data["n"], ylim=(0.05, 1e6))
    axes.minorticks_off()
    axes.legend()
