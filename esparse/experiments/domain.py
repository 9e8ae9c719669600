"""Notebook 07: domain-specific pruning (Tables 3 and 8)."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from ..pruning.plan import PruningPlan
from ..pruning.search import search_experts
from ..style import COLOURS, NotebookFigure, legend_below
from ..tracing.statistics import median_betas
from .figures import PAST, draws, register
from .run import Run
from .tables import measure_panels, panels, paper_panel, pick

DRAWS = 3  # random plans for each r
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the domain in a mixture
SHOWN = ("general", "domain", "exact match")  # measures shown in figures


def domain_rows(run: Run) -> Iterator[dict]:
    """Tables 3 and 8: calibration corpus x beta corpus x r x method x skipping, random draws included, and the full model
    with Wanda's and MoE-Pruner's weights at 2:4."""
    n, corpora = run.experts, [run.general, run.domain, both(run)]
    yield from skipping_rows(run, None, {"r": n, "method": "none", "calibration": None}, corpora)
    for r in run.sizes:
        yield from pruned_rows(run, r, corpora)
        for draw in range(DRAWS):
            plan = run.plan(run.general, r, "random", seed=run.seed + draw)
            yield from skipping_rows(run, plan, {"r": r, "method": "random", "calibration": None, "draw": draw}, corpora)
    for method, corpus in itertools.product(("wanda", "moe-pruner"), corpora):
        about = {"r": n, "method": f"{method} 2:4", "calibration": corpus}
        yield from skipping_rows(run.sparse(corpus, "2:4", method), None, about, corpora)


def both(run: Run) -> str:
    """Both corpora mixed."""
    return f"{run.general}+{run.domain}"


def pruned_rows(run: Run, r: int, beta_corpora: Sequence[str] = ()) -> Iterator[dict]:
    """METHOD and frequency at r, calibrated on each corpus, without skipping and with the betas of `beta_corpora`."""
    methods, corpora = dict.fromkeys((run.method, "frequency")), [run.general, run.domain, both(run)]
    for method, corpus in itertools.product(methods, corpora):
        about = {"r": r, "method": method, "calibration": corpus}
        yield from skipping_rows(run, run.plan(corpus, r, method), about, beta_corpora)


def skipping_rows(run: Run, plan: PruningPlan | None, about: dict, beta_corpora: Sequence[str]) -> Iterator[dict]:
    """A run's model masked to a plan, without skipping and with its median betas on each corpus. Of the models that skip, the
    tasks are scored on those of Table 8: the full model, and those that METHOD pruned for the domain."""
    shown = about["method"] == "none" or (about["method"], about["calibration"]) == (run.method, run.domain)
    for corpus in (None, *beta_corpora):
        betas = median_betas(run.trace(corpus), plan and plan.kept) if corpus else None
        yield about | {"betas": corpus} | run.quality(plan, betas, tasks=shown or not corpus)


def domain_figure(run: Run, rows: Sequence[dict], paper: Sequence[dict]) -> dict:
    """Table 3 as curves over r: `SHOWN` for each calibration corpus and for random draws; and the paper's GSM8K."""
    rows, paper = pick(rows, betas=None), pick(paper, model="Mixtral 8x7B")
    corpora = filter(None, dict.fromkeys(row["calibration"] for row in rows))
    ours = [(run.label(corpus), {"method": run.method, "calibration": corpus}) for corpus in corpora]
    ours.insert(2, ("random", {"method": "random"}))  # third, as in the paper
    theirs = {"C4": {"calibration": "C4"}, "MATH": {"calibration": "MATH"}, "random": {"method": "random"}}
    about = {"x": "r", "xlabel": "experts kept, r", "falling": True}
    measured = measure_panels(run, SHOWN, _from_full(rows, dict(ours)), **about)
    return {"panels": [*measured, paper_panel("Table 3", 5, _from_full(paper, theirs), **about)]}


def _from_full(rows: Sequence[dict], kinds: Mapping[str, dict]) -> dict[str, list[dict]]:
    """The full model's rows, followed by the pruned models' of each kind."""
    full = pick(rows, method="none")
    pruned = [row for row in rows if row["r"] < full[0]["r"]]
    return {name: full + pick(pruned, **kind) for name, kind in kinds.items()}


def beta_figure(run: Run, rows: Sequence[dict], paper: Sequence[dict]) -> dict:
    """Table 8: skipping with each corpus's betas, on the full model and on models pruned on the domain. Of more than three
    sizes every second is shown, as in the paper."""
    sizes = sorted({row["r"] for row in rows if row["betas"]}, reverse=True)
    sizes = sizes[::2] if len(sizes) > 3 else sizes
    pruned = {"calibration": run.domain, "method": run.method}
    shown = {f"r = {r}": pick(rows, r=r, **pruned) or pick(rows, r=r, method="none") for r in sizes}
    theirs = {f"r = {r}": pick(paper, model="Mixtral 8x7B", r=r) for r in (8, 6, 4)}

    def betas(row: dict) -> str:
        """Whose betas, in lines narrow enough for an axis tick."""
        return run.label(row["betas"]).replace(" (", "\n(").replace(" and ", "\nand ") if row["betas"] else "none"

    measured = measure_panels(run, SHOWN, shown, betas, xlabel="betas of")
    skips = lambda row: "skipping" if row["skipping"] else "none"  # noqa: E731
    return {"panels": [*measured, paper_panel("Table 8", 5, theirs, skips, xlabel="")]}


def mixture(run: Run) -> dict:
    """For every second r, held-out perplexity on both corpora. "frontier": of the plans that METHOD (for "progressive",
    enumeration) chooses from both traces for `SHARES` of the domain; "mixed text": of the plan calibrated on a text of both."""
    method = "enumerate" if run.method == "progressive" else run.method
    corpora, rows = [run.general, run.domain], []
    traces = [run.trace(corpus) for corpus in corpora]
    for r in run.sizes[1::2] or run.sizes:
        shares = [[1 - share, share] for share in SHARES]
        plans = [search_experts(traces, r, method=method, weights=parts, seed=run.seed) for parts in shares]
        plans.append(run.plan(both(run), r, method))
        *frontier, mixed = [[run.perplexity(corpus, plan) for corpus in corpora] for plan in plans]
        rows.append({"r": r, "shares": SHARES, "frontier": frontier, "mixed text": mixed})
    return {"corpora": list(map(run.label, corpora)), "rows": rows}


@draws("07_mixture", PAST)
def _mixture(figure: NotebookFigure, data: dict) -> None:
    """A panel for each r: held-out perplexity on one corpus against that on the other as the calibration goes from one to the
    other in quarters; both ends and calibration on mixed text marked."""
    count, (one, other) = len(data["rows"]), data["corpora"]
    [every] = figure.panels(max(7.0, 2.4 * count), 2.9, 1, count)
    for axes, row in zip(every, data["rows"], strict=True):
        axes.plot(*zip(*row["frontier"], strict=True), ".-", color="0.5", label="mixtures of both, in quarters")
        marked = {f"calibrated on {one}": row["frontier"][0], f"calibrated on {other}": row["frontier"][-1]}
        for i, (label, point) in enumerate((marked | {"calibrated on mixed text": row["mixed text"]}).items()):
            axes.plot(*point, "osX"[i], color=COLOURS[i], ms=7, label=label)
        axes.set(title=f"r = {row['r']}", xlabel=f"perplexity, {one}")
    every[0].set_ylabel(f"perplexity, {other}")
    legend_below(every[0], 2)


DOMAIN = (
    "Perplexity on both corpora and exact match over the experts kept, a line for each calibration corpus with bars over three "
    "seeds; the paper's GSM8K beside."
)
BETAS = "Quality by whose betas skipping uses, a line for each r; the paper's GSM8K beside."
register("07_domain_specific", "Table 3", panels, DOMAIN)
register("07_betas", "Table 8", panels, BETAS)
