"""Run copies of the numbered notebooks with parameters, in a run folder, continuing after the last finished one."""

import ast
import asyncio
import json
import os
import re
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm.auto import tqdm

from ..files import PACKAGE, checkout, digest, write_json, write_text
from ..tiny_model.training import PRESETS
from .figures import figures, list_figures, publish
from .run import default_folder

NOISE = ("application/vnd.jupyter.widget-view+json",)  # outputs that need a kernel
_PEAK = "from esparse.machine import peak_memory; print(peak_memory() / 2**20)"  # of the kernel, in MiB


# The folder is not called esparse, or the next start would import it instead of the package.
_SETUP = """# Where esparse is not installed, as on Colab: fetch it, and add what is missing to what is there
import importlib.util
from pathlib import Path

if importlib.util.find_spec("esparse") is None:
    root = Path("..") if Path("../esparse/environment.py").exists() else Path("esparse-checkout")
    !test -d {{root}} || git clone -q --depth 1 {address} {{root}}
    %run {{root}}/esparse/environment.py"""
_RUN = "%run {root}/esparse/environment.py"  # below it are the setup cell's own imports
_BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})"


def find(selection: Sequence[str] = ()) -> list[Path]:
    """The notebooks named by numbers ("03"), ranges ("01-06") or names. Without a selection: all.

    Raises ValueError for a selection that matches none.
    """
    paths = sorted((checkout() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not selection:
        return paths
    found = [path for path in paths if any(_matches(path, word) for word in selection)]
    for word in selection:
        if not any(_matches(path, word) for path in paths):
            raise ValueError(f"No notebook matches {word!r}: there are {', '.join(path.stem for path in paths)}.")
    return found


def _matches(path: Path, word: str) -> bool:
    first, _, last = word.partition("-")
    if first.isdigit() and (last or first).isdigit():
        return int(first) <= int(path.stem[:2]) <= int(last or first)
    return path.stem == Path(word).stem


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` words as parameters. A value is a Python literal if it can be read as one, else a string."""
    settings = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"A setting is written NAME=VALUE, got {word!r}.")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def parameters(notebook) -> dict[str, Any]:
    """The names and defaults in the cell tagged `parameters`; `A = B = None` declares both."""
    statements = ast.parse(notebook.cells[_tagged(notebook, "parameters")].source).body
    return {target.id: ast.literal_eval(node.value) for node in statements for target in node.targets}


def _tagged(notebook, tag: str) -> int:
    """The position of the first cell with a tag."""
    return next(i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", []))


def address() -> str:
    """The project's public address, from `[project.urls]` in pyproject.toml, where alone it is set."""
    return tomllib.loads((checkout() / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def addressed(notebook, name: str):
    """The notebook with the public address in the first cell's badge, which opens the notebook on Colab, and in the first
    lines of the setup cell."""
    place = address().replace("https://github.com/", "https://colab.research.google.com/github/")
    badge = _BADGE.format(colab=f"{place}/blob/main/notebooks/{name}")
    title = re.sub(r"\n\n\[!\[Open in Colab\].*", "", notebook.cells[0].source)
    notebook.cells[0].source = f"{title}\n\n{badge}"
    setup = notebook.cells[_tagged(notebook, "setup")]
    setup.source = _SETUP.format(address=address()) + setup.source.partition(_RUN)[2]
    return notebook


def _declared(notebook, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a notebook declares as parameters."""
    return {name: settings[name] for name in parameters(notebook) if name in settings}


def _with_settings(notebook, settings: Mapping[str, Any]):
    """The notebook with a cell after its parameters that sets the ones it declares."""
    source = "\n".join(f"{name} = {value!r}" for name, value in _declared(notebook, settings).items())
    cell = nbformat.v4.new_code_cell(source)
    cell.metadata["tags"] = ["injected-parameters"]
    notebook.cells.insert(_tagged(notebook, "parameters") + 1, cell)
    return notebook


def _check_settings(paths: Sequence[Path], settings: Mapping[str, Any]) -> None:
    """ValueError for a setting that none of the notebooks declares."""
    declared = dict.fromkeys(name for path in paths for name in parameters(nbformat.read(path, as_version=4)))
    for name in settings:
        if name not in declared:
            raise ValueError(f"The selected notebooks have no parameter {name!r}: there are {', '.join(declared)}.")


def strip(notebook):
    """Remove widget views and state, progress bars, execution counts and timings, which do not belong in git."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        kept = [o for o in cell.outputs if o.get("name") != "stderr" and not any(n in o.get("data", {}) for n in NOISE)]
        for output in kept:
            output.pop("execution_count", None) if output.output_type != "execute_result" else output.update(
                execution_count=None
            )
        cell.outputs = kept
    return notebook


@dataclass
class Result:
    """One row of the summary."""

    notebook: str
    seconds: float
    peak_mib: float
    figures: int
    reused: bool = False


def run_notebooks(
    selection: Sequence[str] = (),
    *,
    settings: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    update: bool = False,
) -> pd.DataFrame:
    """Execute copies of the notebooks and return a table: notebook, seconds, peak memory in MiB, figures.

    settings: parameters to change, such as {"MODEL": "mistralai/Mixtral-8x7B-v0.1"}, in those notebooks that declare
    them. folder: where copies, traces, results and figures go (None: `.runs/MODEL`). A notebook that finished there with
    the same cells and settings is not run again. update: write changed outputs and figures into `notebooks/` and
    `figures/`; without it no file of the checkout is written.
    Raises ValueError for bad settings before anything runs, RuntimeError naming the notebook and cell that failed.
    """
    settings = dict(settings or {})
    if update and settings:
        raise ValueError("--update writes what the notebooks show as they stand: run it without --set.")
    paths = find(selection)
    _check_settings(paths, settings)
    target = Path(folder).resolve() if folder else default_folder(settings.get("MODEL", "tiny"))
    if folder:
        settings["RUN_DIR"] = str(target)
    workers = min(4, torch.get_num_threads()) if settings.get("MODEL", "tiny") in PRESETS else 1
    results = asyncio.run(_run_all(paths, partial(_run_one, settings=settings, target=target, update=update), workers))
    if update:
        list_figures()
    return pd.DataFrame(results)


async def _run_all(paths: Sequence[Path], run_one: Callable, workers: int) -> list[Result]:
    """The results of run_one(path, threads). The first notebook runs alone, since the others need its trace; of these,
    `workers` run at a time and share the threads."""
    free = asyncio.Semaphore(workers)

    async def waiting(path: Path, threads: int) -> Result:
        async with free:
            result = await run_one(path, threads)
        bar.update()
        return result

    threads = torch.get_num_threads()
    with tqdm(total=len(paths), desc="notebooks", unit="notebook") as bar:
        first = await waiting(paths[0], threads)
        try:
            async with asyncio.TaskGroup() as group:
                rest = [group.create_task(waiting(path, threads // workers)) for path in paths[1:]]
        except* Exception as failed:
            raise failed.exceptions[0] from None
    return [first, *(task.result() for task in rest)]


def _state(path: Path, settings: Mapping[str, Any]) -> str:
    """What a finished run depends on: the notebook's cells, its settings, the package."""
    notebook = nbformat.read(path, as_version=4)
    sources = [source for source in sorted(PACKAGE.rglob("*.py")) if "tests" not in source.parts]
    package = [source.read_text(encoding="utf-8") for source in sources]
    return digest([cell.source for cell in notebook.cells], _declared(notebook, settings), package)


async def _run_one(path: Path, threads: int, settings: Mapping[str, Any], target: Path, update: bool) -> Result:
    record = target / "notebooks" / f"{path.stem}.json"
    state = _state(path, settings)
    finished = pd.read_json(record, typ="series") if record.exists() else {}
    if finished.get("state") == state and not update:
        return Result(path.stem, finished["seconds"], finished["peak_mib"], int(finished["figures"]), reused=True)
    started = time.perf_counter()
    notebook = _with_settings(nbformat.read(path, as_version=4), settings)
    peak = await _execute(notebook, path, threads)
    write_text(target / "notebooks" / path.name, nbformat.writes(strip(notebook)) + "\n")
    figures = len(list((target / "figures").glob(f"{path.stem[:2]}_*.png")))
    result = Result(path.stem, round(time.perf_counter() - started, 1), round(peak), figures)
    write_json(record, {"state": state, **vars(result)})
    if update:
        notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        _update(addressed(notebook, path.name), path, target / "figures")
    return result


def _update(notebook, path: Path, drawn: Path) -> None:
    """Copy a finished notebook's outputs into the checkout, cell by cell, unless they agree with the outputs there."""
    before = {cell.source: cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells}
    own = [name for name in figures() if name.startswith(path.stem[:2])]
    new = [name for name in own if publish(name, drawn, checkout() / "figures")]
    for cell in notebook.cells:
        old = before.get(cell.source)
        if cell.cell_type == "code" and old and not any(f'"{name}"' in cell.source for name in new):
            cell.outputs = old if _say_the_same(old, cell.outputs) else cell.outputs
    write_text(path, nbformat.writes(notebook) + "\n")


def _say_the_same(one: Sequence, other: Sequence) -> bool:
    """Whether outputs have the same words, and decimals that differ by at most one in the last digit."""
    (words, numbers), (others, against) = (_words_and_numbers(outputs) for outputs in (one, other))
    return words == others and all(
        len(a) == len(b) and abs(float(a) - float(b)) < 1.5 * 10.0 ** -len(a.partition(".")[2])
        for a, b in zip(numbers, against, strict=True)
    )


def _words_and_numbers(outputs: Sequence) -> tuple[list[str], list[str]]:
    """The text of outputs without images, split into the text between decimals and the decimals."""
    texts = [(o.get("text"), [pair for pair in sorted(o.get("data", {}).items()) if "image" not in pair[0]]) for o in outputs]
    parts = re.split(r"(\d+\.\d+)(?![\de])", json.dumps(texts))
    return parts[::2], parts[1::2]


async def _execute(notebook, path: Path, threads: int) -> float:
    """Run every cell in the folder of the notebook, with so many threads; returns the kernel's peak memory in MiB."""
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", store_widget_state=False, extra_arguments=["--log-level=40"]
    )
    client.resources = {"metadata": {"path": str(path.parent)}}
    cells = [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    async with client.async_setup_kernel(env=os.environ | {"OMP_NUM_THREADS": str(threads)}):
        try:
            for index, cell in tqdm(cells, desc=path.stem, unit="cell", leave=False):
                await client.async_execute_cell(cell, index)
        except CellExecutionError as error:
            last = (error.evalue or error.ename).splitlines()[0]
            raise RuntimeError(f"{path.name} failed in cell {index + 1}: {error.ename}: {last}") from error
        notebook.cells.append(nbformat.v4.new_code_cell(_PEAK))
        await client.async_execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
    return float(notebook.cells.pop().outputs[0]["text"])
