"""What a pruning plan costs on a trace, beside the best one."""

import math

from ..tracing.losses import reconstruction_loss, weighed
from ..tracing.trace import LayerTrace, Trace
from .plan import PruningPlan
from .scores import ranked
from .search import affordable, search_layer, subset_losses


def price(trace: Trace, plan: PruningPlan, *, loss: str = "residual") -> list[dict]:
    """Each layer's loss under a plan, whoever made it, beside the optimum's; then a row for all layers.

    A row holds

        "layer": its name, or "all"
        "loss": the plan's loss, by `loss` as for `search_experts`
        "optimum": the smallest loss of all subsets, or what greedy search finds where they are too many
        "method": how the optimum was found, "enumerate" or "greedy"
        "rank", "of": the plan's place among all subsets, from 1 on, by `ranked`, and their number; None for greedy
        "ratio": loss / optimum
        "gain": (loss^2 - optimum^2) / the plan's squared loss in all layers; below 0 where greedy found a worse subset

    Squares add up over layers: loss and optimum of the last row are roots of sums of squares, and its gain is the sum of gains.
    Raises ValueError for a plan of another model, subsets outside the trace, and an unknown loss.
    """
    plan.check(trace.model, [(layer.n, layer.k, layer.router) for layer in trace.layers])
    rows = [_priced(weighed(layer, loss), layer.check(kept)) for layer, kept in zip(trace.layers, plan.kept, strict=True)]
    total = {name: math.hypot(*(row[name] for row in rows)) for name in ("loss", "optimum")}
    methods = "greedy" if any(row["rank"] is None for row in rows) else "enumerate"
    rows.append({"layer": "all", **total, "method": methods, "rank": None, "of": None})
    for row in rows:
        row["ratio"] = row["loss"] / row["optimum"] if row["optimum"] else math.inf if row["loss"] else 1.0
        row["gain"] = (row["loss"] ** 2 - row["optimum"] ** 2) / total["loss"] ** 2 if total["loss"] else 0.0
    return rows


def _priced(layer: LayerTrace, kept: list[int]) -> dict:
    """A row of `price` without ratio and gain."""
    row = {"layer": layer.name, "loss": reconstruction_loss(layer, kept)}
    if not affordable(layer, len(kept)):
        return row | {"optimum": search_layer(layer, len(kept), "greedy")[1], "method": "greedy", "rank": None, "of": None}
    subsets, losses = subset_losses(layer, len(kept))
    order = ranked(losses).tolist()
    place = order.index(subsets.index(tuple(kept)))
    best = reconstruction_loss(layer, subsets[order[0]])
    return row | {"optimum": best, "method": "enumerate", "rank": place + 1, "of": len(subsets)}
