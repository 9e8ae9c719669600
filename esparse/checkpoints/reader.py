"""Checkpoints read from folders of safetensors, one tensor at a time, and downloaded from the hub."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Thread

import torch
import transformers
from safetensors import safe_open
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ..corpora import from_hub
from ..files import digest, local_folder
from .folder import ADAPTER, CARRIED, CONFIG, INDEX, QUANTISERS, SINGLE, Entry, json_object, named, refuse_adapter, tensors

FP8, FP8_SCALE = "F8_E4M3", "_scale_inv"  # block FP8: `weight` beside `weight_scale_inv`
MXFP4, MXFP4_SCALE = "_blocks", "_scales"  # two 4-bit numbers a byte, and an exponent for 32 of them
AHEAD = 2**17  # bytes that Linux is asked to read ahead at a time; of a longer range it reads only the beginning
DECODED = (None, "fp8", "mxfp4")  # the quantisations that are read here


class CheckpointReader:
    """A local folder of safetensors with its config. Only headers are read until `read` is called.

    stored: its tensors by name. entries: the same with FP8 and MXFP4 read as bfloat16. decoded: whether all of them can be
    read so; of another quantisation only bits can be copied. Raises what `folder.tensors` does.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.quantisation = quantisation(self.config)
        self.method = self.quantisation.get("quant_method")
        self.decoded = self.method in DECODED
        self.stored = tensors(self.folder)
        self.entries = dict(self._entries())

    def _entries(self) -> Iterator[tuple[str, Entry]]:
        scale = {"fp8": FP8_SCALE, "mxfp4": MXFP4_SCALE}.get(self.method)
        for name, entry in self.stored.items():
            if self.method == "mxfp4" and name.endswith(MXFP4) and len(entry.shape) > 2:
                *outer, rows, groups, half = entry.shape
                shape = (*outer, groups * half * 2, rows)
                yield name.removesuffix(MXFP4), entry._replace(shape=shape, dtype=torch.bfloat16)
            elif self.method == "fp8" and entry.stored == FP8:
                yield name, entry._replace(dtype=torch.bfloat16)
            elif scale is None or not name.endswith(scale):
                yield name, entry

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the config, the files' names, sizes and times, and every tensor's dtype and shape."""
        files = sorted({entry.file for entry in self.entries.values()})
        sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        shapes = [(name, entry.stored, entry.shape) for name, entry in sorted(self.entries.items())]
        return digest(sizes, shapes, self.config.to_dict())

    def announce(self, names: list[str]) -> None:
        """Ask the system to read these tensors into its cache, in the background, if it supports that."""
        if hasattr(os, "posix_fadvise"):
            Thread(target=self._announce, args=(names,), daemon=True).start()  # a call waits while the disk's queue is full

    def _announce(self, names: list[str]) -> None:
        for entry in map(self.entries.get, names):
            with suppress(OSError), entry.file.open("rb") as file:
                for start in range(entry.start, entry.stop, AHEAD):
                    os.posix_fadvise(file.fileno(), start, min(AHEAD, entry.stop - start), os.POSIX_FADV_WILLNEED)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised."""
        weight, *scale = map(self.read_stored, self.parts(name))
        if not scale:
            return weight
        if self.method == "mxfp4":
            return convert_moe_packed_tensors(weight, *scale, rows_per_chunk=2**20)  # unpacking takes eight times the memory
        block = self.quantisation.get("weight_block_size", (128, 128))  # transformers' default
        return _from_fp8(weight, *scale, block and tuple(block))

    def parts(self, name: str) -> list[str]:
        """The stored tensors that one of `entries` is made of. Raises ValueError where a scale is missing."""
        parts, entry = [name], self.entries[name]
        if self.method == "mxfp4" and name + MXFP4 in self.stored:
            parts = [name + MXFP4, name + MXFP4_SCALE]
        elif entry.dtype and entry.stored == FP8:
            parts = [name, name + FP8_SCALE]
        if parts[-1] not in self.stored:
            raise ValueError(f"{self.folder} has no tensor {parts[-1]}: without it the weights cannot be dequantised.")
        return parts

    def read_stored(self, name: str) -> torch.Tensor:
        """One tensor as it is stored."""
        with safe_open(self.stored[name].file, framework="pt") as file:  # closed at once: mapped pages would add up
            return file.get_tensor(name)


def _from_fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """[..., rows, columns] float8 times float32 scales (DeepSeek-V3's weight_scale_inv), as bfloat16.

    A single scale, of any shape, applies to the whole tensor. Scales [..., rows / block, columns / block] apply to blocks of
    the config's size or, if these do not fit, to equal blocks. Raises ValueError if neither fits.
    """
    if scale.numel() == 1:
        return (weight.float() * scale.float().reshape(())).bfloat16()
    shape, grid = weight.shape[-2:], scale.shape[-2:]
    equal = [length // count for length, count in zip(shape, grid, strict=False)]
    for sides in (block, equal) if scale.ndim == weight.ndim > 1 else ():
        if sides and all(side and -(-length // side) == count for length, side, count in zip(shape, sides, grid, strict=True)):
            for axis, side in zip((-2, -1), sides, strict=True):
                scale = scale.repeat_interleave(side, axis).narrow(axis, 0, weight.shape[axis])
            return (weight.float() * scale.float()).bfloat16()
    raise ValueError(f"FP8 scales of shape {list(scale.shape)} do not divide a weight of {list(weight.shape)}.")


def check_decoded(method: str | None, folder: Path) -> None:
    """ValueError for a quantisation whose weights are not read here."""
    if method not in DECODED:
        raise ValueError(
            f"{folder} is quantised with {method}: only FP8 and MXFP4 are dequantised here, so make a plan with the checkpoint "
            "it was made of, and prune this one by that plan (--plan)."
        )


def quantisation(config) -> dict:
    """The quantisation that a config, or the text part of a composite one, describes; empty if there is none."""
    return getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None) or {}


def read_config(folder: Path):
    """The config of a checkpoint. Raises FileNotFoundError without one, ValueError for an adapter, a type of model that
    transformers does not know, and entries that it refuses."""
    refuse_adapter(folder)
    kind = json_object(folder, CONFIG, "model config").get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{folder} is of model type {kind!r}, which transformers {transformers.__version__} does not know: code that comes "
            "with a checkpoint is never run here, so use a version of transformers that has it."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.to_dict()
    except Exception as error:  # each type of config has its own checks
        raise ValueError(f"transformers cannot take {folder / 'config.json'}: {' '.join(str(error).split())}") from error
    return config


def described(source: str | Path, revision: str | None = None) -> Path:
    """A checkpoint's folder with its config and index; those of a hub id are downloaded. Raises ValueError for an adapter,
    ConnectionError or PermissionError if the hub does not provide them."""
    folder = local_folder(source) or _download(source, revision, [CONFIG, ADAPTER, f"*{INDEX.removeprefix('model')}"])
    refuse_adapter(folder)
    return folder


def fetch(source: str, revision: str | None = None) -> Path:
    """A checkpoint's folder with its weights and the files beside them, downloaded for a hub id. Raises as `described`."""
    folder = described(source, revision)
    if local_folder(source) is None:
        file = json_object(folder, CONFIG, "model config").get("transformers_weights")
        _download(source, folder.name, [file or SINGLE, *CARRIED, *QUANTISERS, "*.py"])  # code is copied, never run
        _download(source, folder.name, named(folder)[0])
    return folder


def _download(source: str | Path, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(model_from_hub(lambda: snapshot_download(str(source), revision=revision, allow_patterns=wanted), source))


def model_from_hub(load: Callable, source: str | Path):
    """`corpora.from_hub` for a model."""
    here = "offline there are 'tiny', 'tiny-scratch' and local folders"
    return from_hub(load, f"the model {str(source)!r}", str(source), here)
