"""Memory and decoding speed of Mixtrals with random weights, in three sizes, against baselines from the same run."""

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

from ..files import data_folder, measured
from ..machine import flop_per_second, seconds_of
from ..moe.layers import moe_layers
from ..moe.routers import skip_pairs, skip_ratios
from ..pruning.skipping import dropped, record_routing, skipping
from .search_cost import LAYERS, calibration
from .timing import MIB, MIXTRAL_8X7B, keep, measure_generation, measure_memory, median_ratio, random_mixtral, report, rounds

BASELINES = ("stock", "nothing skipped")
COMPILED = "1, compiled"  # batch 1, decoded by compiled code


@dataclass(frozen=True)
class Size:
    """The shape of a benchmark's model, and the token counts for decoding, calibration and the paper's protocol."""

    shape: Mapping[str, object]
    batches: Sequence[int] = (1, 8, 32)
    prompt: int = 32
    new_tokens: int = 16
    repeats: int = 8  # at batch 1; a fourth of that at larger batches, at least 3
    calibration: int = 4096
    protocol: int = 512
    minutes: float = math.inf  # a part that has not started by then is left out, and named


SIZES = {
    "small": Size({"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 2}),
    "medium": Size(
        {**MIXTRAL_8X7B, "num_hidden_layers": 2, "vocab_size": 1000}, prompt=16, new_tokens=8, repeats=16, calibration=1024
    ),
    "full": Size(MIXTRAL_8X7B, prompt=128, new_tokens=64, repeats=4, calibration=128 * 2048, minutes=7.0),
}


# --- routing and bytes ----------------------------------------------------------------------------------------------


def routed(model, betas: Sequence[float], **options) -> dict:
    """The routing while `measure_generation` decodes with these options: the share of droppable pairs that each layer drops,
    the mean number of experts that a step reads per layer, and each layer's median rho."""
    with skipping(model, betas), record_routing(model) as calls:
        measure_generation(model, **options)
    shares, read, medians = [], [], []
    for layer, beta, (_prefill, *steps) in zip(moe_layers(model), betas, calls, strict=True):
        shares.append(dropped(layer, beta, steps))
        kept = [chosen[skip_pairs(weights, beta, layer.router.normalises)[0]] for weights, chosen in steps]
        read += [experts.unique().numel() for experts in kept]
        medians.append(torch.cat([skip_ratios(weights) for weights, _ in steps]).double().quantile(0.5).item())
    return {"shares": shares, "read": statistics.mean(read), "medians": medians}


def halving_betas(model, **options) -> list[float]:
    """Betas that drop half of the second experts in this very run: medians, recomputed because skipping changes them."""
    betas = [0.0] * len(moe_layers(model))
    for _ in range(6):
        seen = routed(model, betas, **options)
        if betas[0] and abs(statistics.mean(seen["shares"]) - 0.5) < 0.02:
            break
        betas = seen["medians"]
    return betas


def cache_bytes(model, context: int, batch: int) -> int:
    """Bytes of the keys and values of all layers."""
    config = model.config
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    return 2 * config.num_hidden_layers * batch * context * width * model.dtype.itemsize


def weights_read(model, experts: float) -> float:
    """The number of weights that a decoding step reads: all but the embedding and the experts that do not run."""
    layers = moe_layers(model)
    expert = sum(p[0].numel() for p in layers[0].experts.parameters())
    every = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    return every - len(layers) * (layers[0].n - experts) * expert


def step_bytes(model, experts: float, context: int, batch: int) -> float:
    """Bytes that a decoding step must read: weights and cache."""
    return weights_read(model, experts) * model.dtype.itemsize + cache_bytes(model, context, batch)


def read_bandwidth(device: str) -> float:
    """Bytes per second read while summing a gigabyte of float32, the best of eight runs."""
    numbers = torch.ones(2**28, device=device)
    return numbers.nbytes / min(seconds_of(numbers.sum) for _ in range(8))


def decoding_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU that supports it, else float16; on a CPU, the faster of bfloat16 and float32 over 1 to 32 rows.

    On a CPU without bfloat16 instructions, bfloat16 is faster for one row and a hundred times slower in a prefill.
    """
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    tried = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight, rows = torch.ones(8192, 4096, dtype=dtype), [torch.ones(n, 4096, dtype=dtype) for n in (1, 8, 32)]
        tried[dtype] = sum(min(seconds_of(lambda: each @ weight.T) for _ in range(8)) for each in rows)  # noqa: B023
    return min(tried, key=tried.get)


# --- the parts of a benchmark ---------------------------------------------------------------------------------------


def decoding(model, size: Size, bandwidth: float, batch: int, compiled: bool) -> dict:
    """Prefill and decoding at one batch size: stock transformers, esparse with nothing skipped, esparse with skipping. Medians
    over rounds in turn, and the limit from the bytes that must be read.

    gain: the speed of skipping over that of the faster baseline, median over rounds. Its limit is the ratio of bytes read.
    """
    new_tokens = size.new_tokens if batch == 1 else min(size.new_tokens, 16)
    options = {"batch_size": batch, "prompt": size.prompt, "new_tokens": new_tokens}
    betas = {"nothing skipped": [0.0] * len(moe_layers(model)), "skipping": halving_betas(model, **options)}
    routing = {name: routed(model, given, **options) for name, given in betas.items()}
    cache = StaticCache(model.config, max_cache_len=size.prompt + new_tokens) if compiled else None

    def run(name: str) -> dict:
        with skipping(model, betas[name]) if name in betas else nullcontext():
            return measure_generation(model, **options, cache=cache)

    repeats = size.repeats if batch == 1 else max(3, size.repeats // 4)
    turns = rounds({name: partial(run, name) for name in ("stock", *betas)}, repeats)
    speeds = {name: [turn["tokens_per_second"] for turn in of] for name, of in turns.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    prefills = {name: statistics.median(turn["prefill_tokens_per_second"] for turn in of) for name, of in turns.items()}
    faster = max(BASELINES, key=medians.get)
    read = {name: step_bytes(model, of["read"], size.prompt + new_tokens // 2, batch) for name, of in routing.items()}
    share = statistics.mean(routing["skipping"]["shares"])
    used = {"nothing skipped": 2, "skipping": 2 - share}  # experts per token
    return {
        "batch": batch,
        "compiled": compiled,
        "repeats": repeats,
        "tokens_per_second": medians,
        "prefill_tokens_per_second": prefills,
        "planned": 0.5,
        "dropped": share,
        "experts_read": {name: of["read"] for name, of in routing.items()},
        "step_bytes": read,
        "step_flop": {name: 2 * batch * weights_read(model, experts) for name, experts in used.items()},
        "limit_tokens_per_second": {name: batch * bandwidth / value for name, value in read.items()},
        "baseline": faster,
        "gain": median_ratio(speeds["skipping"], speeds[faster]),
        "plain": median_ratio(speeds["nothing skipped"], speeds["stock"]),
        "limit_gain": read["nothing skipped"] / read["skipping"],
    }


def protocol(model, size: Size, prompt: int = 128) -> dict:
    """Seconds by the paper's protocol: batch 1, greedy, exactly `size.protocol` tokens, prefill included, no warm-up, once.

    One prompt of random tokens replaces the paper's 50 from Alpaca. `stock` runs first, cold; `again` repeats it, and
    `prefill` is its time to the first token.
    """
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    generate = lambda n: seconds_of(lambda: model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options))  # noqa: E731
    found = {"new_tokens": size.protocol, "prompt": prompt, "stock": generate(size.protocol)}
    with skipping(model, halving_betas(model, prompt=size.prompt, new_tokens=size.new_tokens)):
        found["skipping"] = generate(size.protocol)
    return found | {"again": generate(size.protocol), "prefill": generate(1)}


def host_seconds(size: Size, device: str, dtype: torch.dtype) -> float:
    """Seconds of a decoding step with nothing skipped, in a model as deep but so narrow that only the host's time counts."""
    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100}
    model = random_mixtral({**size.shape, **narrow}, 8, dtype, device)
    with skipping(model, [0.0] * len(moe_layers(model))):
        measure_generation(model, new_tokens=4)
        return 1 / statistics.median(measure_generation(model, new_tokens=32)["tokens_per_second"] for _ in range(5))


def memory(model, size: Size) -> dict:
    """Weights, cache and GPU peak in a short generation at batch 1, in MiB and MB, and the peak over weights plus cache."""
    context = size.prompt + size.new_tokens
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        measure_generation(model, prompt=8, new_tokens=context - 8)
    found, cache = measure_memory(model), cache_bytes(model, context, 1) / MIB
    peak = found["peak_mib"]
    found |= {"cache_mib": cache, "over_computed": peak and peak / (found["weights_mib"] + cache)}
    return found | {f"{name}_mb": found[f"{name}_mib"] * MIB / 1e6 for name in ("weights", "experts")}


# --- all of it ------------------------------------------------------------------------------------------------------


def measure(size: Size, *, sizes: Sequence[int] = (8, 6, 4), out: Path | None = None) -> dict:
    """All parts for one size, with `sizes` experts; `out` is written after every part."""
    device, started = "cuda" if torch.cuda.is_available() else "cpu", time.perf_counter()
    dtype, bandwidth = decoding_dtype(device), read_bandwidth(device)
    rows = {r: {"r": r, "decoding": {}} for r in sizes}
    about = {"weights": "random", "dtype": str(dtype).removeprefix("torch."), "bandwidth": bandwidth}
    about |= {"flop_per_second": flop_per_second(dtype, 8192 if device == "cuda" else 2048)}
    result = keep(about | {"shape": dict(size.shape), "rows": list(rows.values()), "left_out": []}, out)

    def part(into: dict, key: str, name: str, compute: Callable[[], object]) -> None:
        if time.perf_counter() - started > 60 * size.minutes:
            result["left_out"].append(f"{name}: no time")
        else:
            try:
                into[key] = compute()
            except RuntimeError as error:  # without enough memory or a compiler the other parts can still be measured
                result["left_out"].append(f"{name}: {str(error).strip().splitlines()[0]}")
        keep(result, out)

    rate = torch.float32 if device == "cpu" else dtype  # a CPU multiplies many rows faster in float32
    part(result, "calibration", "calibration", lambda: calibration(size.shape, size.calibration, device, rate))
    part(result, "host_seconds", "the host's share", lambda: host_seconds(size, device, dtype))
    batches = {str(batch): (batch, False) for batch in size.batches} | {COMPILED: (1, True)}
    alone = {"protocol": protocol, "memory": memory}
    for r, names in _stages(size, sizes, device):
        model = random_mixtral(size.shape, r, dtype, device)
        for name in names:
            if name in alone:
                part(rows[r], name, f"r = {r}, {name}", partial(alone[name], model, size))
            else:
                compute = partial(decoding, model, size, bandwidth, *batches[name])
                part(rows[r]["decoding"], name, f"r = {r}, batch {name}", compute)
        del model
        torch._dynamo.reset()  # compiled code holds the model, and two do not fit
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return result


def _stages(size: Size, sizes: Sequence[int], device: str) -> list[tuple[int, list[str]]]:
    """The models (r) in the order in which they are made, with the parts measured on each. On a GPU time is short: the most
    important parts come first, and models are made again for the rest."""
    first, rest = ["protocol", "memory", "1"], [f"{batch}" for batch in size.batches if batch > 1]
    if device == "cpu":
        return [(r, first + rest) for r in sizes]
    stages = ((sizes, first), (sizes[:1], [COMPILED]), (sizes, rest), (sizes[1:], [COMPILED]))
    return [(r, names) for some, names in stages for r in some]


def results() -> dict[str, dict]:
    """The complete results that `data/results/` holds, by size."""
    existing = [name for name in SIZES if (data_folder() / "results" / f"speed_{name}.json").exists()]
    found = {name: measured(f"speed_{name}") for name in existing}
    return {name: result for name, result in found.items() if complete(result)}


def complete(result: Mapping) -> bool:
    """Whether a result has every part that tables, figures and explanations need, with batch 1 for every r."""
    whole = {"host_seconds", "calibration"} <= result.keys()
    return whole and all({"protocol", "memory"} <= row.keys() and "1" in row["decoding"] for row in result["rows"])


# --- tables ---------------------------------------------------------------------------------------------------------


def _decoded(result: Mapping) -> Iterator[tuple[dict, dict]]:
    """The first two columns of a row, r and batch, and its measurements."""
    return (({"r": row["r"], "batch": batch}, found) for row in result["rows"] for batch, found in row["decoding"].items())


def decoding_rows(result: Mapping) -> list[dict]:
    """Decoding: tokens per second of each variant, the faster baseline divided by its limit, and the gain from skipping."""
    rows = []
    for about, found in _decoded(result):
        speed = found["tokens_per_second"]
        reached = max(speed[name] for name in BASELINES) / found["limit_tokens_per_second"]["nothing skipped"]
        about |= speed | {"of limit": reached, "planned": found["planned"], "dropped": found["dropped"]}
        rows.append(about | {"gain": found["gain"], "limit of gain": found["limit_gain"]})
    return rows


def prefill_rows(result: Mapping) -> list[dict]:
    """Prefill: tokens per second of each variant."""
    return [about | found["prefill_tokens_per_second"] for about, found in _decoded(result)]


def memory_rows(result: Mapping) -> list[dict]:
    """Weights, cache and peak (on a GPU), in MiB and MB."""
    return [{"r": row["r"]} | row["memory"] for row in result["rows"] if "memory" in row]


def protocol_rows(result: Mapping) -> list[dict]:
    """The paper's protocol: tokens per second without and with skipping, and the speed-up over the largest size without
    skipping, in its second run, since only the first is cold."""
    runs = [(row["r"], row["protocol"]) for row in result["rows"] if "protocol" in row]
    base = runs and runs[0][1]["again"]
    return [
        {"r": r, "skipping": name == "skipping", "tokens/s": run["new_tokens"] / run[name], "speed-up": base / run[name]}
        for (r, run), name in itertools.product(runs, ("stock", "skipping"))
    ]


def calibration_rows(result: Mapping) -> list[dict]:
    """Trace and search of one layer: seconds, seconds for all of Mixtral's layers, ratio to the products, speed-up over
    running every subset."""
    names = {"r": "r", "tokens": "tokens", "seconds": "s a layer", "all_layers": f"s for {LAYERS}"}
    names |= {"over_floor": "of its products", "faster": "times faster"}
    return [{new: row[old] for old, new in names.items()} for row in result.get("calibration", ())]


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
    # bf16, including the weights that stock transformers gathers for a batch of 32.
    if name == "full" and not (torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 120e9):
        raise RuntimeError("The full size needs one GPU with 120 GB of free memory: run `bench small` or `bench medium` here.")
    result = measure(SIZES[name], out=out)
    head = f"{result['device']}, {result['dtype']}, random weights, {result['bandwidth'] / 1e9:.0f} GB/s read"
    tables = report({title: rows(result) for title, rows in TABLES.items()})
    return "\n\n".join([head, tables, *(f"left out: {name}" for name in result["left_out"])])
