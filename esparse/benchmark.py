"""Time and memory, measured side by side on whatever machine this runs on."""

import itertools
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from safetensors.torch import save_file
from transformers import CompileConfig, DynamicCache, StaticCache

from .experts import Scratch
from .files import data_folder, read_json, write_json
from .models import evaluating, input_device, moe_layers
from .pruning import masked_layer
from .search import subset_losses
from .traces import CHUNK_TOKENS, LayerTrace, trace_block

MIB = 2**20
T = TypeVar("T")


def machine() -> dict:
    """The device, versions and date that a figure belongs to."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, **versions, "date": date.today().isoformat()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak_memory() -> Iterator[dict]:
    """Yields a dict that holds `mib` on leaving: the extra memory at its highest, on the GPU or resident (Linux), or None."""
    found = {"mib": None}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found["mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_mib("VmRSS")
    except OSError:
        before = None
    yield found
    if before is not None:
        found["mib"] = max(0.0, _status_mib("VmHWM") - before)


def _status_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def measure_memory(model) -> dict:
    """Weights in MiB, the experts' share of them, and what the device holds at its peak (GPU only; None elsewhere)."""
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors) / MIB  # noqa: E731
    peak = torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else None
    experts = size(p for layer in moe_layers(model) for p in layer.experts.parameters())
    return {"weights_mib": size(model.parameters()), "experts_mib": experts, "peak_mib": peak}


@torch.no_grad()
def measure_generation(
    model, *, batch_size: int = 1, prompt: int = 32, new_tokens: int = 64, seed: int = 0, cache: StaticCache | None = None
) -> dict[str, float]:
    """One timed pass over random tokens: a prompt at once, then `new_tokens` one at a time with a cache.

    The tokens are given, not chosen, so that all variants of a model do the same. cache: a static one to use again; then
    torch.compile does the decoding, as in `generate(cache_implementation="static")` on a GPU. Returns the seconds of both
    parts and their tokens per second over all sequences. Warm up before, repeat and take medians.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (batch_size, prompt + new_tokens), generator=generator)
    ids = ids.to(input_device(model))
    if compiled := cache is not None:
        cache.reset()  # of another one the addresses would be new, and what was captured useless
    else:
        cache = DynamicCache(config=model.config)

    def step(forward: Callable, since: int, until: int) -> None:
        forward(ids[:, since:until], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        with model._optimize_model_for_decode():  # what `generate` does: another implementation for few tokens
            forward = model.get_compiled_call(CompileConfig()) if compiled else model
            for position in range(prompt, prompt + new_tokens):
                step(forward, position, position + 1)

    with evaluating(model):
        prefill, decoding = seconds_of(lambda: step(model, 0, prompt)), seconds_of(decode)
    return {
        "prefill_seconds": prefill,
        "decode_seconds": decoding,
        "prefill_tokens_per_second": batch_size * prompt / prefill,
        "tokens_per_second": batch_size * new_tokens / decoding,
    }


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes, a GPU's queue included."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def rounds(variants: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What each variant gives in `repeats` rounds after one to warm up.

    They take turns, which spreads a machine's moods, and each round begins with another: what runs after what counts too.
    """
    names, turns = list(variants), []
    for turn in range(repeats + 1):
        first = turn % len(names)
        turns.append({name: variants[name]() for name in names[first:] + names[:first]})
    return {name: [turn[name] for turn in turns[1:]] for name in names}


FULL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def random_mixtral(shape: Mapping[str, object], experts: int, dtype: torch.dtype, device: str, seed: int = 0):
    """A Mixtral of random weights, made in place on the device: nothing passes through host memory."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**shape, num_local_experts=experts, num_experts_per_tok=2)
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(dtype)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 1.0 if "norm" in name else 0.02
        parameter.data.normal_(0.0, scale, generator=generator) if scale < 1 else parameter.data.fill_(scale)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no parameter
    return model.eval()


# --- the search against its limits ----------------------------------------------------------------------------------


def benchmark_layer(hidden: int = 512, inner: int = 1792, n: int = 8, seed: int = 0):
    """A one-layer Mixtral of random weights, routed unevenly enough for subsets to differ."""
    from .training import preset_model

    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_local_experts": n, "num_hidden_layers": 1}
    model = preset_model("tiny", seed, **shape)
    torch.nn.init.normal_(moe_layers(model)[0].gate.weight, std=0.1)
    return model


@torch.no_grad()
def search_times(model, r: int, tokens: int = 4096, repeats: int = 15) -> dict:
    """Seconds for one layer at one r: trace and enumeration, the bare products, and re-running every subset.

    The bare products are the experts' matrix products for the k + n - r best experts of each token, sorted already.
    The extra memory is that of four times the tokens, set against all their outputs: a chunk bounds it.
    """
    layer, scratch = moe_layers(model)[0], Scratch()
    hidden = torch.randn(tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    block = lambda: layer.block(hidden[None])  # noqa: E731

    def ours(inputs: torch.Tensor = hidden) -> LayerTrace:
        traced = trace_block(layer, inputs, r, scratch)
        subset_losses(traced, r)
        return traced

    traced, many = ours(), hidden.repeat(4, 1)
    with peak_memory() as found:
        ours(many)
    extra = scratch.nbytes + (found["mib"] or 0.0) * MIB - many.nbytes  # the layer's own result is no extra
    counts = torch.bincount(traced.order.flatten(), minlength=layer.n).tolist()
    turns = rounds({"ours": lambda: seconds_of(ours), "products": lambda: products_of(layer, hidden, counts)}, repeats)
    rerun = seconds_of(lambda: [_rerun(layer, block, subset) for subset in itertools.combinations(range(layer.n), r)])
    contributions = 4 * traced.order.numel() * hidden.shape[1] * hidden.element_size() / MIB
    return {
        "r": r,
        "ours": statistics.median(turns["ours"]),
        "products": statistics.median(turns["products"]),
        "over_products": statistics.median(a / b for a, b in zip(turns["ours"], turns["products"], strict=True)),
        "rerun": rerun,
        "extra_mib": extra / MIB,
        "all_outputs_mib": contributions,
    }


def _rerun(layer, block: Callable[[], torch.Tensor], subset: tuple[int, ...]) -> torch.Tensor:
    with masked_layer(layer, subset):
        return block()


def products_of(layer, hidden: torch.Tensor, counts: list[int]) -> float:
    """Seconds for the products alone, each expert's rows in chunks like the trace's."""
    inputs = hidden.repeat(-(-max(counts) // len(hidden)), 1)
    rows = max(1, CHUNK_TOKENS * sum(counts) // len(hidden) // layer.n)

    def run() -> None:
        for expert, count in enumerate(counts):
            up, down = layer.experts.gate_up_proj[expert], layer.experts.down_proj[expert]
            for part in inputs[:count].split(rows):
                (part @ up.T)[:, : down.shape[1]] @ down.T

    return seconds_of(run)


def bench_search(out: Path | None = None) -> str:
    """The search benchmark as a table: hidden 512, inner 1792, 8 experts, 4096 tokens, r = 6 and 4."""
    model = benchmark_layer()
    rows = [search_times(model, r) for r in (6, 4)]
    if out:
        write_json(out, {**machine(), "rows": rows})
    lines = ["r  trace+search  bare products  ratio  every subset again  faster  extra MiB at 4x tokens (all outputs would be)"]
    for row in rows:
        ratio, gain = row["over_products"], row["rerun"] / row["ours"]
        lines.append(
            f"{row['r']}  {row['ours']:11.2f}s {row['products']:13.2f}s {ratio:6.2f}  {row['rerun']:17.2f}s {gain:6.1f}x  "
            f"{row['extra_mib']:.0f} ({row['all_outputs_mib']:.0f})"
        )
    return "\n".join(lines)


# --- a checkpoint larger than what may be held ------------------------------------------------------------------------


def write_random_checkpoint(folder: Path, shape: Mapping[str, object], experts: int = 8, seed: int = 0) -> None:
    """A Mixtral of random bf16 weights in the hub's layout, with the tiny tokenizer, one layer in memory at a time."""
    from transformers import MixtralConfig

    from .layout import Layout
    from .shards import INDEX

    folder.mkdir(parents=True)
    config = MixtralConfig(**shape, num_local_experts=experts, num_experts_per_tok=2, dtype="bfloat16")
    config.architectures = ["MixtralForCausalLM"]
    layout, generator, places = Layout(config, experts), torch.Generator().manual_seed(seed), {}
    for number in (None, *range(layout.layers)):
        names = layout.published_names(number)
        state = {name: torch.empty(layout.full[name], dtype=torch.bfloat16) for name in names}
        for name, tensor in state.items():
            tensor.fill_(1.0) if "norm" in name else tensor.normal_(0.0, 0.02, generator=generator)
        file = f"model-{0 if number is None else number + 1:05d}-of-{layout.layers:05d}.safetensors"
        save_file(state, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    config.save_pretrained(folder)
    for path in (data_folder() / "tiny").glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


def stream_floor(folder: Path, r: int, sequences: int, length: int) -> dict[str, float]:
    """Seconds to read every weight of a Mixtral folder once, to write those that stay, and for the matrix products alone."""
    from .layout import Checkpoint, Layout
    from .shards import Source

    source = Source(folder)
    layout, kept, products = Layout(source.config, r), list(range(r)), 0.0
    opened = Checkpoint(source, layout)
    reading, writing = seconds_of(lambda: [source.read(name).clone() for name in opened.stored(None)]), 0.0
    for number in range(layout.layers):
        state: dict[str, torch.Tensor] = {}
        reading += seconds_of(lambda: state.update({name: source.read(name).clone() for name in opened.stored(number)}))  # noqa: B023
        stay = {name: tensor for name, tensor in state.items() if layout.cut(name, kept)[0]}
        writing += seconds_of(lambda: save_file(stay, folder / "written.tmp"))  # noqa: B023
        (folder / "written.tmp").unlink()
        tokens, reach = sequences * length, 2 + layout.n - r
        for name, tensor in state.items():
            rows = tokens * reach // layout.n if ".experts." in name else tokens
            if tensor.ndim == 2:
                inputs = torch.ones(rows, tensor.shape[1], dtype=tensor.dtype)
                products += seconds_of(lambda: inputs @ tensor.T)  # noqa: B023
    return {"reading": reading, "writing": writing, "products": products}


def bench_stream(out: Path | None = None, shape: Mapping[str, object] | None = None) -> str:
    """Pruning a four-layer Mixtral of full width from disk, 8 to 6 experts, 4 x 256 tokens; needs 25 GB of free disk.

    A fresh process does it, so that its peak memory is its own. The source is the embedded tokenizer's text.
    """
    shape = shape or {**FULL, "num_hidden_layers": 4}
    folder = Path(tempfile.mkdtemp(prefix="esparse-stream-", dir=Path.cwd()))
    try:
        write_random_checkpoint(folder / "source", shape)
        size = sum(path.stat().st_size for path in (folder / "source").glob("*.safetensors")) / 1e9
        words = ["prune", str(folder / "source"), str(folder / "pruned"), "--experts", "6", "--calibration", "web"]
        command = [sys.executable, "-m", "esparse", *words, "--sequences", "4", "--length", "256"]
        seconds = seconds_of(lambda: subprocess.run(command, check=True, capture_output=True))
        report = read_json(folder / "pruned" / "pruning_report.json", "pruning report")
        floor = stream_floor(folder / "source", 6, 4, 256)
    finally:
        shutil.rmtree(folder)
    steps = {step: sum(layer["seconds"][step] for layer in report["layers"]) for step in report["layers"][0]["seconds"]}
    result = {"source_gb": size, "peak_gb": report["peak_gb"], "command": seconds, "layers": report["seconds"], "steps": steps}
    result |= {"checking": report["checking"], "floor": floor, "shape": dict(shape), "weights": "random"}
    result["over_floor"] = (report["seconds"] + report["checking"]) / sum(floor.values())
    if out:
        write_json(out, {**machine(), **result})
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in floor.items())
    return (
        f"{size:.1f} GB on disk, at most {report['peak_gb']:.2f} GB of memory\n"
        f"{report['checking'] + report['seconds']:.1f} s ({report['checking']:.1f} checking weights, "
        + ", ".join(f"{value:.1f} {name}" for name, value in steps.items())
        + f"; {seconds:.1f} with starting up), {result['over_floor']:.2f} times the least: {parts}"
    )
