"""Dynamic expert skipping (Section 3.3, A.2) as an experts implementation that does not compute dropped pairs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .. import kernels
from ..moe.experts import pair_outputs
from ..moe.gates import unpack
from ..moe.layers import MoELayer, moe_layers
from ..moe.routers import skip_pairs
from ..moe.running import check_tokens, evaluating, input_device, uncompiled
from ..tracing.trace import check_beta

IMPLEMENTATION = "esparse_skipping"


def skipping_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[tokens, d] -> [tokens, d] from the kept (token, expert) pairs alone, added in float32 (float64 for float64 models)."""
    weights, order = top_k_weights.sort(dim=1, descending=True, stable=True)  # [tokens, k]
    if experts.esparse_beta.device != weights.device:  # the model has moved
        experts.esparse_beta = experts.esparse_beta.to(weights.device)
    keep, weights = skip_pairs(weights, experts.esparse_beta, experts.esparse_renormalise)
    expert = top_k_index.gather(1, order).masked_fill(~keep, experts.num_experts)
    outputs = pair_outputs(experts, hidden_states, expert)  # [tokens, k, d]
    wide = torch.promote_types(outputs.dtype, torch.float32)
    return (outputs.to(wide) * weights[:, :, None]).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, skipping_forward)


def enable_skipping(model, betas: Sequence[float]) -> None:
    """Let the model skip experts from now on, until `disable_skipping`.

    betas: one number >= 0 per MoE layer, as from `median_betas`; 0 drops nothing. Works with `generate`, static caches,
    torch.compile, `masked` and pruned models; device, dtype and number of tokens decide how the experts run.
    Raises ValueError for the wrong number of betas, betas that are negative or no numbers, and k = 1.
    """
    layers = moe_layers(model)
    if isinstance(betas, int | float) or len(betas) != len(layers):
        given = "one number" if isinstance(betas, int | float) else f"{len(betas)} betas"
        raise ValueError(f"Skipping takes one beta per MoE layer: the model has {len(layers)}, got {given}.")
    for layer, beta in zip(layers, betas, strict=True):
        check_beta(beta, layer.k)
    for layer, beta in zip(layers, betas, strict=True):
        weight = layer.experts.down_proj
        if weight.is_cuda:
            kernels.works(weight.device, weight.dtype)  # Try the kernel now: compilation and CUDA graphs cannot try it.
        # A tensor: torch.compile makes one graph for all betas, and no decoding step copies it to the GPU.
        device = None if weight.is_meta else weight.device  # offloaded
        layer.experts.esparse_beta = torch.tensor(float(beta), dtype=torch.float64, device=device)
        layer.experts.esparse_renormalise = layer.router.normalises
    if model.config._experts_implementation != IMPLEMENTATION:
        model.esparse_former = model.config._experts_implementation
    model.set_experts_implementation(IMPLEMENTATION)


def disable_skipping(model) -> None:
    """Restore the experts implementation from before `enable_skipping`; without effect on a model that does not skip."""
    if skipping_betas(model) is None:
        return
    model.set_experts_implementation(model.esparse_former)
    del model.esparse_former
    for layer in moe_layers(model):
        del layer.experts.esparse_beta, layer.experts.esparse_renormalise


def skipping_betas(model) -> list[float] | None:
    """The betas the model skips with, or None when it does not skip."""
    if model.config._experts_implementation != IMPLEMENTATION:
        return None
    return [layer.experts.esparse_beta.item() for layer in moe_layers(model)]


@contextmanager
def skipping(model, betas: Sequence[float]) -> Iterator[None]:
    """Lets the model skip inside the context, then restores its former state."""
    former = skipping_betas(model)
    enable_skipping(model, betas)
    try:
        yield
    finally:
        disable_skipping(model)
        if former is not None:
            enable_skipping(model, former)


@contextmanager
def record_routing(model) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """For each layer, a list that collects each call's routing weights, in falling order, and experts, both [tokens, k]."""
    layers = moe_layers(model)
    calls: list[list] = [[] for _ in layers]

    def record(of_layer: list, _gate, _inputs, output) -> None:
        _, weights, chosen = unpack(output)
        weights, order = weights.sort(dim=1, descending=True, stable=True)
        of_layer.append((weights, chosen.gather(1, order)))

    with ExitStack() as stack:
        for layer, of_layer in zip(layers, calls, strict=True):
            stack.enter_context(layer.gate.register_forward_hook(partial(record, of_layer)))
        yield calls


@torch.no_grad()
def skipped_shares(model, tokens: Tensor, batch_size: int = 8) -> list[float]:
    """The share of droppable pairs that each layer of a skipping model drops on these tokens [sequences, length]. It differs
    from the trace's, since skipping changes the hidden states of later layers. ValueError when the model does not skip."""
    betas = skipping_betas(model)
    if betas is None:
        raise ValueError("The model does not skip: call enable_skipping first.")
    check_tokens(model, tokens)
    with evaluating(model), uncompiled(), record_routing(model) as calls:
        for batch in tokens.split(batch_size):
            model.base_model(batch.to(input_device(model)), use_cache=False)
    return [dropped(layer, beta, of) for layer, beta, of in zip(moe_layers(model), betas, calls, strict=True)]


def dropped(layer: MoELayer, beta: float, calls: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The share of droppable pairs that beta drops in `record_routing` calls of a layer."""
    keep = skip_pairs(torch.cat([weights for weights, _ in calls]), beta, layer.router.normalises)[0]
    return 1 - keep[:, 1:].double().mean().item()
