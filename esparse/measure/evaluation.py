"""Quality: perplexity on held-out tokens, and tasks through EleutherAI's lm-eval."""

import atexit
import fnmatch
import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm
from transformers import set_seed

from ..files import data_folder, digest
from ..machine import everyone, leave_ranks
from ..moe.running import check_tokens, evaluating, input_device, router_logits_off

if TYPE_CHECKING:
    import pandas as pd

TINY_TASKS = ("web_facts", "web_walks", "web_reference", "arithmetic_result", "arithmetic_problems")
# The paper's eight tasks (Table 2), zero-shot accuracy.
PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande")
# GSM8K comes with its five examples; MATH is lm-eval's group over the seven subjects.
SUITES = {"tiny": TINY_TASKS, "paper": PAPER_TASKS, "domain": ("gsm8k", "hendrycks_math"), "perplexity": ("wikitext",)}
METRICS = ("acc,none", "exact_match,strict-match", "exact_match,none", "word_perplexity,none")  # a task's first of these


@torch.no_grad()
def perplexity(model, tokens: torch.Tensor, batch_size: int = 8) -> float:
    """exp of the mean next-token cross-entropy over tokens [sequences, length], as for WikiText in the literature."""
    check_tokens(model, tokens)
    total = 0.0
    with evaluating(model), router_logits_off(model):
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
    batch_size: int = 128,
    seed: int = 1234,
) -> "pd.DataFrame":
    """Score a model on lm-eval tasks: those shipped in `data/tasks/` and any of lm-eval's own, by name, or a suite.

        esparse.evaluate(model, tokenizer, ["web_facts", "arithmetic_problems"], limit=100)
        esparse.evaluate(model, tokenizer, "paper").value.mean()

    tasks: one or several, or several joined by commas. Each is a task, group or tag of lm-eval, a pattern such as "web_*",
    or a suite: "tiny" (the embedded five), "paper" (its eight, zero-shot `acc`), "domain" (GSM8K 5-shot strict match, and
    MATH), "perplexity" (WikiText per word). limit: the first items of each task (None: all). num_fewshot: None takes each
    task's own. Works inside `masked` and `skipping`, and under `accelerate launch`, where the processes share the items.
    Returns a table indexed by task with `metric`, `value` (a share, or a perplexity), `stderr` and `items`; a tag, or a
    group without a score of its own, has a row for each of its tasks.
    Raises ValueError for a task that is unknown or that lm-eval cannot prepare, ConnectionError if the hub cannot be read.
    """
    import pandas as pd

    lm_eval, names = _lm_eval(), resolve_tasks(tasks)
    set_seed(seed)
    loaded, options = _load_tasks(names, num_fewshot, seed), {"limit": limit, "bootstrap_iters": 1000, "log_samples": False}
    with evaluating(model), router_logits_off(model):  # also while it is wrapped, which puts it into evaluation mode
        results = lm_eval.evaluate(_language_model(model, tokenizer, batch_size), loaded, **options)
    parts = results and {part: results[part] for part in ("results", "n-samples", "group_subtasks")}
    found = everyone(parts)[0]  # lm-eval returns results to the first process only
    return pd.DataFrame([row for name in names for row in _rows(found, name)]).drop_duplicates("task").set_index("task")


def _lm_eval():
    """The lm-eval library; only its errors are logged."""
    try:
        import datasets
        import lm_eval
    except ImportError as error:
        raise ImportError(f"Tasks are scored by lm-eval, which cannot be imported ({error}): pip install lm-eval.") from None
    datasets.disable_progress_bars()
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lm_eval


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """The named tasks, each once, with suites expanded; a word may hold several names joined by commas."""
    given = [tasks] if isinstance(tasks, str) else tasks
    words = [word.strip() for joined in given for word in str(joined).split(",")]
    return list(dict.fromkeys(name for word in words if word for name in SUITES.get(word, [word])))


def resolve_tasks(tasks: str | Sequence[str]) -> list[str]:
    """The shipped tasks, lm-eval tasks and groups that words name; tags and patterns are expanded into their tasks.

    Raises ValueError if there are none, and for an unknown one.
    """
    found = [name for word in task_names(tasks) for name in ([word] if word in TINY_TASKS else _known(word))]
    if not found:
        raise ValueError(f"No tasks are asked: take some of {', '.join(TINY_TASKS)} or of lm-eval's own.")
    return list(dict.fromkeys(found))


def _known(word: str) -> list[str]:
    """The tasks and groups that lm-eval knows by this name, tag or pattern."""
    _lm_eval()
    manager = _task_manager(True)
    if word in manager.all_tags:
        return sorted(manager.task_index[word].tags)
    if word in manager.all_tasks:
        return [word]
    matching = fnmatch.filter([*TINY_TASKS, *manager.all_subtasks], word) or fnmatch.filter(manager.all_groups, word)
    if not matching:
        raise ValueError(f"Unknown task {word!r}: take one of {', '.join(TINY_TASKS)} or one of lm-eval's own.")
    return matching


def is_group(task: str) -> bool:
    """Whether a resolved name stands for several tasks."""
    return task not in TINY_TASKS and task in _task_manager(True).all_groups


def task_version(task: str) -> str:
    """The task version that cached scores depend on: a digest of a shipped task's files, else lm-eval's version."""
    if task not in TINY_TASKS:
        return f"lm-eval {metadata.version('lm_eval')}"
    return digest(*(path.read_text(encoding="utf-8") for path in sorted(_task_file(task).parent.glob(f"{task}.*"))))


@cache
def _task_manager(everything: bool):
    """lm-eval's task manager, with its own tasks (which takes ten seconds) or without."""
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, tasks):
            try:
                loaded = super().load(tasks)
            except Exception as error:  # the task's own code, or its data reader, may raise anything
                raise _not_ready(tasks, error) from error
            for name, task in loaded["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                    raise ValueError(f"{name} executes code written by the model, or needs images: esparse scores text only.")
            return loaded

    return Manager(include_defaults=everything)


def _load_tasks(names: Sequence[str], num_fewshot: int | None, seed: int) -> dict:
    """The tasks as lm-eval's `simple_evaluate` prepares them; that function also lists the machine's packages at each call."""
    manager = _task_manager(not set(names) <= set(TINY_TASKS))
    loaded = manager.load([_task_config(name) if name in TINY_TASKS else name for name in names])
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (own and num_fewshot is not None):  # a task that fixes 0 keeps it
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(seed)
    return loaded


def _not_ready(tasks: Sequence[str | dict], error: Exception) -> Exception:
    """The reason why lm-eval cannot prepare tasks, in one sentence."""
    asked = ", ".join(task if isinstance(task, str) else task["task"] for task in tasks)
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError):
        return ConnectionError(
            f"The data of {asked} could not be read ({line}): offline, take tasks among {', '.join(TINY_TASKS)}."
        )
    return ValueError(f"lm-eval cannot make {asked} ready ({type(error).__name__}: {line}).")


def _language_model(model, tokenizer, batch_size: int):
    """The model as lm-eval calls it; it knows the other processes of `accelerate launch`."""
    from .harness import HarnessModel

    lm = HarnessModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    lm._device = input_device(model)  # lm-eval would take the first weight's device, but that weight may be offloaded
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import Accelerator

        lm.accelerator = Accelerator()
        lm._rank, lm._world_size = lm.accelerator.process_index, lm.accelerator.num_processes
        if torch.distributed.get_backend() == "gloo":  # nccl is left alone: ending it may wait for failed ranks
            atexit.register(leave_ranks)
    return lm


def _task_file(task: str) -> Path:
    return data_folder() / "tasks" / f"{task}.yaml"


def _task_config(task: str) -> dict:
    """A shipped task's config with absolute paths to its items; its file has paths relative to the checkout."""
    import yaml

    config = yaml.safe_load(_task_file(task).read_text(encoding="utf-8"))
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {split: str(data_folder().parent / name) for split, name in files.items()}
    return config


def _rows(results: dict, task: str) -> list[dict]:
    """The row of a task with the first of `METRICS` that it has (those that the literature reports), else its first metric.
    For a group without a score of its own: the rows of its tasks."""
    scores = results["results"].get(task, {})
    names = [key for key in scores if "," in key and "_stderr" not in key]
    if not names:
        return [row for part in results["group_subtasks"].get(task, ()) for row in _rows(results, part)]
    name = next((metric for metric in METRICS if metric in names), names[0])
    metric, _, filtered = name.partition(",")
    stderr = scores.get(f"{metric}_stderr,{filtered}")  # "N/A" where lm-eval has none
    stderr = float(stderr) if isinstance(stderr, int | float) else None
    return [{"task": task, "metric": metric, "value": scores[name], "stderr": stderr, "items": _items(results, task)}]


def _items(results: dict, task: str) -> int:
    """The number of items of a task, or of all tasks of a group."""
    if task in results["n-samples"]:
        return results["n-samples"][task]["effective"]
    return sum(_items(results, sub) for sub in results["group_subtasks"][task])
