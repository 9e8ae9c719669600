"""Notebook 01: how often each corpus selects each expert and each pair of experts (Fig. 5, A.1)."""

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from ..style import canvas
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
def _frequency(data: dict) -> Figure:
    """Heatmaps, layers by experts: the share of tokens each expert gets on either corpus, and the difference."""
    figure, [row] = canvas(8, 3, 1, 3, sharey=True)
    tables = {name: np.array(corpus["frequency"]) for name, corpus in data["corpora"].items()}
    top = max(table.max() for table in tables.values())
    for axes, (name, table) in zip(row, tables.items(), strict=False):
        sns.heatmap(table, ax=axes, vmin=0, vmax=top, cmap="viridis", cbar_kws={"label": "share of tokens"})
        axes.set(title=name, xlabel="expert")
    first, second = tables.values()
    sns.heatmap(second - first, ax=row[2], center=0, cmap="vlag", cbar_kws={"label": "difference"})
    row[2].set(title="second minus first", xlabel="expert")
    row[0].set_ylabel("layer")
    return figure


@draws("01_co_selection", "Fig. 5")
def _co_selection(data: dict) -> Figure:
    """Heatmaps, expert by expert, for three layers and both corpora: how often a pair is chosen."""
    pairs = {name: {k: np.array(t) for k, t in found["co_selection"].items()} for name, found in data["corpora"].items()}
    layers = list(next(iter(pairs.values())))
    for table in (table for tables in pairs.values() for table in tables.values()):
        np.fill_diagonal(table, 0)  # an expert and itself are no pair
    top = max(table.max() for tables in pairs.values() for table in tables.values())
    figure, grid = canvas(2.6 * len(layers) + 0.8, 5, len(pairs), len(layers), sharex=True, sharey=True)
    for row, (name, tables) in zip(grid, pairs.items(), strict=True):
        for axes, layer in zip(row, layers, strict=True):
            sns.heatmap(tables[layer], ax=axes, vmin=0, vmax=top, cmap="viridis", square=True, cbar=axes is row[-1])
            axes.set_title(f"{name}\nlayer {layer}" if axes is row[0] else f"layer {layer}")
    figure.supxlabel("expert")
    figure.supylabel("expert; colour: share of tokens that choose both")
    return figure
