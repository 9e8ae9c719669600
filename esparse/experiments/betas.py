"""Notebook 04: median betas (Section 3.3, A.7)."""

import torch

from ..moe.routers import skip_ratios
from ..style import COLOURS, NotebookFigure, legend_beside, line_style, of_the_paper
from ..tracing.statistics import median_betas
from .figures import draws
from .run import Run


def betas(run: Run, bins: int = 40) -> dict:
    """A.7: for both corpora, the distribution of rho in each layer, its median, and the median of another draw."""
    data = {"edges": torch.linspace(0, 1, bins + 1).tolist(), "corpora": {}}
    for corpus in (run.general, run.domain):
        traced = run.trace(corpus)
        ratios = [skip_ratios(layer.weights).flatten().float().cpu() for layer in traced.layers]
        data["corpora"][run.label(corpus)] = {
            "betas": median_betas(traced),
            "again": median_betas(run.another_draw(corpus)[0]),
            "density": [torch.histogram(r, bins, range=(0.0, 1.0), density=True).hist.tolist() for r in ratios],
        }
    return data


@draws("04_ratios", "Section 3.3")
def _ratios(figure: NotebookFigure, data: dict) -> None:
    """Histograms of the ratio of the second to the first routing weight, layer by layer."""
    layers = len(next(iter(data["corpora"].values()))["betas"])
    [row] = figure.panels(1.45 * layers + 0.8, 2.3, 1, layers, sharey=True, sharex=True)
    for number, axes in enumerate(row):
        for (name, corpus), colour in zip(data["corpora"].items(), COLOURS, strict=False):
            axes.stairs(corpus["density"][number], data["edges"], color=colour, label=name)
            axes.axvline(corpus["betas"][number], color=colour, ls="--", lw=1)
        axes.set_title(f"layer {number}")
    row[0].set_ylabel("density")
    legend_beside(row[-1])
    figure.supxlabel("rho (k = 2: second routing weight over the first); dashed: the median, beta", fontsize=9)


@draws("04_betas", "A.7")
def _betas(figure: NotebookFigure, data: dict) -> None:
    """Median beta over layers for both corpora, with another draw dotted; the paper's 64 beside."""
    [(here, paper)] = figure.panels(8, 2.7, 1, 2, sharey=True)
    for i, (name, corpus) in enumerate(data["corpora"].items()):
        here.plot(corpus["betas"], label=name, **line_style(i))
        here.plot(corpus["again"], ls=":", alpha=0.5, label="the same, another draw", **line_style(i))
    for i, (name, values) in enumerate(data["paper"].items()):
        paper.plot(values, ms=3, label=name, **line_style(i))
    here.set(xlabel="layer", ylabel="median beta", title="this model")
    of_the_paper(paper, "Mixtral 8x7B (A.7)", xlabel="layer")
    here.legend()
    paper.legend()
