"""The studies of notebooks 07 to 09, on one run, and over models that differ by their training seed alone.

Each function of a run gives rows that JSON can hold; `bench_study` takes them over the seeds and keeps them in
`data/results/`, from where the notebooks read them. Traces, pruned models and scores are kept in the runs' folders: what
was interrupted goes on.
"""

import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

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
        if rung == "experts" and r == traced.layers[0].n:
            continue  # no expert differs from the teacher's
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
