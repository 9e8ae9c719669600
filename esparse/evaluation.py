"""Quality: perplexity on held-out tokens, and tasks through EleutherAI's lm-eval."""

import atexit
import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from .files import data_folder, digest
from .models import check_tokens, evaluating, input_device
from .processes import leave_ranks, of_first

if TYPE_CHECKING:
    import pandas as pd

TINY_TASKS = ("web_facts", "web_walks", "web_reference", "web_yes_no", "arithmetic_result", "arithmetic_problems")
# The paper's eight tasks (Table 2), zero-shot accuracy.
PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande")
# GSM8K comes with its five examples; MATH is lm-eval's group over the seven subjects.
SUITES = {"tiny": TINY_TASKS, "paper": PAPER_TASKS, "domain": ("gsm8k", "hendrycks_math"), "perplexity": ("wikitext",)}
METRICS = ("acc,none", "exact_match,strict-match", "exact_match,none", "word_perplexity,none")  # in this order, where there


@torch.no_grad()
def perplexity(model, tokens: torch.Tensor, batch_size: int = 16) -> float:
    """exp of the mean next-token cross-entropy over tokens [sequences, length], as for WikiText in the literature."""
    check_tokens(model, tokens)
    total = 0.0
    with evaluating(model):
        for batch in tqdm(tokens.split(batch_size), desc="perplexity", unit="batch", leave=False):
            logits = model(batch.to(input_device(model)), use_cache=False).logits[:, :-1].float()  # [b, length - 1, vocabulary]
            targets = batch[:, 1:].to(logits.device)
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return float(torch.tensor(total / (tokens.shape[0] * (tokens.shape[1] - 1))).exp())


def evaluate(
    model,
    tokenizer,
    tasks: str | Sequence[str] = "tiny",
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 64,
    seed: int = 1234,
) -> "pd.DataFrame":
    """Score a model on lm-eval tasks: those shipped in `data/tasks/` and any of lm-eval's own, by name, or a suite.

        esparse.evaluate(model, tokenizer, ["web_facts", "arithmetic_problems"], limit=100)
        esparse.evaluate(model, tokenizer, "paper").value.mean()

    tasks: "tiny" (the embedded six), "paper" (its eight, zero-shot `acc`), "domain" (GSM8K 5-shot strict match, MATH),
    "perplexity" (WikiText, per word), a task or several. limit: the first so many items of each task (None: all).
    num_fewshot: None takes each task's own. Works inside `masked` and `skipping`, and under `accelerate launch`, where each
    process takes its share of the items. Returns a table indexed by task with `metric`, `value` (a share, or a perplexity),
    `stderr` and `items`.
    Raises ValueError for an unknown task; ConnectionError where a task's data must come from the hub and cannot.
    """
    import lm_eval

    _quiet()
    tasks = task_names(tasks)
    own = [task for task in tasks if _task_file(task).exists()]
    manager = _task_manager(len(own) < len(tasks))
    unknown = [task for task in tasks if task not in own and task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"Unknown task {unknown[0]!r}: take one of {', '.join(TINY_TASKS)} or one of lm-eval's own.")
    try:
        with evaluating(model):
            results = lm_eval.simple_evaluate(
                _language_model(model, tokenizer, batch_size),
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
    parts = results and {part: results[part] for part in ("results", "n-samples", "group_subtasks")}
    return _table(of_first(parts), tasks)  # lm-eval gives them to the first process alone


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """The tasks of a suite, or those named."""
    return list(SUITES.get(tasks, [tasks])) if isinstance(tasks, str) else list(tasks)


def task_version(task: str) -> str:
    """What a cached score of a task depends on: the items and form of a shipped one, else lm-eval's version."""
    if not _task_file(task).exists():
        return f"lm-eval {metadata.version('lm_eval')}"
    return digest(*(path.read_text(encoding="utf-8") for path in sorted(_task_file(task).parent.glob(f"{task}.*"))))


@cache
def _task_manager(everything: bool):
    """lm-eval's index of its own tasks, which takes it ten seconds, or of none."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=everything)


def _language_model(model, tokenizer, batch_size: int):
    """lm-eval's own Hugging Face model around ours, which under `accelerate launch` knows of the other processes."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    lm._device = input_device(model)  # it takes that of the first weight, which may be offloaded
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import Accelerator

        lm.accelerator = Accelerator()
        lm._rank, lm._world_size = lm.accelerator.process_index, lm.accelerator.num_processes
        if torch.distributed.get_backend() == "gloo":  # nccl does no harm, and ending it may wait for ranks that failed
            atexit.register(leave_ranks)
    return lm


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


def _table(results: dict, tasks: Sequence[str]) -> "pd.DataFrame":
    """One row a task: the metric of it that the literature reports, see `METRICS`, or its first."""
    import pandas as pd

    rows = []
    for task in tasks:
        scores = results["results"][task]
        names = [key for key in scores if "," in key and "_stderr" not in key]
        name = next((metric for metric in METRICS if metric in names), names[0])
        metric, _, filtered = name.partition(",")
        stderr = scores.get(f"{metric}_stderr,{filtered}")
        stderr = float(stderr) if isinstance(stderr, int | float) else None
        rows.append({"task": task, "metric": metric, "value": scores[name], "stderr": stderr, "items": _items(results, task)})
    return pd.DataFrame(rows).set_index("task")


def _items(results: dict, task: str) -> int:
    """How many items a task, or all tasks of a group, had."""
    if task in results["n-samples"]:
        return results["n-samples"][task]["effective"]
    return sum(_items(results, sub) for sub in results["group_subtasks"][task])
