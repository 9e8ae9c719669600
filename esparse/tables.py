"""What the rows of studies say over seeds and draws, as tables and as the numbers of a figure."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .runs import Run
from .seeds import LADDER
from .studies import moe_experts
from .weights import METHODS

if TYPE_CHECKING:  # a GPU machine may lack it
    import pandas as pd

EXACT = ("arithmetic_problems", "gsm8k")  # tasks that are scored by exact match; a model without them shows none
MEASURES = {
    "general": lambda row: row["perplexity"][0],
    "domain": lambda row: row["perplexity"][1],
    "exact match": lambda row: next((row["tasks"][task] for task in EXACT if task in row["tasks"]), math.nan),
    "average": lambda row: math.nan if row["average"] is None else row["average"],  # no tasks were asked
}

RATIOS = ("general", "domain")  # of the measures, the perplexities


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 of one; none, where a value is none)."""
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return statistics.fmean(values), 0.0 if len(values) == 1 else math.nan
    return statistics.mean(values), statistics.stdev(values)


def means(rows: Sequence[dict], by: Sequence[str]) -> "pd.DataFrame":
    """Mean and deviation of every one of `MEASURES` over rows that agree in `by` (they differ by seed or draw), as text."""
    import pandas as pd

    groups: dict = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in by), []).append(row)
    cells = [
        {name: "{:.2f} ± {:.2f}".format(*spread([*map(value, some)])) for name, value in MEASURES.items()}
        for some in groups.values()
    ]
    shown = [["" if value is None else value for value in key] for key in groups]
    return pd.DataFrame(cells, index=pd.MultiIndex.from_tuples(map(tuple, shown), names=by))


def compared(rows: Sequence[dict], one: dict, other: dict, by: Sequence[str]) -> "pd.DataFrame":
    """What `one` kind of row has over the `other`, seed by seed: the mean, least and most over seeds for rows that agree in
    `by`. Perplexities compare by their ratio, scores by their difference; where a seed has several rows (draws), by their
    mean. An interval that leaves out 1, or 0, is one that the seeds agree on."""
    import pandas as pd

    places, found = list(dict.fromkeys(tuple(row[k] for k in by) for row in pick(rows, **one))), []
    for key in places:
        place, cells = dict(zip(by, key, strict=True)), []
        for name, value in MEASURES.items():
            mine, theirs = (_by_seed(pick(rows, **kind, **place), value) for kind in (one, other))
            if mine.keys() != theirs.keys():
                raise ValueError(f"The seeds of {one} and {other} at {place} differ: these rows cannot be compared.")
            apart = [mine[s] / theirs[s] if name in RATIOS else mine[s] - theirs[s] for s in mine]
            cells += [statistics.mean(apart), min(apart), max(apart)]
        found.append(cells)
    columns = pd.MultiIndex.from_product([MEASURES, ("mean", "least", "most")])
    index = pd.MultiIndex.from_tuples([tuple("" if value is None else value for value in key) for key in places], names=by)
    return pd.DataFrame(found, index=index, columns=columns)


def by_size(found: "pd.DataFrame", measure: str, digits: int = 2) -> "pd.DataFrame":
    """One measure of what `compared` by r and more found, as text: a column for each r, least to most in each cell."""
    ends = found[measure][["least", "most"]]
    text = "{:.{d}f} to {:.{d}f}".replace(" ", "\N{NO-BREAK SPACE}")
    cells = ends.apply(lambda row: text.format(*row, d=digits), axis=1)
    wide = cells.unstack("r", fill_value="")  # sorted, since pandas 2 mixes up what it does not sort
    return wide.reindex(index=cells.index.droplevel("r").unique(), columns=cells.index.unique("r"))


def _by_seed(rows: Sequence[dict], value: Callable[[dict], float]) -> dict[int, float]:
    groups: dict = {}
    for row in rows:
        groups.setdefault(row["seed"], []).append(value(row))
    return {seed: statistics.mean(values) for seed, values in groups.items()}


def line(label: str, rows: Sequence[dict], x: str | Callable[[dict], object], value: Callable[[dict], float]) -> dict:
    """One line of a panel: at every x the mean, least and most over rows, which differ by seed or draw."""
    place = x if callable(x) else lambda row: row[x]
    groups: dict = {}
    for row in rows:
        groups.setdefault(place(row), []).append(value(row))
    ends = {"mean": statistics.mean, "least": min, "most": max}
    return {"label": label, "x": list(groups)} | {name: [end(group) for group in groups.values()] for name, end in ends.items()}


def pick(rows: Sequence[dict], **wanted) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _measured(run: Run, key: str) -> dict:
    """Title and axis of a panel that shows one of `MEASURES`."""
    names = {"general": run.label(run.general), "domain": run.label(run.domain)}
    return {
        "title": names.get(key, "tasks"),
        "ylabel": "perplexity, held-out" if key in names else f"{key}, %",
        "log": key in names,
    }


def _in_lines(run: Run, corpus: str | None) -> str:
    """A corpus' name, narrow enough for a tick."""
    return run.label(corpus).replace(" (", "\n(").replace(" and ", "\nand ") if corpus else "none"


def corpora_of(rows: Sequence[dict]) -> list[str]:
    """The calibration corpora that rows know, in order."""
    return [corpus for corpus in dict.fromkeys(row["calibration"] for row in rows) if corpus]


def domain_figure(run: Run, rows: Sequence[dict], paper: Sequence[dict]) -> dict:
    """Table 3 as curves over r: what calibration on each corpus leaves of each, beside random draws; the paper's GSM8K."""
    full, panels = pick(rows, method="none", betas=None), []
    for key in ("general", "domain", "exact match"):
        lines = [
            line(run.label(corpus), full + pick(rows, method=run.method, calibration=corpus, betas=None), "r", MEASURES[key])
            for corpus in corpora_of(rows)
        ]
        drawn = full + pick(rows, method="random", betas=None)
        lines.insert(2, line("random", drawn, "r", MEASURES[key]))  # third, as the paper's is
        panels.append(_measured(run, key) | {"xlabel": "experts kept, r", "falling": True, "lines": lines})
    base = pick(paper, model="Mixtral 8x7B")
    kinds = {"C4": {"calibration": "C4"}, "MATH": {"calibration": "MATH"}, "random": {"method": "random"}}
    lines = [
        line(name, pick(base, method="none") + [r for r in pick(base, **kind) if r["r"] < 8], "r", lambda row: row["gsm8k"])
        for name, kind in kinds.items()
    ]
    about = {"title": "Mixtral 8x7B (Table 3)", "ylabel": "GSM8K, 5-shot, %", "xlabel": "experts kept, r", "falling": True}
    return {"panels": [*panels, about | {"lines": lines, "paper": True}]}


def beta_figure(run: Run, rows: Sequence[dict], paper: Sequence[dict]) -> dict:
    """Table 8: skipping with the betas of each corpus, on the full model and on those pruned on the domain; of many sizes
    every second one, as in the paper."""
    sizes = sorted({row["r"] for row in rows if row["betas"]}, reverse=True)
    sizes = sizes[::2] if len(sizes) > 3 else sizes
    panels = []
    for key in ("general", "domain", "exact match"):
        lines = []
        for r in sizes:
            mine = pick(rows, r=r, calibration=run.domain, method=run.method) or pick(rows, r=r, method="none")
            lines.append(line(f"r = {r}", mine, lambda row: _in_lines(run, row["betas"]), MEASURES[key]))
        panels.append(_measured(run, key) | {"xlabel": "betas of", "lines": lines})
    base = pick(paper, model="Mixtral 8x7B")
    lines = [
        line(f"r = {r}", pick(base, r=r), lambda row: "skipping" if row["skipping"] else "none", lambda row: row["gsm8k"])
        for r in (8, 6, 4)
    ]
    about = {"title": "Mixtral 8x7B (Table 8)", "ylabel": "GSM8K, 5-shot, %", "lines": lines, "paper": True, "xlabel": ""}
    return {"panels": [*panels, about]}


def sparsity_figure(run: Run, rows: Sequence[dict]) -> dict:
    """Perplexity over the share of the experts' weights that went, by score."""
    panels = []
    for key, kind in itertools.product(("general", "domain"), (float, str)):
        some = [row for row in rows if (":" in row["sparsity"]) is (kind is str) and row["method"] != "none"]
        lines = [
            line(method, pick(some, method=method), lambda row: kind(row["sparsity"]), MEASURES[key])  # noqa: B023
            for method in METHODS
        ]
        panels.append(_measured(run, key) | {"xlabel": "sparsity" if kind is float else "zeros of each group", "lines": lines})
    return {"panels": panels}


def equal_bytes_figure(run: Run, rows: Sequence[dict], full: Sequence[dict]) -> dict:
    """Experts against weights: quality over the bytes of the experts that are left."""
    n, panels = moe_experts(run), []
    left = lambda row: 100 * row["r"] / n  # noqa: E731
    whole = [{**row, "r": n} for row in full]
    names = {run.method: f"experts, {run.method}", "frequency": "experts, frequency"}
    names |= {"wanda": "weights, Wanda", "moe-pruner": "weights, MoE-Pruner"}
    for key in ("general", "domain", "average"):
        lines = [line(name, whole + pick(rows, method=method), left, MEASURES[key]) for method, name in names.items()]
        panels.append(_measured(run, key) | {"xlabel": "bytes of the experts, %", "falling": True, "lines": lines})
    return {"panels": panels}


def won_back(rows: Sequence[dict]) -> list[dict]:
    """The rungs of a ladder with the shares of what pruning lost that each wins back, in percent: in mean log perplexity over
    both corpora, towards the full model ("in perplexity") and towards the full model tuned alike ("of tuned", where there
    is one), and in exact match."""
    log = lambda row: sum(math.log(value) for value in row["perplexity"]) / len(row["perplexity"])  # noqa: E731
    measures = {
        "in perplexity": (log, "full"),
        "of tuned": (log, "full, tuned"),
        "in exact match": (MEASURES["exact match"], "full"),
    }
    found = []
    for row in rows:
        if row["rung"] not in LADDER:
            continue
        (pruned,) = pick(rows, seed=row["seed"], rung="pruned", r=row["r"], calibration=row["calibration"])
        about = {key: row[key] for key in ("seed", "r", "calibration", "rung", "seconds", "trained")}
        for name, (value, rung) in measures.items():
            for goal in pick(rows, seed=row["seed"], rung=rung):
                lost = value(pruned) - value(goal)
                about[name] = 100 * (value(pruned) - value(row)) / lost if lost else float("nan")
        found.append(about)
    return found


def ladder_figure(rows: Sequence[dict]) -> dict:
    """What each rung wins back, over the seconds it took and the parameters it trained; one point for each r, calibration
    corpus and seed."""
    found, panels = won_back(rows), []
    for of, x in itertools.product(("in perplexity", "in exact match"), ("seconds", "trained")):
        points = [
            {"label": rung, "x": [row[x] for row in pick(found, rung=rung)], "y": [row[of] for row in pick(found, rung=rung)]}
            for rung in LADDER
        ]
        label = {"seconds": "seconds", "trained": "trained parameters"}[x]
        panels.append({"title": of, "xlabel": label, "ylabel": "won back, %", "points": points})
    return {"panels": panels}


def tuned_figure(run: Run, rows: Sequence[dict], paper: Sequence[dict]) -> dict:
    """Table 4: exact match before and after the same fine-tuning, beside the paper's GSM8K after it."""
    name = lambda row: f"r = {row['r']}" + (f"\n{row['calibration']}" if row["calibration"] else "")  # noqa: E731
    before = [row["before"] | {"r": row["r"], "calibration": row["calibration"]} for row in rows]
    lines = [line("before", before, name, MEASURES["exact match"]), line("fine-tuned", rows, name, MEASURES["exact match"])]
    ours = _measured(run, "exact match") | {"title": f"tuned on {run.label(run.domain)}", "lines": lines, "xlabel": ""}
    base = sorted(pick(paper, model="Mixtral 8x7B"), key=lambda row: (-row["r"], row["calibration"] or ""))
    theirs = {"title": "Mixtral 8x7B (Table 4)", "ylabel": "GSM8K, 0-shot, %", "xlabel": "", "paper": True}
    return {"panels": [ours, theirs | {"lines": [line("fine-tuned", base, name, lambda row: row["gsm8k"])]}]}
