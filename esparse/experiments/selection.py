"""Notebook 01: how often each corpus selects each expert and each pair of experts (Fig. 5, A.1)."""

import numpy as np
import seaborn as sns

from ..style import NotebookFigure
from ..tracing.statistics import co_selection, selection_frequency
from .figures import draws
from .run import Run


def selection(run: Run) -> dict:
    """Fig. 5: selection frequency in every layer, and co-selection in the first, middle and last."""
    data = {"corpora": {}}
    for corpus in (run.general, run.domain):
        layers = run.trace(corpus).layers
        shown = sorted({0, (len(layers) - 1) // 2, len(layers) - 1})
        data["corpora"][run.label(corpus)] = {
            "frequency": [selection_frequency(layer).tolist() for layer in layers],
            "co_selection": {str(i): co_selection(layers[i]).tolist() for i in shown},
        }
    return data


@draws("01_frequency", "Section A.1")
def _frequency(figure: NotebookFigure, data: dict) -> None:
    """Heatmaps, layers by experts: the share of tokens each expert gets on either corpus, and the difference."""
    [row] = figure.panels(8, 3, 1, 3, sharey=True)
    tables = {name: np.array(corpus["frequency"]) for name, corpus in data["corpora"].items()}
    shared = {"vmin": 0, "vmax": max(table.max() for table in tables.values()), "cmap": "viridis"}
    first, second = tables.values()
    maps = [(name, table, shared, "share of tokens") for name, table in tables.items()]
    maps.append(("second minus first", second - first, {"center": 0, "cmap": "vlag"}, "difference"))
    for axes, (title, table, colours, label) in zip(row, maps, strict=True):
        sns.heatmap(table, ax=axes, cbar_kws={"label": label}, **colours)
        axes.set(title=title, xlabel="expert")
    row[0].set_ylabel("layer")


@draws("01_co_selection", "Fig. 5")
def _co_selection(figure: NotebookFigure, data: dict) -> None:
    """Heatmaps, expert by expert, for three layers and both corpora: how often a pair is chosen."""
    pairs = {}
    for name, found in data["corpora"].items():  # an expert and itself are no pair
        pairs[name] = {layer: np.array(table) * (1 - np.eye(len(table))) for layer, table in found["co_selection"].items()}
    layers = list(next(iter(pairs.values())))
    top = max(table.max() for tables in pairs.values() for table in tables.values())
    grid = figure.panels(2.6 * len(layers) + 0.8, 5, len(pairs), len(layers), sharex=True, sharey=True)
    for row, (name, tables) in zip(grid, pairs.items(), strict=True):
        for axes, layer in zip(row, layers, strict=True):
            sns.heatmap(tables[layer], ax=axes, vmin=0, vmax=top, cmap="viridis", square=True, cbar=axes is row[-1])
            axes.set_title(f"{name}\nlayer {layer}" if axes is row[0] else f"layer {layer}")
    figure.supxlabel("expert")
    figure.supylabel("expert; colour: share of tokens that choose both")
