"""Notebook 02: the experts that each corpus keeps, and the distance between the corpora's routing (Fig. 4)."""

import math
from collections.abc import Callable, Sequence
from operator import attrgetter, eq, methodcaller

import torch

from ..pruning.mixture import LayerMixtures, mixtures
from ..pruning.search import search_experts
from ..style import COLOURS, NotebookFigure, legend_below, legend_beside, line_style
from ..tracing.statistics import routing_divergence
from .figures import PAST, draws
from .run import Run


def kept_experts(run: Run, r: int) -> dict:
    """Fig. 4: the subset that each corpus keeps in each layer, the layers that agree, and the number expected by chance.

    `again`: the number of layers that keep the same subset for two draws of the general corpus.
    """
    general, domain = run.plan(run.general, r), run.plan(run.domain, r)
    again, tokens = run.another_draw(run.general)
    model = run.model if run.method == "progressive" else None
    redrawn = search_experts(again, r, method=run.method, model=model, tokens=tokens, seed=run.seed).kept
    about = {"r": r, "n": run.experts, "kept": {run.label(run.general): general.kept, run.label(run.domain): domain.kept}}
    about["identical"] = [i for i, same in enumerate(map(eq, general.kept, domain.kept)) if same]
    chance = len(general.kept) / math.comb(run.experts, r)
    return about | {"chance": chance, "again": sum(map(eq, general.kept, redrawn))}


def divergence(run: Run) -> dict:
    """Total variation of the routing between the corpora, per layer, and between two draws of the general one."""
    general, domain, again = run.trace(run.general), run.trace(run.domain), run.another_draw(run.general)[0]
    return {
        "labels": [run.label(run.general), run.label(run.domain)],
        "between": list(map(routing_divergence, general.layers, domain.layers)),
        "within": list(map(routing_divergence, general.layers, again.layers)),
    }


def mixture(run: Run) -> dict:
    """For each r, pairs of losses on both corpora, divided by the norm of the layer's output, as means over layers. "frontier":
    for each of the mixture's `shares`, from the first corpus alone to the second alone; "equal": for equal parts; "minimax":
    for the subsets whose larger loss is smallest.

    Raises ValueError where there are too many subsets to enumerate.
    """
    traces, rows = [run.trace(corpus) for corpus in (run.general, run.domain)], []
    for r in run.sizes:
        layers = mixtures(*traces, r).layers
        shares = sorted({0.0, 1.0}.union(*(layer.breakpoints for layer in layers)))
        frontier = [_losses(layers, methodcaller("best", share)) for share in shares]
        marked = {"equal": _losses(layers, methodcaller("best", 0.5)), "minimax": _losses(layers, attrgetter("minimax"))}
        rows.append({"r": r, "shares": shares, "frontier": frontier} | marked)
    return {"corpora": [run.label(run.general), run.label(run.domain)], "rows": rows}


def _losses(layers: Sequence[LayerMixtures], number: Callable[[LayerMixtures], int]) -> list[float]:
    """The relative losses on both corpora of the subsets of this number, means over layers."""
    return torch.stack([layer.relative[number(layer)] for layer in layers]).mean(0).tolist()


@draws("02_kept_experts", "Fig. 4")
def _kept(figure: NotebookFigure, data: dict) -> None:
    """A grid of experts over layers: which stay for both corpora, which for one only."""
    first, second = data["kept"]
    layers, n = range(len(data["kept"][first])), data["n"]
    one, other = ({(layer, expert) for layer in layers for expert in kept[layer]} for kept in data["kept"].values())
    points = {"kept for both": one & other, f"only for {first}": one - other, f"only for {second}": other - one}
    [[axes]] = figure.panels(7, 0.34 * n + 1.2)
    for (label, found), marker, colour in zip(points.items(), "soD", ("0.45", *COLOURS[:2]), strict=True):
        places = zip(*sorted(found), strict=True) if found else ([], [])
        axes.scatter(*places, marker=marker, color=colour, s=70, label=label)
    for layer in data["identical"]:
        axes.axvspan(layer - 0.45, layer + 0.45, color="0.9", zorder=0)
    axes.set(xlabel="layer (grey: the same subset)", ylabel="expert", xticks=layers, yticks=range(n), ylim=(-0.6, n - 0.4))
    same = f"same subset in {len(data['identical'])} of {len(layers)} layers"
    axes.set_title(f"r = {data['r']}: {same}, {data['chance']:.2f} by chance")
    legend_beside(axes)


@draws("02_divergence", "Section 3.2, remark")
def _divergence(figure: NotebookFigure, data: dict) -> None:
    """Lines over layers: how far apart the routing of the two corpora is, and that of two draws of one corpus."""
    [[axes]] = figure.panels(5, 3)
    layers = range(len(data["between"]))
    axes.plot(layers, data["between"], marker="o", color=COLOURS[0], label=" against ".join(data["labels"]))
    axes.plot(layers, data["within"], marker="s", ls="--", color="0.5", label=f"two draws of {data['labels'][0]}")
    axes.set(xlabel="layer", ylabel="total variation of the routing", xticks=layers, ylim=(0, None))
    legend_below(axes, 1)


@draws("02_mixture", PAST)
def _mixture(figure: NotebookFigure, data: dict) -> None:
    """A line for each r: the loss on one corpus against that on the other as the calibration goes from one to the other, with
    each corpus's own choice, equal parts and minimax marked."""
    [[axes]] = figure.panels(5.5, 3.6)
    one, other = data["corpora"]
    for i, row in enumerate(data["rows"]):
        axes.plot(*zip(*row["frontier"], strict=True), ".-", color=COLOURS[i], label=f"r = {row['r']}")
    marked = {
        f"calibrated on {one}": [row["frontier"][0] for row in data["rows"]],
        f"calibrated on {other}": [row["frontier"][-1] for row in data["rows"]],
        "both, equal parts": [row["equal"] for row in data["rows"]],
        "minimax": [row["minimax"] for row in data["rows"]],
    }
    for i, (label, points) in enumerate(marked.items()):
        style = line_style(i) | {"color": "black", "mfc": "none", "ls": "none", "ms": 8}
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel=f"loss / norm of the output, {one}", ylabel=f"loss / norm of the output, {other}")
    legend_beside(axes)
