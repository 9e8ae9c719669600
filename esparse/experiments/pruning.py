"""Notebook 03: expert pruning (Eq. 3, Tables 2, 6 and 7)."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import seaborn as sns
import torch

from ..measure.search_cost import over
from ..pruning.certainty import certainty
from ..pruning.search import best_subset, search_experts, subset_losses
from ..style import COLOURS, NotebookFigure, legend_below, legend_beside, line_style, log_axis, of_the_paper
from ..tracing.losses import LOSSES, output_norm, output_norms, reconstruction_loss
from ..tracing.trace import part
from .figures import PAST, draws
from .run import Run
from .tables import MEASURES, pick

# The lines of Tables 2 and 6, whose losses are Eq. 3, and enumeration by the default loss.
CASES = {"enumeration, Eq. 3": {"method": "enumerate", "loss": "eq3"}, "progressive": {"method": "progressive", "loss": "eq3"}}
CASES |= {"frequency": {"method": "frequency", "loss": "eq3"}}
CASES |= {"enumeration, residual": {"method": "enumerate", "loss": "residual"}}


def landscape(run: Run, r: int) -> dict:
    """Every subset's loss in every layer, divided by the norm of the layer's output, on calibration and held-out tokens.

    `chosen` holds the position of each method's subset in the list of subsets.
    """
    calibration, held_out = run.trace(run.general), run.trace(run.general, tokens=run.held_out(run.general))
    plans = {method: run.plan(run.general, r, method, loss="eq3").kept for method in ("enumerate", "greedy", "frequency")}
    layers = []
    for i, (layer, other) in enumerate(zip(calibration.layers, held_out.layers, strict=True)):
        subsets, losses = subset_losses(layer, r)
        relative = {"losses": losses / output_norm(layer), "held_out": subset_losses(other, r)[1] / output_norm(other)}
        chosen = {method: subsets.index(tuple(kept[i])) for method, kept in plans.items()}
        layers.append({name: values.tolist() for name, values in relative.items()} | {"chosen": chosen})
    return {"r": r, "corpus": run.label(run.general), "layers": layers}


def methods(run: Run, r_random: int, draws: int = 10) -> dict:
    """Tables 2 and 6: each of `CASES` at every r, and `draws` random plans at one r, calibrated on the general corpus."""
    cases = [(r, case, 0) for r in run.sizes for case in CASES.values()]
    cases += [(r_random, {"method": "random", "loss": "eq3"}, draw) for draw in range(draws)]
    rows = [{"method": "none", "r": run.experts, **run.quality()}]
    for r, case, draw in cases:
        plan = run.plan(run.general, r, seed=run.seed + draw, **case)
        rows.append(case | {"r": r} | run.quality(plan))
    return {"corpora": [run.label(run.general), run.label(run.domain)], "rows": rows}


def by_loss(run: Run) -> list[dict]:
    """Held-out perplexity of the subsets with the smallest loss at every r, for each of `LOSSES`, corpus by corpus."""
    rows = []
    for corpus, loss in itertools.product(dict.fromkeys((run.general, run.domain)), LOSSES):
        row = {"calibrated and tested on": run.label(corpus), "loss": loss}
        for r in run.sizes:
            row[f"r = {r}"] = run.perplexity(corpus, run.plan(corpus, r, "enumerate", loss=loss))
        rows.append(row)
    return rows


def heaviest(run: Run, share: float = 0.01) -> list[float]:
    """Per layer, the heaviest tokens' share of the squared output norm, which Eq. 3 sums."""
    squares = [output_norms(layer).square() for layer in run.trace(run.general).layers]
    return [(s.topk(max(1, int(share * len(s)))).values.sum() / s.sum()).item() for s in squares]


def without_heaviest(run: Run, share: float = 0.01) -> dict[int, dict[str, float]]:
    """For each r, held-out perplexity on the general corpus of two plans by enumeration: on all calibration tokens, and without
    the heaviest tokens of each layer."""
    trace, found = run.trace(run.general), {}
    norms = [output_norms(layer) for layer in trace.layers]
    light = [part(layer, norm <= norm.quantile(1 - share)) for layer, norm in zip(trace.layers, norms, strict=True)]
    for r in run.sizes:
        plans = {"on all tokens": run.plan(run.general, r, "enumerate", loss="eq3")}
        plans[f"without the heaviest {share:.0%}"] = search_experts(replace(trace, layers=light), r, loss="eq3")
        found[r] = {label: run.perplexity(run.general, plan) for label, plan in plans.items()}
    return found


def calibration_size(run: Run, r: int, draws: int = 5) -> dict:
    """Table 7: the held-out loss of subsets chosen on fewer sequences, divided by the best held-out loss.

    The sequences of a smaller set are drawn from the trace: nothing runs again.
    """
    calibration, held_out = run.trace(run.general), run.trace(run.general, tokens=run.held_out(run.general))
    best = [best_subset(layer, r)[1] for layer in held_out.layers]
    generator, rows = torch.Generator().manual_seed(run.seed), []
    for size in (s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256) if s <= run.sequences):
        for _ in range(draws if size < run.sequences else 1):
            sequences = torch.randperm(run.sequences, generator=generator)[:size]
            tokens = (sequences[:, None] * run.length + torch.arange(run.length)).flatten()
            kept = [best_subset(part(layer, tokens), r)[0] for layer in calibration.layers]
            losses = map(reconstruction_loss, held_out.layers, kept)
            rows.append({"sequences": size, "excess": sum(map(over, losses, best)) / len(best)})
    return {"r": r, "corpus": run.label(run.general), "length": run.length, "rows": rows}


def how_sure(run: Run, r: int) -> dict:
    """`certainty` of every layer's best subset, over the calibration sequences of the general corpus."""
    layers = certainty(run.trace(run.general), r)
    return {"r": r, "corpus": run.label(run.general), "sequences": run.sequences, "layers": layers}


@draws("03_loss_landscape", "Eq. 3")
def _landscape(figure: NotebookFigure, data: dict) -> None:
    """For each layer the losses of all subsets, rising, with the choices of three methods."""
    layers = data["layers"]
    [row] = figure.panels(1.5 * len(layers) + 1, 2.8, 1, len(layers), sharey=True)
    for number, (axes, layer) in enumerate(zip(row, layers, strict=True)):
        order = sorted(range(len(layer["losses"])), key=layer["losses"].__getitem__)
        axes.plot([layer["losses"][i] for i in order], color="0.6", lw=1.5)
        for i, (method, at) in enumerate(layer["chosen"].items()):
            axes.plot(order.index(at), layer["losses"][at], ls="none", ms=9 - 2 * i, label=method, **line_style(i))
        axes.set_title(f"layer {number}")
    row[0].set_ylabel("loss / norm of the output")
    legend_beside(row[-1])
    figure.supxlabel(f"all subsets of {data['r']} experts, best first; calibrated on {data['corpus']}", fontsize=9)


@draws("03_held_out", "Eq. 3")
def _held_out(figure: NotebookFigure, data: dict) -> None:
    """Points: each subset's loss on calibration and on held-out tokens, layer by layer."""
    [[axes]] = figure.panels(4, 3.2)
    for number, layer in enumerate(data["layers"]):
        axes.plot(layer["losses"], layer["held_out"], ls="none", ms=3, label=f"layer {number}", **line_style(number))
    top = max(max(layer["losses"] + layer["held_out"]) for layer in data["layers"])
    axes.plot([0, top], [0, top], color="0.6", lw=0.8)
    axes.set(xlabel="relative loss, calibration tokens", ylabel="relative loss, held-out tokens")
    axes.set_title(f"every subset, r = {data['r']}")
    legend_beside(axes)


@draws("03_methods", "Tables 2, 6")
def _methods(figure: NotebookFigure, data: dict) -> None:
    """Perplexity and task scores over the experts kept, a line a method; the paper's beside."""
    [(perplexity, tasks, paper)] = figure.panels(9, 2.9, 1, 3)
    random = pick(data["rows"], method="random")
    for axes, value in ((perplexity, MEASURES["general"]), (tasks, MEASURES["average"])):
        _method_lines(axes, data["rows"], CASES, value, errors=axes is tasks)
        at, label = [row["r"] + 0.12 for row in random], f"random ({len(random)} draws)"
        axes.plot(at, list(map(value, random)), "x", color="0.4", label=label)
    perplexity.set(ylabel=f"perplexity, {data['corpora'][0]}", title="held-out perplexity")
    log_axis(perplexity)
    tasks.set(ylabel="average of the tasks, %", title="tasks (bars: standard error)")
    legend_below(tasks, 5)
    theirs = {label: {"method": case["method"]} for label, case in CASES.items() if case["loss"] == "eq3"}
    theirs["random"] = {"method": "random"}
    _method_lines(paper, pick(data["paper"], model="Mixtral 8x7B"), theirs, MEASURES["average"])
    of_the_paper(paper, "Mixtral 8x7B (Tables 2, 6)", ylabel="average of 8 zero-shot tasks, %")
    paper.legend(fontsize=7)


def _method_lines(axes, rows: Sequence[dict], cases: Mapping[str, dict], value: Callable, errors: bool = False) -> None:
    """A line for each case over the experts kept, starting at the full model."""
    for label, case in cases.items():
        points = sorted(pick(rows, method="none")[:1] + pick(rows, **case), key=lambda row: -row["r"])
        bars = [row["stderr"] for row in points] if errors else None
        at = [row["r"] for row in points]
        axes.errorbar(at, list(map(value, points)), bars, capsize=2, label=label, **line_style([*CASES, "random"].index(label)))
    axes.invert_xaxis()
    axes.set_xlabel("experts kept, r")


@draws("03_calibration_size", "Table 7")
def _calibration_size(figure: NotebookFigure, data: dict) -> None:
    """Held-out loss over the optimum's against the size of the calibration set; the paper's averages beside."""
    [(here, paper)] = figure.panels(7, 2.7, 1, 2)
    here.plot([r["sequences"] for r in data["rows"]], [100 * (r["excess"] - 1) for r in data["rows"]], "o", color=COLOURS[0])
    here.set(ylabel="loss above the held-out best, %", title=f"r = {data['r']}, {data['corpus']}")
    paper.plot([r["sequences"] for r in data["paper"]], [r["average"] for r in data["paper"]], "s-", color=COLOURS[7])
    of_the_paper(paper, "r = 6 (Table 7)", ylabel="average of 8 tasks, %")
    for axes, length in ((here, data["length"]), (paper, 2048)):
        axes.set(xscale="log", xlabel=f"calibration sequences of {length} tokens")


@draws("03_certainty", PAST)
def _certainty(figure: NotebookFigure, data: dict) -> None:
    """A heatmap, layers by experts: the share of resampled calibration sets that keep each expert. Dots: the experts kept on
    all sequences. Beside each layer: by how many standard deviations the second best subset is worse."""
    layers = data["layers"]
    n = len(layers[0]["shares"])
    [[axes]] = figure.panels(0.42 * n + 3, 0.34 * len(layers) + 1.4)
    scale = {"vmin": 0, "vmax": 1, "cmap": "viridis", "cbar_kws": {"label": "share of draws that keep it"}}
    sns.heatmap([layer["shares"] for layer in layers], ax=axes, **scale)
    kept = [(expert + 0.5, number + 0.5) for number, layer in enumerate(layers) for expert in layer["kept"]]
    axes.scatter(*zip(*kept, strict=True), s=22, color="white", edgecolors="black")
    margins = ["" if layer["margin"] is None else f": {layer['margin']:.1f}" for layer in layers]
    axes.set_yticks(
        [number + 0.5 for number in range(len(layers))], map("{}{}".format, range(len(layers)), margins), rotation=0
    )
    axes.set(xlabel="expert", ylabel="layer: margin in standard deviations")
    axes.set_title(f"r = {data['r']}, {data['sequences']} sequences of {data['corpus']}")
