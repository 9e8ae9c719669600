"""Constants in place of removed experts (MoNE, arXiv 2507.00390): what a pruned model would gain from them.

The router stays that of the full model. A removed expert returns its mean output, a vector, for every token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..moe.experts import pair_outputs, weighted_sum
from ..moe.layers import moe_layers, replaced_experts
from ..moe.running import check_tokens, evaluating, input_device, uncompiled
from .mask import planned_layers
from .plan import PruningPlan


@torch.no_grad()
def mean_outputs(model, tokens: Tensor, batch_size: int = 8) -> list[Tensor]:
    """Each expert's mean output over the tokens [sequences, length] routed to it, without routing weights: float64 [n, d] for
    every MoE layer; 0 for an expert without tokens."""
    check_tokens(model, tokens)
    layers = moe_layers(model)
    totals: list[dict[str, Tensor]] = [{} for _ in layers]
    with evaluating(model), uncompiled(), replaced_experts(layers, [partial(_add_outputs, total) for total in totals]):
        for batch in tokens.split(batch_size):
            model.base_model(batch.to(input_device(model)), use_cache=False)
    return [total["outputs"] / total["counts"].clamp(min=1)[:, None] for total in totals]


def _add_outputs(total: dict[str, Tensor], experts, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Runs the experts, and adds to the sums of their outputs [n, d] and to the numbers of their tokens [n]."""
    n, outputs = experts.num_experts, pair_outputs(experts, hidden_states, index)  # [tokens, k, d]
    if not total:
        total |= {"outputs": outputs.new_zeros(n, outputs.shape[2], dtype=torch.float64)}
        total |= {"counts": torch.zeros(n, dtype=torch.long, device=index.device)}
    routed = weights.flatten() != 0  # for no expert, a gate returns some expert with weight 0
    total["outputs"].index_add_(0, index.flatten()[routed], outputs.flatten(0, 1)[routed].double())
    total["counts"] += torch.bincount(index.flatten()[routed], minlength=n)
    ranks = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return weighted_sum(outputs, index, weights, ranks, "eager" if index.device.type == "cpu" else "grouped_mm")


@contextmanager
def novices(model, plan: PruningPlan, constants: Sequence[Tensor]) -> Iterator[None]:
    """Runs the model with its own routing and constants [n, d] a layer, as from `mean_outputs`, in place of the experts that
    a plan removes. Raises ValueError for a plan made with another model, and constants of other numbers."""
    planned = planned_layers(model, plan)
    if [len(constant) for constant in constants] != [layer.n for layer, _ in planned]:
        raise ValueError("Give a constant for each expert of each MoE layer of the full model, as mean_outputs does.")
    functions = []
    for (layer, kept), constant in zip(planned, constants, strict=True):
        kept = torch.tensor(kept, device=constant.device)
        removed = torch.ones(layer.n, dtype=torch.bool, device=constant.device).index_fill(0, kept, False)
        functions.append(partial(_with_constants, removed, constant))
    with uncompiled(), replaced_experts([layer for layer, _ in planned], functions):
        yield


def _with_constants(
    removed: Tensor, constant: Tensor, experts, hidden_states: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """[tokens, d] -> [tokens, d]: the kept experts' outputs and the removed ones' constants, by routing weight."""
    replaced = removed[index]  # [tokens, k]
    outputs = pair_outputs(experts, hidden_states, index.masked_fill(replaced, experts.num_experts))
    wide = torch.promote_types(outputs.dtype, torch.float32)
    outputs = torch.where(replaced[:, :, None], constant[index].to(wide), outputs.to(wide))
    return (weights[:, :, None].to(wide) * outputs).sum(1).to(hidden_states.dtype)
