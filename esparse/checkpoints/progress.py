"""Builds a folder layer by layer, and resumes after a crash."""

import os
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..files import read_json, refuse_existing, write_json
from ..machine import rank, together


class ResumableJob:
    """Builds a folder in a hidden folder beside it, which holds the inputs, a record of each finished layer, and the output so
    far. The destination does not exist until `finish`; then it is complete."""

    def __init__(self, destination: str | Path, inputs: dict, check: Callable[[], None] | None = None):
        """check: runs once, before anything is written. Raises FileExistsError if the destination exists, ValueError if the
        work began with other inputs."""
        self.destination = refuse_existing(destination)
        self.folder = self.destination.parent / f".{self.destination.name}.partial"
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
        records = []
        while (path := self._record(len(records))).exists():
            records.append(read_json(path, "record of a finished layer"))
        return records

    def _record(self, number: int) -> Path:
        return self.folder / f"layer_{number:05d}.json"

    def run(
        self,
        count: int,
        visit: Callable[[int, object], dict],
        write: Callable[[int, dict], None],
        *,
        weights: Callable[[int], AbstractContextManager] = nullcontext,
        streams: Callable[[], tuple[dict, list[Path]]] = lambda: ({}, []),
    ) -> list[dict]:
        """Run every unfinished layer; returns the records of all layers.

        weights(number) holds a layer's weights while visit(number, layer) makes its record. Then write(number, record) writes
        its output. streams() returns the record's entry on the streams, and their files.
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
            self._finish_layer(number, record | {"peak_gb": peak_gb()}, *streams())
        return self.records()

    def _finish_layer(self, number: int, record: dict, about: dict, needed: list[Path]) -> None:
        """Record the layer once all ranks have finished it, and remove the streams that are no longer needed."""
        together()
        if rank() == 0:
            write_json(self._record(number), record | {"streams": about})
        together()
        for path in self.streams.glob(f"*.{rank()}"):
            if path not in needed:
                path.unlink()

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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
