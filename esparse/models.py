"""Finding the MoE layers of a transformers model, through the experts interface rather than by model name."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .routers import SoftmaxRouter, identify

FLOOR = "5.17"
if Version(transformers.__version__) < Version(FLOOR):
    raise ImportError(f"esparse needs transformers {FLOOR} or newer, found {transformers.__version__}: upgrade it alone.")

COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

BLOCK = 768  # rows of a product on a CPU: larger results are mapped afresh each time, which costs a third more


@dataclass
class MoELayer:
    """One MoE layer in place: its block, gate and experts modules, and what its router does."""

    name: str
    block: nn.Module
    gate: nn.Module
    experts: nn.Module
    router: SoftmaxRouter
    n: int  # experts
    k: int  # experts a token is routed to


def _is_experts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("num_experts", "has_gate", "is_transposed", "down_proj"))


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in order: every module behind the experts interface that has a gate beside it.

    Raises ValueError for a model without any, or with a router of an unknown kind.
    """
    layers = []
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        gate = getattr(block, "gate", None) or getattr(block, "router", None)
        if isinstance(experts, nn.Module) and _is_experts(experts) and isinstance(gate, nn.Module):
            hidden_size = experts.down_proj.shape[2 if experts.is_transposed else 1]
            router, k = identify(gate, hidden_size)
            layers.append(MoELayer(name, block, gate, experts, router, experts.num_experts, k))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layers behind transformers' experts interface: "
            "load a Mixture-of-Experts model, such as Mixtral, Qwen3-MoE or OLMoE."
        )
    return layers


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, which take hidden states [batch, length, d] and return them."""
    return model.base_model.layers


def fingerprint(model: nn.Module) -> str:
    """A short name for the model's routers, the same in every dtype that holds the weights exactly.

    Traces and plans carry it, so that none is used with another model by mistake.
    """
    state = hashlib.sha256()
    for layer in moe_layers(model):
        state.update(f"{layer.n}/{layer.k}".encode())
        for parameter in layer.gate.parameters():
            state.update(parameter.detach().float().cpu().numpy().tobytes())
    return state.hexdigest()[:16]


def check_fingerprint(model: nn.Module, expected: str, what: str) -> None:
    if fingerprint(model) != expected:
        raise ValueError(f"This {what} was made with another model: trace the model you want to use it with.")


def check_tokens(model: nn.Module, tokens: torch.Tensor) -> None:
    """ValueError unless `tokens` is a non-empty [sequences, length] integer tensor of ids in the vocabulary."""
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise ValueError(f"tokens must be integer ids of shape [sequences, length], got {list(tokens.shape)} {tokens.dtype}.")
    size, low, high = model.get_input_embeddings().num_embeddings, int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(f"Token id {wrong} is outside the vocabulary of {size}: use the tokenizer that belongs to the model.")


def run_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts as stock transformers runs them, [tokens, d] -> [tokens, d], in any dtype a CPU or GPU computes in."""
    if hidden_states.device.type == "cpu":  # grouped products refuse float64 there
        return type(experts).forward.__wrapped__(experts, hidden_states, top_k_index, top_k_weights)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)


def pair_outputs(experts: nn.Module, hidden_states: torch.Tensor, token: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """The outputs [pairs, d] at weight one of (token, expert) pairs, both int64 [pairs], of hidden_states [tokens, d].

    Only these pairs are computed. On a GPU each is a token of its own in a grouped product; on a CPU one product per
    expert reads its weights in place.
    """
    if hidden_states.device.type != "cpu":
        ones = hidden_states.new_ones(len(token), 1)
        return run_experts(experts, hidden_states[token], expert[:, None], ones)
    outputs = hidden_states.new_empty(len(token), hidden_states.shape[1])
    counts = torch.bincount(expert, minlength=experts.num_experts).tolist()
    for number, pairs in enumerate(expert.argsort().split(counts)):
        for rows in pairs.split(BLOCK) if len(pairs) else ():
            outputs[rows] = _one_expert(experts, number, hidden_states[token[rows]])
    return outputs


def _one_expert(experts: nn.Module, number: int, x: torch.Tensor) -> torch.Tensor:
    """[rows, d] -> [rows, d], by the attributes with which every family describes its experts to the interface."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, name)[number]
        bias = getattr(experts, f"{name}_bias")[number] if experts.has_bias else None
        return nn.functional.linear(x, weight.T if experts.is_transposed else weight, bias)

    if experts.has_gate:
        return linear("down_proj", experts._apply_gate(linear("gate_up_proj", x)))
    return linear("down_proj", experts.act_fn(linear("up_proj", x)))


@contextmanager
def experts_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """The model running under another registered experts implementation, and the former one afterwards."""
    former = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(former)
