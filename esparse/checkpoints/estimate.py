"""Memory, disk, download and time that pruning a checkpoint will take, from its config and headers alone."""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelInfo

from ..files import local_folder
from ..machine import flop_per_second
from ..moe.layers import decoder_layers, find_moe
from ..pruning.plan import PruningPlan
from ..pruning.search import BY_LOSS
from .folder import DTYPES, named
from .layout import Checkpoint, Layout, expert_counts
from .models import read_dtype
from .reader import FP8, CheckpointReader, check_decoded, described, model_from_hub, quantisation, read_config
from .stored import StoredCheckpoint

GB = 1e9


def preflight(
    source: str | Path,
    r: int | PruningPlan | None = None,
    *,
    sequences: int = 128,
    length: int = 2048,
    method: str = "enumerate",
    dtype: torch.dtype | str | None = None,
    batch_size: int = 8,
    destination: str | Path = ".",
    revision: str | None = None,
) -> dict[str, str]:
    """Memory, disk, download, FLOPs, time and access that `prune_checkpoint` needs, as sentences by name.

    r: experts to keep (None: half of them), or a plan, by which nothing is computed. Reads the config and the headers of a
    local folder; for a hub id, downloads the config and the index and queries the hub. Memory counts one layer while it is
    assembled, the largest Gram and a batch's activations. Time counts the matrix products, at the speed of a small one
    measured now, and every weight read twice and written once at 1 GB/s; it suggests float32 where that is much faster, as on
    a CPU without bfloat16 instructions.
    Raises ValueError if r cannot be kept, the errors of `Checkpoint` for a folder, those of `load_model` for a hub id.
    """
    dtype, folder = read_dtype(dtype), described(source, revision)
    plan, stays = isinstance(r, PruningPlan), dtype is None
    config = read_config(folder)
    quantised = quantisation(config).get("quant_method")
    if plan:
        r, sequences, length = r.r, 0, 0
    else:
        check_decoded(quantised, folder)
    n, k = expert_counts(config)
    r = max(k, n // 2) if r is None else r
    layout = Layout(config, r)
    info = None if local_folder(source) else _info(str(source), revision)
    reader = None if info else CheckpointReader(folder)
    known = _written_from_hub(info, layout) if info else reader.decoded and Checkpoint(reader, layout).written()
    written = known or Counter()
    remark = "" if written else " (as its config says)"
    if not written:
        usual = getattr(config, "dtype", None) or torch.bfloat16
        written[usual] = _numel(layout.small) * usual.itemsize
    dtype = dtype or max(written, key=written.get)
    sizes = _Sizes(layout.text, k, r if method in BY_LOSS else n, dtype.itemsize)
    result, kinds = written.total(), _kinds(written) + remark
    if quantised and stays:
        full = sum(file.size or 0 for file in info.siblings if file.rfilename.endswith(".safetensors")) if info else 0
        result = StoredCheckpoint(reader, layout).nbytes(r) if reader else full * _numel(layout.small) / _numel(layout.full)
        kinds = f"{quantised}, as it is stored,"
    elif quantised:
        kinds += f", dequantised from {quantised},"
    tokens, streams = sequences * length, 2 if method == "progressive" else 1
    gram = tokens * sizes.reach * (sizes.reach + 1) // 2 * 4
    states = streams * 2 * tokens * sizes.hidden * dtype.itemsize
    chunk = batch_size * length * (sizes.hidden * 12 + sizes.inner * 4) * 4
    memory = sizes.rest + 1.4 * sizes.layer + gram + chunk + 0.6 * GB
    flops = 2 * tokens * sizes.active * streams
    moved = result * (1 + 2 * _numel(layout.full) / _numel(layout.small))
    path = Path(destination).resolve()
    free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
    return {
        "memory": f"about {_bytes(memory)}: a layer has {_bytes(sizes.layer)}, its Gram {_bytes(gram)}",
        "disk": f"{_bytes(result)} for the result in {kinds} and {_bytes(states)} while it works; {_bytes(free)} are free",
        "download": _download(info, folder) if info else "nothing",
        "FLOPs": f"{flops:.1e} on {tokens} tokens, {sizes.reach} of {n} experts each",
        "time": _time(flops, moved, dtype),
        "access": _access(info, source) if info else "a local folder",
    }


def _numel(shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(map(prod, shapes.values()))


def _written_from_hub(info: ModelInfo, layout: Layout) -> Counter[torch.dtype]:
    """The bytes that will be written in each dtype, as far as the hub knows the dtypes."""
    stored, written = getattr(info.safetensors, "parameters", None) or {}, Counter()
    counts = {kind: count for kind, count in stored.items() if kind in (FP8, *DTYPES)}
    for kind, count in counts.items():
        dtype = DTYPES["BF16" if kind == FP8 else kind]
        written[dtype] += count / sum(counts.values()) * _numel(layout.small) * dtype.itemsize
    return written


def _kinds(written: Counter[torch.dtype]) -> str:
    """The names of the dtypes, most bytes first, with the bytes if there are several."""
    names = {str(dtype).removeprefix("torch."): size for dtype, size in written.most_common()}
    return " and ".join(f"{name} ({_bytes(size)})" for name, size in names.items()) if len(names) > 1 else next(iter(names))


def _bytes(count: float) -> str:
    """Bytes in a fitting unit: 12 kB, 81 MB, 2.3 GB."""
    unit, size = next(((unit, size) for unit, size in (("GB", GB), ("MB", 1e6), ("kB", 1e3)) if count >= size), ("bytes", 1))
    return f"{count / size:.{int(size == GB)}f} {unit}"


class _Sizes:
    """Sizes of a model: bytes of the largest layer and of the embeddings (rest), the experts a token can reach, the widths of
    the hidden states and of an expert (inner), and the number of weights a token uses (active)."""

    def __init__(self, model, k: int, r: int, itemsize: int):
        layers = [(layer, find_moe(layer)) for layer in decoder_layers(model)]
        count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
        self.hidden = model.config.get_text_config().hidden_size
        self.layer = max(count(layer) for layer, _ in layers) * itemsize
        self.rest = count(model.get_input_embeddings()) * itemsize
        moe = next(moe for _, moe in layers if moe is not None)
        self.reach = min(moe.n, k + moe.n - r)
        expert = count(moe.experts) // moe.n
        self.inner = expert // self.hidden
        self.active = sum(count(layer) - (count(m.experts) - self.reach * expert if m else 0) for layer, m in layers)


def _time(flops: float, moved: float, dtype: torch.dtype) -> str:
    seconds, plain = (flops / flop_per_second(kind) + moved / GB for kind in (dtype, torch.float32))
    faster = f"; in float32 (--dtype float32) {_duration(plain)}, with more memory" * (seconds > max(60, 2 * plain))
    return f"about {_duration(seconds)} here{faster}, without the download"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{minutes:.0f} minutes" if minutes < 120 else f"{hours:.1f} hours"


def _info(source: str, revision: str | None) -> ModelInfo:
    return model_from_hub(lambda: HfApi().model_info(source, revision=revision, files_metadata=True), source)


def _download(info: ModelInfo, folder: Path) -> str:
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    names = named(folder, sizes)[0]
    return f"{_bytes(sum(sizes.get(name, 0) for name in names))} in {len(names)} files, less what is there already"


def _access(info: ModelInfo, source: str | Path) -> str:
    if not info.gated:
        return "open"
    token = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "then set HF_TOKEN"
    return f"gated: accept the terms at https://huggingface.co/{source}, {token}"
