"""Many experts, past the paper: layers and models with 16 to 256 of them, and what each search finds there at what cost."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .benchmark import machine, products_of, seconds_of
from .checkpoints import load_model, save_model
from .corpora import calibration_tokens
from .evaluation import perplexity
from .experts import Scratch, pair_outputs
from .files import checkout, write_json
from .models import MoELayer, moe_layers
from .pruning import PruningPlan, masked
from .search import MAX_ROUTINGS, MAX_SUBSETS, best_subset, search_layer
from .traces import CHUNK_TOKENS, LayerTrace, Trace, trace, trace_block
from .training import preset_model, train_model

METHODS = ("enumerate", "greedy", "reap", "activation", "frequency", "random")
TRAINED = {"tiny-16": (3600, (12, 8)), "tiny-32": (2400, (24, 16))}  # steps of training, experts kept
LAYERS = ((16, 2), (32, 8), (64, 8), (128, 8), (256, 8))  # n and k of the synthetic layers, of which 3/4 stay


@torch.no_grad()
def expert_layer(n: int, k: int, *, hidden: int = 256, inner: int = 128, twins: float = 0.5, seed: int = 0) -> MoELayer:
    """A Mixtral layer of random weights whose experts differ in usefulness.

    Their outputs differ in size up to three times, and a share `twins` of them comes in pairs of near copies, router rows
    included, of which one can stand in for the other. No score that looks at one expert alone can see the second.
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


def found_by(layer: LayerTrace, r: int, method: str) -> dict:
    """What a method keeps in a layer, its loss, and the seconds that took."""
    started = time.perf_counter()
    kept, loss, _ = search_layer(layer, r, method)
    return {"kept": kept, "loss": loss, "seconds": time.perf_counter() - started}


def affordable(layer: LayerTrace, r: int) -> bool:
    """Whether every subset can be tried."""
    count = math.comb(layer.n, r)
    return count <= MAX_SUBSETS and count * len(layer.order) <= MAX_ROUTINGS


def compare(layers: Sequence[LayerTrace], r: int) -> dict[str, dict]:
    """Every method (enumeration where it is affordable) on the same layers: kept experts, losses and seconds."""
    found = {}
    for method in METHODS if affordable(layers[0], r) else METHODS[1:]:
        each = [found_by(layer, r, method) for layer in tqdm(layers, desc=method, unit="layer", leave=False)]
        found[method] = {
            "kept": [one["kept"] for one in each],
            "losses": [one["loss"] for one in each],
            "seconds": sum(one["seconds"] for one in each),
        }
    return found


def over(loss: float, least: float) -> float:
    """A loss over the smallest there is: 1 where nothing is lost at all, as when no expert goes."""
    return loss / least if least else 1.0


def trained(name: str, folder: Path):
    """A preset trained by the package's own recipe, kept in `folder`: half an hour the first time."""
    if not (folder / name).exists():
        tokenizer = load_model("tiny")[1]
        save_model(train_model(tokenizer, name, steps=TRAINED[name][0]).to(torch.bfloat16), tokenizer, folder / name)
    return load_model(str(folder / name), dtype=torch.float32)


def compare_trained(name: str, folder: Path) -> list[dict]:
    """The methods on a trained model, calibrated on 64 x 256 tokens of web, with held-out perplexities."""
    model, tokenizer = trained(name, folder)
    tokens = calibration_tokens("web", tokenizer, sequences=64, length=256)
    held = {c: calibration_tokens(f"{c}/heldout", tokenizer, sequences=64, length=256) for c in ("web", "arithmetic")}
    traced, rows = trace(model, tokens, keep=min(TRAINED[name][1])), []
    for r in TRAINED[name][1]:
        found = compare(traced.layers, r)
        for method, result in found.items():
            result["perplexity"] = _as_if(model, traced, method, r, result, held)
        rows.append({"r": r, "n": traced.layers[0].n, "k": traced.layers[0].k, "methods": found})
    full = {corpus: perplexity(model, some) for corpus, some in held.items()}
    return [{**row, "model": name, "steps": TRAINED[name][0], "full": full} for row in rows]


def _as_if(model, traced: Trace, method: str, r: int, result: dict, held: dict[str, torch.Tensor]) -> dict[str, float]:
    with masked(model, PruningPlan(method, r, result["kept"], result["losses"], traced.model, traced.tokens)):
        return {corpus: perplexity(model, tokens) for corpus, tokens in held.items()}


def compare_synthetic(n: int, k: int, *, tokens: int = 16384, hidden: int = 256, twins: float = 0.5, repeats: int = 3) -> dict:
    """The methods on one synthetic layer keeping three quarters, with the seconds of its trace and of its experts alone.

    Times are the least of `repeats` for trace and experts, and for the search as well.
    """
    layer, r, scratch = expert_layer(n, k, hidden=hidden, twins=twins), n * 3 // 4, Scratch()
    states = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1))
    best = lambda call: min(seconds_of(call) for _ in range(repeats))  # noqa: E731
    traced = trace_block(layer, states, r, scratch)
    order = traced.order
    runs = torch.no_grad()(lambda: [pair_outputs(layer.experts, *part, scratch) for part in _chunks(states, order)])
    times = {"trace": best(lambda: trace_block(layer, states, r, scratch)), "experts": best(runs)}
    times["products"] = products_of(layer, states, torch.bincount(order.flatten(), minlength=n).tolist())
    methods = compare([traced], r)
    times["search"] = best(lambda: search_layer(traced, r, "greedy"))
    times["one subset"] = best(lambda: traced.losses(_subsets(n, r, 16))) / 16
    about = {"n": n, "k": k, "r": r, "reach": order.shape[1], "tokens": tokens, "hidden": hidden, "twins": twins}
    return {**about, "gram_mib": traced.gram.nbytes / 2**20, "seconds": times, "methods": methods}


def _subsets(n: int, r: int, count: int) -> list[list[int]]:
    """Random subsets, to time one of all that enumeration would try."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(n, generator=generator)[:r].sort().values.tolist() for _ in range(count)]


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(CHUNK_TOKENS) for tensor in tensors), strict=True)


def hits(cases: Sequence[tuple[LayerTrace, int]]) -> dict:
    """How often greedy removal with swaps finds the exact optimum, and its largest loss over it."""
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


def trained_cases(folder: Path) -> list[tuple[LayerTrace, int]]:
    """The layers of the embedded model (down to 7, 6, 5, 4 experts) and of the trained one with 16 (to 12, 8)."""
    cases = []
    for (model, tokenizer), sizes in ((load_model("tiny"), (7, 6, 5, 4)), (trained("tiny-16", folder), (12, 8))):
        for corpus in ("web", "arithmetic"):
            traced = trace(model, calibration_tokens(corpus, tokenizer, sequences=16, length=128), keep=min(sizes))
            cases += [(layer, r) for layer in traced.layers for r in sizes]
    return cases


def bench_many(out: Path | None = None) -> str:
    """Search methods on trained models with 16 and 32 experts and on layers with up to 256; trains the models first."""
    folder = checkout() / ".runs" / "trained"
    cases = trained_cases(folder)
    result = {
        "trained": [row for name in TRAINED for row in compare_trained(name, folder)],
        "synthetic": [compare_synthetic(n, k) for n, k in LAYERS] + [compare_synthetic(128, 8, twins=0.0)],
        "optimum": {"trained": hits(cases), "random": hits(random_cases(200 - len(cases)))},
    }
    if out:
        write_json(out, {**machine(), **result})
    return "\n".join(
        [*map(_trained_line, result["trained"]), *map(_synthetic_line, result["synthetic"]), str(result["optimum"])]
    )


def _relative(methods: dict) -> str:
    best = methods["enumerate" if "enumerate" in methods else "greedy"]["losses"]
    share = lambda found: sum(a / b for a, b in zip(found["losses"], best, strict=True)) / len(best)  # noqa: E731
    return ", ".join(f"{method} {share(found):.3f} ({found['seconds']:.1f} s)" for method, found in methods.items())


def _trained_line(row: dict) -> str:
    return f"{row['model']} to {row['r']}: loss over the best {_relative(row['methods'])}"


def _synthetic_line(row: dict) -> str:
    times = ", ".join(f"{name} {value:.2f} s" for name, value in row["seconds"].items())
    return f"{row['n']} to {row['r']}, twins {row['twins']}: {times}; loss over the best {_relative(row['methods'])}"
