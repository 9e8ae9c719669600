"""Writing a pruned checkpoint's folder, shard by shard."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import read_json, write_json, write_text
from ..machine import rank
from .folder import CONFIG, INDEX, REPORT, inside
from .layout import Checkpoint, written_config
from .models import card

SHARD = 4e9  # bytes


class CheckpointWriter:
    """Writes a pruned checkpoint's folder: one shard for each decoder layer, one for the tensors outside them, and shards for
    the tensors that a composite carries. Rank 0 alone writes."""

    def __init__(self, checkpoint: Checkpoint, folder: Path):
        self.checkpoint, self.folder, self.layers = checkpoint, folder, checkpoint.layout.layers
        self.carried = list(_carried_shards(checkpoint))
        self.shards = self.layers + 1 + len(self.carried)

    def _shard(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"

    def write_layer(self, number: int, record: dict) -> None:
        """Write a decoder layer's tensors as they are stored, cut to the experts that the record keeps."""
        if rank() == 0:
            self.write(number, self.checkpoint.pruned(number, record.get("kept", [])))

    def write(self, number: int, state: dict[str, torch.Tensor]) -> None:
        """Write one shard."""
        file = self._shard(number)
        temporary = self.folder / f".{file}"
        try:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata={"format": "pt"})
            os.replace(temporary, self.folder / file)
        except (SafetensorError, OSError) as error:
            raise OSError(f"Could not write {self.folder / file} ({error}): make room, then ask for the same again.") from None
        finally:
            temporary.unlink(missing_ok=True)

    def finish(self, r: int, report: dict, method: str) -> None:
        """Write the other shards, the index, the config, the report and the model card, and copy the side files."""
        source = self.checkpoint.source
        self.write(self.layers, self.checkpoint.pruned(None, []))
        for number, names in enumerate(self.carried, self.layers + 1):
            self.write(number, {name: source.read(name) for name in names})
        self._write_index()
        for name in self.checkpoint.side_files[0]:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(source.folder, name), self.folder / name)
        config = read_json(source.folder / CONFIG, "model config")
        config, report["config"] = written_config(config, source.config, r, predicting=self.checkpoint.layout.composite)
        write_json(self.folder / CONFIG, config)
        write_json(self.folder / REPORT, report)
        more = f" Pruned by esparse from {report['source']} ({method}); see `{REPORT}`."
        write_text(self.folder / "README.md", card(source.config, r, report["k"], more))

    def _write_index(self) -> None:
        places, size = {}, 0
        for file in map(self._shard, range(self.shards)):
            with safe_open(self.folder / file, framework="pt") as shard:
                places |= dict.fromkeys(shard.keys(), file)
            size += (self.folder / file).stat().st_size
        write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def _carried_shards(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """The names of the carried tensors, in shards of at most SHARD bytes or one tensor."""
    shard, size = [], 0
    for name in checkpoint.carried:
        nbytes = checkpoint.source.nbytes(name)
        if shard and size + nbytes > SHARD:
            yield shard
            shard, size = [], 0
        shard, size = [*shard, name], size + nbytes
    if shard:
        yield shard
