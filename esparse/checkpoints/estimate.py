"""Memory, disk, download and time that pruning a checkpoint will take, from its config and headers alone."""

import copy
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelInfo

from ..files import local_folder
from ..machine import Timed, flop_per_second, free_memory, seconds_of
from ..moe.layers import MoELayer, decoder_layers, find_moe
from ..moe.routers import Router
from ..pruning.greedy import MAX_PAIRS
from ..pruning.plan import PruningPlan
from ..pruning.search import BY_LOSS, MAX_SUBSETS
from ..tracing.losses import MAX_TABLE
from ..tracing.reach import reach
from ..tracing.recorder import CHUNK_TOKENS
from ..tracing.walk import BATCH
from .folder import DTYPES, named
from .layout import Checkpoint, Layout, expert_counts
from .models import read_dtype
from .reader import FP8, CheckpointReader, check_decoded, described, model_from_hub, quantisation, read_config
from .stored import StoredCheckpoint

GB = 1e9
OWN = 0.5 * GB  # memory of the interpreter with its libraries
# What was fitted to runs of `bench scale`. Bytes moved in memory: for each byte of hidden states in a decoder layer, for each
# byte of a token and expert, for each choice and expert tried, for each token's expert in line.
PASSES, PAIRED, WIDENING, ENUMERATED, REMOVED = 24, 0.5, 20, 130, 120
# Bytes moved by the host, for each byte of weights put together for a layer, or written.
ASSEMBLY, WRITING = 2.5, 1.2
# Bytes held, for each of a layer while it is put together, of a batch's hidden states, and of an output in half precision; for
# each tensor of a layer, in mapped pages; for each of up to 1,024 products in half precision, whose code oneDNN keeps; always.
ASSEMBLED, HELD, WIDENED, MAPPED, KERNEL, ALWAYS = 1.6, 12, 5, 220e3, 0.5e6, 25e6
# Seconds of a run, a layer, a pass of the search; of a tensor that is read or written, and of each other one in its file, whose
# header is read with it.
A_RUN, A_LAYER, A_PASS, A_TENSOR, A_NEIGHBOUR = 0.1, 0.02, 0.0004, 0.00011, 0.6e-6


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
    local folder; for a hub id, downloads the config and the index and queries the hub. Memory counts the interpreter, one layer
    while it is assembled or traced, its Gram and a batch's activations. Time counts products, copies, the search, reading and
    writing, at this machine's speeds, measured now.
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
        written[usual] = numel(layout.small) * usual.itemsize
    dtype = dtype or max(written, key=written.get)
    result, kinds = written.total(), _kinds(written) + remark
    if quantised and stays:
        full = sum(file.size or 0 for file in info.siblings if file.rfilename.endswith(".safetensors")) if info else 0
        result = StoredCheckpoint(reader, layout).nbytes(r) if reader else full * numel(layout.small) / numel(layout.full)
        kinds = f"{quantised}, as it is stored,"
    elif quantised:
        kinds += f", dequantised from {quantised},"
    place = Path(destination).resolve()
    place = next(path for path in (place, *place.parents) if path.exists())
    device = measured_device(dtype, place, None if info else next(folder.glob("*.safetensors"), None))
    about = {"method": method, "dtype": dtype, "batch_size": batch_size, "result": result, "free": device.free}
    job = estimated(layout, r, sequences, length, **about)
    free = shutil.disk_usage(place).free
    return {
        "memory": f"about {_bytes(job.held + OWN)}: a layer has {_bytes(job.layer)}, its Gram {_bytes(job.gram)}",
        "disk": f"{_bytes(result)} for the result in {kinds} and {_bytes(job.stream)} while it works; {_bytes(free)} are free",
        "download": _download(info, folder) if info else "nothing",
        "FLOPs": f"{job.flop:.1e} on {sequences * length} tokens, {job.reach} of {n} experts each",
        "time": f"about {_duration(sum(job.seconds(device).values()))} here, without the download",
        "access": _access(info, source) if info else "a local folder",
    }


def numel(shapes: Mapping[str, Sequence[int]]) -> int:
    """The number of weights of these shapes."""
    return sum(map(math.prod, shapes.values()))


def _written_from_hub(info: ModelInfo, layout: Layout) -> Counter[torch.dtype]:
    """The bytes that will be written in each dtype, as far as the hub knows the dtypes."""
    stored, written = getattr(info.safetensors, "parameters", None) or {}, Counter()
    counts = {kind: count for kind, count in stored.items() if kind in (FP8, *DTYPES)}
    for kind, count in counts.items():
        dtype = DTYPES["BF16" if kind == FP8 else kind]
        written[dtype] += count / sum(counts.values()) * numel(layout.small) * dtype.itemsize
    return written


def _kinds(written: Counter[torch.dtype]) -> str:
    """The names of the dtypes, most bytes first, with the bytes if there are several."""
    names = {str(dtype).removeprefix("torch."): size for dtype, size in written.most_common()}
    return " and ".join(f"{name} ({_bytes(size)})" for name, size in names.items()) if len(names) > 1 else next(iter(names))


def _bytes(count: float) -> str:
    """Bytes in a fitting unit: 12 kB, 81 MB, 2.3 GB."""
    unit, size = next(((unit, size) for unit, size in (("GB", GB), ("MB", 1e6), ("kB", 1e3)) if count >= size), ("bytes", 1))
    return f"{count / size:.{int(size == GB)}f} {unit}"


@dataclass(frozen=True)
class Device:
    """What a machine does in a second: FLOP of matrix products, bytes copied in the memory where it computes, bytes of weights
    put together in the host's, bytes read from disk, bytes written and flushed to it; and the free bytes of both memories."""

    flop: float
    memory: float
    host: float
    read: float
    write: float
    free: float
    host_free: float


@dataclass(frozen=True)
class Estimate:
    """What pruning takes, in bytes and operations.

    read, written: from and to disk; states: hidden states among them, of which `stream` are there at a time; full: the source's
    weights. held: in memory at most, beside the interpreter's own; layer, gram: of the largest layer. copied, searched: moved
    in memory by the trace and the search. reach: the experts that a token can reach. fixed: the seconds of each step that
    depend on no speed.
    """

    read: float
    written: float
    states: float
    stream: float
    full: float
    held: float
    layer: float
    gram: float
    flop: float
    copied: float
    searched: float
    reach: int
    fixed: Mapping[str, float]

    def seconds(self, device: Device) -> dict[str, float]:
        """Seconds of the trace, with checking and reading the weights, of the search, and of writing; and those for which all
        wait for the disk. It reads ahead and writes behind them, and what fits into the host's memory it reads once."""
        result, again = self.written - self.states, (self.read - self.full) * (self.full > device.host_free)
        check, trace = self.full / min(device.read, device.host), self.flop / device.flop + self.copied / device.memory
        trace += self.states / device.write + ASSEMBLY * self.full * (self.flop > 0) / device.host
        steps = {"trace": check + trace, "search": self.searched / device.memory, "write": WRITING * result / device.host}
        steps = {step: seconds + self.fixed[step] for step, seconds in steps.items()}
        busy = again / device.read + self.written / device.write
        return steps | {"disk": max(0.0, busy - sum(steps.values()) + check)}


class _Shape:
    """Numbers of a model: experts, those chosen and those within reach; widths of hidden states and of an expert (inner);
    weights of the largest layer, of the embeddings (rest) and those that a token uses; decoder and MoE layers."""

    def __init__(self, layout: Layout, keep: int):
        config = layout.text.config.get_text_config()
        layers = [(layer, find_moe(layer)) for layer in decoder_layers(layout.text)]
        moes = [moe for _, moe in layers if moe]
        count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
        (self.n, self.k), expert = expert_counts(config), count(moes[0].experts) // moes[0].n
        self.reach, self.hidden = reach(self.n, self.k, keep, _router(moes[0])), config.hidden_size
        self.inner = expert // self.hidden
        self.layer, self.rest = max(count(layer) for layer, _ in layers), count(layout.text.get_input_embeddings())
        self.used = sum(count(layer) - (count(moe.experts) - self.reach * expert if moe else 0) for layer, moe in layers)
        self.layers, self.moes, self.tensors = len(layers), len(moes), len(layout.full)


def estimated(
    layout: Layout,
    r: int,
    sequences: int,
    length: int,
    *,
    method: str = "enumerate",
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = BATCH,
    result: float = 0,
    free: float = math.inf,
    ranks: int = 1,
) -> Estimate:
    """What `prune_checkpoint` takes; without sequences, by a plan.

    result: bytes of the pruned weights (0: all in `dtype`); the source has as many more as it has more weights. free: bytes of
    memory, of which expert outputs take a quarter at most. ranks: processes that share the sequences; the estimate is for one
    of them, but `written` and `states` are those of all.
    """
    shape, sequences = _Shape(layout, r if method in BY_LOSS else layout.n), -(-sequences // ranks)
    size, tokens, m, hidden = dtype.itemsize, sequences * length, shape.reach, shape.hidden
    walks, streams = sequences > 0, 2 if method == "progressive" else 1
    result = result or numel(layout.small) * size
    full = result * numel(layout.full) / numel(layout.small)
    tensors = shape.tensors * (A_TENSOR + A_NEIGHBOUR * shape.tensors / shape.layers)
    gram, state = tokens * m * (m + 1) // 2 * 4, streams * tokens * hidden * size
    pairs = streams * tokens * m * (PAIRED * (hidden + shape.inner) * size + (size < 4) * WIDENING * hidden)
    searched, passes = _search(shape, r, sequences, length, method) if walks else (0, 0)
    return Estimate(
        read=full * (1 + walks) + result + state * shape.layers,
        written=result + ranks * state * shape.layers,
        states=ranks * state * shape.layers,
        stream=2 * ranks * state,
        full=full,
        held=_held(shape, tokens, min(batch_size * length, tokens), size, gram, free)
        if walks
        else shape.layer * size * r / shape.n,
        layer=shape.layer * size,
        gram=gram,
        flop=2 * tokens * streams * (shape.used + shape.layers * length * hidden + shape.moes * m * m * hidden),
        copied=PASSES * state * shape.layers + shape.moes * (pairs + 4 * gram),
        searched=shape.moes * searched,
        reach=m,
        fixed={
            "trace": A_RUN + 2 * tensors + walks * shape.layers * A_LAYER,
            "search": shape.moes * passes * A_PASS,
            "write": tensors,
        },
    )


def _held(shape: _Shape, tokens: int, batch: int, size: int, gram: int, free: float) -> float:
    """Bytes held while a layer is put together, while it runs, or while its trace is searched, whichever is most. In half
    precision the expert outputs of a chunk are also held in float32, and compiled products."""
    chunk, layer = min(CHUNK_TOKENS, tokens), shape.layer * size
    outputs = chunk * (shape.reach * shape.hidden + shape.inner) * size
    wide = (size < 4) * WIDENED * chunk * shape.reach * shape.hidden
    share = min(1, free / 4 / (outputs + wide))
    running = layer + HELD * batch * shape.hidden * size + share * wide + gram
    searching = layer + 2 * gram + tokens * (12 * shape.n + 32 * (shape.reach + shape.k))
    products = min(1024, 2 * shape.moes * shape.n * -(-tokens // CHUNK_TOKENS)) * (size < 4)
    always = ALWAYS + MAPPED * shape.tensors / shape.layers + KERNEL * products + shape.rest * size + share * outputs
    return always + max(ASSEMBLED * layer, running, searching)


def _search(shape: _Shape, r: int, sequences: int, length: int, method: str) -> tuple[float, float]:
    """The bytes that the search of one layer moves in memory, and its passes over tokens.

    Enumeration tries every choice within reach, or every subset, and again for each sequence. Greedy removal evaluates the
    tokens that reach an expert, at each removal and in every sweep of swaps: about 7 where few are removed, else hardly one.
    """
    n, k, m, tokens = shape.n, shape.k, shape.reach, sequences * length
    sums, few = math.comb(n, k) << n, math.comb(n - r, 2) <= MAX_PAIRS
    tried = math.comb(m, k) if sums <= MAX_TABLE else math.comb(n, r)
    if method not in BY_LOSS:
        return 0, 1
    if method != "greedy" and tried <= MAX_SUBSETS:
        return 2 * ENUMERATED * tokens * tried * m + 28 * sums * (sums <= MAX_TABLE) * (1 + sequences), 1 + sequences
    sweeps = 7.5 if few else 0.8
    rows = tokens * (1 + (k + 1) * (math.log(n / r) + sweeps * (n / r - 1)))
    return REMOVED * rows * m, 1 + (n - r) * (1 + sweeps)


def _router(layer: MoELayer) -> Router:
    """The layer's router, as it answers with random weights: those of the layer are on the meta device."""
    layer, generator = copy.deepcopy(layer), torch.Generator().manual_seed(0)
    for module in (layer.block, *layer.gate.modules()):
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_floating_point():
                    held[name] = type(tensor)(0.02 * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator))
                elif tensor is not None:  # a table from token ids to experts
                    rows, columns = (torch.arange(size) for size in tensor.shape)
                    held[name] = (rows[:, None] + columns) % layer.n
    return layer.router


def measured_device(dtype: torch.dtype, folder: Path, file: Path | None = None, timed: Timed | None = None) -> Device:
    """This machine, measured now: by a small product, copies of 64 MB, as many bytes written to a temporary file in the folder,
    and as many read from `file` (None: from the temporary one, which the system may have in its cache). timed: what tells the
    seconds of a call (None: `seconds_of`)."""
    timed = timed or seconds_of
    places = ("cuda" if torch.cuda.is_available() else "cpu", "cpu")
    blocks = [torch.ones(2**26, dtype=torch.uint8, device=place) for place in places]
    copies = [len(block) / min(timed(block.clone) for _ in range(10)) for block in blocks]
    there = os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * len(blocks[1])
    with tempfile.NamedTemporaryFile(dir=folder if there else None) as temporary:
        numbers = blocks[1].numpy()
        write = timed(lambda: (temporary.write(numbers), temporary.flush(), os.fsync(temporary.fileno())))
        with open(file or temporary.name, "rb", buffering=0) as source:
            read = timed(lambda: source.readinto(numbers))
            size = source.tell()
    free, host_free = free_memory(), free_memory(torch.device("cpu"))
    kinds = {dtype, torch.float32} if dtype.itemsize < 4 else {dtype}  # a CPU slow in half precision multiplies in float32
    flop = max(flop_per_second(kind, timed=timed) for kind in kinds)
    return Device(flop, *copies, size / read, len(numbers) / write, free, host_free)


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
