"""Finding the MoE layers of a transformers model, through the experts interface rather than by model name."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from .files import digest
from .routers import Router, device_of, held, identify, table

COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def count_names(holder: object, n: int | None = None) -> list[str]:
    """Under which names a config or a module counts its experts (n of them, if given): those of its class first."""
    names = sorted(COUNT_NAMES, key=partial(is_known, holder), reverse=True)
    counts = {name: getattr(holder, name, None) for name in names}
    return [name for name, count in counts.items() if isinstance(count, int) and n in (None, count)]


def is_known(holder: object, name: str) -> bool:
    """Whether a config's class has an entry of that name: it may hold others, of which the model knows nothing."""
    mapped = getattr(holder, "attribute_map", {})
    return hasattr(type(holder), name) or name in (*mapped, *mapped.values())


@dataclass
class MoELayer:
    """One MoE layer in place: its block, its gate and its experts module."""

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
        """What the router does. Raises ValueError where it is of no known kind."""
        return self._identified[0]

    @property
    def k(self) -> int:
        """The experts a token is routed to."""
        return self._identified[1]

    @cached_property
    def _leaving(self) -> tuple[bool, torch.Tensor | None]:
        return _after(self)

    @property
    def linear(self) -> bool:
        """Whether the experts' sum reaches the block's output by a linear map. Where a norm follows it, or a decoder
        layer holds its experts itself, the sum is what losses compare, not the block's output."""
        return self._leaving[0]

    @property
    def after(self) -> torch.Tensor | None:
        """That map: a factor [], a matrix [inner, d], or nothing (None)."""
        return self._leaving[1]

    @property
    def shared(self) -> bool:
        """Whether the block adds something that does not come from its experts."""
        own = {id(p) for module in (self.gate, self.experts) for p in module.parameters()}
        return any(id(p) not in own for p in self.block.parameters())


def _is_experts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("num_experts", "has_gate", "is_transposed", "down_proj"))


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in order: every module behind the experts interface that has a gate beside it.

    Raises ValueError for a model without any.
    """
    layers = list(moe_blocks(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layers behind transformers' experts interface: "
            "load a Mixture-of-Experts model, such as Mixtral, Qwen3-MoE or OLMoE."
        )
    return layers


def moe_blocks(module: nn.Module) -> Iterator[MoELayer]:
    """Every MoE layer within a module, in order; none for a dense one."""
    for name, block in module.named_modules():
        experts = getattr(block, "experts", None)
        gates = [gate for gate in (getattr(block, "gate", None), getattr(block, "router", None)) if isinstance(gate, nn.Module)]
        if isinstance(experts, nn.Module) and _is_experts(experts) and gates:
            yield MoELayer(name, block, gates[0], experts)


def find_moe(decoder: nn.Module) -> MoELayer | None:
    """The MoE layer of one decoder layer, or None where it is dense."""
    return next(moe_blocks(decoder), None)


@torch.no_grad()
def _after(layer: MoELayer) -> tuple[bool, torch.Tensor | None]:
    """Whether a block's output is linear in its experts' sum, and the map, found by handing it sums of our own."""
    width = layer.experts.down_proj.shape[2 if layer.experts.is_transposed else 1]
    like = next(p for p in layer.gate.parameters() if p.ndim == 2)
    like = like.new_empty(like.shape, device=device_of(layer.gate, like))
    given = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).to(like.device, layer.experts.down_proj.dtype)
    close = lambda one, other: torch.allclose(one, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())  # noqa: E731
    try:
        rest = block_output(layer, torch.zeros_like(given), like)
        mixed = block_output(layer, given, like) - rest
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False, None  # it takes more than hidden states: a decoder layer
    if mixed.shape == given.shape:
        factor = (mixed / given).median()
        if close(mixed, factor * given):
            return True, None if abs(factor - 1) < 1e-2 else factor
    matrix = block_output(layer, torch.eye(width).to(given), like) - rest[:1]
    return (True, matrix) if close(mixed, given @ matrix) else (False, None)


def block_output(layer: MoELayer, sums: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The block's output [rows, d] were its experts to sum up to `sums` [rows, inner], on inputs of zero."""
    ids = {"input_ids": torch.zeros(1, len(sums), dtype=torch.long, device=like.device)} if table(layer.gate) else {}
    with silenced(layer, sums), evaluating(layer.block):
        output = layer.block(like.new_zeros(1, len(sums), like.shape[1]).to(sums.dtype), **ids)
    return (output[0] if isinstance(output, tuple) else output).reshape(len(sums), -1)


@contextmanager
def silenced(layer: MoELayer, sums: torch.Tensor | None = None) -> Iterator[None]:
    """The layer with experts that do not run, and give `sums` [tokens, inner] (zeros, if None)."""
    experts = layer.experts
    former = experts.__dict__.get("forward")
    experts.forward = lambda hidden_states, *_: torch.zeros_like(hidden_states) if sums is None else sums
    try:
        yield
    finally:
        if former is None:
            del experts.forward
        else:
            experts.forward = former


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, which take hidden states [batch, length, d] and return them."""
    return (model.base_model if hasattr(model.base_model, "layers") else model.get_decoder()).layers


def free_memory(device: torch.device | None = None) -> float:
    """Bytes that are free: on a GPU, on all GPUs (None, where there are any), else in the machine."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        devices = range(torch.cuda.device_count()) if device is None else (device,)
        cached = lambda one: torch.cuda.memory_reserved(one) - torch.cuda.memory_allocated(one)  # noqa: E731
        return sum(torch.cuda.mem_get_info(one)[0] + cached(one) for one in devices)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:  # no Linux: nothing to tell by
        return float("inf")
    return int(lines["MemAvailable"].split()[0]) * 1024


def fingerprint(model: nn.Module) -> str:
    """A short name for the model's routers as they are stored, whatever dtype they were loaded in (see `remember_stored`).

    Traces and plans carry it, so that none is used with another model by mistake.
    """
    return digest([gate_digest(layer) for layer in moe_layers(model)])


def gate_digest(layer: MoELayer) -> str:
    """The same for one layer's gate."""
    now = _digest(layer, [held(module, name) for module, name in _gate_tensors(layer).values()])
    loaded, stored = getattr(layer.gate, "esparse_stored", (None, None))
    return stored if now == loaded else now


def remember_stored(model: nn.Module, layers: Iterable[MoELayer], read: Callable[[str], torch.Tensor]) -> None:
    """Let these layers' gates know the name that they have as stored, until their values change: loading may have rounded them.

    read: the stored tensor of a parameter, by its name in the model.
    """
    places = {module: name for name, module in model.named_modules()}
    for layer in layers:
        here = _gate_tensors(layer)
        now = _digest(layer, [held(module, name) for module, name in here.values()])
        stored = _digest(layer, [read(f"{places[layer.gate]}.{name}") for name in here])
        layer.gate.esparse_stored = (now, stored)


def _gate_tensors(layer: MoELayer) -> dict[str, tuple[nn.Module, str]]:
    """The modules and names of a gate's parameters, by their names within the gate."""
    found = {}
    for place, module in layer.gate.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            found[f"{place}.{name}".removeprefix(".")] = (module, name)
    return found


def _digest(layer: MoELayer, tensors: Sequence[torch.Tensor]) -> str:
    state = hashlib.sha256(f"{layer.n}/{layer.k}".encode())
    for tensor in tensors:
        state.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
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


@contextmanager
def router_logits_off(model: nn.Module) -> Iterator[None]:
    """The model without `output_router_logits`, which its config has back afterwards.

    Where it is on, transformers computes a balance loss on every forward pass, and `generate` fails in it for a padded batch:
    the mask also covers the tokens of the cache, the router logits do not.
    """
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    former = [config for config in configs if getattr(config, "output_router_logits", False)]
    for config in former:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in former:
            config.output_router_logits = True


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """On leaving, every module of these is again in the mode, training or evaluation, that it was in."""
    former = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in former:
            module.training = mode


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """These in evaluation mode, without dropout or a router's jitter, and afterwards as they were."""
    with modes_kept(*models):
        for module in (module for model in models for module in model.modules()):
            module.training = False
        yield


def uncompiled():
    """A context in which torch.compile's code gives way to the modules', since it does not hear hooks that came later."""
    return torch.compiler.set_stance("force_eager")


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: its embeddings may be offloaded."""
    embeddings = model.get_input_embeddings()
    return device_of(embeddings, embeddings.weight)


def check_held(modules: Iterable[nn.Module], advice: str) -> None:
    """ValueError, with advice, where accelerate has left weights of these modules on disk or on another device."""
    if any(p.is_meta for module in modules for p in module.parameters()):
        raise ValueError(f"Weights of this model are offloaded, so that they cannot be changed in place: {advice}.")


@contextmanager
def experts_implementation(layers: Sequence[MoELayer], name: str) -> Iterator[None]:
    """The layers' model running under another registered experts implementation, and the former one afterwards."""
    configs = {id(layer.experts.config): layer.experts.config for layer in layers}.values()
    former = [config._experts_implementation for config in configs]
    try:
        for config in configs:
            config._experts_implementation = name
        yield
    finally:
        for config, before in zip(configs, former, strict=True):
            config._experts_implementation = before
