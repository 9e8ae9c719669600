"""The cost of the explorer on a large trace: seconds from opening to the first pictures, and of the steps of each control."""

import asyncio
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from ..measure.timing import MIB, keep, report
from ..tiny_model.training import preset_model
from ..tracing.recorder import trace
from .widgets import SKIPPING, Dashboard, Page

SHAPE = {"num_hidden_layers": 48, "num_local_experts": 128, "hidden_size": 64, "intermediate_size": 32}  # top-8
STEPS, GAP = 40, 0.25  # of each control, and seconds from one to the next, as of somebody who looks at what changed


def bench_explorer(out: Path | None = None, shape: Mapping[str, int] | None = None, steps: int = STEPS) -> str:
    """The explorer on a saved trace of 48 layers of 128 experts on 16 x 256 random tokens, valid down to three quarters of the
    experts. The model has random weights. A fresh process opens the trace, which the system's cache of files still holds."""
    shape = dict(shape or SHAPE)
    tokens = torch.randint(3, 1024, (16, 256), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="esparse-explorer-") as name:
        folder = Path(name) / "trace"
        trace(preset_model("tiny-32", **shape), tokens, keep=shape["num_local_experts"] * 3 // 4).save(folder)
        size = sum(path.stat().st_size for path in folder.iterdir()) / MIB
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            opening, rows = fresh.submit(_session, folder, steps, time.time()).result()
    about = {"shape": shape, "weights": "random", "tokens": tokens.numel(), "trace_mib": size}
    result = keep(about | {"opening": opening, "controls": rows}, out)
    return report({"opening, s": [result["opening"]], "from a step to its pictures, ms": result["controls"]})


def _session(folder: Path, steps: int, started: float) -> tuple[dict, list[dict]]:
    """Seconds of opening a trace, and a row for each control. started: when the process was asked for."""
    return asyncio.run(_open(folder, steps, {"start and import": time.time() - started}))


async def _open(folder: Path, steps: int, found: dict) -> tuple[dict, list[dict]]:
    started, used = time.perf_counter(), time.process_time()
    board = Page({"trace": folder}, folder.parent).dashboard
    found |= {"first pictures": time.perf_counter() - started, "processor": time.process_time() - used}
    found["layers in them"] = board.explorer.layers - len(board.explorer.missing(board.choice))
    await _until(lambda: not board.explorer.missing(board.choice))
    found["all layers"] = time.perf_counter() - started
    return found, [await _steps(board, *control, steps) for control in _controls(board)]


def _controls(board: Dashboard) -> Iterator[tuple]:
    """The name, the control and its values, for each control."""
    for name in ("r", "method", "mix", "residual", "layer"):
        if name in board.controls:
            control = getattr(board, name)
            yield name, control, control.values if hasattr(control, "values") else control.options
    yield "share", board.share, board.share.values
    yield "skip by", board.mode, SKIPPING
    for mode in SKIPPING[1:]:
        board.mode.value = mode
        yield mode, board.beta, board.beta.values


async def _steps(board: Dashboard, name: str, control, values: Sequence, steps: int) -> dict:
    """Milliseconds from a step to its pictures, and to those with the layer that is looked at. As after a key press, the wait
    for what the kernel is doing counts."""
    loop, at, taken, whole = asyncio.get_running_loop(), list(values).index(control.value), [], []
    tour = itertools.cycle([*values[at + 1 :], *values[-2::-1], *values[1 : at + 1]])
    for value in itertools.islice(tour, steps):
        pressed = loop.time() + GAP
        await asyncio.sleep(GAP)
        control.value = value
        taken.append(1000 * (loop.time() - pressed))
        await _until(lambda: board.choice.layer not in board.explorer.missing(board.choice))
        whole.append(1000 * (loop.time() - pressed))
    high = lambda some: sorted(some)[int(0.95 * len(some))]  # noqa: E731
    row = {"control": name, "steps": steps, "median": sorted(taken)[steps // 2], "p95": high(taken), "most": max(taken)}
    return row | {"p95 with the layer": high(whole)}


async def _until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)
