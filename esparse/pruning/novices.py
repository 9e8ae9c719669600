"""Constants in place of removed experts: what a pruned model would gain from them, and folding them into biases.

MoNE (arXiv 2507.00390) keeps the router of the full model, and a removed expert returns its mean output, a vector, for every
token. A pruned model can hold one constant per layer where its experts have biases: the mean change of the layer's output.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from ..moe.experts import pair_outputs, weighted_sum
from ..moe.layers import MoELayer, moe_layers, replaced_experts
from ..moe.masking import masked_layer
from ..moe.running import check_held, check_tokens, evaluating, input_device, uncompiled
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


@torch.no_grad()
def mean_changes(model, plan: PruningPlan, tokens: Tensor, batch_size: int = 8) -> list[Tensor]:
    """What a plan takes from the sum of the experts' outputs in every MoE layer, on the full model's hidden states, as a mean
    over the tokens [sequences, length]: float64 [d]. Raises ValueError for a plan made with another model."""
    check_tokens(model, tokens)
    planned = planned_layers(model, plan)
    with ExitStack() as stack, evaluating(model), uncompiled():
        sums = [stack.enter_context(_recorded_changes(layer, kept)) for layer, kept in planned]
        for batch in tokens.split(batch_size):
            model.base_model(batch.to(input_device(model)), use_cache=False)
    return [sum(found) / tokens.numel() for found in sums]


@contextmanager
def _recorded_changes(layer: MoELayer, kept: Sequence[int]) -> Iterator[list[Tensor]]:
    """A list that gets, for each forward pass of the layer's block, the change summed over its tokens: float64 [d]."""
    sums, outputs = [], []

    def run_masked(block, args, kwargs, _output):
        if len(outputs) == 1:  # else this is the masked run itself
            with masked_layer(layer, kept):
                block(*args, **kwargs)
            full, pruned = (output.double().flatten(0, -2).sum(0) for output in outputs)
            sums.append(full - pruned)
            outputs.clear()

    recording = layer.experts.register_forward_hook(lambda _experts, _args, output: outputs.append(output))
    with recording, layer.block.register_forward_hook(run_masked, with_kwargs=True):
        yield sums


@torch.no_grad()
def fold_changes(model, changes: Sequence[Tensor]) -> None:
    """Add the constants [d] of `mean_changes` to a pruned model's outputs, in place, through its experts' biases.

    Raises ValueError, before anything changes, where experts have no bias after the last map, or where a token's routing
    weights have no fixed sum, and for other numbers of layers; also for offloaded experts.
    """
    layers = moe_layers(model)
    if len(changes) != len(layers):
        raise ValueError(f"Give a constant for each of the {len(layers)} MoE layers, as mean_changes does, got {len(changes)}.")
    for layer in layers:
        if not (layer.experts.has_bias and layer.router.normalises) or layer.router.shared or layer.router.expert_scale:
            raise ValueError(f"{layer.name}: its experts have no biases, or weights of no fixed sum, so it holds no constant.")
    check_held((layer.experts for layer in layers), "load the pruned model without offloading")
    for layer, change in zip(layers, changes, strict=True):
        bias = layer.experts.down_proj_bias
        bias.add_((change / layer.router.scale).to(bias))
