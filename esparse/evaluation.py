"""Quality: perplexity on held-out tokens, and tasks through EleutherAI's lm-eval."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from .files import data_folder
from .models import check_tokens

if TYPE_CHECKING:
    import pandas as pd

TINY_TASKS = ("web_facts", "web_walks", "web_reference", "web_yes_no", "arithmetic_result", "arithmetic_problems")


@torch.no_grad()
def perplexity(model, tokens: torch.Tensor, batch_size: int = 16) -> float:
    """exp of the mean next-token cross-entropy over tokens [sequences, length], as for WikiText in the literature."""
    check_tokens(model, tokens)
    total = 0.0
    for batch in tqdm(tokens.split(batch_size), desc="perplexity", unit="batch", leave=False):
        logits = model(batch.to(model.device), use_cache=False).logits[:, :-1].float()  # [b, length - 1, vocabulary]
        targets = batch[:, 1:].to(logits.device)
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return float(torch.tensor(total / (tokens.shape[0] * (tokens.shape[1] - 1))).exp())


def evaluate(
    model,
    tokenizer,
    tasks: Sequence[str] = TINY_TASKS,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 64,
    seed: int = 1234,
) -> "pd.DataFrame":
    """Score a model on lm-eval tasks: those shipped in `data/tasks/` and any of lm-eval's own, by name.

        esparse.evaluate(model, tokenizer, ["web_facts", "arithmetic_problems"], limit=100)

    limit: the first so many items of each task (None: all). num_fewshot: None takes each task's own. Works inside
    `masked` and `skipping`. Returns a table indexed by task with `metric`, `value` (a share), `stderr` and `items`.
    Raises ValueError for an unknown task; ConnectionError where a task's data must come from the hub and cannot.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    _quiet()
    if isinstance(tasks, str):
        tasks = [tasks]
    own = [task for task in tasks if _task_file(task).exists()]
    manager = TaskManager(include_defaults=len(own) < len(tasks))
    unknown = [task for task in tasks if task not in own and task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"Unknown task {unknown[0]!r}: take one of {', '.join(TINY_TASKS)} or one of lm-eval's own.")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=_max_length(model))
    try:
        results = lm_eval.simple_evaluate(
            lm,
            tasks=[_task_config(task) if task in own else task for task in tasks],
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except OSError as error:
        raise ConnectionError(
            f"The data of {', '.join(tasks)} could not be read ({error}): offline, take tasks among {', '.join(TINY_TASKS)}."
        ) from error
    return _table(results)


def _quiet() -> None:
    import datasets

    datasets.disable_progress_bars()
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _task_file(task: str) -> Path:
    return data_folder() / "tasks" / f"{task}.yaml"


def _task_config(task: str) -> dict:
    """A shipped task with the path of its items made absolute: the files name it from the root of the checkout."""
    import yaml

    config = yaml.safe_load(_task_file(task).read_text(encoding="utf-8"))
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {split: str(data_folder().parent / name) for split, name in files.items()}
    return config


def _max_length(model) -> int:
    """Enough for any prompt here, and no more than the positions the model knows."""
    return min(2048, getattr(model.config, "max_position_embeddings", 2048))


def _table(results: dict) -> "pd.DataFrame":
    """The first metric of each task that lm-eval reports a standard error with."""
    import pandas as pd

    rows = []
    for task, scores in results["results"].items():
        names = [key for key in scores if "," in key and "_stderr" not in key]
        if not names:
            continue
        metric, _, filtered = names[0].partition(",")
        stderr = scores.get(f"{metric}_stderr,{filtered}")
        items = results["n-samples"][task]["effective"] if task in results["n-samples"] else None
        stderr = float(stderr) if isinstance(stderr, int | float) else None
        rows.append({"task": task, "metric": metric, "value": scores[names[0]], "stderr": stderr, "items": items})
    return pd.DataFrame(rows).set_index("task")
