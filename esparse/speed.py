"""Memory and speed of Mixtrals of random weights, in three sizes, beside the baselines of the same run and the limits."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import StaticCache

from .benchmark import FULL, MIB, machine, measure_generation, measure_memory, random_mixtral, rounds, seconds_of
from .experts import Scratch
from .files import data_folder, read_json, write_json
from .models import MoELayer, moe_layers
from .preflight import flop_per_second
from .pruning import masked_layer
from .routers import skip_pairs, skip_ratios
from .search import subset_losses
from .skips import dropped, heard, skipping
from .traces import Recorder, recording

VARIANTS = ("stock", "nothing skipped", "skipping")
LAYERS = 32  # of Mixtral 8x7B
BATCH_TOKENS = 16384  # of calibration, in one forward pass


@dataclass(frozen=True)
class Size:
    """What one benchmark runs: batch sizes and tokens of decoding, of calibration and of the paper's protocol."""

    shape: Mapping[str, object]
    batches: Sequence[int] = (1, 8, 32)
    prompt: int = 32
    new_tokens: int = 16
    repeats: int = 8  # at batch 1; a fourth of it beyond
    calibration: int = 4096
    protocol: int = 512
    minutes: float = math.inf  # what has not begun by then is left out, and said


SIZES = {
    "small": Size({"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 2}),
    "medium": Size({**FULL, "num_hidden_layers": 2, "vocab_size": 1000}, prompt=16, new_tokens=8, repeats=16, calibration=1024),
    "full": Size(FULL, prompt=128, new_tokens=64, repeats=4, calibration=128 * 2048, minutes=7.0),
}


# --- what a run reads -----------------------------------------------------------------------------------------------


def routed(model, betas: Sequence[float], **options) -> dict:
    """What `measure_generation` with these options does while decoding: the share of droppable pairs each layer drops,
    how many experts a step reads in a layer (mean), and the medians of rho that it saw."""
    with skipping(model, betas), heard(model) as calls:
        measure_generation(model, **options)
    steps = [of[1:] for of in calls]  # without the prefill
    shares = [dropped(*of) for of in zip(moe_layers(model), betas, steps, strict=True)]
    read, medians = [], []
    for layer, beta, of in zip(moe_layers(model), betas, steps, strict=True):
        kept = [chosen[skip_pairs(weights, beta, layer.router.normalises)[0]] for weights, chosen in of]
        read += [experts.unique().numel() for experts in kept]
        medians.append(torch.cat([skip_ratios(weights) for weights, _ in of]).double().quantile(0.5).item())
    return {"shares": shares, "read": statistics.mean(read), "medians": medians}


def halving_betas(model, tries: int = 6, **options) -> list[float]:
    """Betas that drop half of the second experts in this very run: medians, taken again as skipping moves them."""
    betas = [0.0] * len(moe_layers(model))
    for _ in range(tries):
        seen = routed(model, betas, **options)
        if betas[0] and abs(statistics.mean(seen["shares"]) - 0.5) < 0.02:
            break
        betas = seen["medians"]
    return betas


def step_bytes(model, read: float, context: int, batch: int) -> float:
    """Bytes that a decoding step must read: the cache, and all weights but the embedding and the experts not used."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * batch * context * config.num_key_value_heads * head
    return (_used(model, read) + cache) * model.dtype.itemsize


def _used(model, experts: float) -> float:
    """Weights in use where each layer runs so many experts."""
    layers = moe_layers(model)
    expert = sum(p[0].numel() for p in layers[0].experts.parameters())
    every = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    return every - len(layers) * (layers[0].n - experts) * expert


def read_bandwidth(device: str) -> float:
    """Bytes a second that summing up a gigabyte of float32 reads here, at best of several times."""
    numbers = torch.ones(2**28, device=device)
    return numbers.nbytes / min(seconds_of(numbers.sum) for _ in range(8))


def decoding_dtype(device: str) -> torch.dtype:
    """bfloat16, where this device multiplies in it; else float16 on a GPU, and on a CPU whatever is faster over 1 to 32 rows.

    A CPU without instructions for bfloat16 is faster in it at one row, and a hundred times slower in a prefill.
    """
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    tried = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight, rows = torch.ones(8192, 4096, dtype=dtype), [torch.ones(n, 4096, dtype=dtype) for n in (1, 8, 32)]
        tried[dtype] = sum(min(seconds_of(lambda: each @ weight.T) for _ in range(8)) for each in rows)  # noqa: B023
    return min(tried, key=tried.get)


# --- decoding, prefill and the paper's protocol ---------------------------------------------------------------------


def variants(model, betas: Sequence[float]) -> dict:
    """The contexts in which a model is measured: stock, ours with nothing skipped, ours with `betas`."""
    chosen = (None, [0.0] * len(betas), betas)
    return {
        name: (lambda b=b: nullcontext() if b is None else skipping(model, b)) for name, b in zip(VARIANTS, chosen, strict=True)
    }


def decoding(model, batch: int, size: Size, bandwidth: float, compiled: bool = False) -> dict:
    """Prefill and decoding of each variant at one batch size, medians of rounds in turn, against what must be read.

    gain: skipping over the faster of the two baselines, the median over rounds; its limit is the ratio of bytes read.
    """
    new_tokens = size.new_tokens if batch == 1 else min(size.new_tokens, 16)
    options = {"batch_size": batch, "prompt": size.prompt, "new_tokens": new_tokens}
    betas = halving_betas(model, **options)
    runs = {"nothing skipped": routed(model, [0.0] * len(betas), **options), "skipping": routed(model, betas, **options)}

    cache = StaticCache(model.config, max_cache_len=size.prompt + new_tokens) if compiled else None

    def measure(context) -> dict:
        with context():
            return measure_generation(model, **options, cache=cache)

    repeats = size.repeats if batch == 1 else max(3, size.repeats // 4)
    measured = rounds({name: lambda c=c: measure(c) for name, c in variants(model, betas).items()}, repeats)
    of = lambda key: {name: [turn[key] for turn in turns] for name, turns in measured.items()}  # noqa: E731
    medians = lambda figures: {name: statistics.median(values) for name, values in figures.items()}  # noqa: E731
    speeds, context = of("tokens_per_second"), size.prompt + new_tokens // 2
    faster = max(VARIANTS[:2], key=medians(speeds).get)
    read = {name: step_bytes(model, run["read"], context, batch) for name, run in runs.items()}
    share = statistics.mean(runs["skipping"]["shares"])
    return {
        "batch": batch,
        "compiled": compiled,
        "repeats": repeats,
        "tokens_per_second": medians(speeds),
        "prefill_tokens_per_second": medians(of("prefill_tokens_per_second")),
        "planned": 0.5,
        "dropped": share,
        "experts_read": {name: run["read"] for name, run in runs.items()},
        "step_bytes": read,
        "step_flop": {"nothing skipped": 2 * batch * _used(model, 2), "skipping": 2 * batch * _used(model, 2 - share)},
        "limit_tokens_per_second": {name: batch * bandwidth / value for name, value in read.items()},
        "baseline": faster,
        "gain": statistics.median(a / b for a, b in zip(speeds["skipping"], speeds[faster], strict=True)),
        "plain": statistics.median(a / b for a, b in zip(speeds["nothing skipped"], speeds["stock"], strict=True)),
        "limit_gain": read["nothing skipped"] / read["skipping"],
    }


def protocol(model, size: Size, prompt: int = 128) -> dict:
    """The paper's own way of timing: batch 1, greedy, exactly `size.protocol` tokens, prefill included, no warm-up, once.

    One prompt of random tokens stands for its 50 from Alpaca. Stock comes first, while everything is cold; `again` is the
    same once more, `prefill` the part of it until the first token.
    """
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    generate = lambda n: seconds_of(lambda: model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options))  # noqa: E731
    found = {"new_tokens": size.protocol, "prompt": prompt, "stock": generate(size.protocol)}
    with skipping(model, halving_betas(model, prompt=size.prompt, new_tokens=size.new_tokens)):
        found["skipping"] = generate(size.protocol)
    return found | {"again": generate(size.protocol), "prefill": generate(1)}


def host_seconds(size: Size, device: str, dtype: torch.dtype) -> float:
    """Seconds a decoding step with nothing skipped takes in a model as deep, but so narrow that it is the host's work alone."""
    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100}
    model = random_mixtral({**size.shape, **narrow}, 8, dtype, device)
    with skipping(model, [0.0] * len(moe_layers(model))):
        measure_generation(model, new_tokens=4)
        return 1 / statistics.median(measure_generation(model, new_tokens=32)["tokens_per_second"] for _ in range(5))


# --- memory ---------------------------------------------------------------------------------------------------------


def memory(model, batch: int, context: int) -> dict:
    """Weights, cache and what a GPU holds at its peak over a short generation, in MiB and MB, and peak over the sum."""
    config, found = model.config, measure_memory(model)
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * batch * context * config.num_key_value_heads * head * model.dtype.itemsize / MIB
    peak = None
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        measure_generation(model, batch_size=batch, prompt=8, new_tokens=context - 8)
        peak = torch.cuda.max_memory_allocated() / MIB
    found |= {"cache_mib": cache, "peak_mib": peak, "over_computed": peak and peak / (found["weights_mib"] + cache)}
    return found | {f"{name}_mb": found[f"{name}_mib"] * MIB / 1e6 for name in ("weights", "experts")}


# --- calibration ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def calibration(size: Size, device: str, dtype: torch.dtype, sizes: Sequence[int] = (6, 4)) -> list[dict]:
    """Seconds to trace and search one layer of the shape, times those of Mixtral, against its products and re-running.

    The floor: the experts' products for the tokens that must run, at the speed of one large product here. Re-running is
    measured for one subset and multiplied by their number.
    """
    model = random_mixtral({**size.shape, "num_hidden_layers": 1}, 8, dtype, device)
    layer, hidden, rows = moe_layers(model)[0], model.config.hidden_size, []
    states = torch.randn(1, min(size.calibration, BATCH_TOKENS), hidden, device=device).to(dtype)
    speed = flop_per_second(dtype, 8192 if device == "cuda" else 2048)
    for r in sizes:
        seconds = statistics.median(_trace_and_search(layer, states, size.calibration, r) for _ in range(3))
        flop = 6 * size.calibration * (2 + 8 - r) * hidden * model.config.intermediate_size
        with masked_layer(layer, range(r)):
            once = min(seconds_of(lambda: layer.block(states)) for _ in range(2)) * size.calibration / states.shape[1]
        row = {"r": r, "tokens": size.calibration, "seconds": seconds, "layers": LAYERS, "all_layers": LAYERS * seconds}
        read = 3 * 8 * hidden * model.config.intermediate_size * dtype.itemsize  # each expert's weights once
        row |= {"dtype": str(dtype).removeprefix("torch."), "flop": flop, "bytes": read}
        row |= {"floor": flop / speed, "over_floor": seconds * speed / flop, "flop_per_second": speed}
        rows.append(row | {"rerun": once * math.comb(8, r), "faster": once * math.comb(8, r) / seconds})
    return rows


def _trace_and_search(layer: MoELayer, states: torch.Tensor, tokens: int, r: int) -> float:
    def run() -> None:
        recorder, left = Recorder(layer, r, None, Scratch()), tokens
        with recording([recorder]):
            while left > 0:
                layer.block(states[:, :left])
                left -= states.shape[1]
        subset_losses(recorder.finish(), r)

    return seconds_of(run)


# --- all of it ------------------------------------------------------------------------------------------------------


def measure(size: Size, *, sizes: Sequence[int] = (8, 6, 4), out: Path | None = None) -> dict:
    """Everything about one size. With `out`, the JSON there is written again after every part, so that nothing is lost."""
    device, started = "cuda" if torch.cuda.is_available() else "cpu", time.perf_counter()
    dtype, bandwidth = decoding_dtype(device), read_bandwidth(device)
    result = {**machine(), "weights": "random", "dtype": str(dtype).removeprefix("torch."), "bandwidth": bandwidth}
    result |= {"flop_per_second": flop_per_second(dtype, 8192 if device == "cuda" else 2048)}
    result |= {"shape": dict(size.shape), "rows": [], "left_out": []}

    def part(into: dict, key: str, name: str, compute: Callable[[], object]) -> None:
        if time.perf_counter() - started > 60 * size.minutes:
            result["left_out"].append(f"{name}: no time")
        else:
            try:
                into[key] = compute()
            except RuntimeError as error:  # out of memory, no compiler: what else can be measured still is
                result["left_out"].append(f"{name}: {str(error).strip().splitlines()[0]}")
        if out:
            write_json(out, result)

    # A CPU multiplies many rows faster in float32.
    rate = torch.float32 if device == "cpu" else dtype
    part(result, "calibration", "calibration", lambda: calibration(size, device, rate))
    part(result, "host_seconds", "the host's share", lambda: host_seconds(size, device, dtype))
    rows = {r: {"r": r, "decoding": {}} for r in sizes}
    result["rows"] = list(rows.values())
    for some, parts in _stages(size, sizes, device):
        for r in some:
            _of_one_model(random_mixtral(size.shape, r, dtype, device), rows[r], parts, size, bandwidth, part)
            torch._dynamo.reset()  # compiled code holds the model, and two do not fit
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return result


def _stages(size: Size, sizes: Sequence[int], device: str) -> list[tuple[Sequence[int], list[str]]]:
    """Which models are made one after the other, and what is measured of each: where time is short, what matters most
    comes first, and models are made again."""
    first, rest = ["protocol", "memory", "1"], [f"{batch}" for batch in size.batches if batch > 1]
    if device == "cpu":
        return [(sizes, first + rest)]
    return [(sizes, first), (sizes[:1], ["1, compiled"]), (sizes, rest), (sizes[1:], ["1, compiled"])]


def _of_one_model(model, row: dict, parts: Sequence[str], size: Size, bandwidth: float, part: Callable) -> None:
    others = {
        "protocol": lambda: protocol(model, size),
        "memory": lambda: memory(model, 1, size.prompt + size.new_tokens),
        "1, compiled": lambda: decoding(model, 1, size, bandwidth, True),
    }
    for name in parts:
        into = row if name in ("protocol", "memory") else row["decoding"]
        compute = others.get(name) or partial(decoding, model, int(name), size, bandwidth)
        part(into, name, f"r = {row['r']}, {'' if into is row else 'batch '}{name}", compute)


def results() -> dict[str, dict]:
    """What `bench` measured and `data/results/` keeps, by size; sizes of which anything essential is missing are absent."""
    paths = {name: data_folder() / "results" / f"speed_{name}.json" for name in SIZES}
    found = {name: read_json(path, "benchmark result") for name, path in paths.items() if path.exists()}
    return {name: result for name, result in found.items() if complete(result)}


def complete(result: Mapping) -> bool:
    """Whether a result has all that tables, figures and explanations stand on: batch 1 of every r, and what is beside it."""
    whole = {"host_seconds", "calibration"} <= result.keys()
    return whole and all({"protocol", "memory"} <= row.keys() and "1" in row["decoding"] for row in result["rows"])


def fits_full() -> bool:
    """Whether one GPU here has room for Mixtral 8x7B in bf16, and for the weights that stock transformers gathers for a
    batch of 32."""
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 120e9


# --- tables, as rows of columns -------------------------------------------------------------------------------------


def decoding_rows(result: Mapping) -> list[dict]:
    """Decoding: tokens per second of each variant, what part of the limit is reached, and skipping's gain."""
    rows = []
    for row, batch, found in _decoded(result):
        speed, limit = found["tokens_per_second"], found["limit_tokens_per_second"]["nothing skipped"]
        gains = {"gain": found["gain"], "limit of gain": found["limit_gain"]}
        rows.append(
            {"r": row["r"], "batch": batch} | speed | {"of limit": max(speed["stock"], speed["nothing skipped"]) / limit}
        )
        rows[-1] |= {"planned": found["planned"], "dropped": found["dropped"]} | gains
    return rows


def prefill_rows(result: Mapping) -> list[dict]:
    """Prefill: tokens per second of each variant."""
    return [{"r": row["r"], "batch": batch} | found["prefill_tokens_per_second"] for row, batch, found in _decoded(result)]


def _decoded(result: Mapping) -> Iterator[tuple[dict, str, dict]]:
    return ((row, batch, found) for row in result["rows"] for batch, found in row["decoding"].items())


def memory_rows(result: Mapping) -> list[dict]:
    """Weights, cache and peak (on a GPU), in MiB and MB."""
    return [{"r": row["r"]} | row["memory"] for row in result["rows"] if "memory" in row]


def protocol_rows(result: Mapping) -> list[dict]:
    """The paper's protocol: tokens per second without and with skipping, and over the largest size's second run without,
    since only its first is cold."""
    runs = [(row["r"], row["protocol"]) for row in result["rows"] if "protocol" in row]
    rows = []
    for (r, run), name in itertools.product(runs, ("stock", "skipping")):
        rows.append({"r": r, "skipping": name == "skipping", "tokens/s": run["new_tokens"] / run[name]})
        rows[-1] |= {"speed-up": runs[0][1]["again"] / run[name]}
    return rows


def calibration_rows(result: Mapping) -> list[dict]:
    """Trace and search of one layer: seconds, times Mixtral's layers, over the products, against every subset again."""
    names = {"seconds": "s a layer", "all_layers": f"s for {LAYERS}", "over_floor": "of its products", "faster": "times faster"}
    about = [{"r": row["r"], "tokens": row["tokens"]} for row in result.get("calibration", ())]
    return [
        one | {new: row[old] for old, new in names.items()}
        for one, row in zip(about, result.get("calibration", ()), strict=True)
    ]


def aligned(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of the same columns under each other."""
    cells = [
        [
            f"{v:.3g}" if isinstance(v, float) and abs(v) < 100 else f"{v:.0f}" if isinstance(v, float) else str(v)
            for v in row.values()
        ]
        for row in rows
    ]
    table = [list(rows[0]), *cells] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table)


TABLES = {
    "decoding, tokens/s": decoding_rows,
    "prefill, tokens/s": prefill_rows,
    "memory": memory_rows,
    "the paper's protocol": protocol_rows,
    "calibration and search": calibration_rows,
}


def bench(name: str, out: Path | None = None) -> str:
    """Measure one of `SIZES` and return its tables: "small" takes a minute on a laptop's CPU, "medium" minutes on any GPU
    with 8 GB, "full" is Mixtral 8x7B and takes 9 minutes on one GPU with 120 GB free.

    Raises RuntimeError where the full size does not fit.
    """
    if name == "full" and not fits_full():
        raise RuntimeError("The full size needs one GPU with 120 GB of free memory: run `bench small` or `bench medium` here.")
    result = measure(SIZES[name], out=out)
    head = f"{result['device']}, {result['dtype']}, random weights, {result['bandwidth'] / 1e9:.0f} GB/s read"
    tables = [f"{title}\n{aligned(rows(result))}" for title, rows in TABLES.items()]
    return "\n\n".join([head, *tables, *(f"left out: {name}" for name in result["left_out"])])
