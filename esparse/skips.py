"""Dynamic expert skipping (Section 3.3, A.2) as an experts implementation that leaves dropped pairs uncomputed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts import pair_outputs, ready
from .models import MoELayer, check_tokens, evaluating, input_device, moe_layers, uncompiled
from .routers import skip_pairs, unpack
from .traces import check_beta

IMPLEMENTATION = "esparse_skipping"
ROUNDING = 1e-6  # between two ratios, which two machines may put in another order
ABOVE = 1 + 2**-20  # times the largest ratio is a beta that drops every pair: in float32, too, it is another number


def skipping_forward(
    experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """[tokens, d] -> [tokens, d]: only the kept (token, expert) pairs go through the experts.

    Dropped pairs are in no product. A token's pairs are then added in float32 (float64 for float64 models).
    """
    weights, order = top_k_weights.sort(dim=1, descending=True, stable=True)  # [tokens, k]
    if experts.esparse_beta.device != weights.device:  # the model has moved
        experts.esparse_beta = experts.esparse_beta.to(weights.device)
    keep, weights = skip_pairs(weights, experts.esparse_beta, experts.esparse_renormalise)
    expert = top_k_index.gather(1, order).masked_fill(~keep, experts.num_experts)
    outputs = pair_outputs(experts, hidden_states, expert)  # [tokens, k, d]
    wide = torch.promote_types(outputs.dtype, torch.float32)
    return (outputs.to(wide) * weights[:, :, None]).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, skipping_forward)


def betas_of_shares(ratios: torch.Tensor, shares: Sequence[float]) -> list[float]:
    """Betas that drop shares of the droppable pairs with these ratios, rising, float64 [pairs]: 0.5 gives the median, 1 drops
    all of them.

    Each lies between two ratios that are further apart than rounding, at the place that is aimed at or before it: every
    machine drops the same pairs.
    """
    apart = torch.cat([ratios.new_ones(1), ratios.diff()]) > ROUNDING
    first = torch.arange(len(ratios), device=ratios.device).where(apart, 0).cummax(0).values
    found = []
    for share in shares:
        at = first[min(int(share * len(ratios)), len(ratios) - 1)].item()
        between = (ratios[at - 1] + ratios[at]).item() / 2 if at else 0.0
        found.append(ratios[-1].item() * ABOVE if share == 1 else between)
    return found


def _check_betas(model, betas: Sequence[float]) -> list[MoELayer]:
    layers = moe_layers(model)
    if isinstance(betas, int | float) or len(betas) != len(layers):
        given = "one number" if isinstance(betas, int | float) else f"{len(betas)} betas"
        raise ValueError(f"Skipping takes one beta per MoE layer: the model has {len(layers)}, got {given}.")
    for layer, beta in zip(layers, betas, strict=True):
        check_beta(beta, layer.k)
    return layers


def _held_on(layer: MoELayer) -> torch.device | None:
    """Where a layer's experts lie, but for those left on disk."""
    device = layer.experts.down_proj.device
    return None if device.type == "meta" else device


def enable_skipping(model, betas: Sequence[float]) -> None:
    """Let the model skip experts from now on, until `disable_skipping`.

    betas: one number >= 0 per MoE layer, as from `median_betas`; 0 drops nothing. Works with `generate`, static caches,
    torch.compile, `masked` and pruned models; how the experts run is chosen by device, dtype and number of tokens.
    Raises ValueError for the wrong number of betas, betas that are negative or no numbers, and k = 1.
    """
    for layer, beta in zip(_check_betas(model, betas), betas, strict=True):
        ready(layer.experts)
        # A tensor: torch.compile makes one graph for all betas, and nothing is copied to a GPU step by step.
        layer.experts.esparse_beta = torch.tensor(float(beta), dtype=torch.float64, device=_held_on(layer))
        layer.experts.esparse_renormalise = layer.router.normalises
    if model.config._experts_implementation != IMPLEMENTATION:
        model.esparse_former = model.config._experts_implementation
    model.set_experts_implementation(IMPLEMENTATION)


def disable_skipping(model) -> None:
    """Put back the experts implementation the model had before `enable_skipping`; nothing to do without it."""
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
    """The model with skipping, and as it was before on leaving."""
    former = skipping_betas(model)
    enable_skipping(model, betas)
    try:
        yield
    finally:
        disable_skipping(model)
        if former is not None:
            enable_skipping(model, former)


@contextmanager
def heard(model) -> Iterator[list[list[tuple[torch.Tensor, torch.Tensor]]]]:
    """What every call of every gate gave, one list a layer: routing weights, which fall, and experts, both [tokens, k]."""
    layers = moe_layers(model)
    calls: list[list] = [[] for _ in layers]

    def hear(number: int):
        def hook(_gate, _inputs, output) -> None:
            _, weights, chosen = unpack(output)
            weights, order = weights.sort(dim=1, descending=True, stable=True)
            calls[number].append((weights, chosen.gather(1, order)))

        return hook

    handles = [layer.gate.register_forward_hook(hear(i)) for i, layer in enumerate(layers)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def skipped_shares(model, tokens: torch.Tensor, batch_size: int = 8) -> list[float]:
    """The share of droppable pairs each layer of a skipping model really drops on these tokens [sequences, length].

    Differs from the trace's share, since skipping earlier changes what later layers see.
    Raises ValueError when the model does not skip.
    """
    betas = skipping_betas(model)
    if betas is None:
        raise ValueError("The model does not skip: call enable_skipping first.")
    check_tokens(model, tokens)
    with evaluating(model), uncompiled(), heard(model) as calls:
        for batch in tokens.split(batch_size):
            model.base_model(batch.to(input_device(model)), use_cache=False)
    return [dropped(layer, beta, of) for layer, beta, of in zip(moe_layers(model), betas, calls, strict=True)]


def dropped(layer: MoELayer, beta: float, calls: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The share of droppable pairs that beta drops in `heard` calls of a layer."""
    keep = skip_pairs(torch.cat([weights for weights, _ in calls]), beta, layer.router.normalises)[0]
    return 1 - keep[:, 1:].double().mean().item()
