"""Finding the MoE layers of a transformers model, through the experts interface rather than by model name."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts import run_experts
from .gates import device_of, identify, table
from .routers import Router
from .running import evaluating, temporarily

LORA = re.compile(r"\.lora_(A|B|embedding_A|magnitude_vector)\b")  # what peft puts into the names of an adapter's tensors
COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def count_names(holder: object, n: int | None = None) -> list[str]:
    """The attributes of a config or module that count its experts (as n, if given); those its class defines come first."""
    names = sorted(COUNT_NAMES, key=partial(is_known, holder), reverse=True)
    counts = {name: getattr(holder, name, None) for name in names}
    return [name for name, count in counts.items() if isinstance(count, int) and n in (None, count)]


def is_known(holder: object, name: str) -> bool:
    """Whether a config's class defines this entry; the model ignores other entries."""
    mapped = getattr(holder, "attribute_map", {})
    return hasattr(type(holder), name) or name in (*mapped, *mapped.values())


@dataclass
class MoELayer:
    """One MoE layer of a model: its block, its gate and its experts module."""

    name: str
    block: nn.Module
    gate: nn.Module
    experts: nn.Module

    @property
    def n(self) -> int:
        """The number of experts."""
        return self.experts.num_experts

    @cached_property
    def _identified(self) -> tuple[Router, int]:
        try:
            with evaluating(self.block, self.gate):
                return identify(self.block, self.gate, self.n)
        except ValueError as error:
            raise ValueError(f"{self.name}: esparse cannot use the router {type(self.gate).__name__}, since {error}.") from None

    @property
    def router(self) -> Router:
        """The arithmetic of the router. Raises ValueError for an unknown kind."""
        return self._identified[0]

    @property
    def k(self) -> int:
        """The number of experts per token."""
        return self._identified[1]

    @cached_property
    def _output(self) -> tuple[bool, Tensor | None]:
        return _find_output_map(self)

    @property
    def output_is_linear(self) -> bool:
        """Whether the block's output is linear in the sum of its experts' outputs. Where it is not (a norm follows, or the
        decoder layer itself holds the experts), losses compare the sums instead of the block's outputs."""
        return self._output[0]

    @property
    def output_map(self) -> Tensor | None:
        """The linear map from that sum to the block's output: a factor [], a matrix [inner, d], or None for the identity."""
        return self._output[1]

    @property
    def shared(self) -> bool:
        """Whether the block has parameters outside its gate and its experts."""
        own = {id(p) for module in (self.gate, self.experts) for p in module.parameters()}
        return any(id(p) not in own for p in self.block.parameters())


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in order: every module with the experts interface and a gate. ValueError if it has none, and
    for an adapter that is not merged."""
    if adapter := next((name for name, _ in model.named_parameters() if LORA.search(name)), None):
        raise ValueError(f"This model holds an adapter ({adapter}): merge it first (merge_and_unload of peft).")
    layers = list(moe_blocks(model))
    if not layers:
        apart = (f"{name}.experts" for name, block in model.named_modules() if hasattr(block, "experts"))
        raise ValueError(_no_layers(type(model).__name__, next(apart, None)))
    return layers


def _no_layers(kind: str, apart: str | None) -> str:
    """Why a model has no MoE layers; apart: the name of its first experts that are not behind the interface."""
    if apart:
        return (
            f"The experts in {apart} are not behind transformers' experts interface: load the model with esparse or "
            "transformers alone, since tools such as llm-compressor take experts apart."
        )
    return (
        f"{kind} has no MoE layers behind transformers' experts interface: load a Mixture-of-Experts model, such as Mixtral, "
        "Qwen3-MoE or OLMoE."
    )


def moe_blocks(module: nn.Module) -> Iterator[MoELayer]:
    """Every MoE layer within a module, in order; none for a dense one."""
    interface = ("num_experts", "has_gate", "is_transposed", "down_proj")
    for name, block in module.named_modules():
        experts = getattr(block, "experts", None)
        gates = [gate for gate in (getattr(block, "gate", None), getattr(block, "router", None)) if isinstance(gate, nn.Module)]
        if isinstance(experts, nn.Module) and all(hasattr(experts, attribute) for attribute in interface) and gates:
            yield MoELayer(name, block, gates[0], experts)


def find_moe(decoder: nn.Module) -> MoELayer | None:
    """The MoE layer of one decoder layer, or None where it is dense."""
    return next(moe_blocks(decoder), None)


@torch.no_grad()
def _find_output_map(layer: MoELayer) -> tuple[bool, Tensor | None]:
    """`output_is_linear` and `output_map`, found from the block's outputs when its experts return random sums."""
    down, weight = layer.experts.down_proj, next(p for p in layer.gate.parameters() if p.ndim == 2)
    given = torch.randn(8, down.shape[2 if layer.experts.is_transposed else 1], generator=torch.Generator().manual_seed(0))
    given = given.to(device_of(layer.gate, weight), down.dtype)
    output = partial(_block_output, layer, weight.shape[1])
    close = lambda one, other: torch.allclose(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())  # noqa: E731
    try:
        rest = output(torch.zeros_like(given))
        mapped = output(given) - rest
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False, None  # the block takes more than hidden states: it is a decoder layer
    if mapped.shape == given.shape:
        factor = (mapped / given).median()
        if close(mapped, factor * given):
            return True, None if abs(factor - 1) < 1e-2 else factor
    matrix = output(torch.eye(given.shape[1]).to(given)) - rest[:1]
    return (True, matrix) if close(mapped, given @ matrix) else (False, None)


def _block_output(layer: MoELayer, d: int, sums: Tensor) -> Tensor:
    """The block's output [rows, d] for zero inputs when its experts return `sums` [rows, inner]."""
    ids = {"input_ids": torch.zeros(1, len(sums), dtype=torch.long, device=sums.device)} if table(layer.gate) else {}
    with experts_returning(layer, sums), evaluating(layer.block):
        return flat_output(layer.block(sums.new_zeros(1, len(sums), d), **ids))


def flat_output(output) -> Tensor:
    """The hidden states [tokens, d] that a block returned, alone or first in a tuple."""
    return (output[0] if isinstance(output, tuple) else output).flatten(0, -2)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, which take hidden states [batch, length, d] and return them."""
    return (model.base_model if hasattr(model.base_model, "layers") else model.get_decoder()).layers


def experts_implementation(layers: Sequence[MoELayer], name: str):
    """A context in which the layers' model runs under another registered experts implementation."""
    return temporarily([layer.experts.config for layer in layers], "_experts_implementation", name)


def _replaced_forward(experts: nn.Module, *arguments) -> Tensor:
    return getattr(experts, "esparse_forward", run_experts)(experts, *arguments)  # other layers run as before


ALL_EXPERTS_FUNCTIONS.register("esparse_replaced", _replaced_forward)


@contextmanager
def replaced_experts(layers: Sequence[MoELayer], functions: Sequence[Callable]) -> Iterator[None]:
    """Calls a function of (experts, hidden_states, top_k_index, top_k_weights) in place of each layer's experts."""
    with ExitStack() as stack, experts_implementation(layers, "esparse_replaced"):
        for layer, function in zip(layers, functions, strict=True):
            stack.enter_context(temporarily([layer.experts], "esparse_forward", function))
        yield


def experts_returning(layer: MoELayer, sums: Tensor | None = None):
    """A context in which the layer's experts are not computed: they return `sums` [tokens, inner] (None: zeros)."""
    return replaced_experts([layer], [lambda _experts, x, *_: torch.zeros_like(x) if sums is None else sums])
