"""Checkpoints as folders of safetensors, read one tensor at a time and written one layer at a time."""

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers.core_model_loading import revert_weight_conversion

from .corpora import from_hub
from .files import digest, local_folder, read_json
from .models import COUNT_NAMES, count_names, decoder_layers, moe_layers
from .traces import check_experts

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
FP8, FP8_SCALE = "F8_E4M3", "_scale_inv"  # block FP8: `weight` beside `weight_scale_inv`
MXFP4, MXFP4_SCALE = "_blocks", "_scales"  # two 4-bit numbers a byte, and an exponent for 32 of them
_NUMBERED = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint as it will be read: the dtype and shape after dequantisation."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str  # safetensors' name of the dtype on disk

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Source:
    """A local folder of safetensors with its config; nothing but headers is read before a tensor is asked for.

    Block-FP8 and MXFP4 tensors read as bfloat16. Raises FileNotFoundError, or ValueError naming the file and the tensor:
    an index that names a missing file, a truncated file, a tensor that is not where the index says, of a dtype that
    cannot be pruned, or quantised in another way.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.method = (getattr(self.config, "quantization_config", None) or {}).get("quant_method")
        if self.method not in (None, "fp8", "mxfp4"):
            raise ValueError(
                f"{self.folder} is quantised with {self.method}: only block FP8 and MXFP4 are dequantised here, so start from "
                "the checkpoint it was made of."
            )
        self.entries = self._entries()

    def _entries(self) -> dict[str, Entry]:
        entries = {}
        for path, names in self._files().items():
            try:
                with safe_open(path, framework="pt") as file:
                    here = set(file.keys())
                    for name in names if names is not None else sorted(here):
                        if name not in here:
                            raise ValueError(f"{path} has no tensor {name}, which the index says it has: download it again.")
                        part = file.get_slice(name)
                        entries[name] = (path, tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is truncated or corrupt ({error}): download it again.") from None
        self.places = {name: path for name, (path, _, _) in entries.items()}  # of scales too, which are no entries
        return dict(self._readable(entries))

    def _files(self) -> dict[Path, list[str] | None]:
        """The files, and the tensors each should hold (None: whatever it holds)."""
        if (self.folder / SINGLE).exists() and not (self.folder / INDEX).exists():
            return {self.folder / SINGLE: None}
        if not (self.folder / INDEX).exists():
            raise FileNotFoundError(f"There are no safetensors in {self.folder}: neither {SINGLE} nor {INDEX} is there.")
        files: dict[Path, list[str] | None] = {}
        for name, file in read_json(self.folder / INDEX, "safetensors index")["weight_map"].items():
            files.setdefault(self.folder / file, []).append(name)
        for path in files:
            if not path.exists():
                raise ValueError(f"The index {INDEX} names {path.name}, which is not in {self.folder}: download it again.")
        return files

    def _readable(self, entries: dict[str, tuple]) -> Iterator[tuple[str, Entry]]:
        for name, (path, shape, dtype) in entries.items():
            if self.method == "mxfp4" and name.endswith(MXFP4):
                rows, groups, half = shape[-3:]
                whole = (*shape[:-3], groups * half * 2, rows)  # stored transposed
                yield name.removesuffix(MXFP4), Entry(path, whole, torch.bfloat16, dtype)
            elif dtype == FP8 and self.method == "fp8":
                yield name, Entry(path, shape, torch.bfloat16, dtype)
            elif dtype in DTYPES:
                if not (self.method == "fp8" and name.endswith(FP8_SCALE)):
                    yield name, Entry(path, shape, DTYPES[dtype], dtype)
            elif not (self.method == "mxfp4" and name.endswith(MXFP4_SCALE)):
                raise ValueError(f"{path}: tensor {name} is of dtype {dtype}; weights must be BF16, F16, F32 or F64.")

    @cached_property
    def fingerprint(self) -> str:
        """A short name of what is in the folder: every tensor's place and form, the files' sizes and times."""
        files = sorted({entry.file for entry in self.entries.values()})
        sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        forms = [(name, entry.stored, entry.shape) for name, entry in sorted(self.entries.items())]
        return digest(sizes, forms, self.config.to_dict())

    def announce(self, names: list[str]) -> None:
        """Say that these tensors are wanted soon: the system reads them into its cache meanwhile, where it knows how."""
        if not hasattr(os, "posix_fadvise"):
            return
        for path in {self.entries[name].file for name in names}:
            with path.open("rb") as file:
                start = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(start - 8))
                for name in names:
                    about = header.get(name) or header.get(name + MXFP4)
                    if about:
                        since, until = about["data_offsets"]
                        os.posix_fadvise(file.fileno(), start + since, until - since, os.POSIX_FADV_WILLNEED)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised. The file is open no longer than that, so that no mapped pages add up."""
        entry = self.entries[name]
        if entry.stored == "U8":
            return _from_mxfp4(_raw(entry.file, name + MXFP4), self._other(name + MXFP4_SCALE))
        tensor = _raw(entry.file, name)
        return _from_fp8(tensor, self._other(name + FP8_SCALE), self._block) if entry.stored == FP8 else tensor

    def _other(self, name: str) -> torch.Tensor:
        """A scale, which may lie in another file."""
        if name not in self.places:
            raise ValueError(f"{self.folder} has no tensor {name}: without it the weights cannot be dequantised.")
        return _raw(self.places[name], name)

    @property
    def _block(self) -> tuple[int, int] | None:
        """What a scale is for: a block of so many rows and columns, or whatever the scales divide a weight into (None)."""
        block = self.config.quantization_config.get("weight_block_size", (128, 128))  # transformers' default
        return block and tuple(block)

    def lazily(self, names: Iterable[str]) -> dict[str, "_Lazy"]:
        """A state dict whose tensors are read when transformers asks for them."""
        return {name: _Lazy(self, name) for name in names}

    def check_finite(self) -> None:
        """Read every tensor once. Raises ValueError naming the first that holds a NaN or an infinity."""
        for name, entry in tqdm(self.entries.items(), desc="checking weights", unit="tensor"):
            tensor = self.read(name)
            if not (torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):  # the sum is twenty times as fast
                raise ValueError(f"{entry.file}: tensor {name} holds NaN or infinite weights.")

    def layer(self, number: int) -> list[str]:
        """The tensors of one decoder layer."""
        return [name for name in self.entries if layer_number(name) == number]

    def rest(self) -> list[str]:
        """The tensors outside the decoder layers."""
        return [name for name in self.entries if layer_number(name) is None]


@dataclass
class _Lazy:
    source: Source
    name: str

    def __getitem__(self, _everything) -> torch.Tensor:
        return self.source.read(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.entries[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.entries[self.name].dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)


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


def layer_number(name: str) -> int | None:
    """The decoder layer that a tensor belongs to by its name, or None."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def read_config(folder: Path):
    """The config of a checkpoint. Raises FileNotFoundError without one, ValueError where it asks for code of its own, or
    holds what transformers cannot take."""
    entries = read_json(folder / "config.json", "model config")
    kind = entries.get("model_type") if isinstance(entries, dict) else None
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


def fetch(source: str, revision: str | None = None) -> Path:
    """The folder of a local checkpoint, or of a hub id once its safetensors, configuration and tokenizer are downloaded."""
    if (folder := local_folder(source)) is not None:
        return folder
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
    load = lambda: snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED)  # noqa: E731
    return Path(from_hub(load, f"the model {source!r}", source, "a local folder works offline"))


UNWANTED = ["consolidated*", "original/*", "metal/*"]


# --- how a checkpoint changes when experts go ---------------------------------------------------------------------------


def check_causal(config) -> None:
    """ValueError for the config of anything that transformers has no causal language model for."""
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"transformers {transformers.__version__} has no causal language model of type {config.model_type!r}: esparse "
            "works on language models with a Mixture of Experts, such as Mixtral, Qwen3-MoE or OLMoE."
        )


def skeleton(config) -> transformers.PreTrainedModel:
    """The model of a config without any weights. Raises ValueError as `check_causal`."""
    check_causal(config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def with_experts(config, r: int):
    """The config of the same model with r experts a layer, and without quantisation."""
    config = copy.deepcopy(config)
    n = count_experts(config)
    for part in (config, config.get_text_config()):
        for name in count_names(part, n):
            setattr(part, name, r)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


class Layout:
    """Which tensors stock transformers writes for a config, and how each is cut when r experts are kept.

    Raises ValueError for the config of a model without MoE layers, or with one that cannot keep r experts.
    """

    def __init__(self, config, r: int):
        self.n = count_experts(config)
        full = skeleton(with_experts(config, self.n))
        moe_layers(full)  # or says that there are none
        if r != self.n:
            check_experts(r, *expert_counts(config))
        self.full, self.small = _written(full), _written(skeleton(with_experts(config, r)))
        self.tied = (
            set(getattr(full, "all_tied_weights_keys", None) or {}) if getattr(config, "tie_word_embeddings", False) else set()
        )
        self.layers = len(decoder_layers(full))

    def check(self, source: Source) -> list[str]:
        """The tensors of a source that are no part of the model, such as layers that predict further tokens.

        Raises ValueError naming a tensor that is missing or of another shape.
        """
        for name, shape in self.full.items():
            if name not in source.entries:
                if name in self.tied:
                    continue
                raise ValueError(f"{source.folder} has no tensor {name}, which its config asks for.")
            entry = source.entries[name]
            if entry.shape != shape:
                raise ValueError(
                    f"{entry.file}: tensor {name} is of shape {list(entry.shape)}, but its config asks for {list(shape)}."
                )
        return [name for name in source.entries if name not in self.full]

    def cut(self, name: str, kept: list[int]) -> tuple[str | None, int | None]:
        """A tensor's new name (None, where it goes with its expert), and the axis to cut to the kept experts (or None)."""
        numbered = _NUMBERED.fullmatch(name)
        if numbered and f"{numbered[1]}{self.n - 1}{numbered[3]}" in self.full:
            expert = int(numbered[2])
            return (f"{numbered[1]}{kept.index(expert)}{numbered[3]}", None) if expert in kept else (None, None)
        pairs = enumerate(zip(self.full[name], self.small[name], strict=True))
        return name, next((axis for axis, (one, other) in pairs if one != other), None)

    def pruned(self, source: Source, names: Iterable[str], kept: list[int]) -> dict[str, torch.Tensor]:
        """These tensors of the source as the smaller model has them, read one by one."""
        state = {}
        for name in names:
            new, axis = self.cut(name, kept)
            if new is not None:
                tensor = source.read(name)
                state[new] = tensor if axis is None else tensor.index_select(axis, torch.tensor(kept))
        return state


def count_experts(config) -> int:
    """The experts a layer has by its config. Raises ValueError where it counts none."""
    counts = [getattr(config.get_text_config(), name) for name in count_names(config.get_text_config())]
    if not counts:
        raise ValueError(f"{type(config).__name__} counts no experts ({', '.join(COUNT_NAMES)}): this is no MoE model.")
    return counts[0]


def expert_counts(config) -> tuple[int, int]:
    """The experts of a layer, and those a token is routed to, by the config."""
    text = config.get_text_config()
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
    k = next((value for name in names if (value := getattr(text, name, None))), None)
    if k is None:
        raise ValueError(f"{type(config).__name__} does not say how many experts a token is routed to.")
    return count_experts(config), max(k) if isinstance(k, list) else k


def _written(model) -> dict[str, tuple[int, ...]]:
    state = revert_weight_conversion(model, dict(model.state_dict()))
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
