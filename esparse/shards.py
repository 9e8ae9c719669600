"""Checkpoints as folders of safetensors, read one tensor at a time."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from tqdm.auto import tqdm

from .corpora import from_hub
from .files import digest, local_folder
from .folder import ADAPTER, CARRIED, CONFIG, INDEX, SINGLE, Place, json_object, named, refuse_adapter, tensors

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
DTYPES |= {"I32": torch.int32, "I64": torch.int64}  # tables of token ids
FP8, FP8_SCALE = "F8_E4M3", "_scale_inv"  # block FP8: `weight` beside `weight_scale_inv`
MXFP4, MXFP4_SCALE = "_blocks", "_scales"  # two 4-bit numbers a byte, and an exponent for 32 of them


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint as it will be read: the dtype and shape after dequantisation."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None for what holds no weights of a language model, such as whole numbers
    stored: str  # safetensors' name of the dtype on disk

    def check(self, name: str, whole_numbers: bool) -> None:
        """ValueError where a tensor that the model is made of is in a dtype that does not hold what it should."""
        if self.dtype is None or self.dtype.is_floating_point == whole_numbers:
            known = [kind for kind, dtype in DTYPES.items() if dtype.is_floating_point != whole_numbers]
            raise ValueError(f"{self.file}: tensor {name} is of dtype {self.stored}; it must be {', '.join(known)}.")


class Source:
    """A local folder of safetensors with its config; nothing but headers is read before a tensor is asked for.

    Block-FP8 and MXFP4 tensors read as bfloat16. Raises what `folder.tensors` does, and ValueError naming the file and the
    tensor for a dtype that cannot be pruned, or one quantised in another way.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.quantisation = quantisation(self.config)
        self.method = self.quantisation.get("quant_method")
        if self.method not in (None, "fp8", "mxfp4"):
            raise ValueError(
                f"{self.folder} is quantised with {self.method}: only block FP8 and MXFP4 are dequantised here, so start from "
                "the checkpoint it was made of."
            )
        self.stored = tensors(self.folder)
        self.places = {name: place.file for name, place in self.stored.items()}  # of scales too, which are no entries
        self.entries = dict(self._readable())

    def _readable(self) -> Iterator[tuple[str, Entry]]:
        for name, place in self.stored.items():
            path, shape, dtype = place.file, place.shape, place.dtype
            if self.method == "mxfp4" and name.endswith(MXFP4) and len(shape) > 2:
                rows, groups, half = shape[-3:]
                whole = (*shape[:-3], groups * half * 2, rows)  # stored transposed
                yield name.removesuffix(MXFP4), Entry(path, whole, torch.bfloat16, dtype)
            elif dtype == FP8 and self.method == "fp8":
                yield name, Entry(path, shape, torch.bfloat16, dtype)
            elif not (self.method == "fp8" and name.endswith(FP8_SCALE)) and not (
                self.method == "mxfp4" and name.endswith(MXFP4_SCALE)
            ):
                yield name, Entry(path, shape, DTYPES.get(dtype), dtype)

    @cached_property
    def fingerprint(self) -> str:
        """A short name of what is in the folder: every tensor's place and form, the files' sizes and times."""
        files = sorted({entry.file for entry in self.entries.values()})
        sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        forms = [(name, entry.stored, entry.shape) for name, entry in sorted(self.entries.items())]
        return digest(sizes, forms, self.config.to_dict())

    def nbytes(self, name: str) -> int:
        """The bytes that a tensor takes in memory."""
        entry = self.entries[name]
        return torch.Size(entry.shape).numel() * (entry.dtype or torch.int64).itemsize

    def announce(self, names: list[str]) -> None:
        """Say that these tensors are wanted soon: the system reads them into its cache meanwhile, where it knows how."""
        if not hasattr(os, "posix_fadvise"):
            return
        places: dict[Path, list[Place]] = {}
        for name in names:
            place = self.stored.get(name) or self.stored[name + MXFP4]
            places.setdefault(place.file, []).append(place)
        for path, found in places.items():
            with path.open("rb") as file:
                for place in found:
                    os.posix_fadvise(file.fileno(), place.start, place.stop - place.start, os.POSIX_FADV_WILLNEED)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised. The file is open no longer than that, so that no mapped pages add up."""
        entry = self.entries[name]
        if name + MXFP4 in self.stored and self.method == "mxfp4":
            return _from_mxfp4(_raw(entry.file, name + MXFP4), self._other(name + MXFP4_SCALE))
        tensor = _raw(entry.file, name)
        return _from_fp8(tensor, self._other(name + FP8_SCALE), self._block) if entry.dtype and entry.stored == FP8 else tensor

    def _other(self, name: str) -> torch.Tensor:
        """A scale, which may lie in another file."""
        if name not in self.places:
            raise ValueError(f"{self.folder} has no tensor {name}: without it the weights cannot be dequantised.")
        return _raw(self.places[name], name)

    @property
    def _block(self) -> tuple[int, int] | None:
        """What a scale is for: a block of so many rows and columns, or whatever the scales divide a weight into (None)."""
        block = self.quantisation.get("weight_block_size", (128, 128))  # transformers' default
        return block and tuple(block)

    def check_finite(self, names: Iterable[str]) -> None:
        """Read these tensors once. Raises ValueError naming the first that holds a NaN or an infinity."""
        for name in tqdm(list(names), desc="checking weights", unit="tensor"):
            tensor = self.read(name)
            if not (torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):  # the sum is twenty times as fast
                raise ValueError(f"{self.entries[name].file}: tensor {name} holds NaN or infinite weights.")


def _raw(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _from_fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """[..., rows, columns] float8 times float32 scales (DeepSeek-V3's weight_scale_inv), as bfloat16.

    One scale of any shape is for the whole tensor; [..., rows / block, columns / block] are for blocks of the size that the
    config names, or where that is not theirs, of the size they divide the weight into. Raises ValueError if they do not.
    """
    if scale.numel() == 1:
        return (weight.float() * scale.float().reshape(())).bfloat16()
    sides = _sides(weight.shape[-2:], scale.shape[-2:], block) if scale.ndim == weight.ndim > 1 else None
    if sides is None:
        raise ValueError(f"FP8 scales of shape {list(scale.shape)} do not divide a weight of {list(weight.shape)}.")
    for axis, side in zip((-2, -1), sides, strict=True):
        scale = scale.repeat_interleave(side, axis).narrow(axis, 0, weight.shape[axis])
    return (weight.float() * scale.float()).bfloat16()


def _sides(shape: torch.Size, grid: torch.Size, block: tuple[int, int] | None) -> tuple[int, int] | None:
    """The rows and columns that one of a grid of scales is for."""
    if block and all(-(-whole // side) == count for whole, side, count in zip(shape, block, grid, strict=True)):
        return block
    fits = all(whole % count == 0 for whole, count in zip(shape, grid, strict=True))
    return tuple(whole // count for whole, count in zip(shape, grid, strict=True)) if fits else None


def _from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Blocks [n, rows, groups, 16] of two 4-bit floats a byte, the lower half first, with exponents [n, rows, groups]
    (bias 127), as bfloat16 [n, groups * 32, rows] (OCP Microscaling formats, E2M1)."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([magnitudes, -magnitudes])
    parts = []
    for block, scale in zip(blocks, scales, strict=True):  # an expert at a time: unpacking takes eight times the memory
        pairs = torch.stack([block & 15, block >> 4], -1).flatten(-2).long()  # [rows, groups, 32]
        parts.append(torch.ldexp(values[pairs], scale.int()[..., None] - 127).flatten(-2).T.bfloat16())
    return torch.stack(parts)


def quantisation(config) -> dict:
    """What a config says of quantised weights, itself or, in a composite, its text part; empty where it says nothing."""
    parts = (config, config.get_text_config())
    return next((found for part in parts if (found := getattr(part, "quantization_config", None))), {})


def read_config(folder: Path):
    """The config of a checkpoint. Raises FileNotFoundError without one, ValueError for an adapter, and where it asks for code
    of its own or holds what transformers cannot take."""
    refuse_adapter(folder)
    entries = json_object(folder, CONFIG, "model config")
    kind = entries.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{folder} is of model type {kind!r}, which transformers {transformers.__version__} does not know: code that comes "
            "with a checkpoint is never run here, so use a version of transformers that has it."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.to_dict()
    except Exception as error:  # of the type's own checks
        raise ValueError(f"transformers cannot take {folder / 'config.json'}: {' '.join(str(error).split())}") from error
    return config


def described(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a local checkpoint, or of a hub id once its config and index are downloaded. Raises ValueError for an
    adapter, ConnectionError or PermissionError where a hub id cannot be had."""
    folder = local_folder(source) or _download(source, revision, [CONFIG, ADAPTER, f"*{INDEX.removeprefix('model')}"])
    refuse_adapter(folder)
    return folder


def fetch(source: str, revision: str | None = None) -> Path:
    """`described`, with the weights that the folder means, and what belongs beside them, downloaded as well."""
    folder = described(source, revision)
    if local_folder(source) is None:
        asked = json_object(folder, CONFIG, "model config").get("transformers_weights")
        _download(source, folder.name, [asked or SINGLE, *CARRIED, "*.py"])  # code is copied along, never run
        _download(source, folder.name, named(folder)[0])
    return folder


def _download(source: str | Path, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    load = lambda: snapshot_download(str(source), revision=revision, allow_patterns=wanted)  # noqa: E731
    return Path(model_from_hub(load, source))


def model_from_hub(load: Callable, source: str | Path):
    """`from_hub` of a model: the page and what works offline are those of models."""
    return from_hub(load, f"the model {str(source)!r}", str(source), "offline there are 'tiny' and local folders")
