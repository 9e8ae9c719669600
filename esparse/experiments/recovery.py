"""Notebook 08: recovery (Table 4)."""

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from matplotlib.figure import Figure

from ..checkpoints.models import load_model, save_model
from ..files import digest, read_json, write_json
from ..pruning.mask import prune
from ..pruning.plan import PruningPlan
from ..recovery import TRAINED_METHODS, choose_by_output, recover, scale_experts
from ..tracing.recorder import tokens_digest
from .domain import both
from .figures import draws
from .run import Run
from .tables import GSM8K, MEASURES, line, measure_panel, panels, paper_panel, pick

STEPS = 100  # training steps on the tiny model
RATE = 1e-3
RECOVERY_METHODS = ("scales", "output", *TRAINED_METHODS)


def study_rows(run: Run) -> Iterator[dict]:
    """The full model, and every method at r = 6 and 5 of 8, calibrated on the general corpus and trained on both.

    The full model is scored untuned and tuned like the pruned ones, since more training changes it too.
    """
    n, text = run.experts, both(run)
    yield {"r": n, "method": "full"} | run.quality()
    yield {"r": n} | _trained(run, None, text, "tune", STEPS) | {"method": "full, tuned"}
    for r in run.sizes[1:3] or run.sizes:
        yield from recovery_rows(run, r, run.general, text)


def recovery_rows(
    run: Run, r: int, corpus: str, text: str, *, methods: Sequence[str] = RECOVERY_METHODS, steps: int = STEPS
) -> Iterator[dict]:
    """A model pruned to r experts on a corpus, and each recovery method on its own: quality on held-out text, seconds, and
    number of trained parameters. text: the corpus for training, with nothing held out."""
    plan, about = run.plan(corpus, r), {"r": r, "calibration": corpus, "text": text}
    yield about | {"method": "pruned", "seconds": 0.0, "trained": 0} | run.quality(plan)
    for method in methods:
        if method == "output" and run.method != "enumerate":
            continue  # it needs the loss of every subset, and there are too many
        if method == "experts" and r == run.experts:
            continue  # no expert differs from the teacher's
        if method == "scales":
            found = _scaled(run, plan, corpus, text)
        elif method == "output":
            found = _chosen(run, plan, corpus, text)
        else:
            found = _trained(run, plan, text, method, steps)
        yield about | {"method": method} | found


def tuned_rows(run: Run, cases: Sequence[tuple[int, str | None]] = (), *, steps: int = STEPS) -> Iterator[dict]:
    """Table 4: the full model and pruned ones, each fine-tuned on the domain for the same steps.

    cases: r and the calibration corpus. Without cases: all experts, and 7 and 6 of 8 calibrated on each corpus.
    """
    pruned = itertools.product(run.sizes[:2], (run.general, run.domain))
    for r, corpus in cases or [(run.experts, None), *pruned]:
        plan = run.plan(corpus, r) if corpus else None
        yield {"r": r, "calibration": corpus} | _trained(run, plan, run.domain, "tune", steps) | {"before": run.quality(plan)}


def _scaled(run: Run, plan: PruningPlan, corpus: str, text: str) -> dict:
    """Closed-form scales of the kept experts."""
    traced = run.trace(corpus)

    def scale(model) -> dict:
        started = time.perf_counter()
        scales = scale_experts(model, traced, plan)
        return {"seconds": time.perf_counter() - started, "trained": 0, "scales": scales}

    other, report = recovered(run, plan, {"method": "scales", "text": text}, scale)
    return report | other.quality()


def _chosen(run: Run, plan: PruningPlan, corpus: str, text: str) -> dict:
    """The choice among close subsets by the model's output, on sequences of its own."""
    traced, tokens = run.trace(corpus), run.tokens(text, sequences=8, seed=run.seed + 2000)

    def choose() -> dict:
        started = time.perf_counter()
        chosen, found = choose_by_output(run.model, traced, plan.r, tokens)
        report = {"seconds": time.perf_counter() - started, "trained": 0, "kl": found}
        return {"plan": asdict(chosen), "report": report}

    found = run.cached(choose, _settings(run, plan, text), "output", text)
    return found["report"] | run.quality(PruningPlan(**found["plan"]))


def _trained(run: Run, plan: PruningPlan | None, text: str, method: str, steps: int) -> dict:
    """The report of `recover` after training on text, and the quality."""

    def train(model) -> dict:
        tokens = run.tokens(text, sequences=min(1024, 8 * steps), seed=run.seed + 3000)
        options = {"teacher": run.model, "plan": plan, "steps": steps, "learning_rate": RATE, "seed": run.seed}
        return recover(model, tokens, method, **options)

    other, report = recovered(run, plan, {"method": method, "text": text, "steps": steps}, train)
    return report | other.quality()


def recovered(run: Run, plan: PruningPlan | None, done: dict, change: Callable[[object], dict]) -> tuple[Run, dict]:
    """A run of the model pruned to a plan (None: the full model) and changed in place by `change`; and the report of that.

    The model is stored on disk under a digest of `done` and of everything else that it depends on.
    """
    folder = run.folder / "recovered" / digest(_settings(run, plan, done.get("text")), done)
    about = folder.with_suffix(".json")
    if not about.exists():
        model, tokenizer = load_model(run.model_name, dtype=run.model.dtype, revision=run.revision)
        report = change(model if plan is None else prune(model, plan))
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed before it wrote its report
        save_model(model, tokenizer, folder)
        write_json(about, report)
    return run.on_checkpoint(folder), read_json(about, "record of a recovery")


def _settings(run: Run, plan: PruningPlan | None, text: str | None = None) -> list:
    """Everything that a recovery depends on besides its method: model, plan, calibration set and training text."""
    learnt = text and tokens_digest(run.tokens(text, sequences=8, seed=run.seed + 3000))
    return [run.model_key, plan and [plan.kept, plan.tokens], run.seed, run.length, RATE, learnt]


def won_back(rows: Sequence[dict]) -> list[dict]:
    """The share of what pruning lost that each recovery method wins back, in percent.

    "in perplexity" and "of tuned" are of the mean log perplexity over both corpora. The first is relative to the full
    model, the second to the full model tuned alike, if there is one. "in exact match" is relative to the full model.
    """
    log = lambda row: sum(map(math.log, row["perplexity"])) / len(row["perplexity"])  # noqa: E731
    measures = {"in perplexity": (log, "full"), "of tuned": (log, "full, tuned")}
    measures["in exact match"] = (MEASURES["exact match"], "full")
    found = []
    for row in (row for row in rows if row["method"] in RECOVERY_METHODS):
        (pruned,) = pick(rows, seed=row["seed"], method="pruned", r=row["r"], calibration=row["calibration"])
        about = {key: row[key] for key in ("seed", "r", "calibration", "method", "seconds", "trained")}
        for name, (value, goal) in measures.items():
            for full in pick(rows, seed=row["seed"], method=goal):
                lost = value(pruned) - value(full)
                about[name] = 100 * (value(pruned) - value(row)) / lost if lost else math.nan
        found.append(about)
    return found


def recovery_figure(rows: Sequence[dict]) -> dict:
    """The share that each method wins back, over its seconds and its number of trained parameters.

    There is one point for each r, calibration corpus and seed.
    """
    found, panels = {method: pick(won_back(rows), method=method) for method in RECOVERY_METHODS}, []
    xlabels = {"seconds": "seconds", "trained": "trained parameters"}
    for share, x in itertools.product(("in perplexity", "in exact match"), xlabels):
        points = [
            {"label": method, "x": [row[x] for row in some], "y": [row[share] for row in some]}
            for method, some in found.items()
        ]
        panels.append({"title": share, "xlabel": xlabels[x], "ylabel": "won back, %", "points": points})
    return {"panels": panels}


def tuned_figure(run: Run, rows: Sequence[dict], paper: Sequence[dict]) -> dict:
    """Table 4: exact match before and after the same fine-tuning, and the paper's GSM8K after it."""
    name = lambda row: f"r = {row['r']}" + (f"\n{row['calibration']}" if row["calibration"] else "")  # noqa: E731
    before = [row["before"] | {"r": row["r"], "calibration": row["calibration"]} for row in rows]
    value = MEASURES["exact match"]
    lines = [line("before", before, name, value), line("fine-tuned", rows, name, value)]
    base = sorted(pick(paper, model="Mixtral 8x7B"), key=lambda row: (-row["r"], row["calibration"] or ""))
    theirs = paper_panel("Table 4", 0, "", [line("fine-tuned", base, name, GSM8K)])
    return {"panels": [measure_panel(run, "exact match", "", lines, title=f"tuned on {run.label(run.domain)}"), theirs]}


@draws("08_recovery", "Section 4.2")
def _recovery(data: dict) -> Figure:
    """Points: the share of the loss won back over seconds and trained parameters."""
    return panels(data)


@draws("08_fine_tuning", "Table 4")
def _fine_tuning(data: dict) -> Figure:
    """Exact match before and after fine-tuning, full model and pruned ones; the paper's beside."""
    return panels(data)
