"""Where a checkpoint goes: work that survives being killed, and the folder that it becomes."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checkpoints import card
from .files import read_json, refuse_existing, write_json, write_text
from .folder import CONFIG, INDEX, REPORT, inside
from .layout import Checkpoint, written_config
from .processes import rank, together

SHARD = 4e9  # bytes


class Progress:
    """Work towards a folder, in a hidden one beside it: what was asked for, what each finished layer gave, and the
    output so far. The destination is absent until `finish`, then complete."""

    def __init__(self, destination: str | Path, job: dict, check: Callable[[], None] = lambda: None):
        """check: what is looked at once, before anything is written; what it raises leaves nothing behind.
        Raises FileExistsError if the destination is there, ValueError if the work began with other inputs or options."""
        self.destination = refuse_existing(destination)
        self.folder = self.destination.parent / f".{self.destination.name}.partial"
        self.out, self.streams = self.folder / "out", self.folder / "streams"
        about = self.folder / "job.json"
        if about.exists():
            former = read_json(about, "description of unfinished work")
            changed = [key for key in job if job[key] != former.get(key)]
            if changed:
                raise ValueError(
                    f"{self.folder} holds unfinished work with another {', '.join(changed)}: ask for the same again to "
                    "continue it, or remove that folder to begin anew."
                )
        elif rank() == 0:
            check()
            for folder in (self.out, self.streams):
                folder.mkdir(parents=True, exist_ok=True)
            write_json(about, job)
        together()

    def records(self) -> list[dict]:
        """What the layers finished so far gave, in order."""
        found = []
        while (path := self._record(len(found))).exists():
            found.append(read_json(path, "record of a finished layer"))
        return found

    def _record(self, number: int) -> Path:
        return self.folder / f"layer_{number:05d}.json"

    def finish_layer(self, number: int, record: dict, keep: list[Path]) -> None:
        """The layer is done, once all ranks say so; hidden states before it are no longer needed."""
        together()
        if rank() == 0:
            write_json(self._record(number), record)
        together()
        for path in self.streams.glob(f"*.{rank()}"):
            if path not in keep:
                path.unlink()

    def finish(self) -> None:
        together()
        if rank() == 0:
            os.replace(self.out, self.destination)
            shutil.rmtree(self.folder)
        together()


class ShardWriter:
    """The folder that a pruned checkpoint becomes: one shard a decoder layer, one for what is outside of them, and those of
    a composite's other parts."""

    def __init__(self, checkpoint: Checkpoint, folder: Path):
        self.checkpoint, self.folder, self.layers = checkpoint, folder, checkpoint.layout.layers
        self.parts = list(_parts(checkpoint))
        self.shards = self.layers + 1 + len(self.parts)

    def _shard(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"

    def write_layer(self, number: int, record: dict) -> None:
        """The decoder layer's tensors as they are in the source, cut to the experts that the record keeps."""
        self.write(number, self.checkpoint.pruned(number, record.get("kept", [])) if rank() == 0 else {})

    def write(self, number: int, state: dict[str, torch.Tensor]) -> None:
        """One shard, by the first process alone."""
        if rank() > 0:
            return
        file = self._shard(number)
        temporary = self.folder / f".{file}"
        try:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata={"format": "pt"})
            os.replace(temporary, self.folder / file)
        except (SafetensorError, OSError) as error:
            raise OSError(f"Could not write {self.folder / file} ({error}): make room, then ask for the same again.") from None
        finally:
            temporary.unlink(missing_ok=True)

    def finish(self, r: int, report: dict, what: str) -> None:
        """The rest of the weights, the index, and what belongs beside them; `what` was done is for the model card."""
        source = self.checkpoint.source
        self.write(self.layers, self.checkpoint.pruned(None, []))
        for number, names in enumerate(self.parts, self.layers + 1):
            self.write(number, {name: source.read(name) for name in names})
        self._write_index()
        for name in self.checkpoint.side_files[0]:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(source.folder, name), self.folder / name)
        config = read_json(source.folder / CONFIG, "model config")
        config, report["config"] = written_config(config, source.config, r, predicting=self.checkpoint.layout.composite)
        write_json(self.folder / CONFIG, config)
        write_json(self.folder / REPORT, report)
        made = f" Pruned by esparse from {report['source']} ({what}); see `{REPORT}`."
        write_text(self.folder / "README.md", card(source.config, r, report["k"], made))

    def _write_index(self) -> None:
        places, size = {}, 0
        for number in range(self.shards):
            with safe_open(self.folder / self._shard(number), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    places[name] = self._shard(number)
            size += (self.folder / self._shard(number)).stat().st_size
        write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def _parts(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """What is carried, by names, in parts that together take no more memory than a shard may."""
    part, size = [], 0
    for name in checkpoint.carried:
        nbytes = checkpoint.source.nbytes(name)
        if part and size + nbytes > SHARD:
            yield part
            part, size = [], 0
        part, size = [*part, name], size + nbytes
    if part:
        yield part
