"""The cost of tracing and searching: for one layer of a given shape, and for 16 to 256 experts, past the paper."""

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DeepseekV3Config

from ..checkpoints.models import load_model
from ..corpora import calibration_tokens
from ..machine import flop_per_second, seconds_of
from ..moe.experts import Scratch, pair_outputs
from ..moe.layers import MoELayer, moe_layers
from ..moe.masking import masked_layer
from ..pruning.mask import masked
from ..pruning.plan import PruningPlan
from ..pruning.search import affordable, best_subset, search_layer, subset_losses
from ..tiny_model.build import trained_folder
from ..tiny_model.training import Recipe, preset_model
from ..tracing.losses import losses_of
from ..tracing.recorder import CHUNK_TOKENS, trace, trace_block
from ..tracing.trace import LayerTrace
from .evaluation import perplexity
from .timing import MIB, keep, median_ratio, one_thread, random_mixtral, report, rise_of_memory, rounds

LAYERS = 32  # Mixtral 8x7B's
BATCH_TOKENS = 16384  # at most, on which a layer runs again
COMPARED = ("enumerate", "greedy", "reap", "activation", "frequency", "random")
TRAINED = {"tiny-16": (3600, (12, 8)), "tiny-32": (2400, (24, 16))}  # training steps, numbers of experts kept
SYNTHETIC = ((16, 2, 0.5), (32, 8, 0.5), (64, 8, 0.5), (128, 8, 0.5), (256, 8, 0.5), (128, 8, 0.0))  # n, k, twins


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


@torch.no_grad()
def grouped_layer(n: int, k: int, groups: int, **kind) -> MoELayer:
    """A layer of DeepSeek-V3, whose tokens choose within half of the groups, with the weights of `expert_layer`."""
    like = expert_layer(n, k, **kind)
    shape = {"hidden_size": like.gate.weight.shape[1], "moe_intermediate_size": like.experts.down_proj.shape[2]}
    shape |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "vocab_size": 64, "num_attention_heads": 4}
    config = DeepseekV3Config(
        **shape, n_routed_experts=n, num_experts_per_tok=k, n_group=groups, topk_group=max(1, groups // 2), n_shared_experts=1
    )
    layer = moe_layers(AutoModelForCausalLM.from_config(config, dtype=torch.float32))[0]
    for module, other in ((layer.gate, like.gate), (layer.experts, like.experts)):
        for name, weight in other.named_parameters():
            getattr(module, name).copy_(weight)
    return layer


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normally distributed hidden states, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- one layer with 8 experts ---------------------------------------------------------------------------------------


def trace_and_search(layer: MoELayer, states: torch.Tensor, r: int, scratch: Scratch) -> LayerTrace:
    """Trace a layer on hidden states [tokens, d], and compute the loss of every subset of r."""
    traced = trace_block(layer, states, r, scratch)
    subset_losses(traced, r)
    return traced


def rerun(layer: MoELayer, states: torch.Tensor, subset: Sequence[int]) -> None:
    """Run the layer with this subset of its experts."""
    with masked_layer(layer, subset):
        layer.block(states[None])


@torch.no_grad()
def calibration(shape: Mapping[str, object], tokens: int, device: str, dtype: torch.dtype) -> list[dict]:
    """Seconds to trace and search one layer of the shape, and all of Mixtral's, against a floor and against re-running.

    The floor is the time of the necessary expert products at the speed of one large product on this device. Re-running
    is measured for one subset and multiplied by the number of subsets.
    """
    layer = moe_layers(random_mixtral({**shape, "num_hidden_layers": 1}, 8, dtype, device))[0]
    expert = layer.experts.gate_up_proj[0].numel() + layer.experts.down_proj[0].numel()
    states = torch.randn(tokens, shape["hidden_size"], device=device).to(dtype)
    some, speed, rows = states[:BATCH_TOKENS], flop_per_second(dtype, 8192 if device == "cuda" else 2048), []
    for r in (6, 4):
        seconds = statistics.median(seconds_of(lambda: trace_and_search(layer, states, r, Scratch())) for _ in range(3))  # noqa: B023
        once = min(seconds_of(lambda: rerun(layer, some, range(r))) for _ in range(2))  # noqa: B023
        every, flop = math.comb(8, r) * once * tokens / len(some), 2 * tokens * (2 + 8 - r) * expert
        row = {"r": r, "tokens": tokens, "seconds": seconds, "layers": LAYERS, "all_layers": LAYERS * seconds}
        row |= {"dtype": str(dtype).removeprefix("torch."), "flop": flop, "bytes": 8 * expert * dtype.itemsize}
        row |= {"floor": flop / speed, "over_floor": seconds * speed / flop, "flop_per_second": speed}
        rows.append(row | {"rerun": every, "faster": every / seconds})
    return rows


@torch.no_grad()
def search_times(layer: MoELayer, r: int, tokens: int = 4096, repeats: int = 15) -> dict:
    """Seconds for one layer at one r: trace and enumeration, the bare products, and re-running every subset.

    The extra memory is measured with four times the tokens, beside the size of all their expert outputs: it is bounded by
    the chunk size.
    """
    scratch, states = Scratch(), normal(tokens, layer.gate.weight.shape[1])
    order, many = trace_and_search(layer, states, r, scratch).order, states.repeat(4, 1)
    extra = rise_of_memory(lambda: trace_and_search(layer, many, r, scratch)) + scratch.nbytes
    variants = {
        "ours": lambda: seconds_of(lambda: trace_and_search(layer, states, r, scratch)),
        "products": lambda: products_of(layer, states, order),
    }
    turns, subsets = rounds(variants, repeats), itertools.combinations(range(layer.n), r)
    return {
        "r": r,
        **{name: statistics.median(seconds) for name, seconds in turns.items()},
        "over_products": median_ratio(turns["ours"], turns["products"]),
        "rerun": seconds_of(lambda: [rerun(layer, states, subset) for subset in subsets]),
        "extra_mib": (extra - many.nbytes) / MIB,  # the layer's own result is not extra
        "all_outputs_mib": order.shape[1] * many.nbytes / MIB,
    }


def products_of(layer: MoELayer, hidden: torch.Tensor, order: torch.Tensor) -> float:
    """Seconds of the bare products of hidden states [tokens, d] with the experts in order [tokens, m], already sorted, in
    chunks like the trace's."""
    counts = torch.bincount(order.flatten(), minlength=layer.n).tolist()
    inputs = hidden.repeat(-(-max(counts) // len(hidden)), 1)
    rows = max(1, CHUNK_TOKENS * sum(counts) // len(hidden) // layer.n)

    def run() -> None:
        for expert, count in enumerate(counts):
            up, down = layer.experts.gate_up_proj[expert], layer.experts.down_proj[expert]
            for part in inputs[:count].split(rows):
                (part @ up.T)[:, : down.shape[1]] @ down.T

    return seconds_of(run)


@torch.no_grad()
def greedy_times(layers: Mapping[str, tuple[MoELayer, int]], tokens: int = 8192, repeats: int = 5) -> list[dict]:
    """Seconds of the trace and of greedy removal on one thread, for layers by name, with the number of experts to keep. All
    take turns."""
    scratch, variants, traces = Scratch(), {}, {}
    for name, (layer, r) in layers.items():
        states = normal(tokens, layer.gate.weight.shape[1])
        traces[name] = trace_block(layer, states, r, scratch)
        variants[name, "trace"] = partial(seconds_of, partial(trace_block, layer, states, r, scratch))
        variants[name, "search"] = partial(seconds_of, partial(search_layer, traces[name], r, "greedy"))
    with one_thread():
        median = {variant: statistics.median(seconds) for variant, seconds in rounds(variants, repeats).items()}
    rows = [{"layer": name, "r": r, "reach": traces[name].order.shape[1]} for name, (_, r) in layers.items()]
    return [row | {part: median[row["layer"], part] for part in ("trace", "search")} for row in rows]


def bench_search(out: Path | None = None) -> str:
    """The search benchmark as tables: hidden 512, inner 1792, 8 experts, 4096 tokens, r = 6 and 4; then greedy removal from 32
    experts, and from 256 with and without groups."""
    layer = expert_layer(8, 2, hidden=512, inner=1792, twins=0.0)
    result = keep({"rows": [search_times(layer, r) for r in (6, 4)]}, out)
    layers = {"32 experts": (expert_layer(32, 8), 24)}
    layers |= {f"256 in {groups}": (grouped_layer(256, 8, groups), 192) for groups in (1, 8)}
    result = keep(result | {"greedy": greedy_times(layers)}, out)
    names = {"r": "r", "ours": "trace and search", "products": "bare products", "over_products": "ratio"}
    names |= {"rerun": "every subset again", "faster": "times faster", "extra_mib": "extra MiB at 4 x tokens"}
    names |= {"all_outputs_mib": "MiB of all outputs"}
    rows = [row | {"faster": row["rerun"] / row["ours"]} for row in result["rows"]]
    tables = {"trace and search, s": [{new: row[old] for old, new in names.items()} for row in rows]}
    return report(tables | {"greedy removal, s": result["greedy"]})


# --- many experts ---------------------------------------------------------------------------------------------------


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
    perplexities = lambda: {corpus: perplexity(model, tokens) for corpus, tokens in held.items()}  # noqa: E731
    traced, full, rows = trace(model, read("web"), keep=min(sizes)), perplexities(), []
    for r in sizes:
        found = compare(traced.layers, r)
        for method, result in found.items():
            with masked(model, PruningPlan(method, r, result["kept"], result["losses"], traced.model, traced.tokens)):
                result["perplexity"] = perplexities()
        about = {"r": r, "n": traced.layers[0].n, "k": traced.layers[0].k, "methods": found}
        rows.append(about | {"model": name, "steps": steps, "full": full})
    return rows


@torch.no_grad()
def compare_synthetic(n: int, k: int, twins: float) -> dict:
    """The methods on one synthetic layer that keeps three quarters, and the least seconds of trace, experts and search."""
    layer, r, scratch, states = expert_layer(n, k, twins=twins), n * 3 // 4, Scratch(), normal(16384, 256)
    best = lambda call: min(seconds_of(call) for _ in range(3))  # noqa: E731
    traced = trace_block(layer, states, r, scratch)
    parts = list(zip(states.split(CHUNK_TOKENS), traced.order.split(CHUNK_TOKENS), strict=True))
    some = list(itertools.islice(itertools.combinations(range(n), r), 16))
    times = {
        "trace": best(lambda: trace_block(layer, states, r, scratch)),
        "experts": best(lambda: [pair_outputs(layer.experts, *part, scratch) for part in parts]),
        "products": products_of(layer, states, traced.order),
        "search": best(lambda: search_layer(traced, r, "greedy")),
        "one subset": best(lambda: losses_of(traced, some)) / len(some),
    }
    about = {"n": n, "k": k, "r": r, "reach": traced.order.shape[1], "tokens": len(states), "hidden": 256, "twins": twins}
    return {**about, "gram_mib": traced.gram.nbytes / MIB, "seconds": times, "methods": compare([traced], r)}


def hits(cases: Sequence[tuple[LayerTrace, int]]) -> dict:
    """How often greedy removal with swaps finds the exact optimum, and its largest loss divided by the optimum's."""
    bar = tqdm(cases, desc="against the optimum", unit="layer", leave=False)
    ratios = [search_layer(layer, r, "greedy")[1] / best_subset(layer, r)[1] for layer, r in bar]
    return {"layers": len(ratios), "optimal": sum(ratio < 1 + 1e-6 for ratio in ratios), "worst": max(ratios)}


def random_cases(count: int) -> list[tuple[LayerTrace, int]]:
    """Traces of `count` synthetic layers with 8, 12 or 16 experts, k of 1, 2 or 4, and a number to keep."""
    shapes = itertools.cycle(itertools.product((8, 12, 16), (1, 2, 4), (0.0, 0.5), (0.5, 0.75)))
    cases = []
    for seed, (n, k, twins, share) in zip(range(count), shapes, strict=False):
        layer = expert_layer(n, k, hidden=32, inner=16, twins=twins, seed=seed)
        cases.append((trace_block(layer, normal(256, 32, seed=seed), int(n * share)), int(n * share)))
    return cases


def trained_cases() -> list[tuple[LayerTrace, int]]:
    """The layers of models trained from nothing: with 8 experts (down to 7, 6, 5, 4) and with 16 (to 12, 8)."""
    cases = []
    for (model, tokenizer), sizes in ((load_model("tiny-scratch"), (7, 6, 5, 4)), (trained("tiny-16"), (12, 8))):
        for corpus in ("web", "arithmetic"):
            traced = trace(model, calibration_tokens(corpus, tokenizer, sequences=16, length=128), keep=min(sizes))
            cases += [(layer, r) for layer in traced.layers for r in sizes]
    return cases


def bench_many(out: Path | None = None) -> str:
    """Search methods on trained models with 16 and 32 experts and on layers with up to 256; trains the models first."""
    cases = trained_cases()
    result = keep({"trained": [row for name in TRAINED for row in compare_trained(name)]}, out)
    result = keep(result | {"synthetic": [compare_synthetic(*shape) for shape in SYNTHETIC]}, out)
    optimum = {"trained": hits(cases), "random": hits(random_cases(200 - len(cases)))}
    result = keep(result | {"optimum": optimum}, out)
    tables = {"loss over the best": [_relative(row) for row in result["trained"] + result["synthetic"]]}
    tables["seconds"] = [{"n": row["n"], "twins": row["twins"]} | row["seconds"] for row in result["synthetic"]]
    return report(tables | {f"greedy against the optimum, {name}": [row] for name, row in optimum.items()})


def _relative(row: dict) -> dict:
    """Each method's mean ratio of its loss to the best, and its seconds."""
    methods, cells = row["methods"], dict.fromkeys(COMPARED, "-")
    best = methods.get("enumerate", methods["greedy"])["losses"]
    for method, found in methods.items():
        cells[method] = f"{statistics.mean(map(over, found['losses'], best)):.3f} ({found['seconds']:.1f} s)"
    return {"model": row.get("model", "random"), "n": row["n"], "r": row["r"]} | cells
