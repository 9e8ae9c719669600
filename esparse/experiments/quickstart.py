"""Notebook 00: the method in two pictures, and the quality that remains."""

from collections.abc import Sequence

import torch
from matplotlib.patches import Rectangle

from ..pruning.scores import ranked
from ..pruning.search import search_layer, subset_losses
from ..style import COLOURS, NotebookFigure, grouped_bars
from ..tracing.losses import output_norm, weighed
from ..tracing.statistics import median_betas
from ..tracing.trace import LayerTrace, Trace
from .figures import PAST, draws
from .run import Run

NOT_COMPUTED = {"facecolor": "white", "hatch": "////"}


def layer_scheme(run: Run, number: int = 0) -> dict:
    """Fig. 2 on a real token: the first whose second weight is 0.67 of its first or more, else the one nearest to that."""
    layer = run.trace(run.general).layers[number]
    token = int((layer.weights[:, 1] / layer.weights[:, 0]).clamp(max=0.67).argmax())
    chosen = layer.order[token, : layer.k].tolist()
    weights = layer.router.scores(layer.logits[token : token + 1])[0].tolist()
    return {"layer": number, "weights": weights, "chosen": chosen, "normalised": layer.weights[token].tolist()}


def method_scheme(run: Run, r: int, number: int = 0) -> dict:
    """Fig. 3 on a real layer: METHOD's subset beside others, and six tokens with skipping at the median beta.

    Each token is the middle one of a sixth of all, sorted by ratio, and is given as [first weight, sum of the others].
    """
    layer = weighed(run.trace(run.general).layers[number], "residual")
    norm, beta = output_norm(layer), median_betas(Trace([layer], "", ""))[0]
    halves = torch.stack([layer.weights[:, 0], layer.weights[:, 1:].sum(1)], 1)
    rising = (halves[:, 1] / halves[:, 0]).argsort(stable=True)
    tokens = rising[[len(rising) * part // 12 for part in (11, 9, 7, 5, 3, 1)]]
    candidates = [{"kept": list(kept), "loss": loss / norm} for kept, loss in _candidates(layer, r, run.method)]
    about = {"layer": number, "n": layer.n, "r": r, "beta": beta, "k": layer.k}
    return about | {"candidates": candidates, "tokens": halves[tokens].tolist()}


def _candidates(layer: LayerTrace, r: int, method: str) -> list[tuple[Sequence[int], float]]:
    """The best, median and worst subset; if METHOD is not enumeration, its subset and two random ones, by loss."""
    if method == "enumerate":
        subsets, losses = subset_losses(layer, r)
        order = ranked(losses).tolist()
        return [(subsets[i], losses[i].item()) for i in (order[0], order[len(order) // 2], order[-1])]
    generator = torch.Generator().manual_seed(0)
    found = [search_layer(layer, r, name, generator)[:2] for name in (method, "random", "random")]
    return sorted(found, key=lambda one: one[1])


@draws("00_moe_layer", "Fig. 2")
def _moe_layer(figure: NotebookFigure, data: dict) -> None:
    """One token in an MoE layer: bars of its routing weights for all experts; the best run."""
    [[axes]] = figure.panels(7, 2.6)
    n, chosen = len(data["weights"]), dict(zip(data["chosen"], data["normalised"], strict=True))
    for expert, weight in enumerate(data["weights"]):
        colour = COLOURS[0] if expert in chosen else "0.8"
        axes.add_patch(Rectangle((expert + 0.1, 1.6), 0.8, 1.2 * weight / max(data["weights"]), color=colour))
        axes.add_patch(Rectangle((expert + 0.1, 0.6), 0.8, 0.6, facecolor=colour, edgecolor="0.3"))
        axes.text(expert + 0.5, 0.9, f"f{expert}", ha="center", va="center", color="white" if expert in chosen else "0.3")
        axes.text(expert + 0.5, 1.45, f"{weight:.2f}", ha="center", va="center", fontsize=8)
    for expert in chosen:
        axes.annotate("", (n / 2, -0.35), (expert + 0.5, 0.58), arrowprops={"arrowstyle": "->", "color": COLOURS[0]})
    total = " + ".join(f"{weight:.2f} f{expert}(x)" for expert, weight in chosen.items())
    axes.text(n / 2, -0.55, f"output = {total}", ha="center", va="center")
    for height, words in ((2.2, "routing weights"), (0.9, "experts")):
        axes.text(-0.1, height, words, ha="right", va="center")
    axes.set(xlim=(-1.6, n), ylim=(-0.75, 2.9))
    axes.set_axis_off()
    figure.supxlabel(f"a token of layer {data['layer']}: the best {len(chosen)} of {n}, renormalised", fontsize=9)


@draws("00_method", "Fig. 3")
def _method(figure: NotebookFigure, data: dict) -> None:
    """Left, three subsets of experts with their losses, the best one in colour; right, tokens as bars of their two routing
    weights, the second hatched where it is skipped."""
    [(left, right)] = figure.panels(8, 2.9, 1, 2)
    n, candidates, tokens, beta = (data[key] for key in ("n", "candidates", "tokens", "beta"))
    for row, candidate in enumerate(candidates):
        for expert in range(n):
            style = {"facecolor": "0.6" if row else COLOURS[0]} if expert in candidate["kept"] else NOT_COMPUTED
            left.add_patch(Rectangle((expert + 0.08, -row + 0.1), 0.84, 0.7, edgecolor="0.4", lw=0.6, **style))
        left.text(n + 0.2, -row + 0.45, f"loss {candidate['loss']:.2f}", va="center")
    title = f"pruning: of the subsets of {data['r']}, the best stays"
    left.set(xlim=(0, n + 2.4), ylim=(-len(candidates) + 0.9, 1), title=title)
    for row, (first, second) in enumerate(tokens):
        dropped = second < beta * first
        style = NOT_COMPUTED if dropped else {"facecolor": COLOURS[1]}
        right.add_patch(Rectangle((0, -row + 0.1), first, 0.7, facecolor=COLOURS[0], edgecolor="0.4"))
        right.add_patch(Rectangle((first, -row + 0.1), second, 0.7, edgecolor="0.4", lw=0.6, **style))
        right.text(1.03, -row + 0.45, f"{second / first:.2f}" + (", skipped" if dropped else ""), va="center")
    behind = "a second expert" if data["k"] == 2 else "experts behind the first, together"
    right.set(xlim=(0, 1.5), ylim=(-len(tokens) + 0.9, 1), title=f"skipping: {behind} below {beta:.2f} of the first")
    for axes in (left, right):
        axes.set_axis_off()
    below = f"layer {data['layer']}; hatched: not computed; on the right, the ratio of the routing weights"
    figure.supxlabel(below, fontsize=9)


@draws("00_quickstart", PAST)
def _quickstart(figure: NotebookFigure, data: dict) -> None:
    """Bars of held-out perplexity on both corpora: all experts, pruned, pruned and skipping."""
    [[axes]] = figure.panels(5, 2.6)
    values = dict(zip(data["corpora"], zip(*data["perplexity"].values(), strict=True), strict=True))
    for bars in grouped_bars(axes, list(data["perplexity"]), values, 0.35, 0.33):
        axes.bar_label(bars, fmt="%.2f", padding=1, fontsize=8)
    axes.set(ylabel="perplexity, held-out (lower is better)", ylim=(1, None))
    axes.legend()
