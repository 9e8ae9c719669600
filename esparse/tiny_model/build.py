"""Make `data/` again from nothing: tokenizer, tiny model, corpora and tasks."""

import gzip
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from ..corpora import SYNTHETIC
from ..files import checkout, made_once, new_folder, read_json, write_json, write_text
from ..moe.published import published
from . import synthetic
from .training import TINY, Recipe, train_model, train_tokenizer

ITEMS = 300  # items of each task
DOCUMENTS = 5000  # documents of each split
SPLITS = {"calibration": 1, "heldout": 2}  # seeds; training uses 0


def _jsonl(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_corpora(folder: Path) -> None:
    """Write `corpora/NAME.SPLIT.jsonl.gz`: documents that no training step saw (other seeds of the same generator)."""
    (folder / "corpora").mkdir(parents=True, exist_ok=True)
    for name, (split, seed) in itertools.product(SYNTHETIC, SPLITS.items()):
        text = _jsonl({"text": d} for d in itertools.islice(synthetic.documents(name, seed), DOCUMENTS))
        (folder / "corpora" / f"{name}.{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def write_tasks(folder: Path) -> None:
    """Write `tasks/NAME.yaml` and its items; lm-eval reads them in the checkout with --include_path data/tasks."""
    for task in synthetic.TASKS:
        kind = "generation" if task == "arithmetic_problems" else "multiple_choice"
        template = Path(__file__).with_name(f"{kind}.yaml").read_text(encoding="utf-8")
        write_text(folder / "tasks" / f"{task}.yaml", template.replace("TASK", task))
        write_text(folder / "tasks" / f"{task}.jsonl", _jsonl(synthetic.task_items(task, ITEMS, seed=1)))
    examples = _jsonl(synthetic.example_problems(3, seed=1))
    write_text(folder / "tasks" / "arithmetic_problems.examples.jsonl", examples)


def write_model(folder: Path, recipe: Recipe = TINY, seed: int = 0, tokenizer=None, device: str = "cpu") -> None:
    """Train a model, and write it in bf16 with its tokenizer, which is trained too if none is given."""
    tokenizer = tokenizer or train_tokenizer()
    model = train_model(tokenizer, recipe, seed=seed, device=device)
    with new_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        model.bfloat16().save_pretrained(temporary)
        config = read_json(temporary / "config.json", "model config")
        write_json(temporary / "config.json", published(config, model.config.model_type))


def trained_folder(recipe: Recipe, seed: int, tokenizer, device: str = "cpu") -> Path:
    """The folder of a recipe's model for a training seed, in `.runs/trained` of the checkout.

    The model is trained the first time; the tiny one takes about 20 minutes on two quiet cores.
    """
    folder = checkout() / ".runs" / "trained" / f"{recipe.key}-seed-{seed}"
    return made_once(folder, lambda folder: write_model(folder, recipe, seed, tokenizer, device))
