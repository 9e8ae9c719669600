"""Notebook 08: recovery (Table 4)."""

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..checkpoints.models import load_model, save_model
from ..files import digest, made_once, read_json, write_json
from ..pruning.mask import prune
from ..pruning.plan import PruningPlan
from ..recovery import TRAINED_METHODS, recover, scale_experts
from ..tracing.recorder import tokens_digest
from .domain import both
from .figures import register
from .run import Run
from .tables import MEASURES, measure_panels, panels, paper_panel, pick

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
    plan, traced, about = run.plan(corpus, r), run.trace(corpus), {"r": r, "calibration": corpus, "text": text}
    yield about | {"method": "pruned", "seconds": 0.0, "trained": 0} | run.quality(plan)
    for method in methods:
        if method == "experts" and r == run.experts:
            continue  # no expert differs from the teacher's
        if method == "scales":
            scale = lambda model: {"scales": scale_experts(model, traced, plan)}  # noqa: E731
            found = _changed(run, plan, {"method": method, "text": text}, scale)
        elif method == "output":
            chosen, found = run.chosen_by_output(corpus, r, text)
            found |= {"trained": 0} | run.quality(chosen)
        else:
            found = _trained(run, plan, text, method, steps)
        yield about | {"method": method} | found


def tuned_rows(run: Run, *, steps: int = STEPS) -> Iterator[dict]:
    """Table 4, each model fine-tuned on the domain for the same steps: all experts, and 7 and 6 of 8 calibrated on each
    corpus."""
    pruned = itertools.product(run.sizes[:2], (run.general, run.domain))
    for r, corpus in [(run.experts, None), *pruned]:
        plan = run.plan(corpus, r) if corpus else None
        yield {"r": r, "calibration": corpus} | _trained(run, plan, run.domain, "tune", steps) | {"before": run.quality(plan)}


def _trained(run: Run, plan: PruningPlan | None, text: str, method: str, steps: int) -> dict:
    """The report of `recover` after training on text, and the quality."""

    def train(model) -> dict:
        tokens = run.tokens(text, sequences=min(1024, 8 * steps), seed=run.seed + 3000)
        return recover(model, tokens, method, teacher=run.model, plan=plan, steps=steps, learning_rate=RATE, seed=run.seed)

    return _changed(run, plan, {"method": method, "text": text, "steps": steps}, train)


def _changed(run: Run, plan: PruningPlan | None, done: dict, change: Callable[[object], dict]) -> dict:
    """The report and the quality of a `recovered` model."""
    other, report = recovered(run, plan, done, change)
    return report | other.quality()


def recovered(run: Run, plan: PruningPlan | None, done: dict, change: Callable[[object], dict]) -> tuple[Run, dict]:
    """A run of the model pruned to a plan (None: the full model) and changed in place by `change`; and the report of that,
    with its seconds and the number of trained parameters, 0 unless it says another.

    The model is stored on disk under a digest of `done` and of everything else that it depends on.
    """
    folder = run.folder / "recovered" / digest(_settings(run, plan, done.get("text")), done)

    def make(about: Path) -> None:
        model, tokenizer = load_model(run.model_name, dtype=run.model.dtype, revision=run.revision)
        model, started = model if plan is None else prune(model, plan), time.perf_counter()
        report = change(model)
        report = {"seconds": time.perf_counter() - started, "trained": 0} | report
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed before it wrote its report
        save_model(model, tokenizer, folder)
        write_json(about, report)

    return run.on_checkpoint(folder), read_json(made_once(folder.with_suffix(".json"), make), "record of a recovery")


def _settings(run: Run, plan: PruningPlan | None, text: str | None = None) -> list:
    """Everything that a recovery depends on besides its method: model, plan, calibration set and training text."""
    learnt = text and tokens_digest(run.tokens(text, sequences=8, seed=run.seed + 3000))
    return [run.model_key, plan and [plan.kept, plan.tokens], run.seed, run.length, RATE, learnt]


def won_back(rows: Sequence[dict]) -> list[dict]:
    """What each recovery method wins back.

    "in perplexity" and "of tuned" are shares, in percent, of the mean log perplexity over both corpora that pruning lost: the
    first relative to the full model, the second to the full model tuned alike, if there is one. "points" is the exact match
    that it gains, in percent of all items.
    """
    log = lambda row: sum(map(math.log, row["perplexity"])) / len(row["perplexity"])  # noqa: E731
    found = []
    for row in (row for row in rows if row["method"] in RECOVERY_METHODS):
        (pruned,) = pick(rows, seed=row["seed"], method="pruned", r=row["r"], calibration=row["calibration"])
        about = {key: row[key] for key in ("seed", "r", "calibration", "method", "seconds", "trained")}
        for name, goal in (("in perplexity", "full"), ("of tuned", "full, tuned")):
            for full in pick(rows, seed=row["seed"], method=goal):
                lost = log(pruned) - log(full)
                about[name] = 100 * (log(pruned) - log(row)) / lost if lost else math.nan
        found.append(about | {"points": MEASURES["exact match"](row) - MEASURES["exact match"](pruned)})
    return found


def recovery_figure(rows: Sequence[dict]) -> dict:
    """What each method wins back, over its seconds and its number of trained parameters: a point for each r, calibration corpus
    and seed."""
    found, made = won_back(rows), []
    measures = {"of tuned": ("log perplexity", "won back, %"), "points": ("exact match", "gained, points")}
    for (measure, (title, ylabel)), x in itertools.product(measures.items(), ("seconds", "trained")):
        points = []
        for method in RECOVERY_METHODS:
            some = pick(found, method=method)
            points.append({"label": method, "x": [row[x] for row in some], "y": [row[measure] for row in some]})
        xlabel = "trained parameters" if x == "trained" else x
        made.append({"title": title, "xlabel": xlabel, "ylabel": ylabel, "points": points})
    return {"panels": made}


def tuned_figure(run: Run, rows: Sequence[dict], paper: Sequence[dict]) -> dict:
    """Table 4: exact match before and after the same fine-tuning, and the paper's GSM8K after it."""
    name = lambda row: f"r = {row['r']}" + (f"\n{row['calibration']}" if row["calibration"] else "")  # noqa: E731
    ours = {"before": [row | row["before"] for row in rows], "fine-tuned": rows}
    title = f"tuned on {run.label(run.domain)}"
    theirs = sorted(pick(paper, model="Mixtral 8x7B"), key=lambda row: (-row["r"], row["calibration"] or ""))
    beside = paper_panel("Table 4", 0, {"fine-tuned": theirs}, name, xlabel="")
    return {"panels": [*measure_panels(run, ["exact match"], ours, name, xlabel="", title=title), beside]}


RECOVERY = "Points: log perplexity won back and exact match gained, over seconds and trained parameters."
FINE_TUNING = "Exact match before and after fine-tuning, full model and pruned ones; the paper's beside."
register("08_recovery", "Section 4.2", panels, RECOVERY)
register("08_fine_tuning", "Table 4", panels, FINE_TUNING)
