"""How to choose experts: every method and loss on models trained from nothing and copied from a dense one (notebook 03)."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

import pandas as pd

from ..measure.evaluation import perplexity
from ..pruning.novices import mean_outputs, novices
from ..pruning.plan import PruningPlan
from ..pruning.scores import available_scores, super_experts
from ..pruning.search import affordable, search_experts
from ..tracing.losses import LOSSES
from ..tracing.recorder import tokens_digest
from .figures import PAST, register
from .run import Run
from .tables import line, panels, pick

DRAWS = 10  # random plans for each r
CASES = [("enumerate", loss) for loss in LOSSES]
CASES += [(method, "eq3") for method in ("progressive", "frequency", "reap", "activation", "cosine", "easy-ep", "contribution")]
CASES += [("contribution", "residual")]


def criteria_rows(run: Run) -> Iterator[dict]:
    """Held-out perplexity on both corpora for every method, loss, calibration corpus and r; tasks at one r."""
    yield {"r": run.experts, "method": "none", "loss": None, "calibration": None} | run.quality()
    cases = possible_cases(run)
    protected = cache(lambda corpus: super_experts(run.trace(corpus)))
    constants = cache(lambda corpus: mean_outputs(run.model, run.tokens(corpus)))
    for r, corpus in itertools.product(run.sizes, (run.general, run.domain)):
        about = {"r": r, "calibration": corpus}
        for method, loss in cases:
            yield about | {"method": method, "loss": loss} | _quality(run, run.plan(corpus, r, method, loss=loss))
        yield from _more_rows(run, corpus, r, about, protected, constants)
    for r, draw in itertools.product(run.sizes, range(DRAWS)):
        plan = run.plan(run.general, r, "random", seed=run.seed + draw, loss="eq3")
        about = {"r": r, "method": "random", "loss": None, "calibration": None, "draw": draw}
        yield about | run.quality(plan, tasks=False)


def possible_cases(run: Run) -> list[tuple[str, str]]:
    """`CASES` without scores that the trace cannot answer; with "greedy" for "enumerate" and without "progressive" where a
    layer's subsets are too many to enumerate."""
    trace = run.trace(run.general)
    if all(affordable(layer, r) for layer in trace.layers for r in run.sizes):
        return [case for case in CASES if case[0] in {"enumerate", "progressive", *available_scores(trace)}]
    cases = [("greedy" if method == "enumerate" else method, loss) for method, loss in CASES]
    return [case for case in cases if case[0] in {"greedy", *available_scores(trace)}]


def _more_rows(run: Run, corpus: str, r: int, about: dict, protected: Callable, constants: Callable) -> Iterator[dict]:
    """Three more choices: by the model's output; by frequency with super experts protected; by frequency with constants in
    place of the removed experts. protected, constants: both by corpus."""
    chosen, _ = run.chosen_by_output(corpus, r)
    yield about | {"method": "by output", "loss": None} | _quality(run, chosen)
    about = about | {"loss": "eq3"}
    safe = search_experts(run.trace(corpus), r, method="frequency", loss="eq3", protect=protected(corpus))
    yield about | {"method": "frequency, super experts stay"} | _quality(run, safe)
    plan = run.plan(corpus, r, "frequency", loss="eq3")
    yield about | {"method": "frequency, constants"} | _quality_with_constants(run, corpus, plan, constants)


def _quality(run: Run, plan: PruningPlan) -> dict:
    return run.quality(plan, tasks=plan.r == run.size)


def _quality_with_constants(run: Run, corpus: str, plan: PruningPlan, constants: Callable) -> dict:
    """Held-out perplexities with the removed experts' mean outputs on a corpus in their place."""
    tokens = run.tokens(corpus)

    def measure() -> list[float]:
        with novices(run.model, plan, constants(corpus)):
            return [perplexity(run.model, run.held_out(other)) for other in (run.general, run.domain)]

    found = run.cached(measure, run.model_key, plan.kept, "novices", tokens_digest(tokens))
    return {"perplexity": found, "average": None, "stderr": None, "tasks": {}}


def ranking(rows: Sequence[dict], sizes: Sequence[int]) -> pd.DataFrame:
    """The geometric mean of held-out perplexity over both corpora and these sizes: a row for each method and loss; a column for
    each seed, once calibrated on the corpus of the test ("own") and once on the other one."""
    corpora, found = list(dict.fromkeys(row["calibration"] for row in rows if row["calibration"])), {}
    for row in rows:
        if row["method"] == "none" or row["r"] not in sizes:
            continue
        label = row["method"] + f", {row['loss']}" * (row["loss"] not in (None, "eq3"))
        for corpus, value in zip(corpora, row["perplexity"], strict=True):
            calibrated = {None: ("own", "other"), corpus: ("own",)}.get(row["calibration"], ("other",))
            for relation in calibrated:
                found.setdefault(label, {}).setdefault((relation, row["seed"]), []).append(math.log(value))
    means = {label: {key: math.exp(sum(logs) / len(logs)) for key, logs in cells.items()} for label, cells in found.items()}
    return pd.DataFrame(means).T.sort_index(axis=1, ascending=[False, True]).sort_values(("own", rows[0]["seed"]))


def redundancy(run: Run, studies: Mapping[str, Sequence[dict]]) -> dict:
    """A panel for each model and corpus: held-out perplexity divided by the full model's, calibrated on that corpus, for each r
    and seed."""
    about = {"xlabel": "experts kept, r", "ylabel": "perplexity / full model's", "log": True, "falling": True}
    found = []
    for (model, rows), (place, corpus) in itertools.product(studies.items(), enumerate((run.general, run.domain))):
        search = "greedy" if pick(rows, method="greedy") else "enumerate"
        kinds = {"Eq. 3": {"method": search, "loss": "eq3"}, "residual": {"method": search, "loss": "residual"}}
        kinds |= {"frequency": {"method": "frequency"}, "random": {"method": "random", "calibration": None}}
        full = {row["seed"]: row["perplexity"][place] for row in pick(rows, method="none")}
        ratio = lambda row, full=full, place=place: row["perplexity"][place] / full[row["seed"]]  # noqa: E731
        lines = [line(name, pick(rows, **{"calibration": corpus} | kind), "r", ratio) for name, kind in kinds.items()]
        found.append({"title": f"{model}, {run.label(corpus)}", "lines": lines} | about)
    return {"panels": found}


REDUNDANCY = (
    "Perplexity over the full model's as experts go, for four ways to choose them: a model trained from nothing loses much at "
    "every step, one whose experts were copied from a dense model little. Bars: least and most over seeds and draws."
)
register("03_redundancy", PAST, panels, REDUNDANCY)
