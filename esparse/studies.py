"""What the notebooks compute: each function takes a run and returns numbers that JSON can hold, one per figure.

Introduced notebook by notebook; nothing here draws.
"""

import math
from collections.abc import Sequence

import torch

from .many import compare, over
from .pruning import masked
from .routers import skip_ratios
from .runs import Run
from .search import best_subset, ranked, search_experts, search_layer, subset_losses
from .skips import betas_of_shares, skipped_shares
from .traces import (
    LayerTrace,
    Trace,
    co_selection,
    dropped_share,
    expert_distances,
    median_betas,
    output_norm,
    output_norms,
    part,
    reconstruction_loss,
    routing_divergence,
    selection_frequency,
    trace,
)
from .training import preset_model

# --- 00: the method in two pictures ---------------------------------------------------------------------------------


def layer_scheme(run: Run, number: int = 0) -> dict:
    """Fig. 2 on a real token: the first whose two best experts weigh within a third of each other, or do so most nearly."""
    layer = run.trace(run.general).layers[number]
    token = int((layer.weights[:, 1] / layer.weights[:, 0]).clamp(max=0.67).argmax())
    chosen = layer.order[token, : layer.k].tolist()
    weights = layer.router.scores(layer.logits[token : token + 1])[0].tolist()
    return {"layer": number, "weights": weights, "chosen": chosen, "normalised": layer.weights[token].tolist()}


def method_scheme(run: Run, r: int, number: int = 0) -> dict:
    """Fig. 3 on a real layer: the subset that METHOD chooses beside others; and what skipping at the median beta does with
    six tokens, whose ratios stand for a sixth of all each: the weight of the first expert, and of all behind it."""
    layer = run.trace(run.general).layers[number]
    norm, beta = output_norm(layer), median_betas(Trace([layer], "", ""))[0]
    halves = torch.stack([layer.weights[:, 0], layer.weights[:, 1:].sum(1)], 1)
    rising = (halves[:, 1] / halves[:, 0]).argsort(stable=True)
    tokens = rising[[len(rising) * part // 12 for part in (11, 9, 7, 5, 3, 1)]]
    return {
        "layer": number,
        "n": layer.n,
        "r": r,
        "candidates": [{"kept": list(kept), "loss": loss / norm} for kept, loss in _candidates(layer, r, run.method)],
        "beta": beta,
        "k": layer.k,
        "tokens": halves[tokens].tolist(),
    }


def _candidates(layer: LayerTrace, r: int, method: str) -> list[tuple[Sequence[int], float]]:
    """The best subset, the median and the worst one; where they are too many to try, what a method and chance choose."""
    if method == "enumerate":
        subsets, losses = subset_losses(layer, r)
        order = ranked(losses).tolist()
        return [(subsets[i], losses[i].item()) for i in (order[0], order[len(order) // 2], order[-1])]
    generator = torch.Generator().manual_seed(0)
    return sorted(
        (search_layer(layer, r, name, generator)[:2] for name in (method, "random", "random")), key=lambda one: one[1]
    )


# --- 01 and 02: which experts are chosen, and kept -----------------------------------------------------------------


def selection(run: Run) -> dict:
    """Fig. 5: selection frequency of every layer, and co-selection of the first, middle and last."""
    data = {"corpora": {}}
    for corpus in (run.general, run.domain):
        layers = run.trace(corpus).layers
        shown = sorted({0, (len(layers) - 1) // 2, len(layers) - 1})
        data["corpora"][run.label(corpus)] = {
            "frequency": [selection_frequency(layer).tolist() for layer in layers],
            "co_selection": {str(i): co_selection(layers[i]).tolist() for i in shown},
        }
    return data


def _again(run: Run, corpus: str) -> tuple[Trace, torch.Tensor]:
    """The trace of another draw of sequences from the same corpus, and its tokens: what differs from the first is noise."""
    tokens = run.tokens(corpus, seed=run.seed + 1000)
    return run.trace(corpus, tokens=tokens), tokens


def divergence(run: Run) -> dict:
    """Total variation of the routing between the corpora, per layer, and between two draws of the general one."""
    general, domain, again = run.trace(run.general), run.trace(run.domain), _again(run, run.general)[0]
    return {
        "labels": [run.label(run.general), run.label(run.domain)],
        "between": [routing_divergence(a, b) for a, b in zip(general.layers, domain.layers, strict=True)],
        "within": [routing_divergence(a, b) for a, b in zip(general.layers, again.layers, strict=True)],
    }


def kept_experts(run: Run, r: int) -> dict:
    """Fig. 4: the subsets both corpora keep in each layer, the layers where they agree, and what chance would give.

    `again` counts the layers that keep the same subset for two draws of the general corpus.
    """
    general, domain = run.plan(run.general, r), run.plan(run.domain, r)
    n = run.trace(run.general).layers[0].n
    again, tokens = _again(run, run.general)
    model = run.model if run.method == "progressive" else None
    redrawn = search_experts(again, r, method=run.method, model=model, tokens=tokens, seed=run.seed).kept
    return {
        "r": r,
        "n": n,
        "kept": {run.label(run.general): general.kept, run.label(run.domain): domain.kept},
        "identical": [i for i, (a, b) in enumerate(zip(general.kept, domain.kept, strict=True)) if a == b],
        "chance": len(general.kept) / math.comb(n, r),
        "again": sum(a == b for a, b in zip(general.kept, redrawn, strict=True)),
    }


# --- 03: pruning ----------------------------------------------------------------------------------------------------


def landscape(run: Run, r: int) -> dict:
    """Every subset's loss in every layer, over the norm of the layer's output, on calibration and held-out tokens.

    `chosen` holds the position of each method's subset in the list of subsets.
    """
    calibration, held_out = run.trace(run.general), run.trace(run.general, tokens=run.held_out(run.general))
    plans = {method: run.plan(run.general, r, method).kept for method in ("enumerate", "greedy", "frequency")}
    layers = []
    for i, (layer, other) in enumerate(zip(calibration.layers, held_out.layers, strict=True)):
        subsets, losses = subset_losses(layer, r)
        layers.append({
            "losses": (losses / output_norm(layer)).tolist(),
            "held_out": (subset_losses(other, r)[1] / output_norm(other)).tolist(),
            "chosen": {method: subsets.index(tuple(kept[i])) for method, kept in plans.items()},
        })  # fmt: skip
    return {"r": r, "corpus": run.label(run.general), "layers": layers}


def heaviest(run: Run, share: float = 0.01) -> list[float]:
    """How much of a layer's squared output norm, which Eq. 3 adds up, its heaviest tokens hold: a share per layer."""
    squares = [output_norms(layer).square() for layer in run.trace(run.general).layers]
    return [(s.topk(max(1, int(share * len(s)))).values.sum() / s.sum()).item() for s in squares]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's correlation of two lists."""
    import pandas as pd

    return float(pd.Series(one).corr(pd.Series(other), method="spearman"))


def quality(run: Run, plan=None, betas=None) -> dict:
    """Held-out perplexity on both corpora, the mean over tasks and its standard error (None without tasks), each task by
    itself."""
    perplexities = {"perplexity": [run.perplexity(corpus, plan, betas) for corpus in (run.general, run.domain)]}
    if not run.tasks:
        return perplexities | {"average": None, "stderr": None, "tasks": {}}
    scores = run.scores(plan, betas)
    scores = scores[~scores.metric.str.contains("perplexity")]  # which is no share, and has no place in an average
    stderr = math.sqrt((scores.stderr.fillna(0) ** 2).sum()) / len(scores)
    return perplexities | {
        "average": float(100 * scores.value.mean()),
        "stderr": 100 * stderr,
        "tasks": (100 * scores.value).round(2).to_dict(),
    }


def methods(run: Run, r_random: int, draws: int = 10) -> dict:
    """Tables 2 and 6: every method at every r, and `draws` random plans at one r, calibrated on the general corpus."""
    rows = [{"method": "none", "r": moe_experts(run), **quality(run)}]
    for r in run.sizes:
        for method in ("enumerate", "progressive", "frequency"):
            rows.append({"method": method, "r": r, **quality(run, run.plan(run.general, r, method))})
    for draw in range(draws):
        plan = run.plan(run.general, r_random, "random", seed=run.seed + draw)
        rows.append({"method": "random", "r": r_random, **quality(run, plan)})
    return {"corpora": [run.label(run.general), run.label(run.domain)], "rows": rows}


def moe_experts(run: Run) -> int:
    """n of the run's model."""
    return run.trace(run.general).layers[0].n


def calibration_size(run: Run, r: int, draws: int = 5) -> dict:
    """Table 7: the held-out loss of the subsets that fewer sequences choose, over that of the held-out optimum.

    The sequences of a smaller set are drawn from the trace: nothing runs again.
    """
    calibration, held_out = run.trace(run.general), run.trace(run.general, tokens=run.held_out(run.general))
    best = [best_subset(layer, r)[1] for layer in held_out.layers]
    sizes = [s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256) if s <= run.sequences]
    generator, rows = torch.Generator().manual_seed(run.seed), []
    for size in sizes:
        for _ in range(draws if size < run.sequences else 1):
            sequences = torch.randperm(run.sequences, generator=generator)[:size]
            tokens = (sequences[:, None] * run.length + torch.arange(run.length)).flatten()
            kept = [best_subset(part(layer, tokens), r)[0] for layer in calibration.layers]
            losses = [reconstruction_loss(layer, subset) for layer, subset in zip(held_out.layers, kept, strict=True)]
            excess = sum(map(over, losses, best)) / len(best)
            rows.append({"sequences": size, "excess": excess})
    return {"r": r, "corpus": run.label(run.general), "length": run.length, "rows": rows}


# --- 04 and 05: skipping --------------------------------------------------------------------------------------------


def betas(run: Run, bins: int = 40) -> dict:
    """A.7: the distribution of rho in each layer and its median, for both corpora, and the median of another draw."""
    data = {"edges": torch.linspace(0, 1, bins + 1).tolist(), "corpora": {}}
    for corpus in (run.general, run.domain):
        traced = run.trace(corpus)
        ratios = [skip_ratios(layer.weights).flatten().float().cpu() for layer in traced.layers]
        data["corpora"][run.label(corpus)] = {
            "betas": median_betas(traced),
            "again": median_betas(_again(run, corpus)[0]),
            "density": [torch.histogram(r, bins, range=(0.0, 1.0), density=True).hist.tolist() for r in ratios],
        }
    return data


def quantile_betas(layers: Sequence[LayerTrace], share: float, kept: Sequence[Sequence[int]] | None = None) -> list[float]:
    """Betas that drop a share of the droppable pairs on the trace: 0.5 gives the medians, 1 drops all of them."""
    subsets = kept or [None] * len(layers)
    ratios = [skip_ratios(layer.routing(one)[1]).flatten().double() for layer, one in zip(layers, subsets, strict=True)]
    return [betas_of_shares(some.sort().values, [share])[0] for some in ratios]


def trade_off(run: Run, shares: Sequence[float] = (0, 0.25, 0.5, 0.75, 1)) -> dict:
    """Table 5 as curves: what skipping more pairs costs, for the full model and on top of pruning.

    Each point: the share dropped as planned on the trace and as seen on held-out text, the relative reconstruction
    loss from the trace, perplexity on both corpora. A share of 1 is top-1 routing, the control.
    """
    layers, rows = run.trace(run.general).layers, []
    held_out = run.held_out(run.general)
    for r in sorted({moe_experts(run), *run.sizes}, reverse=True):
        plan = run.plan(run.general, r) if r < moe_experts(run) else None
        for share in shares:
            chosen = quantile_betas(layers, share, plan and plan.kept)
            rows.append({
                "r": r,
                "share": share,
                "seen": run.as_if(plan, chosen, ["share"], lambda: _mean(skipped_shares(run.model, held_out))),
                "loss": _mean(relative_loss(layer, plan and plan.kept[i], chosen[i]) for i, layer in enumerate(layers)),
                "perplexity": [run.perplexity(corpus, plan, chosen) for corpus in (run.general, run.domain)],
            })  # fmt: skip
    return {"corpora": [run.label(run.general), run.label(run.domain)], "rows": rows}


def relative_loss(layer: LayerTrace, kept: Sequence[int] | None, beta: float | None) -> float:
    """The reconstruction loss over the norm of the layer's output."""
    return reconstruction_loss(layer, kept, beta) / output_norm(layer)


def skipping_layers(run: Run, r: int, beta: float) -> dict:
    """One beta in every layer of the model pruned to r experts: the share dropped and the relative loss in each."""
    kept = run.plan(run.general, r).kept
    layers = [
        {"dropped": dropped_share(layer, beta, subset), "loss": relative_loss(layer, subset, beta)}
        for layer, subset in zip(run.trace(run.general).layers, kept, strict=True)
    ]
    return {"beta": beta, "r": r, "layers": layers}


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def skipping_scores(run: Run, sizes: Sequence[int]) -> dict:
    """Table 5 in tasks: r with and without skipping at the medians, and top-1 routing."""
    traced, rows = run.trace(run.general), []
    for r in sizes:
        plan = run.plan(run.general, r) if r < moe_experts(run) else None
        kept = plan and plan.kept
        variants = {"none": None, "median": median_betas(traced, kept), "top-1": quantile_betas(traced.layers, 1, kept)}
        rows += [{"r": r, "skipping": name, **quality(run, plan, chosen)} for name, chosen in variants.items()]
    return {"corpora": [run.label(run.general), run.label(run.domain)], "rows": rows}


def betas_of_pruned(run: Run, r: int) -> dict:
    """Three betas for a pruned model: of the full model, of the subset from its trace, of the pruned model itself.

    With each: the share dropped on held-out text and the perplexity there.
    """
    plan, traced, tokens = run.plan(run.general, r), run.trace(run.general), run.held_out(run.general)

    def retrace():
        with masked(run.model, plan):
            return median_betas(trace(run.model, run.tokens(run.general), keep=moe_experts(run)))

    found = {
        "full model": median_betas(traced),
        "subset, from the trace": median_betas(traced, plan.kept),
        "pruned model, traced again": run.once(retrace, run.model_key, plan.kept, "retrace", plan.tokens),
    }
    rows = {}
    for name, chosen in found.items():
        shares = run.as_if(plan, chosen, ["shares"], lambda: skipped_shares(run.model, tokens))
        rows[name] = {"betas": chosen, "shares": shares, "perplexity": run.perplexity(run.general, plan, chosen)}
    return {"r": r, "corpus": run.label(run.general), "rows": rows}


def distances(run: Run, bins: int = 40) -> dict:
    """A.2's assumption: how narrow ||f_1 - f_2|| is in each layer, in units of its mean."""
    rows = []
    for layer in run.trace(run.general).layers:
        values = expert_distances(layer).cpu()
        scaled = (values / values.mean()).float()
        density = torch.histogram(scaled, bins, range=(0.0, 3.0), density=True).hist.tolist()
        rows.append({"mean": values.mean().item(), "variation": scaled.std().item(), "density": density})
    return {"corpus": run.label(run.general), "edges": torch.linspace(0, 3, bins + 1).tolist(), "layers": rows}


def tail_rule(n: int = 32, k: int = 8, points: int = 21) -> dict:
    """Skipping for k > 2 (A.2) on a model of random weights: pairs left per token, over beta, and at the median."""
    model = preset_model("tiny-32", seed=0, num_local_experts=n, num_experts_per_tok=k, num_hidden_layers=2)
    tokens = torch.randint(3, model.config.vocab_size, (8, 128), generator=torch.Generator().manual_seed(0))
    layer = trace(model, tokens, keep=n).layers[-1]
    grid = torch.linspace(0, 2, points).tolist()
    left = [k - (k - 1) * dropped_share(layer, beta) for beta in grid]
    ratios = skip_ratios(layer.weights)
    return {"n": n, "k": k, "beta": grid, "left": left, "median": ratios.double().median().item()}


# --- 06: memory and speed -------------------------------------------------------------------------------------------


def roofline(result: dict) -> dict:
    """Decoding at the largest r, and calibration, as points under the roofs of memory and arithmetic: what `speed.measure`
    found, nothing measured anew."""
    row, points = result["rows"][0], []
    for batch, found in row["decoding"].items():
        for kind in ("nothing skipped", "skipping"):
            flop, read = found["step_flop"][kind], found["step_bytes"][kind]
            rate = flop * found["tokens_per_second"][kind] / found["batch"]
            points.append({"kind": f"decoding, {kind}", "label": f"batch {batch}"})
            points[-1] |= {"intensity": flop / read, "flop_per_second": rate}
    peaks = {result["dtype"]: result["flop_per_second"]}
    for row in result.get("calibration", ()):
        points.append({"kind": f"calibration ({row['dtype']})", "label": f"r = {row['r']}"})
        points[-1] |= {"intensity": row["flop"] / row["bytes"], "flop_per_second": row["flop"] / row["seconds"]}
        peaks[row["dtype"]] = row["flop_per_second"]
    return {"device": result["device"], "bandwidth": result["bandwidth"], "peaks": peaks, "points": points}


def explanations(result: dict, paper: Sequence[dict]) -> list[dict]:
    """Why the paper's speed-ups are what they are: each explanation with what it predicts, and what was measured here.

    paper: the rows of Table 5. All figures are ratios of tokens per second, or shares of time.
    """
    theirs = {(row["r"], row["skipping"]): row["speedup"] for row in paper if row["model"] == "Mixtral 8x7B"}
    rows = {row["r"]: row for row in result["rows"]}
    one = {r: row["decoding"]["1"] for r, row in rows.items()}
    plain = {r: one[r]["tokens_per_second"]["nothing skipped"] for r in one}
    limit, gain = one[8]["limit_gain"], theirs[8, True]
    idle = (1 - gain / limit) / (gain - 1)  # time not spent reading weights, over the time that is, for their gain
    run = rows[8]["protocol"]
    step = 1 / plain[8]
    fewer = {r: f"{plain[r] / plain[8]:.2f}" for r in (6, 4)}
    return [
        _explained("two GPUs became one at r = 6", "1.0 on one device, whatever r", f"{fewer[6]} at r = 6", theirs[6, False]),
        _explained(
            "locality at r = 4",
            "more than 1.0 from r = 6 to 4",
            f"{plain[4] / plain[6]:.2f}",
            theirs[4, False] / theirs[6, False],
        ),
        _explained(
            "decoding waits for the host",
            f"{idle / (1 + idle):.0%} of a step at their gain from skipping",
            f"{result['host_seconds'] / step:.0%} of a step's time",
            gain,
        ),
        _explained(
            "prefill included", "a share of the time large enough to matter", f"{run['prefill'] / run['stock']:.1%}", gain
        ),
        _explained("no warm-up", "a first run that is slower", f"{run['stock'] / run['again']:.2f} times the second", gain),
    ]


def _explained(name: str, predicts: str, measured: str, paper: float) -> dict:
    return {"explanation": name, "it predicts": predicts, "measured here": measured, "the paper's ratio": round(paper, 2)}


# --- 10: many experts -----------------------------------------------------------------------------------------------


def searches(run: Run, shipped: dict) -> dict:
    """Each method's loss over the best found, layer by layer: this run's model, then the trained ones with more experts."""
    r = run.sizes[-1]
    own = {"model": run.model_name, "r": r, "n": run.trace(run.general).layers[0].n}
    own["methods"] = run.once(lambda: compare(run.trace(run.general).layers, r), run.model_key, run.general, "searches", r)
    return {"panels": [_search_panel(row) for row in (own, *shipped["trained"])]}


def _search_panel(row: dict) -> dict:
    best = "enumerate" if "enumerate" in row["methods"] else "greedy"
    optimum = row["methods"][best]["losses"]
    ratios = {method: list(map(over, found["losses"], optimum)) for method, found in row["methods"].items()}
    return {"title": f"{row['model']}, {row['n']} to {row['r']}", "best": best, "ratios": ratios}


def search_costs(shipped: dict) -> dict:
    """Seconds for one synthetic layer of 16,384 tokens, and what trying every subset takes, or would take."""
    layers = [row for row in shipped["synthetic"] if row["twins"]]
    return {
        "n": [row["n"] for row in layers],
        "seconds": {
            "trace": [row["seconds"]["trace"] for row in layers],
            "its experts alone": [row["seconds"]["experts"] for row in layers],
            "greedy search": [row["seconds"]["search"] for row in layers],
        },
        "enumeration": [_enumeration(row) for row in layers],
    }


def _enumeration(row: dict) -> float:
    done = row["methods"].get("enumerate")
    return done["seconds"] if done else math.comb(row["n"], row["r"]) * row["seconds"]["one subset"]
