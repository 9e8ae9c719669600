"""The cost of tracing and searching: for one layer of a given shape, and for 16 to 256 experts, past the paper."""

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..checkpoints.estimate import flop_per_second
from ..checkpoints.models import load_model
from ..corpora import calibration_tokens
from ..machine import seconds_of
from ..moe.experts import Scratch, pair_outputs
from ..moe.layers import MoELayer, moe_layers
from ..moe.masking import masked_layer
from ..pruning.mask import masked
from ..pruning.plan import PruningPlan
from ..pruning.search import all_subsets, best_subset, search_layer, subset_losses
from ..tiny_model.build import trained_folder
from ..tiny_model.recipe import Recipe
from ..tiny_model.training import preset_model
from ..tracing.losses import losses_of
from ..tracing.recorder import CHUNK_TOKENS, Recorder, recording, trace, trace_block
from ..tracing.trace import LayerTrace
from .evaluation import perplexity
from .timing import MIB, Record, peak_memory, random_mixtral, report, rounds

LAYERS = 32  # Mixtral 8x7B's
BATCH_TOKENS = 16384  # calibration tokens in one forward pass
COMPARED = ("enumerate", "greedy", "reap", "activation", "frequency", "random")
TRAINED = {"tiny-16": (3600, (12, 8)), "tiny-32": (2400, (24, 16))}  # training steps, numbers of experts kept
SYNTHETIC = ((16, 2), (32, 8), (64, 8), (128, 8), (256, 8))  # n and k of the synthetic layers, which keep 3/4 of n


# --- one layer with 8 experts ---------------------------------------------------------------------------------------


def trace_and_search(layer: MoELayer, states: torch.Tensor, tokens: int, r: int, scratch: Scratch) -> LayerTrace:
    """Trace a layer on this many tokens, in batches of the states [1, batch, d], and compute the loss of every subset of r."""
    recorder = Recorder(layer, r, None, scratch)
    with recording([recorder]):
        for left in range(tokens, 0, -states.shape[1]):
            layer.block(states[:, :left])
    traced = recorder.finish()
    subset_losses(traced, r)
    return traced


def rerun(layer: MoELayer, states: torch.Tensor, subset: Sequence[int]) -> None:
    """Run the layer with this subset of its experts."""
    with masked_layer(layer, subset):
        layer.block(states)


@torch.no_grad()
def calibration(
    shape: Mapping[str, object], tokens: int, device: str, dtype: torch.dtype, sizes: Sequence[int] = (6, 4)
) -> list[dict]:
    """Seconds to trace and search one layer of the shape, and all of Mixtral's, against a floor and against re-running.

    The floor is the time of the necessary expert products at the speed of one large product on this device. Re-running
    is measured for one subset and multiplied by the number of subsets.
    """
    model = random_mixtral({**shape, "num_hidden_layers": 1}, 8, dtype, device)
    layer, hidden, rows = moe_layers(model)[0], model.config.hidden_size, []
    states = torch.randn(1, min(tokens, BATCH_TOKENS), hidden, device=device).to(dtype)
    speed = flop_per_second(dtype, 8192 if device == "cuda" else 2048)
    expert = 3 * hidden * model.config.intermediate_size
    for r in sizes:
        seconds = statistics.median(
            seconds_of(lambda: trace_and_search(layer, states, tokens, r, Scratch()))  # noqa: B023
            for _ in range(3)
        )
        once = min(seconds_of(lambda: rerun(layer, states, range(r))) for _ in range(2))  # noqa: B023
        every, flop = math.comb(8, r) * once * tokens / states.shape[1], 2 * tokens * (2 + 8 - r) * expert
        row = {"r": r, "tokens": tokens, "seconds": seconds, "layers": LAYERS, "all_layers": LAYERS * seconds}
        row |= {"dtype": str(dtype).removeprefix("torch."), "flop": flop, "bytes": 8 * expert * dtype.itemsize}
        row |= {"floor": flop / speed, "over_floor": seconds * speed / flop, "flop_per_second": speed}
        rows.append(row | {"rerun": every, "faster": every / seconds})
    return rows


def benchmark_layer(hidden: int = 512, inner: int = 1792):
    """A one-layer Mixtral with random weights whose routing is uneven enough for subsets to differ."""
    model = preset_model("tiny", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1)
    torch.nn.init.normal_(moe_layers(model)[0].gate.weight, std=0.1)
    return model


@torch.no_grad()
def search_times(model, r: int, tokens: int = 4096, repeats: int = 15) -> dict:
    """Seconds for one layer at one r: trace and enumeration, the bare products, and re-running every subset.

    The bare products are the matrix products of each token's k + n - r best experts, already sorted. The extra memory is
    measured with four times the tokens, beside the size of all their expert outputs: it is bounded by the chunk size.
    """
    layer, scratch = moe_layers(model)[0], Scratch()
    states = torch.randn(1, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    order, many = trace_and_search(layer, states, tokens, r, scratch).order, states.repeat(1, 4, 1)
    with peak_memory() as found:
        trace_and_search(layer, many, 4 * tokens, r, scratch)
    extra = scratch.nbytes + (found["mib"] or 0.0) * MIB - many.nbytes  # the layer's own result is not extra
    turns = rounds(
        {
            "ours": lambda: seconds_of(lambda: trace_and_search(layer, states, tokens, r, scratch)),
            "products": lambda: products_of(layer, states[0], order),
        },
        repeats,
    )
    subsets = itertools.combinations(range(layer.n), r)
    return {
        "r": r,
        "ours": statistics.median(turns["ours"]),
        "products": statistics.median(turns["products"]),
        "over_products": statistics.median(a / b for a, b in zip(turns["ours"], turns["products"], strict=True)),
        "rerun": seconds_of(lambda: [rerun(layer, states, subset) for subset in subsets]),
        "extra_mib": extra / MIB,
        "all_outputs_mib": order.shape[1] * many.nbytes / MIB,
    }


def products_of(layer: MoELayer, hidden: torch.Tensor, order: torch.Tensor) -> float:
    """Seconds of the bare products of hidden states [tokens, d] with the experts in order [tokens, m], in chunks like the
    trace's."""
    counts = torch.bincount(order.flatten(), minlength=layer.n).tolist()
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
    result = Record(out).keep(rows=[search_times(model, r) for r in (6, 4)])
    names = {"r": "r", "ours": "trace and search", "products": "bare products", "over_products": "ratio"}
    names |= {"rerun": "every subset again", "faster": "times faster", "extra_mib": "extra MiB at 4 x tokens"}
    names |= {"all_outputs_mib": "MiB of all outputs"}
    rows = [row | {"faster": row["rerun"] / row["ours"]} for row in result["rows"]]
    return report({"trace and search, s": [{new: row[old] for old, new in names.items()} for row in rows]})


# --- many experts ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def expert_layer(n: int, k: int, *, hidden: int = 256, inner: int = 128, twins: float = 0.5, seed: int = 0) -> MoELayer:
    """A Mixtral layer with random weights whose experts differ in usefulness.

    Their outputs differ in size up to three times. A share `twins` of the experts comes in pairs of near copies, router
    rows included: one can replace the other. A score of single experts cannot see that.
    """
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_local_experts": n, "num_experts_per_tok": k}
    layer = moe_layers(preset_model("tiny", seed, num_hidden_layers=1, **shape))[0]
    generator = torch.Generator().manual_seed(seed)
    layer.gate.weight.normal_(std=1 / hidden**0.5, generator=generator)
    layer.experts.down_proj.mul_(10 * (0.5 + 1.5 * torch.rand(n, 1, 1, generator=generator)))
    for first in range(0, int(n * twins) // 2 * 2, 2):
        for weight in (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
            noise = torch.randn(weight[first].shape, generator=generator)
            weight[first + 1] = weight[first] + 0.2 * weight[first].std() * noise
    return layer


def affordable(layer: LayerTrace, r: int) -> bool:
    """Whether enumeration accepts this layer and r."""
    try:
        all_subsets(layer, r)
    except ValueError:
        return False
    return True


def compare(layers: Sequence[LayerTrace], r: int) -> dict[str, dict]:
    """Every method (enumeration where it is affordable) on the same layers: kept experts, losses and seconds."""
    found = {}
    for method in COMPARED if affordable(layers[0], r) else COMPARED[1:]:
        started = time.perf_counter()
        bar = tqdm(layers, desc=method, unit="layer", leave=False)
        kept, losses, _ = zip(*(search_layer(layer, r, method) for layer in bar), strict=True)
        found[method] = {"kept": list(kept), "losses": list(losses), "seconds": time.perf_counter() - started}
    return found


def over(loss: float, least: float) -> float:
    """A loss over the least one; 1 if the least is 0, as when no expert is removed."""
    return loss / least if least else 1.0


def trained(name: str):
    """A preset trained by the package's own recipe, and its tokenizer; training takes half an hour the first time."""
    folder = trained_folder(Recipe(name, TRAINED[name][0]), 0, load_model("tiny")[1])
    return load_model(str(folder), dtype=torch.float32)


def compare_trained(name: str) -> list[dict]:
    """The methods on a trained model, calibrated on 64 x 256 tokens of web, with held-out perplexities."""
    (model, tokenizer), (steps, sizes) = trained(name), TRAINED[name]
    read = lambda corpus: calibration_tokens(corpus, tokenizer, sequences=64, length=256)  # noqa: E731
    held = {corpus: read(f"{corpus}/heldout") for corpus in ("web", "arithmetic")}
    traced, rows = trace(model, read("web"), keep=min(sizes)), []
    perplexities = lambda: {corpus: perplexity(model, tokens) for corpus, tokens in held.items()}  # noqa: E731
    for r in sizes:
        found = compare(traced.layers, r)
        for method, result in found.items():
            with masked(model, PruningPlan(method, r, result["kept"], result["losses"], traced.model, traced.tokens)):
                result["perplexity"] = perplexities()
        rows.append({"r": r, "n": traced.layers[0].n, "k": traced.layers[0].k, "methods": found})
    return [{**row, "model": name, "steps": steps, "full": perplexities()} for row in rows]


def compare_synthetic(n: int, k: int, *, tokens: int = 16384, hidden: int = 256, twins: float = 0.5, repeats: int = 3) -> dict:
    """The methods on one synthetic layer that keeps three quarters, and the seconds of trace, experts and search: the least
    of `repeats`."""
    layer, r, scratch = expert_layer(n, k, hidden=hidden, twins=twins), n * 3 // 4, Scratch()
    states = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1))
    best = lambda call: min(seconds_of(call) for _ in range(repeats))  # noqa: E731
    traced = trace_block(layer, states, r, scratch)
    parts = lambda: zip(states.split(CHUNK_TOKENS), traced.order.split(CHUNK_TOKENS), strict=True)  # noqa: E731
    runs = torch.no_grad()(lambda: [pair_outputs(layer.experts, *part, scratch) for part in parts()])
    times = {"trace": best(lambda: trace_block(layer, states, r, scratch)), "experts": best(runs)}
    times["products"] = products_of(layer, states, traced.order)
    methods = compare([traced], r)
    times["search"] = best(lambda: search_layer(traced, r, "greedy"))
    generator = torch.Generator().manual_seed(0)
    some = [torch.randperm(n, generator=generator)[:r].sort().values.tolist() for _ in range(16)]
    times["one subset"] = best(lambda: losses_of(traced, some)) / len(some)
    about = {"n": n, "k": k, "r": r, "reach": traced.order.shape[1], "tokens": tokens, "hidden": hidden, "twins": twins}
    return {**about, "gram_mib": traced.gram.nbytes / MIB, "seconds": times, "methods": methods}


def hits(cases: Sequence[tuple[LayerTrace, int]]) -> dict:
    """How often greedy removal with swaps finds the exact optimum, and its largest loss divided by the optimum's."""
    ratios = []
    for layer, r in tqdm(cases, desc="against the optimum", unit="layer", leave=False):
        ratios.append(search_layer(layer, r, "greedy")[1] / best_subset(layer, r)[1])
    return {"layers": len(ratios), "optimal": sum(ratio < 1 + 1e-6 for ratio in ratios), "worst": max(ratios)}


def random_cases(count: int, tokens: int = 256) -> list[tuple[LayerTrace, int]]:
    """Traces of `count` synthetic layers with 8, 12 or 16 experts, k of 1, 2 or 4, and a number to keep."""
    shapes = itertools.cycle(itertools.product((8, 12, 16), (1, 2, 4), (0.0, 0.5), (0.5, 0.75)))
    cases = []
    for seed, (n, k, twins, share) in zip(range(count), shapes, strict=False):
        layer = expert_layer(n, k, hidden=32, inner=16, twins=twins, seed=seed)
        states = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))
        cases.append((trace_block(layer, states, int(n * share)), int(n * share)))
    return cases


def trained_cases() -> list[tuple[LayerTrace, int]]:
    """The layers of the embedded model (down to 7, 6, 5, 4 experts) and of the trained one with 16 (to 12, 8)."""
    cases = []
    for (model, tokenizer), sizes in ((load_model("tiny"), (7, 6, 5, 4)), (trained("tiny-16"), (12, 8))):
        for corpus in ("web", "arithmetic"):
            traced = trace(model, calibration_tokens(corpus, tokenizer, sequences=16, length=128), keep=min(sizes))
            cases += [(layer, r) for layer in traced.layers for r in sizes]
    return cases


def bench_many(out: Path | None = None) -> str:
    """Search methods on trained models with 16 and 32 experts and on layers with up to 256; trains the models first."""
    cases, result = trained_cases(), Record(out)
    result.keep(trained=[row for name in TRAINED for row in compare_trained(name)])
    result.keep(synthetic=[compare_synthetic(n, k) for n, k in SYNTHETIC] + [compare_synthetic(128, 8, twins=0.0)])
    result.keep(optimum={"trained": hits(cases), "random": hits(random_cases(200 - len(cases)))})
    tables = {"loss over the best": [_relative(row) for row in result["trained"] + result["synthetic"]]}
    tables["seconds"] = [{"n": row["n"], "twins": row["twins"]} | row["seconds"] for row in result["synthetic"]]
    return report(tables | {f"greedy against the optimum, {name}": [row] for name, row in result["optimum"].items()})


def _relative(row: dict) -> dict:
    """Each method's mean ratio of its loss to the best, and its seconds."""
    methods, cells = row["methods"], dict.fromkeys(COMPARED, "-")
    best = methods.get("enumerate", methods["greedy"])["losses"]
    for method, found in methods.items():
        cells[method] = f"{statistics.mean(map(over, found['losses'], best)):.3f} ({found['seconds']:.1f} s)"
    return {"model": row.get("model", "random"), "n": row["n"], "r": row["r"]} | cells
