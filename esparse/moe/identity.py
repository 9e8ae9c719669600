"""Identifies the model of a trace or a plan by a digest of the model's stored routers."""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from ..files import digest
from .layers import MoELayer, moe_layers
from .routers import stored_tensor


def fingerprint(model: nn.Module) -> str:
    """A short digest of the model's stored routers, the same for every dtype they are loaded in (see `remember_stored`).

    Traces and plans carry it, so that none is used with another model by mistake.
    """
    return digest([gate_digest(layer) for layer in moe_layers(model)])


def gate_digest(layer: MoELayer) -> str:
    """The digest of one layer's gate."""
    now = _digest(layer, [stored_tensor(module, name) for module, name in _gate_tensors(layer).values()])
    loaded, stored = getattr(layer.gate, "esparse_stored", (None, None))
    return stored if now == loaded else now


def remember_stored(model: nn.Module, layers: Iterable[MoELayer], read: Callable[[str], torch.Tensor]) -> None:
    """Attach to these layers' gates the digest of their stored tensors, which loading may round; it holds until they change.

    read: returns the stored tensor of a parameter from its name in the model.
    """
    places = {module: name for name, module in model.named_modules()}
    for layer in layers:
        here = _gate_tensors(layer)
        now = _digest(layer, [stored_tensor(module, name) for module, name in here.values()])
        stored = _digest(layer, [read(f"{places[layer.gate]}.{name}") for name in here])
        layer.gate.esparse_stored = (now, stored)


def _gate_tensors(layer: MoELayer) -> dict[str, tuple[nn.Module, str]]:
    """The owning module and the attribute of each parameter of a gate, by the parameter's name within the gate."""
    names = (name for name, _ in layer.gate.named_parameters(remove_duplicate=False))
    split = {name: name.rpartition(".") for name in names}
    return {name: (layer.gate.get_submodule(place), attribute) for name, (place, _, attribute) in split.items()}


def _digest(layer: MoELayer, tensors: Sequence[torch.Tensor]) -> str:
    state = hashlib.sha256(f"{layer.n}/{layer.k}".encode())
    for tensor in tensors:
        state.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def check_fingerprint(model: nn.Module, expected: str, what: str) -> None:
    if fingerprint(model) != expected:
        raise ValueError(f"This {what} was made with another model: trace the model you want to use it with.")
