"""Finding the MoE layers of a transformers model, through the experts interface rather than by model name."""

import hashlib
import math
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

BLOCK = 2048  # rows of one expert's product on a CPU
ACTIVATED = 256  # rows activated at a time, while they are in a core's cache


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


class Scratch:
    """Memory that results are written into again and again. A CPU maps megabytes afresh for every large result, and
    those page faults cost a trace up to a tenth of its time."""

    def __init__(self):
        self.held: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self.held.values())

    def empty(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """A tensor of dtype and device of `like`, whose values nobody has set; valid until `name` is asked for again."""
        size, held = math.prod(shape), self.held.get(name)
        if held is None or held.numel() < size or (held.dtype, held.device) != (like.dtype, like.device):
            held = self.held[name] = like.new_empty(size)
        return held[:size].view(shape)


def pair_outputs(
    experts: nn.Module, hidden_states: torch.Tensor, token: torch.Tensor, expert: torch.Tensor, scratch: Scratch | None = None
) -> torch.Tensor:
    """The outputs [pairs, d] at weight one of (token, expert) pairs, both int64 [pairs], of hidden_states [tokens, d].

    Only these pairs are computed. On a GPU each is a token of its own in a grouped product; on a CPU one product per
    expert reads its weights in place. With `scratch` the result lies in it, and nothing can be differentiated.
    """
    if hidden_states.device.type != "cpu":
        ones = hidden_states.new_ones(len(token), 1)
        return run_experts(experts, hidden_states[token], expert[:, None], ones)
    shape = (len(token), hidden_states.shape[1])
    outputs = scratch.empty("outputs", hidden_states, *shape) if scratch else hidden_states.new_empty(shape)
    counts = torch.bincount(expert, minlength=experts.num_experts).tolist()
    for number, pairs in enumerate(expert.argsort().split(counts)):
        for rows in pairs.split(BLOCK) if len(pairs) else ():
            outputs[rows] = _one_expert(experts, number, hidden_states[token[rows]], scratch)
    return outputs


def _one_expert(experts: nn.Module, number: int, x: torch.Tensor, scratch: Scratch | None) -> torch.Tensor:
    """[rows, d] -> [rows, d], by the attributes with which every family describes its experts to the interface."""

    def weight(name: str) -> torch.Tensor:
        stored = getattr(experts, name)[number]
        return stored if experts.is_transposed else stored.T

    def linear(name: str, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if experts.has_bias:
            return torch.addmm(getattr(experts, f"{name}_bias")[number], x, weight(name), out=out)
        return torch.mm(x, weight(name), out=out)

    up, activate = ("gate_up_proj", experts._apply_gate) if experts.has_gate else ("up_proj", experts.act_fn)
    if scratch is None:
        return linear("down_proj", activate(linear(up, x)))
    inner = weight("down_proj").shape[0]
    hidden = linear(up, x, scratch.empty("hidden", x, len(x), weight(up).shape[1]))
    for rows in hidden.split(ACTIVATED):
        rows[:, :inner] = activate(rows)
    return linear("down_proj", hidden[:, :inner])


@contextmanager
def experts_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """The model running under another registered experts implementation, and the former one afterwards."""
    former = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(former)
