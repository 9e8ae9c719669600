"""Chooses the experts to keep (Section 3.2): from all subsets where that is affordable, else by greedy removal with swaps."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..moe.identity import check_fingerprint
from ..moe.layers import decoder_layers
from ..moe.running import check_tokens
from ..tracing.losses import check_loss, has_choice_table, losses_from_choices, losses_of, reconstruction_loss, weighed
from ..tracing.recorder import tokens_digest
from ..tracing.trace import LayerTrace, Trace
from ..tracing.walk import Walk
from .greedy import remove_greedily
from .plan import PruningPlan
from .scores import EXPERT_SCORES, best_by_score, expert_groups, expert_scores, ranked

MAX_SUBSETS = 200_000
MAX_ROUTINGS = 5e9  # subsets times tokens: about ten minutes a layer on two cores
SEARCH_METHODS = ("enumerate", "greedy", *EXPERT_SCORES, "random", "progressive")

Found = tuple[list[int], float, float | None]  # kept experts, their loss, and the runner-up's where all subsets were tried


def all_subsets(layer: LayerTrace, r: int) -> list[tuple[int, ...]]:
    """Every subset of r experts, equally many from each of the router's groups. Raises ValueError where r is out of range, or
    the subsets are too many to enumerate on this many tokens."""
    layer.check_size(r)
    groups = expert_groups(layer)
    count = math.comb(len(groups[0]), r // len(groups)) ** len(groups)
    if count > MAX_SUBSETS or (count * len(layer.order) > MAX_ROUTINGS and not has_choice_table(layer)):
        raise ValueError(
            f"{count:.2g} subsets of {r} out of {layer.n} experts on {len(layer.order)} tokens are too many to enumerate: "
            f"use method='greedy' (up to {MAX_SUBSETS:,} subsets, and {MAX_ROUTINGS:.0e} subsets times tokens, are tried)."
        )
    parts = [itertools.combinations(group, r // len(groups)) for group in groups]
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*parts)]


def subset_losses(layer: LayerTrace, r: int) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every subset of r experts and its reconstruction loss (Eq. 3), float64 [subsets]. Raises ValueError as `all_subsets`."""
    subsets = all_subsets(layer, r)
    return subsets, losses_from_choices(layer, subsets) if has_choice_table(layer) else losses_of(layer, subsets)


def best_subset(layer: LayerTrace, r: int) -> Found:
    """The subset of r experts with the smallest loss, that loss, and the runner-up's (the same loss if there is none)."""
    subsets, losses = subset_losses(layer, r)
    first = [subsets[i] for i in ranked(losses)[:2].tolist()]
    found = [reconstruction_loss(layer, subset) for subset in first]  # as for every other method
    return list(first[0]), found[0], max(found)


def search_layer(layer: LayerTrace, r: int, method: str, generator: torch.Generator | None = None) -> Found:
    """The r experts to keep in one layer. Raises ValueError for r out of range and an unknown method."""
    check_method(method)
    layer.check_size(r)
    if method in ("enumerate", "progressive"):  # which differ in the hidden states that were traced
        return best_subset(layer, r)
    if method == "greedy":
        kept = remove_greedily(layer, r)
    elif method in EXPERT_SCORES:
        kept = best_by_score(layer, r, expert_scores(layer, method))
    else:
        generator = generator or torch.Generator().manual_seed(0)
        kept = best_by_score(layer, r, torch.rand(layer.n, generator=generator))
    return sorted(kept), reconstruction_loss(layer, kept), None


def check_method(method: str) -> None:
    if method not in SEARCH_METHODS:
        raise ValueError(f"Unknown method {method!r}: choose from {', '.join(SEARCH_METHODS)}.")


def search_experts(
    trace: Trace,
    r: int,
    *,
    method: str = "enumerate",
    loss: str = "eq3",
    model=None,
    tokens: Tensor | None = None,
    seed: int = 0,
) -> PruningPlan:
    """Choose r experts to keep in every layer.

    method: "enumerate" (Eq. 3, exact, layer by layer), "greedy" (removal one by one, then swaps: for more experts than
    can be enumerated), "progressive" (Table 6: each layer is searched on the outputs of the already pruned layers; needs
    `model` and the `tokens` of the trace), a score of `expert_scores`, "random" (drawn from `seed`).
    loss: "eq3", the paper's ||change||^2 summed over tokens; "residual", which divides it by ||h + z||^2 of the residual
    stream behind the layer; "output", by ||z||^2 of the layer's output. Scores take the same norms.
    Raises ValueError for r out of range, an unknown method or loss, or a model that is not the trace's.
    """
    check_method(method)
    check_loss(loss)
    for layer in trace.layers:
        layer.check_size(r)
    if method == "progressive":
        return _progressive_plan(trace, r, loss, model, tokens)
    generator = torch.Generator().manual_seed(seed)
    layers = tqdm(trace.layers, desc=method, unit="layer", leave=False)
    found = [search_layer(weighed(layer, loss), r, method, generator) for layer in layers]
    return make_plan(method, loss, r, found, trace.model, trace.tokens)


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
