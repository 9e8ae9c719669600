"""Notebook 05: dynamic expert skipping (Table 5, A.2)."""

from collections.abc import Sequence
from operator import itemgetter
from statistics import fmean

import torch

from ..moe.routers import skip_ratios
from ..pruning.mask import masked
from ..pruning.skipping import skipped_shares
from ..style import COLOURS, NotebookFigure, grouped_bars, legend_below, legend_beside, line_style, log_axis, of_the_paper
from ..tiny_model.training import preset_model
from ..tracing.losses import expert_distances, output_norm, reconstruction_loss
from ..tracing.recorder import trace
from ..tracing.statistics import betas_of_shares, dropped_share, median_betas
from ..tracing.trace import LayerTrace
from .figures import draws
from .run import Run
from .tables import MEASURES, pick

SKIPPING = {"none": "no skipping", "median": "median beta", "top-1": "top-1 (control)"}


def trade_off(run: Run, shares: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)) -> dict:
    """Table 5 as curves: the cost of skipping more pairs, for the full model and for pruned ones.

    Each point: the share of pairs dropped on the trace and on held-out text, the relative reconstruction loss from the
    trace, perplexity on both corpora. A share of 1 is top-1 routing, the control.
    """
    layers, rows, held_out = run.trace(run.general).layers, [], run.held_out(run.general)
    for r in sorted({run.experts, *run.sizes}, reverse=True):
        plan = run.plan(run.general, r) if r < run.experts else None
        subsets = plan.kept if plan else [None] * len(layers)
        for share in shares:
            chosen = quantile_betas(layers, share, subsets)
            seen = run.evaluate_variant(plan, chosen, ["share"], lambda: fmean(skipped_shares(run.model, held_out)))
            loss = fmean(map(relative_loss, layers, subsets, chosen))
            perplexities = [run.perplexity(corpus, plan, chosen) for corpus in (run.general, run.domain)]
            rows.append({"r": r, "share": share, "seen": seen, "loss": loss, "perplexity": perplexities})
    return {"corpora": [run.label(run.general), run.label(run.domain)], "rows": rows}


def quantile_betas(layers: Sequence[LayerTrace], share: float, subsets: Sequence[Sequence[int] | None]) -> list[float]:
    """Betas that drop a share of the droppable pairs on the trace: 0.5 gives the medians, 1 drops all of them. subsets: the
    experts that each layer keeps, or None."""
    ratios = [skip_ratios(layer.choice(kept)[1]).flatten().double() for layer, kept in zip(layers, subsets, strict=True)]
    return [betas_of_shares(some.sort().values, [share])[0] for some in ratios]


def relative_loss(layer: LayerTrace, kept: Sequence[int] | None, beta: float | None) -> float:
    """The reconstruction loss divided by the norm of the layer's output."""
    return reconstruction_loss(layer, kept, beta) / output_norm(layer)


def skipping_layers(run: Run, r: int, beta: float) -> dict:
    """The share dropped and the relative loss in each layer of the model pruned to r experts, with one beta for all."""
    pairs = zip(run.trace(run.general).layers, run.plan(run.general, r).kept, strict=True)
    layers = [{"dropped": dropped_share(one, beta, kept), "loss": relative_loss(one, kept, beta)} for one, kept in pairs]
    return {"beta": beta, "r": r, "layers": layers}


def skipping_scores(run: Run, sizes: Sequence[int]) -> dict:
    """Table 5 in tasks: each r without skipping, with median betas, and with top-1 routing."""
    traced, rows = run.trace(run.general), []
    for r in sizes:
        plan = run.plan(run.general, r) if r < run.experts else None
        kept = plan.kept if plan else [None] * len(traced.layers)
        variants = {"none": None, "median": median_betas(traced, kept), "top-1": quantile_betas(traced.layers, 1, kept)}
        rows += [{"r": r, "skipping": name, **run.quality(plan, chosen)} for name, chosen in variants.items()]
    return {"corpora": [run.label(run.general), run.label(run.domain)], "rows": rows}


def betas_of_pruned(run: Run, r: int) -> dict:
    """A pruned model's betas from three sources: the full model, the subset in the full model's trace, the pruned model.

    For each: the share dropped and the perplexity, both on held-out text.
    """
    plan, traced, tokens = run.plan(run.general, r), run.trace(run.general), run.held_out(run.general)

    def retrace():
        with masked(run.model, plan):
            return median_betas(trace(run.model, run.tokens(run.general), keep=run.experts))

    rows = {
        "full model": median_betas(traced),
        "subset, from the trace": median_betas(traced, plan.kept),
        "pruned model, traced again": run.cached(retrace, run.model_key, plan.kept, "retrace", plan.tokens),
    }
    for name, chosen in rows.items():
        shares = run.evaluate_variant(plan, chosen, ["shares"], lambda: skipped_shares(run.model, tokens))
        rows[name] = {"betas": chosen, "shares": shares, "perplexity": run.perplexity(run.general, plan, chosen)}
    return {"r": r, "corpus": run.label(run.general), "rows": rows}


def distances(run: Run, bins: int = 40) -> dict:
    """A.2's assumption: the spread of ||f_1 - f_2|| in each layer, in units of its mean."""
    rows = []
    for layer in run.trace(run.general).layers:
        values = expert_distances(layer).cpu()
        scaled = (values / values.mean()).float()
        density = torch.histogram(scaled, bins, range=(0.0, 3.0), density=True).hist.tolist()
        rows.append({"mean": values.mean().item(), "variation": scaled.std().item(), "density": density})
    return {"corpus": run.label(run.general), "edges": torch.linspace(0, 3, bins + 1).tolist(), "layers": rows}


def tail_rule(n: int = 32, k: int = 8, points: int = 21) -> dict:
    """Skipping for k > 2 (A.2) on a model with random weights: pairs left per token over beta, and at the median beta."""
    model = preset_model("tiny-32", seed=0, num_local_experts=n, num_experts_per_tok=k, num_hidden_layers=2)
    tokens = torch.randint(3, model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
    layer = trace(model, tokens, keep=n).layers[-1]
    grid = torch.linspace(0, 2, points).tolist()
    left = [k - (k - 1) * dropped_share(layer, beta) for beta in grid]
    return {"n": n, "k": k, "beta": grid, "left": left, "median": skip_ratios(layer.weights).double().median().item()}


@draws("05_trade_off", "Table 5")
def _trade_off(figure: NotebookFigure, data: dict) -> None:
    """Loss and perplexity over the share of second experts dropped, a line for each r."""
    [row] = figure.panels(9, 2.9, 1, 3)
    for i, r in enumerate(sorted({point["r"] for point in data["rows"]}, reverse=True)):
        points = pick(data["rows"], r=r)
        for axes, value in zip(row, (itemgetter("loss"), MEASURES["general"], MEASURES["domain"]), strict=True):
            axes.plot([100 * p["seen"] for p in points], list(map(value, points)), label=f"r = {r}", **line_style(i))
    row[0].set(ylabel="relative reconstruction loss", title=f"calibrated on {data['corpora'][0]}")
    for axes, name in zip(row[1:], data["corpora"], strict=True):
        axes.set(ylabel="perplexity, held-out", title=name)
        log_axis(axes)
    for axes in row:
        axes.set_xlabel("second experts dropped, % (100: top-1)")
    legend_beside(row[2])


@draws("05_layers", "Section 3.3")
def _layers(figure: NotebookFigure, data: dict) -> None:
    """Bars over layers: the share of second experts dropped, and the loss that causes."""
    [(dropped, loss)] = figure.panels(7, 2.5, 1, 2)
    dropped.bar(range(len(data["layers"])), [100 * layer["dropped"] for layer in data["layers"]], color=COLOURS[0])
    dropped.set(
        xlabel="layer", ylabel="second experts dropped, %", ylim=(0, 100), title=f"beta = {data['beta']:.2f}, r = {data['r']}"
    )
    loss.bar(range(len(data["layers"])), [layer["loss"] for layer in data["layers"]], color=COLOURS[1])
    loss.set(xlabel="layer", ylabel="loss / norm of the output", ylim=(0, 1))


@draws("05_scores", "Table 5")
def _scores(figure: NotebookFigure, data: dict) -> None:
    """Bars of task scores without skipping, at the median beta and for top-1; the paper's beside."""
    [(here, paper)] = figure.panels(8, 2.8, 1, 2)
    sizes = sorted({row["r"] for row in data["rows"]}, reverse=True)
    points = {name: [pick(data["rows"], r=r, skipping=kind)[0] for r in sizes] for kind, name in SKIPPING.items()}
    values, errors = ({name: [p[key] for p in some] for name, some in points.items()} for key in ("average", "stderr"))
    grouped_bars(here, [f"r = {r}" for r in sizes], values, 0.25, 0.23, errors=errors)
    here.set(ylabel="average of the tasks, %", title="this model (bars: standard error)")
    rows, sizes = pick(data["paper"], model="Mixtral 8x7B"), (8, 6, 4)
    theirs = {kind: [pick(rows, r=r, skipping=kind)[0]["average"] for r in sizes] for kind in (False, True)}
    grouped_bars(paper, [f"r = {r}" for r in sizes], theirs, 0.25, 0.23, slots=3)  # the paper has no top-1 routing
    of_the_paper(paper, "Mixtral 8x7B (Table 5)", ylabel="average of 8 tasks, %", ylim=(50, 70))
    legend_below(here, 3)


@draws("05_betas_of_pruned", "Section 4.3")
def _betas_of_pruned(figure: NotebookFigure, data: dict) -> None:
    """Lines over layers: betas of three origins for a pruned model, and what each drops."""
    [(betas, dropped)] = figure.panels(8, 2.7, 1, 2)
    for i, (name, found) in enumerate(data["rows"].items()):
        betas.plot(found["betas"], label=f"{name}: perplexity {found['perplexity']:.4g}", **line_style(i))
        dropped.plot([100 * share for share in found["shares"]], **line_style(i))
    dropped.axhline(50, color="0.6", lw=0.8)
    betas.set(xlabel="layer", ylabel="median beta", title=f"r = {data['r']}, {data['corpus']}")
    dropped.set(xlabel="layer", ylabel="second experts dropped, %", title="seen on held-out text")
    legend_below(betas, 1)


@draws("05_expert_distances", "A.2")
def _distances(figure: NotebookFigure, data: dict) -> None:
    """Histograms of the distance between two experts' outputs over its mean, layer by layer."""
    [[axes]] = figure.panels(5, 2.8)
    for i, layer in enumerate(data["layers"]):
        label = f"layer {i}: mean {layer['mean']:.2f}, deviation {100 * layer['variation']:.0f}%"
        axes.stairs(layer["density"], data["edges"], color=COLOURS[i % len(COLOURS)], label=label)
    axes.set(xlabel="||f_1 - f_2|| over its mean in the layer", ylabel="density", title=data["corpus"])
    legend_beside(axes)


@draws("05_tail_rule", "A.2")
def _tail_rule(figure: NotebookFigure, data: dict) -> None:
    """A falling curve: experts a token runs over beta, for more than two experts a token."""
    [[axes]] = figure.panels(4.5, 2.6)
    axes.plot(data["beta"], data["left"], marker="o", ms=3, color=COLOURS[0])
    axes.axvline(data["median"], color="0.5", ls="--", label=f"median rho, {data['median']:.2f}")
    axes.set(xlabel="beta", ylabel="experts a token runs, mean", ylim=(0, data["k"] + 0.5))
    axes.set_title(f"tail rule, {data['k']} of {data['n']} experts, random weights")
    axes.legend()
