"""Helpers to run a user's model: token checks, devices, and settings that are restored afterwards."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .gates import device_of

_ABSENT = object()


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """ValueError unless `tokens` is a non-empty [sequences, length] integer tensor of ids in the vocabulary."""
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise ValueError(f"tokens must be integer ids of shape [sequences, length], got {list(tokens.shape)} {tokens.dtype}.")
    size, low, high = model.get_input_embeddings().num_embeddings, int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(f"Token id {wrong} is outside the vocabulary of {size}: use the tokenizer that belongs to the model.")


@contextmanager
def temporarily(holders: Iterable, name: str, value) -> Iterator[None]:
    """Gives an attribute of these objects a value; each object's former value, or its absence, returns afterwards."""
    former = [(holder, getattr(holder, name, _ABSENT)) for holder in holders]
    try:
        for holder, _ in former:
            setattr(holder, name, value)
        yield
    finally:
        for holder, before in former:
            if before is _ABSENT:
                delattr(holder, name)
            else:
                setattr(holder, name, before)


def router_logits_off(model: nn.Module):
    """A context with `output_router_logits` off: with it, every forward pass computes a balance loss.

    `generate` fails in that loss for a padded batch, since the mask covers the cached tokens and the router logits do not.
    """
    configs = (model.config, model.config.get_text_config())
    on = [config for config in configs if getattr(config, "output_router_logits", False)]
    return temporarily(on, "output_router_logits", False)


def evaluating(*models: nn.Module):
    """A context of evaluation mode, without dropout or a router's jitter; each module's former mode returns afterwards."""
    return temporarily([module for model in models for module in model.modules()], "training", False)


def uncompiled():
    """A context in which modules run uncompiled: compiled code does not call hooks registered after compilation."""
    return torch.compiler.set_stance("force_eager")


def input_device(model: nn.Module) -> torch.device:
    """The device on which a model takes its token ids; its embeddings may be offloaded."""
    embeddings = model.get_input_embeddings()
    return device_of(embeddings, embeddings.weight)


def check_held(modules: Iterable[nn.Module], advice: str) -> None:
    """ValueError, with advice, where accelerate has offloaded weights of these modules, or where they are quantised."""
    modules = list(modules)
    check_unquantised(modules)
    if any(p.is_meta for module in modules for p in module.parameters()):
        raise ValueError(f"Weights of this model are offloaded, so that they cannot be changed in place: {advice}.")


def check_unquantised(modules: Iterable[nn.Module]) -> None:
    """ValueError where weights of these modules are held in 8 bits or fewer."""
    for p in (p for module in modules for p in module.parameters()):
        if p.dtype.itemsize < 2 or type(p).__module__.startswith("torchao."):  # torchao's tensors name the dtype they stand for
            raise ValueError(
                "Weights of this model are held quantised: load it without quantisation to trace, prune or train it, and "
                "quantise the result."
            )
