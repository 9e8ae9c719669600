"""Identifies the model of a trace or a plan by a digest of the model's stored routers."""

import hashlib
from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn

from ..files import digest
from .gates import stored_tensor
from .layers import MoELayer, moe_layers


def fingerprint(model: nn.Module) -> str:
    """A short digest of the model's stored routers, the same for every dtype they are loaded in (see `remember_stored`).

    Traces and plans carry it, so that none is used with another model by mistake.
    """
    return digest([gate_digest(layer) for layer in moe_layers(model)])


def gate_digest(layer: MoELayer) -> str:
    """The digest of one layer's gate."""
    now = _digest(layer, partial(stored_tensor, layer.gate))
    loaded, stored = getattr(layer.gate, "esparse_stored", (None, None))
    return stored if now == loaded else now


def remember_stored(model: nn.Module, layers: Iterable[MoELayer], read: Callable[[str], Tensor]) -> None:
    """Attach to these layers' gates the digest of their stored tensors, which loading may round; it holds until they change.

    read: returns the stored tensor of a parameter from its name in the model.
    """
    places = {module: name for name, module in model.named_modules()}
    for layer in layers:
        now = _digest(layer, partial(stored_tensor, layer.gate))
        stored = _digest(layer, lambda name, place=places[layer.gate]: read(f"{place}.{name}"))
        layer.gate.esparse_stored = (now, stored)


def _digest(layer: MoELayer, read: Callable[[str], Tensor]) -> str:
    """The digest of a gate's parameters, which `read` returns from their names within the gate."""
    state = hashlib.sha256(f"{layer.n}/{layer.k}".encode())
    for name, _ in layer.gate.named_parameters(remove_duplicate=False):
        state.update(read(name).detach().float().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def check_fingerprint(model: nn.Module, expected: str, what: str) -> None:
    if fingerprint(model) != expected:
        raise ValueError(f"This {what} was made with another model: trace the model you want to use it with.")
