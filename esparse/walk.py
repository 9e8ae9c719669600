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


State = torch.Tensor | tuple[torch.Tensor | None, ...]  # hidden states, or they and what else a decoder layer hands on


class Passing(nn.Module):
    """Stands where a decoder layer is not wanted: hands on NaN for hidden states, so that nobody may use them unnoticed,
    with `more` behind them where the layers hand on more, and shows the layer's attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__.update(layer=layer, more=())  # no submodule: its weights are nobody's

    def __getattr__(self, name: str):
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *_arguments, **_named) -> State:
        hidden_states = torch.full_like(hidden_states, float("nan"))
        return (hidden_states, *self.more) if self.more else hidden_states


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


def through(model: nn.Module, layer: nn.Module, batch: torch.Tensor, state: State | None) -> State:
    """What a decoder layer gives out, hidden states [sequences, length, d], for token ids [sequences, length].

    state: what enters it (the model's own embeddings, if None). The model itself prepares masks, positions and whatever else
    its layers are called with. Where layers hand on more than hidden states (ZAYA a state of its routers, GLM-5 the tokens
    that attention looks at), all of it enters and is given out. Raises ValueError for a layer that is called with what
    the model made of the hidden states of earlier layers.
    """
    hidden_states, *more = state if isinstance(state, tuple) else (state,)

    def enter(_module, args, named):
        if hidden_states is None:
            return None
        others = (*args[1:], *(value for name, value in named.items() if name != "hidden_states"))
        if any(torch.is_tensor(value) and value.is_floating_point() and value.isnan().any() for value in others):
            raise ValueError(f"{type(layer).__name__} also takes hidden states of earlier layers, which a walk cannot carry.")
        return ((hidden_states, *args[1:]), named) if args else (args, {**named, "hidden_states": hidden_states})

    def leave(_module, _args, output):
        raise _Left(output)

    for other in decoder_layers(model):
        if isinstance(other, Passing):
            other.__dict__["more"] = more
    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(leave).remove)
        try:
            model.base_model(batch, use_cache=False)
        except _Left as left:
            output = left.args[0]
            return output[0] if isinstance(output, tuple) and len(output) == 1 else output
    raise ValueError(f"{type(model).__name__} does not run its decoder layers one after the other.")


class FileStream(MutableSequence):
    """What a decoder layer gave out for all batches, a file for each tensor, made when the first are known; only what is
    asked for is read."""

    def __init__(self, path: Path, sizes: Sequence[int], about: Sequence[dict | None] | None = None):
        """sizes: sequences of each batch; about: what `about` said, of files that are there."""
        self.path, self.starts = path, [sum(sizes[:b]) for b in range(len(sizes) + 1)]
        self.parts = about and [one and self._map(j, one["shape"], getattr(torch, one["dtype"])) for j, one in enumerate(about)]

    def _file(self, part: int) -> Path:
        return self.path.with_name(f"{self.path.stem}_{part}{self.path.suffix}") if part else self.path

    def _map(self, part: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_file(str(self._file(part)), True, math.prod(shape), dtype=dtype).view(*shape)

    def _made(self, part: int, like: torch.Tensor | None) -> torch.Tensor | None:
        if like is None:
            return None
        shape = (self.starts[-1], *like.shape[1:])
        with self._file(part).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * like.element_size())  # a full disk shows here
        return self._map(part, shape, like.dtype)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, batch: int) -> State:
        rows = slice(self.starts[batch], self.starts[batch + 1])
        found = tuple(None if part is None else part[rows].clone() for part in self.parts)
        return found if len(found) > 1 else found[0]

    def __setitem__(self, batch: int, value: State) -> None:
        values = value if isinstance(value, tuple) else (value,)
        if self.parts is None:
            self.parts = [self._made(j, tensor) for j, tensor in enumerate(values)]
        for part, tensor in zip(self.parts, values, strict=True):
            if part is not None:
                part[self.starts[batch] : self.starts[batch + 1]] = tensor.cpu()

    def insert(self, index, value):
        raise TypeError("a stream has as many batches as it was made for")

    __delitem__ = insert

    @property
    def paths(self) -> list[Path]:
        return [self._file(j) for j, part in enumerate(self.parts) if part is not None]

    def about(self) -> list[dict | None]:
        """What opening it again needs, once everything written is on the disk."""
        for path in self.paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        of = lambda part: {"shape": list(part.shape), "dtype": str(part.dtype).removeprefix("torch.")}  # noqa: E731
        return [None if part is None else of(part) for part in self.parts]


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
        # What shared experts add on the pruned stream, nobody else must make up for, unless their weights change as well.
        if layer.linear and layer.shared and not layer.router.shared:
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


def at(stream: MutableSequence | None, number: int, like: torch.Tensor) -> State | None:
    """What enters a layer with a batch, on the device of `like`; None before the first layer."""
    value = None if stream is None else stream[number]
    if isinstance(value, tuple):
        return tuple(tensor if tensor is None else tensor.to(like.device) for tensor in value)
    return value if value is None else value.to(like.device)


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
