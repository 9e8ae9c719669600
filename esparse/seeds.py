"""The studies of notebooks 07 to 09, on one run, and over models that differ by their training seed alone.

Each function of a run gives rows that JSON can hold; `bench_study` takes them over the seeds and keeps them in
`data/results/`, from where the notebooks read them. Traces, pruned models and scores are kept in the runs' folders: what
was interrupted goes on.
"""

import itertools
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from .benchmark import machine
from .checkpoints import load_model, save_model, weight_bytes
from .files import checkout, digest, measured, read_json, write_json
from .pruning import PruningPlan, prune
from .recipes import TINY, Recipe
from .recovery import RUNGS, choose_by_output, recover, scale_experts
from .runs import Run
from .speed import aligned
from .studies import moe_experts, quality
from .traces import Trace, median_betas, tokens_digest
from .training import train_model
from .weights import METHODS, SCOPES, equal_share

if TYPE_CHECKING:  # a GPU machine may lack it
    import pandas as pd

SEEDS = (0, 1, 2)  # of training; 0 ships
STEPS = 100  # of recovery on the tiny model
RATE = 1e-3
DRAWS = 3  # of random plans
LADDER = ("scales", "output", *RUNGS)


def seed_run(seed: int, recipe: Recipe = TINY) -> Run:
    """A run of the model that a recipe makes of a training seed, on a GPU where there is one; without lm-eval no tasks are
    asked. The tiny model's seed 0 ships; others are trained first, in about 20 minutes on two quiet cores."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = {"device_map": None if device == "cpu" else device, "tasks": None if find_spec("lm_eval") else ()}
    run = Run(**dict(zip(("general", "domain"), recipe.text, strict=False)), **own)
    if seed == 0 and recipe == TINY:
        return run
    name = f"{recipe.key}-seed-{seed}"
    folder = checkout() / ".runs" / "trained" / name
    if not folder.exists():
        _check_text(run)
        options = {"steps": recipe.steps, "rows": recipe.rows, "device": device}
        model = train_model(run.tokenizer, recipe.preset, seed=seed, **options).to(torch.bfloat16)
        save_model(model, run.tokenizer, folder)
    return replace(run, model_name=str(folder), dtype="float32", folder=checkout() / ".runs" / name)


def _check_text(run: Run) -> None:
    """ValueError, before a model is trained on it, for text that is too short for the studies."""
    for corpus in (run.general, run.domain):
        run.held_out(corpus)
    run.tokens(both(run), sequences=8 * STEPS, seed=run.seed + 3000)


# --- 07: domain-specific pruning ------------------------------------------------------------------------------------


def domain_rows(run: Run) -> Iterator[dict]:
    """Tables 3 and 8: calibration corpus x beta corpus x r x method x skipping, random draws included, and the full model
    with Wanda's and MoE-Pruner's weights at 2:4."""
    n, corpora = moe_experts(run), calibration_corpora(run)
    yield from skipping_rows(run, None, {"r": n, "method": "none", "calibration": None}, corpora)
    for r in run.sizes:
        yield from pruned_rows(run, r, corpora)
        for draw in range(DRAWS):
            plan = run.plan(run.general, r, "random", seed=run.seed + draw)
            about = {"r": r, "method": "random", "calibration": None, "draw": draw}
            yield from skipping_rows(run, plan, about, corpora)
    for method, corpus in itertools.product(("wanda", "moe-pruner"), corpora):
        about = {"r": n, "method": f"{method} 2:4", "calibration": corpus}
        yield from skipping_rows(run.sparse(corpus, "2:4", method), None, about, corpora)


def both(run: Run) -> str:
    """Both corpora mixed."""
    return f"{run.general}+{run.domain}"


def calibration_corpora(run: Run) -> list[str]:
    """Each corpus, and both mixed."""
    return [run.general, run.domain, both(run)]


def pruned_rows(run: Run, r: int, beta_corpora: Sequence[str] = ()) -> Iterator[dict]:
    """METHOD and frequency at r, calibrated on each corpus, alone and skipping with the betas of corpora."""
    for method, corpus in itertools.product(dict.fromkeys((run.method, "frequency")), calibration_corpora(run)):
        about = {"r": r, "method": method, "calibration": corpus}
        yield from skipping_rows(run, run.plan(corpus, r, method), about, beta_corpora)


def skipping_rows(run: Run, plan: PruningPlan | None, about: dict, beta_corpora: Sequence[str]) -> Iterator[dict]:
    """A run's model masked to a plan, without skipping and with the median betas that it has on each corpus."""
    for corpus in (None, *beta_corpora):
        betas = median_betas(run.trace(corpus), plan and plan.kept) if corpus else None
        yield about | {"betas": corpus} | quality(run, plan, betas)


# --- 08: recovery ---------------------------------------------------------------------------------------------------


def recovered(run: Run, plan: PruningPlan | None, what: dict, change: Callable[[object], dict]) -> tuple[Run, dict]:
    """A run of the model pruned to a plan (the full one, if None) and then changed in place by `change`, kept on disk under
    the name of `what` was done; and what `change` told of it."""
    folder = run.folder / "recovered" / digest(_settings(run, plan, what.get("text")), what)
    about = folder.with_suffix(".json")
    if not about.exists():
        model, tokenizer = load_model(run.model_name, dtype=run.model.dtype, revision=run.revision)
        told = change(model if plan is None else prune(model, plan))
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it told
        save_model(model, tokenizer, folder)
        write_json(about, told)
    return run.of(folder), read_json(about, "record of a recovery")


def _settings(run: Run, plan: PruningPlan | None, text: str | None = None) -> list:
    """What a recovery depends on besides the rung: the model, the plan and its calibration set, the text that is learnt."""
    learnt = text and tokens_digest(run.tokens(text, sequences=8, seed=run.seed + 3000))
    return [run.model_key, plan and [plan.kept, plan.tokens], run.seed, run.length, RATE, learnt]


def ladder_rows(
    run: Run, r: int, corpus: str, text: str, *, rungs: Sequence[str] = LADDER, steps: int = STEPS
) -> Iterator[dict]:
    """From a model pruned to r experts on a corpus back up, each rung by itself: quality on held-out text, the seconds it
    took and the parameters it trained. text: the corpus that rungs learn from, of which nothing is held out."""
    plan, traced = run.plan(corpus, r), run.trace(corpus)
    calls = {
        "scales": lambda model: {"trained": 0, "scales": scale_experts(model, traced, plan)},
        **{rung: partial(_train, run, text, rung, plan, steps) for rung in RUNGS},
    }
    about = {"r": r, "calibration": corpus, "text": text}
    yield about | {"rung": "pruned", "seconds": 0.0, "trained": 0} | quality(run, plan)
    for rung in rungs:
        if rung == "output" and run.method != "enumerate":
            continue  # it chooses among the best of all subsets, which then are too many
        if rung == "output":
            chosen = run.once(lambda: _chosen(run, plan, traced, text), _settings(run, plan, text), "output", text)
            told, found = chosen["told"], quality(run, PruningPlan(**chosen["plan"]))
        else:
            other, told = recovered(run, plan, {"rung": rung, "text": text, "steps": steps}, _timed(calls[rung]))
            found = quality(other)
        yield about | {"rung": rung} | told | found


def _timed(change: Callable[[object], dict]) -> Callable[[object], dict]:
    def timed(model) -> dict:
        started = time.perf_counter()
        told = change(model)
        return {"seconds": time.perf_counter() - started} | told

    return timed


def _chosen(run: Run, plan: PruningPlan, traced: Trace, text: str) -> dict:
    """The choice among close subsets by output, on a split of its own."""
    started = time.perf_counter()
    tokens = run.tokens(text, sequences=8, seed=run.seed + 2000)
    chosen, found = choose_by_output(run.model, traced, plan.r, tokens)
    return {"plan": asdict(chosen), "told": {"seconds": time.perf_counter() - started, "trained": 0, "kl": found}}


def _train(run: Run, text: str, rung: str, plan: PruningPlan | None, steps: int, model) -> dict:
    tokens = run.tokens(text, sequences=min(1024, 8 * steps), seed=run.seed + 3000)
    options = {"teacher": run.model, "plan": plan, "steps": steps, "learning_rate": RATE, "seed": run.seed}
    return recover(model, tokens, rung, **options)


def tuned_rows(run: Run, cases: Sequence[tuple[int, str | None]], *, steps: int = STEPS) -> Iterator[dict]:
    """Table 4: the full model and pruned ones, each fine-tuned on the domain for the same steps. cases: r, and the corpus
    that pruning was calibrated on."""
    for r, corpus in cases:
        plan = run.plan(corpus, r) if corpus else None
        what = {"rung": "tune", "text": run.domain, "steps": steps}
        other, told = recovered(run, plan, what, partial(_train, run, run.domain, "tune", plan, steps))
        yield {"r": r, "calibration": corpus} | told | quality(other) | {"before": quality(run, plan)}


# --- 09: weight pruning ---------------------------------------------------------------------------------------------


def sparsity_rows(run: Run, shares: Sequence[float | str] = (0.5, 0.6, 0.7, 0.8, "2:4", "4:8")) -> Iterator[dict]:
    """Table 1: magnitude, Wanda and MoE-Pruner at every sparsity of the experts' weights, calibrated on the general corpus."""
    yield {"method": "none", "sparsity": "0"} | quality(run)
    for share, method in itertools.product(shares, METHODS):
        yield {"method": method, "sparsity": str(share)} | quality(run.sparse(run.general, share, method))


def switch_rows(run: Run, share: float | str = 0.7) -> Iterator[dict]:
    """What else can be set: which linear maps, and whose activations."""
    for scope, dense, method in itertools.product(SCOPES, (False, True), ("wanda", "moe-pruner")):
        sparse = run.sparse(run.general, share, method, scope=scope, dense=dense)
        yield {"method": method, "sparsity": str(share), "scope": scope, "dense": dense} | quality(sparse)


def equal_bytes_rows(run: Run) -> Iterator[dict]:
    """Experts against weights at equal bytes: r of n experts, and the sparsity that takes the same room, see `equal_share`."""
    n = moe_experts(run)
    for r in run.sizes:
        share = round(equal_share(n, r), 4)
        yield {"r": r, "method": run.method, "sparsity": None} | quality(run, run.plan(run.general, r))
        yield {"r": r, "method": "frequency", "sparsity": None} | quality(run, run.plan(run.general, r, "frequency"))
        for method in ("wanda", "moe-pruner"):
            yield {"r": r, "method": method, "sparsity": share} | quality(run.sparse(run.general, share, method))


def quantised_rows(run: Run) -> Iterator[dict]:
    """A.6: expert pruning and 8-bit weights, each alone and together, with the bytes of each."""
    for r in (moe_experts(run), *run.sizes):
        plan = run.plan(run.general, r) if r < moe_experts(run) else None
        whole = recovered(run, plan, {"rung": "none"}, lambda model: {})[0]
        for some in (whole, replace(whole, dtype="int8")):
            about = {"r": r, "weights": some.dtype or "stored", "mib": weight_bytes(some.model) / 2**20}
            yield about | quality(some)


# --- over seeds -----------------------------------------------------------------------------------------------------


def _ladder(run: Run) -> Iterator[dict]:
    """The rungs at r = 6 and 5 of 8, calibrated on the general corpus, learning from both; and the full model, as it is and
    tuned like the pruned ones, since training on more text changes that one too."""
    n, text = moe_experts(run), both(run)
    yield {"r": n, "rung": "full"} | quality(run)
    other, told = recovered(
        run, None, {"rung": "tune", "text": text, "steps": STEPS}, partial(_train, run, text, "tune", None, STEPS)
    )
    yield {"r": n} | told | {"rung": "full, tuned"} | quality(other)
    for r in run.sizes[1:3] or run.sizes:
        yield from ladder_rows(run, r, run.general, text)


def _tuned(run: Run) -> Iterator[dict]:
    """Table 4's cases: all experts, and 7 and 6 of 8 calibrated on each corpus."""
    cases = itertools.product(run.sizes[:2], (run.general, run.domain))
    return tuned_rows(run, [(moe_experts(run), None), *cases])


STUDIES: dict[str, dict[str, Callable[[Run], Iterator[dict]]]] = {
    "domain_specific": {"rows": domain_rows},
    "recovery": {"ladder": _ladder, "tuned": _tuned},
    "weight_pruning": {"sparsity": sparsity_rows, "switches": switch_rows, "equal_bytes": equal_bytes_rows},
    "quantised": {"rows": quantised_rows},
}


def study(run: Run, name: str) -> dict:
    """The rows of a study: of the embedded model those measured over all training seeds, which ship; of another model the
    same rows, of it alone, as seed 0."""
    if run.embedded:
        return measured(name)
    rows = {part: [{"seed": 0, **row} for row in tqdm(rows(run), desc=part)] for part, rows in STUDIES[name].items()}
    return {"seeds": [0], **rows}


def bench_study(name: str, out: Path | None = None, seeds: Sequence[int] = SEEDS, recipe: Recipe = TINY) -> str:
    """A study on every training seed of a recipe; with `out`, the JSON there is written again after each."""
    result = {**machine(), "weights": str(recipe), "seeds": [], **{part: [] for part in STUDIES[name]}}
    for seed in seeds:
        run = seed_run(seed, recipe)
        for part, rows in STUDIES[name].items():
            result[part] += [{"seed": seed, **row} for row in tqdm(rows(run), desc=f"{part}, seed {seed}", unit="row")]
        result["seeds"].append(seed)
        if out:
            write_json(out, result)
    return "\n".join(f"{part}\n{aligned(_short(result[part]))}" for part in STUDIES[name])


def _short(rows: Sequence[dict]) -> list[dict]:
    """Rows for printing: of the same columns, without the tasks, and with both perplexities by themselves."""
    columns = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    plain = ({key: row.get(key, "") for key in columns} for row in rows)
    return [one | {f"ppl {i + 1}": row["perplexity"][i] for i in (0, 1)} for one, row in zip(plain, rows, strict=True)]


# --- figures and tables from the rows -------------------------------------------------------------------------------

EXACT = ("arithmetic_problems", "gsm8k")  # tasks that are scored by exact match; a model without them shows none
MEASURES = {
    "general": lambda row: row["perplexity"][0],
    "domain": lambda row: row["perplexity"][1],
    "exact match": lambda row: next((row["tasks"][task] for task in EXACT if task in row["tasks"]), math.nan),
    "average": lambda row: math.nan if row["average"] is None else row["average"],  # no tasks were asked
}

RATIOS = ("general", "domain")  # of the measures, the perplexities


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 of one)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(rows: Sequence[dict], by: Sequence[str]) -> "pd.DataFrame":
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
