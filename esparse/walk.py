"""Walking a decoder layer by layer, with the hidden states of a calibration set: the only thing that is kept between."""

import math
import os
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from .experts import Scratch
from .models import MoELayer, decoder_layers, evaluating, find_moe, input_device, silenced, uncompiled
from .pruning import masked_layer
from .traces import LayerTrace, Recorder, check_gram, recording

BATCH = 8  # sequences a forward pass


class Passing(nn.Module):
    """Stands where a decoder layer is not wanted: hands on the hidden states, and shows the layer's attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule: its weights are nobody's

    def __getattr__(self, name: str):
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *_arguments, **_named) -> torch.Tensor:
        return hidden_states


@contextmanager
def only(model: nn.Module, number: int) -> Iterator[nn.Module]:
    """The model in evaluation mode with one decoder layer, which is yielded; the others are passed over."""
    layers = decoder_layers(model)
    everyone = list(layers)
    try:
        for other, layer in enumerate(everyone):
            if other != number and not isinstance(layer, Passing):
                layers[other] = Passing(layer)
        with evaluating(model), uncompiled():
            yield everyone[number]
    finally:
        for other, layer in enumerate(everyone):
            layers[other] = layer


class _Left(Exception):
    """The hidden states are out of the layer: the rest of the forward pass is not needed."""


def through(model: nn.Module, layer: nn.Module, batch: torch.Tensor, hidden_states: torch.Tensor | None) -> torch.Tensor:
    """What a decoder layer gives out, [sequences, length, d], for token ids [sequences, length].

    hidden_states: what enters it (the model's own embeddings, if None). The model itself prepares masks, positions and
    whatever else its layers are called with. Raises ValueError for layers that hand on more than hidden states.
    """

    def enter(_module, args, named):
        if hidden_states is None:
            return None
        return ((hidden_states, *args[1:]), named) if args else (args, {**named, "hidden_states": hidden_states})

    def leave(_module, _args, output):
        raise _Left(output)

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(leave).remove)
        try:
            model.base_model(batch, use_cache=False)
        except _Left as left:
            return _alone(layer, left.args[0])
    raise ValueError(f"{type(model).__name__} does not run its decoder layers one after the other.")


def _alone(layer: nn.Module, output) -> torch.Tensor:
    if isinstance(output, tuple) and any(torch.is_tensor(more) for more in output[1:]):
        raise ValueError(f"{type(layer).__name__} hands on more than hidden states, which a walk by layers cannot carry.")
    return output[0] if isinstance(output, tuple) else output


class FileStream(MutableSequence):
    """Hidden states of all batches in one file, made when the first are known; only what is asked for is read."""

    def __init__(self, path: Path, sizes: Sequence[int], shape: Sequence[int] | None = None, dtype: torch.dtype | None = None):
        """sizes: sequences of each batch; shape [sequences, ...] and dtype: of a file that is there."""
        self.path, self.starts = path, [sum(sizes[:b]) for b in range(len(sizes) + 1)]
        self.states = None if shape is None else torch.from_file(str(path), True, math.prod(shape), dtype=dtype).view(*shape)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, batch: int) -> torch.Tensor:
        return self.states[self.starts[batch] : self.starts[batch + 1]].clone()

    def __setitem__(self, batch: int, value: torch.Tensor) -> None:
        if self.states is None:
            shape = (self.starts[-1], *value.shape[1:])
            with self.path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, math.prod(shape) * value.element_size())  # a full disk shows here
            self.states = torch.from_file(str(self.path), True, math.prod(shape), dtype=value.dtype).view(*shape)
        self.states[self.starts[batch] : self.starts[batch + 1]] = value.cpu()

    def insert(self, index, value):
        raise TypeError("a stream has as many batches as it was made for")

    __delitem__ = insert

    def about(self) -> dict:
        """What opening it again needs, once everything written is on the disk."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return {"shape": list(self.states.shape), "dtype": str(self.states.dtype).removeprefix("torch.")}


class Walk:
    """One or two streams of hidden states on their way through a decoder: the original model's, and, where the search is
    progressive, that of the layers as pruned so far."""

    def __init__(
        self,
        model: nn.Module,
        tokens: torch.Tensor,
        *,
        progressive: bool = False,
        batch_size: int = BATCH,
        chunk_tokens: int | None = None,
        stream: Callable[[str, int], MutableSequence] | None = None,
    ):
        """stream: makes what holds the hidden states after a layer, from "original" or "pruned" and the layer's number."""
        self.model, self.batches, self.chunk = model, tokens.split(batch_size), chunk_tokens
        self.progressive, self.scratch = progressive, Scratch()
        self.stream = stream or (lambda name, number: [None] * len(self.batches))
        self.original: MutableSequence | None = None  # before the first layer: the embeddings
        self.pruned: MutableSequence | None = None

    def trace_layer(self, number: int, keep: int | None) -> LayerTrace | None:
        """Take the original stream past a decoder layer; the trace of its MoE layer, if it has one.

        In a progressive walk the trace is that of the pruned stream, which stays before the layer until `follow`.
        """
        with only(self.model, number) as decoder:
            layer = find_moe(decoder)
            after = self.stream("original", number)
            if layer is not None:
                check_gram([layer], sum(batch.numel() for batch in self.batches), keep, input_device(self.model))
            recorder = layer and Recorder(layer, keep, self.chunk, self.scratch)
            for b, batch in enumerate(self.batches):
                after[b] = self._one_batch(decoder, layer, recorder, b, batch.to(input_device(self.model)))
            if layer is None and self.progressive:
                self._advance_pruned(decoder, number)
        self.original = after
        return recorder and recorder.finish()

    def _one_batch(self, decoder, layer: MoELayer | None, recorder: Recorder | None, b: int, batch: torch.Tensor):
        states = at(self.original, b, batch)
        if layer is None:
            return through(self.model, decoder, batch, states)
        if not self.progressive:
            with recording([recorder]):
                return through(self.model, decoder, batch, states)
        entering = at(self.pruned, b, batch)
        with outputs(layer) as target:
            after = through(self.model, decoder, batch, states)
        if (
            layer.linear and layer.shared and not layer.router.shared
        ):  # what shared experts add on the pruned stream, nobody else must make up for
            with outputs(layer) as rest, silenced(layer):
                through(self.model, decoder, batch, entering)
            target[0] = target[0] - rest[0]
        recorder.target = iter(target)
        with recording([recorder]):
            through(self.model, decoder, batch, entering)
        return after

    def follow(self, number: int, kept: Sequence[int]) -> None:
        """Take the pruned stream past the same layer, with these experts alone."""
        with only(self.model, number) as decoder, masked_layer(find_moe(decoder), kept):
            self._advance_pruned(decoder, number)

    def _advance_pruned(self, decoder: nn.Module, number: int) -> None:
        after = self.stream("pruned", number)
        for b, batch in enumerate(self.batches):
            batch = batch.to(input_device(self.model))
            after[b] = through(self.model, decoder, batch, at(self.pruned, b, batch))
        self.pruned = after


def at(stream: MutableSequence | None, number: int, like: torch.Tensor) -> torch.Tensor | None:
    return None if stream is None else stream[number].to(like.device)


@contextmanager
def outputs(layer: MoELayer) -> Iterator[list[torch.Tensor]]:
    """A list that collects what the layer's block (or its experts, see `MoELayer.linear`) gives out, [tokens, d] a call."""
    collected: list[torch.Tensor] = []
    source = layer.block if layer.linear else layer.experts
    hook = source.register_forward_hook(lambda module, inputs, out: collected.append(_first(out).flatten(0, -2)))
    try:
        yield collected
    finally:
        hook.remove()


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
