"""Writing a pruned checkpoint's folder, shard by shard."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..files import read_json, write_json, write_text
from ..machine import rank
from .folder import CONFIG, INDEX, QUANTISERS, REPORT, header, inside
from .layout import Checkpoint, written_config
from .models import card
from .stored import Part, StoredCheckpoint

SHARD = 4_000_000_000  # bytes


class CheckpointWriter:
    """Writes a pruned checkpoint's folder: one shard for each decoder layer, one for the tensors outside them, and shards for
    the tensors that a composite carries. Rank 0 alone writes."""

    def __init__(self, checkpoint: Checkpoint | StoredCheckpoint, folder: Path):
        self.checkpoint, self.folder, self.layers = checkpoint, folder, checkpoint.layout.layers
        carried = {name: checkpoint.entries[name] for name in checkpoint.carried}
        options = {"filename_pattern": "{suffix}", "get_storage_size": lambda entry: entry.nbytes, "max_shard_size": SHARD}
        self.carried = list(split_state_dict_into_shards_factory(carried, **options).filename_to_tensors.values())
        self.shards = self.layers + 1 + len(self.carried)

    def _shard(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"

    def write_layer(self, number: int, record: dict) -> None:
        """Write a decoder layer's tensors as they are stored, cut to the experts that the record keeps."""
        if rank() == 0:
            self.write(number, self.checkpoint.pruned(number, record.get("kept", [])))

    def write(self, number: int, state: dict[str, torch.Tensor] | dict[str, Part]) -> None:
        """Write one shard."""
        self.checkpoint.write(self._shard(number), state)

    def finish(self, r: int, report: dict, method: str, copied: list[str]) -> None:
        """Write the other shards, the index, the config, the report and the model card, and copy these side files."""
        source = self.checkpoint.source
        self.write(self.layers, self.checkpoint.pruned(None, []))
        for number, names in enumerate(self.carried, self.layers + 1):
            self.write(number, self.checkpoint.carry(names))
        files = [self._shard(number) for number in range(self.shards)]
        places = {name: file.name for file in files for name in header(file)}
        size = sum(file.stat().st_size for file in files)
        write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})
        for name in copied:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(source.folder, name), self.folder / name)
        kept = {number: layer["kept"] for number, layer in enumerate(report["layers"]) if "kept" in layer}
        for name in (name for name in QUANTISERS if name in copied):
            write_json(
                self.folder / name, self.checkpoint.renumbered(read_json(self.folder / name, "quantisation config"), kept)
            )
        config = read_json(source.folder / CONFIG, "model config")
        options = {"predicting": self.checkpoint.layout.composite, "quantised": self.checkpoint.quantised}
        config, report["config"] = written_config(config, source.config, r, **options)
        for part in (config, *config.values()) if self.checkpoint.quantised else ():
            if isinstance(part, dict) and (told := part.get("quantization_config")):
                part["quantization_config"] = self.checkpoint.renumbered(told, kept)
        write_json(self.folder / CONFIG, config)
        write_json(self.folder / REPORT, report)
        more = f" Pruned by esparse from {report['source']} ({method}); see `{REPORT}`."
        write_text(self.folder / "README.md", card(source.config, r, report["k"], more))
