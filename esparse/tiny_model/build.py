"""Make `data/` again from nothing: tokenizer, tiny model, corpora and tasks."""

import gzip
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from ..files import checkout, new_folder, write_text
from . import synthetic
from .recipe import TINY, Recipe
from .training import train_model, train_tokenizer

ITEMS = 300  # items of each task
DOCUMENTS = 5000  # documents of each split
SPLITS = {"calibration": 1, "heldout": 2}  # seeds; training uses 0


def _jsonl(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_corpora(folder: Path) -> None:
    """Write `corpora/NAME.SPLIT.jsonl.gz`: documents that no training step saw (other seeds of the same generator)."""
    (folder / "corpora").mkdir(parents=True, exist_ok=True)
    for name, (split, seed) in itertools.product(("web", "arithmetic"), SPLITS.items()):
        text = _jsonl({"text": d} for d in itertools.islice(synthetic.documents(name, seed), DOCUMENTS))
        packed = gzip.compress(text.encode(), mtime=0)
        (folder / "corpora" / f"{name}.{split}.jsonl.gz").write_bytes(packed)


def write_tasks(folder: Path) -> None:
    """Write `tasks/NAME.yaml` and its items; lm-eval reads them in the checkout with --include_path data/tasks."""
    for task in synthetic.TASKS:
        kind = "generation" if task == "arithmetic_problems" else "multiple_choice"
        template = Path(__file__).with_name(f"{kind}.yaml").read_text(encoding="utf-8")
        write_text(folder / "tasks" / f"{task}.yaml", template.replace("TASK", task))
        write_text(folder / "tasks" / f"{task}.jsonl", _jsonl(synthetic.task_items(task, ITEMS, seed=1)))
    examples = _jsonl(synthetic.example_problems(3, seed=1))
    write_text(folder / "tasks" / "arithmetic_problems.examples.jsonl", examples)


def write_model(folder: Path) -> None:
    """Write `tiny/`: tokenizer and checkpoint."""
    _write_trained(folder / "tiny", TINY, 0, train_tokenizer())


def trained_folder(recipe: Recipe, seed: int, tokenizer, device: str = "cpu") -> Path:
    """The folder of a recipe's model for a training seed, in `.runs/trained` of the checkout.

    The model is trained the first time; the tiny one takes about 20 minutes on two quiet cores.
    """
    folder = checkout() / ".runs" / "trained" / f"{recipe.key}-seed-{seed}"
    if not folder.exists():
        _write_trained(folder, recipe, seed, tokenizer, device)
    return folder


def _write_trained(folder: Path, recipe: Recipe, seed: int, tokenizer, device: str = "cpu") -> None:
    """Train a model, and save it with its tokenizer, in bf16."""
    model = train_model(tokenizer, recipe.preset, steps=recipe.steps, seed=seed, rows=recipe.rows, device=device)
    with new_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        model.bfloat16().save_pretrained(temporary)
