"""Builds a folder layer by layer, and resumes after a crash."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..files import read_json, write_json
from ..machine import peak_memory, rank, together


class ResumableJob:
    """Builds a folder in a hidden folder beside it, which holds the inputs, a record of each finished layer, and the output so
    far. The destination does not exist until `finish`; then it is complete."""

    def __init__(self, destination: Path, inputs: dict, check: Callable[[], None] | None = None):
        """check: runs once, before anything is written. Raises ValueError if the work began with other inputs."""
        self.destination, self.folder = destination, destination.with_name(f".{destination.name}.partial")
        self.out, self.streams = self.folder / "out", self.folder / "streams"
        path = self.folder / "job.json"
        if path.exists():
            earlier = read_json(path, "description of unfinished work")
            if changed := [key for key in inputs if inputs[key] != earlier.get(key)]:
                raise ValueError(
                    f"{self.folder} holds unfinished work with another {', '.join(changed)}: ask for the same again to "
                    "continue it, or remove that folder to begin anew."
                )
        elif rank() == 0:
            if check:
                check()
            for folder in (self.out, self.streams):
                folder.mkdir(parents=True, exist_ok=True)
            write_json(path, inputs)
        together()

    def records(self) -> list[dict]:
        """The records of the finished layers, in order."""
        return [read_json(path, "record of a finished layer") for path in sorted(self.folder.glob("layer_*.json"))]

    @torch.no_grad()
    def run(
        self,
        count: int,
        weights: Callable[[int], AbstractContextManager],
        visit: Callable[[int, object], dict],
        write: Callable[[int, dict], None] = lambda number, record: None,
    ) -> list[dict]:
        """Run every unfinished layer; returns the records of all layers.

        weights(number) holds a layer's weights while visit(number, layer) makes its record. Then write(number, record) writes
        its output. The layer is recorded once all ranks have finished it.
        """
        done = len(self.records())
        for number in tqdm(range(done, count), desc="layers", unit="layer", initial=done, total=count):
            clock = [time.perf_counter()]
            with weights(number) as layer:
                clock.append(time.perf_counter())
                record = {"search": 0.0, **visit(number, layer)}
                del layer
            clock.append(time.perf_counter())
            write(number, record)
            clock.append(time.perf_counter())
            (read, run, written), search = (b - a for a, b in pairwise(clock)), record.pop("search")
            record["seconds"] = {"read": read, "run": run - search, "write": written, "search": search}
            together()
            if rank() == 0:
                write_json(self.folder / f"layer_{number:05d}.json", record | {"peak_gb": peak_gb()})
            together()
        return self.records()

    def abandon(self) -> None:
        """Remove the unfinished work."""
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        """Move the output to the destination."""
        together()
        if rank() == 0:
            os.replace(self.out, self.destination)
            shutil.rmtree(self.folder)
        together()


def peak_gb() -> float:
    """This process's peak memory so far, in GB: on the GPU, else resident, with mapped pages of files."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_memory() / 1e9
