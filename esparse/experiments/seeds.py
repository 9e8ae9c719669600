"""The studies of notebooks 03 and 07 to 09, on one run, and over models that differ only in their training seed.

Each function of a run yields rows that JSON can hold. `bench_study` collects them over the seeds in `data/results/`, where
the notebooks read them. Traces, pruned models and scores stay in the runs' folders, so that an interrupted study continues
where it stopped.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..files import measured, write_json
from ..machine import machine
from ..measure.timing import aligned
from ..tiny_model.build import trained_folder
from ..tiny_model.training import RECIPES, TINY, Recipe
from .criteria import criteria_rows
from .domain import both, domain_rows
from .recovery import STEPS, study_rows, tuned_rows
from .run import Run
from .weights import equal_bytes_rows, quantised_rows, sparsity_rows, switch_rows

SEEDS = (0, 1, 2)  # training seeds; 0 ships
STUDIES: dict[str, dict[str, Callable[[Run], Iterator[dict]]]] = {
    "criteria": {"rows": criteria_rows},
    "domain_specific": {"rows": domain_rows},
    "recovery": {"recovery": study_rows, "tuned": tuned_rows},
    "weight_pruning": {"sparsity": sparsity_rows, "switches": switch_rows, "equal_bytes": equal_bytes_rows},
    "quantised": {"rows": quantised_rows},
}


def study(run: Run, name: str) -> dict:
    """The rows of a study. For the embedded model: those that ship, over all training seeds. For another model: its own, as
    seed 0."""
    if run.embedded:
        return measured(name)
    rows = {part: [{"seed": 0, **row} for row in tqdm(rows(run), desc=part)] for part, rows in STUDIES[name].items()}
    return {"seeds": [0], **rows}


def bench_study(name: str, out: Path | None = None, seeds: Sequence[int] = SEEDS, recipe: Recipe = TINY) -> str:
    """A study on every training seed of a recipe. With `out`, that JSON file is rewritten after each seed."""
    result = {**machine(), "weights": str(recipe), "seeds": [], **{part: [] for part in STUDIES[name]}}
    for seed in seeds:
        run = seed_run(seed, recipe)
        for part, rows in STUDIES[name].items():
            result[part] += [{"seed": seed, **row} for row in tqdm(rows(run), desc=f"{part}, seed {seed}", unit="row")]
        result["seeds"].append(seed)
        if out:
            write_json(out, result)
    return "\n".join(f"{part}\n{aligned(_printable(result[part]))}" for part in STUDIES[name])


def seed_run(seed: int, recipe: Recipe = TINY) -> Run:
    """The run of a recipe's model for a training seed, on a GPU if there is one, without tasks if lm-eval is missing. Seed 0
    of `RECIPES` ships; other models are trained first, see `trained_folder`.

    Raises ValueError before training if the recipe's files are too short for the studies.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = {"device_map": None if device == "cpu" else device, "tasks": None if find_spec("lm_eval") else ()}
    run = Run(**dict(zip(("general", "domain"), recipe.text, strict=False)), **own)
    if seed == 0 and RECIPES.get(recipe.preset) == recipe:
        return replace(run, model_name=recipe.preset, folder=None)
    for corpus in recipe.text:
        run.held_out(corpus)
    if recipe.text:
        run.tokens(both(run), sequences=8 * STEPS, seed=run.seed + 3000)
    folder = trained_folder(recipe, seed, run.tokenizer, device)
    return replace(run, model_name=str(folder), dtype="float32", folder=folder.parents[1] / folder.name)


def _printable(rows: Sequence[dict]) -> list[dict]:
    """Rows with equal columns, without tasks, and with a perplexity column for each corpus."""
    columns = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    perplexities = [{f"ppl {i + 1}": row["perplexity"][i] for i in (0, 1)} for row in rows]
    return [{key: row.get(key, "") for key in columns} | two for row, two in zip(rows, perplexities, strict=True)]
