"""The machine: its memory and clock, and the processes (ranks) that `torchrun` or `accelerate launch` started."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path

import torch
import transformers
from torch import distributed

Timed = Callable[[Callable[[], object]], float]

# The files of a control group, by version and controller: its limit, its use, and what goes before names in memory.stat.
_GROUPS = {"": ("memory.max", "memory.current", ""), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")}


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is rank 0, which alone prints; also before `join_ranks`."""
    return os.environ.get("RANK", "0") == "0"


def join_ranks() -> None:
    """Join the group of processes, if several were started: with nccl on GPUs, else gloo."""
    if "RANK" in os.environ and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave_ranks() -> None:
    """Leave the group, if there is one. Otherwise a thread of gloo may outlive the interpreter and abort a finished process;
    torchrun then stops the others as failed."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def together() -> None:
    """Wait for the other ranks."""
    if ranks() > 1:
        distributed.barrier()


def summed(total: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place."""
    if ranks() > 1:
        distributed.all_reduce(total)
    return total


def everyone(value) -> list:
    """The values of all ranks, in order."""
    values = [value] * ranks()
    if ranks() > 1:
        distributed.all_gather_object(values, value)
    return values


def peak_memory() -> int:
    """The most bytes of this process that were resident at once, mapped pages of files among them."""
    with suppress(OSError, KeyError):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource  # on Linux this maximum may be that of the process that started this one; on macOS it is in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def free_memory(device: torch.device | None = None) -> float:
    """Free bytes of a GPU (None: of all GPUs), or of main memory for a CPU or without GPUs (infinite if unknown)."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        gpus = range(torch.cuda.device_count()) if device is None else (device,)
        cached = lambda gpu: torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)  # noqa: E731
        return sum(torch.cuda.mem_get_info(gpu)[0] + cached(gpu) for gpu in gpus)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:  # not on Linux
        return float("inf")
    left = _left_to_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return min([int(lines["MemAvailable"].split()[0]) * 1024, *left])


def _left_to_groups(own: Path, mounted: Path) -> Iterator[float]:
    """Bytes that each limit of this process's control groups leaves, as in a container or a batch job. The cache of files
    counts as free, since the system gives it up."""
    for line in own.read_text().splitlines() if own.exists() else ():
        _, kind, path = line.split(":", 2)
        inner = mounted / kind / path.lstrip("/")
        for folder in (inner, *inner.parents) if kind in _GROUPS else ():
            limit, use, total = _GROUPS[kind]
            try:
                most, used, stat = ((folder / name).read_text() for name in (limit, use, "memory.stat"))
            except OSError:  # the root has no limit; within a container the path is one of the host
                continue
            if most.strip() != "max":
                counts = dict(line.split() for line in stat.splitlines())
                yield int(most) - int(used) + sum(int(counts[f"{total}{name}_file"]) for name in ("active", "inactive"))


def machine() -> dict:
    """The device, versions and date of a measurement."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, **versions, "date": date.today().isoformat()}


def seconds_of(call: Callable[[], object]) -> float:
    """The seconds a call takes, with the work that it queues on a GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def flop_per_second(dtype: torch.dtype, size: int = 1024, device: str | None = None, timed: Timed | None = None) -> float:
    """FLOP per second of one square product of this size, the best of three; device: "cpu" or "cuda" (None: a GPU if there is
    one). timed: what tells the seconds of a call (None: `seconds_of`).

    Sizes double from 256 on, up to the first product that takes over 0.1 s: a CPU without instructions for a dtype may be a
    hundred times slower in it.
    """
    device, side = device or ("cuda" if torch.cuda.is_available() else "cpu"), min(256, size)
    while True:
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        seconds = min((timed or seconds_of)(lambda: matrix @ matrix) for _ in range(3))  # noqa: B023
        if side >= size or seconds > 0.1:
            return 2 * side**3 / seconds
        side *= 2
