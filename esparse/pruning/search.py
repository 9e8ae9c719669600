"""Chooses the experts to keep (Section 3.2): from all subsets where that is affordable, else by greedy removal with swaps."""

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..files import digest
from ..moe.identity import check_fingerprint
from ..moe.layers import decoder_layers
from ..moe.running import check_tokens
from ..tracing.losses import check_loss, has_choice_table, losses_from_choices, losses_of, mixed, reconstruction_loss, weighed
from ..tracing.recorder import tokens_digest
from ..tracing.trace import LayerTrace, Trace
from ..tracing.walk import Walk
from .greedy import remove_greedily
from .plan import PruningPlan
from .scores import EXPERT_SCORES, best_by_score, expert_groups, expert_scores, ranked

MAX_SUBSETS = 200_000
MAX_ROUTINGS = 5e9  # subsets times tokens: about ten minutes a layer on two cores
SEARCH_METHODS = ("enumerate", "greedy", *EXPERT_SCORES, "random", "progressive")
BY_LOSS = ("enumerate", "greedy", "progressive")  # the methods that compare losses, not experts one by one

# Kept experts, their loss (None where the trace does not reach as far), and the runner-up's where all subsets were tried.
Found = tuple[list[int], float | None, float | None]


def all_subsets(layer: LayerTrace, r: int) -> list[tuple[int, ...]]:
    """Every subset of r experts, equally many from each of the router's groups. Raises ValueError where r is out of range, or
    the subsets are too many to enumerate on this many tokens."""
    _check_subsets(layer, r)
    groups = expert_groups(layer)
    parts = [itertools.combinations(group, r // len(groups)) for group in groups]
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*parts)]


def _check_subsets(layer: LayerTrace, r: int, searches: int = 1) -> None:
    """ValueError as for `all_subsets`, if so many searches like it come to more work than one may be."""
    layer.check_size(r)
    groups = expert_groups(layer)
    count = math.comb(len(groups[0]), r // len(groups)) ** len(groups)
    if count > MAX_SUBSETS or (searches * count * len(layer.order) > MAX_ROUTINGS and not has_choice_table(layer)):
        raise ValueError(
            f"{count:.2g} subsets of {r} out of {layer.n} experts on {len(layer.order)} tokens are too many to enumerate: "
            f"use method='greedy' (up to {MAX_SUBSETS:,} subsets, and {MAX_ROUTINGS:.0e} subsets times tokens, are tried)."
        )


def affordable(layer: LayerTrace, r: int, searches: int = 1) -> bool:
    """Whether enumeration accepts this layer and r, and `searches` like it together are no more work than one may be."""
    with suppress(ValueError):
        _check_subsets(layer, r, searches)
        return True
    return False


def subset_losses(layer: LayerTrace, r: int) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every subset of r experts and its reconstruction loss (Eq. 3), float64 [subsets]. Raises ValueError as `all_subsets`."""
    subsets = all_subsets(layer, r)
    return subsets, losses_from_choices(layer, subsets) if has_choice_table(layer) else losses_of(layer, subsets)


def best_subset(layer: LayerTrace, r: int, protected: Sequence[int] = ()) -> Found:
    """The subset of r experts with the smallest loss among those that hold the protected ones, that loss, and the runner-up's
    (the same loss if there is none)."""
    subsets, losses = subset_losses(layer, r)
    allowed = [i for i in ranked(losses).tolist() if set(protected) <= set(subsets[i])]
    first = [subsets[i] for i in allowed[:2]]
    found = [reconstruction_loss(layer, subset) for subset in first]  # as for every other method
    return list(first[0]), found[0], max(found)


def search_layer(
    layer: LayerTrace, r: int, method: str, generator: torch.Generator | None = None, protected: Sequence[int] = ()
) -> Found:
    """The r experts to keep in one layer, the protected ones among them. Raises ValueError for r out of range, an unknown
    method, and protected experts that are none or more than can be kept."""
    check_method(method)
    layer.check_size(r, losses=method in BY_LOSS)
    _check_protected(layer, r, protected)
    if method in ("enumerate", "progressive"):  # which differ in the hidden states that were traced
        return best_subset(layer, r, protected)
    kept = choose_experts(layer, r, method, generator, protected)
    return kept, reconstruction_loss(layer, kept) if r >= layer.keep else None, None


def choose_experts(
    layer: LayerTrace, r: int, method: str, generator: torch.Generator | None = None, protected: Sequence[int] = ()
) -> list[int]:
    """The r experts that greedy removal, a score or "random" keeps in one layer, in rising order; their loss is not computed.
    Greedy removal protects none."""
    if method == "greedy":
        return sorted(remove_greedily(layer, r))
    generator = generator or torch.Generator().manual_seed(0)
    scores = expert_scores(layer, method) if method in EXPERT_SCORES else torch.rand(layer.n, generator=generator)
    safe = torch.tensor(protected, dtype=torch.long, device=scores.device)
    return sorted(best_by_score(layer, r, scores.index_fill(0, safe, math.inf)))


def _check_protected(layer: LayerTrace, r: int, protected: Sequence[int]) -> None:
    """ValueError unless r experts, equally many of each group, can hold the protected ones."""
    if not set(protected) <= set(range(layer.n)):
        raise ValueError(f"{layer.name}: protected experts must be numbers from 0 to {layer.n - 1}, got {protected}.")
    groups = expert_groups(layer)
    most = max(len(set(protected) & set(group)) for group in groups)
    if most > r // len(groups):
        each = f", since each of {len(groups)} groups keeps {r // len(groups)}" * (len(groups) > 1)
        raise ValueError(f"{layer.name}: {r} experts cannot hold {most} protected ones{each}.")


def check_method(method: str) -> None:
    if method not in SEARCH_METHODS:
        raise ValueError(f"Unknown method {method!r}: choose from {', '.join(SEARCH_METHODS)}.")


def search_experts(
    trace: Trace | Sequence[Trace],
    r: int,
    *,
    method: str = "enumerate",
    loss: str = "residual",
    weights: Sequence[float] | None = None,
    model=None,
    tokens: Tensor | None = None,
    seed: int = 0,
    protect: Sequence[Sequence[int]] | None = None,
) -> PruningPlan:
    """Choose r experts to keep in every layer.

    trace: one, or several of the same model, each on a corpus of its own. weights: how much each corpus counts, whatever its
    length (None: all equally). Divided by their sum, weights are shares, and a squared loss is T sum_i share_i L_i^2 / T_i, see
    `tracing.losses.mixed`. The plan's `tokens` is a digest of all corpora and shares. A trace of weight 0 is left out; if one
    trace is left, the plan is that of this trace alone.
    method: "enumerate" (all subsets, layer by layer), "greedy" (removal one by one, then swaps: for more experts than
    can be enumerated), "progressive" (Table 6: each layer is searched on the outputs of the already pruned layers; needs
    `model` and the `tokens` of the trace), a score of `expert_scores`, "random" (drawn from `seed`). The last two take a trace
    of any `keep`, even of all experts; where r is below it, the plan's losses are None.
    loss: "eq3", the paper's ||change||^2 summed over tokens; "residual", which divides it by ||h + z||^2 of the residual
    stream behind the layer, and has chosen better (data/results/README.md); "output", by ||z||^2 of the layer's output.
    Scores take the same norms.
    protect: experts of each layer that must stay, as from `super_experts`; not for "greedy" and "progressive".
    Raises ValueError for r out of range, an unknown method or loss, a model that is not the trace's, traces that do not belong
    together, bad weights, and "progressive" with several traces.
    """
    check_method(method)
    check_loss(loss)
    traces, shares = mixture_shares([trace] if isinstance(trace, Trace) else trace, weights)
    if method == "progressive" and len(traces) > 1:
        raise ValueError("method='progressive' walks through one calibration set: give one trace, or choose another method.")
    for layer in traces[0].layers:
        layer.check_size(r, losses=method in BY_LOSS)
    if protect and method in ("greedy", "progressive"):
        raise ValueError(f"method={method!r} cannot protect experts: use enumerate, a score or random.")
    if method == "progressive":
        return _progressive_plan(traces[0], r, loss, model, tokens)
    generator = torch.Generator().manual_seed(seed)
    layers, safe = zip(*(one.layers for one in traces), strict=True), protect or [()] * len(traces[0].layers)
    if len(safe) != len(traces[0].layers):
        raise ValueError(f"Got protected experts for {len(safe)} layers, but the trace has {len(traces[0].layers)}.")
    found = [
        search_layer(mixed([weighed(layer, loss) for layer in same], shares), r, method, generator, experts)
        for same, experts in tqdm(zip(layers, safe, strict=True), total=len(safe), desc=method, unit="layer", leave=False)
    ]
    return make_plan(method, loss, r, found, traces[0].model, mixture_digest(traces, shares))


def mixture_shares(traces: Sequence[Trace], weights: Sequence[float] | None = None) -> tuple[list[Trace], list[float]]:
    """The traces whose weight is not 0, and their weights (None: all equal) divided by the sum. Raises ValueError for bad
    weights, and for traces of different models or sizes."""
    if len({(one.model, len(one.layers), one.keep) for one in traces}) != 1:
        raise ValueError("A mixture needs traces of one model that answer down to the same number of experts.")
    weights = [1.0] * len(traces) if weights is None else list(map(float, weights))
    if len(weights) != len(traces) or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"Give {len(traces)} finite weights, one for each trace, none negative and not all 0, got {weights}.")
    scaled = [weight / max(weights) for weight in weights]  # so that their sum is finite
    used = [(one, weight / sum(scaled)) for one, weight in zip(traces, scaled, strict=True) if weight]
    return [one for one, _ in used], [share for _, share in used]


def mixture_digest(traces: Sequence[Trace], shares: Sequence[float]) -> str:
    """The digest of a mixture's calibration sets; of one trace, its own."""
    sets = [one.tokens for one in traces]
    return sets[0] if len(sets) == 1 else digest("mixture", sets, shares)


def make_plan(method: str, loss: str, r: int, found: Sequence[Found], model: str, tokens: str) -> PruningPlan:
    """A plan from the results of `search_layer` for all layers."""
    kept, losses, runner_up = (list(column) for column in zip(*found, strict=True))
    return PruningPlan(method, r, kept, losses, model, tokens, None if None in runner_up else runner_up, loss=loss)


@torch.no_grad()
def _progressive_plan(trace: Trace, r: int, loss: str, model, tokens: Tensor | None) -> PruningPlan:
    if model is None or tokens is None:
        raise ValueError("method='progressive' runs the model again: pass model= and the tokens= of the trace.")
    check_fingerprint(model, trace.model, "trace")
    check_tokens(model, tokens)
    if tokens_digest(tokens) != trace.tokens:
        raise ValueError("These are not the tokens the trace was made from: pass the same calibration set.")
    walk, found = Walk(model, tokens, progressive=True), []
    for number in tqdm(range(len(decoder_layers(model))), desc="progressive", unit="layer", leave=False):
        traced = walk.trace_layer(number, r)
        if traced is not None:
            found.append(best_subset(weighed(traced, loss), r))
            walk.follow(number, found[-1][0])
    return make_plan("progressive", loss, r, found, trace.model, trace.tokens)
