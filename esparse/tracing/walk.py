"""Walking through a decoder layer by layer: only the hidden states of the calibration set are kept between layers."""

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..moe.experts import Scratch
from ..moe.layers import MoELayer, decoder_layers, experts_returning, find_moe, flat_output
from ..moe.masking import masked_layer
from ..moe.running import evaluating, input_device, router_logits_off, uncompiled
from .recorder import Recorder, check_gram, recording, recording_stream
from .trace import LayerTrace

BATCH = 8  # sequences a forward pass
FIRST_LOOK = 8  # sequences after which a walk first asks whether the choice has settled

State = tuple[Tensor | None, ...]  # hidden states, then other outputs of a layer that the next one takes


class Bypass(nn.Module):
    """Replaces a decoder layer that must not run. It has the layer's attributes and returns NaN for the hidden states, so that
    any use of them is noticed, followed by `more`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__.update(layer=layer, more=())  # not registered as a submodule

    def __getattr__(self, name: str):
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *_arguments, **_named):
        hidden_states = torch.full_like(hidden_states, float("nan"))
        return (hidden_states, *self.more) if self.more else hidden_states


@contextmanager
def single_layer(model: nn.Module, number: int | None) -> Iterator[nn.Module | None]:
    """Yields one decoder layer of the model (None: none), in evaluation mode; the model bypasses the other layers meanwhile."""
    layers = decoder_layers(model)
    former = list(layers)
    try:
        for other, layer in enumerate(former):
            if other != number and not isinstance(layer, Bypass):
                layers[other] = Bypass(layer)
        with evaluating(model), uncompiled():
            yield None if number is None else former[number]
    finally:
        for other, layer in enumerate(former):
            layers[other] = layer


def _pass_on(model: nn.Module, more: Sequence[Tensor | None]) -> None:
    """Makes the bypassed layers return these values behind the hidden states."""
    for layer in decoder_layers(model):
        if isinstance(layer, Bypass):
            layer.__dict__["more"] = more


class _StopForward(Exception):
    """Carries the layer's output out of the model's forward pass, which ends there."""


def forward_layer(model: nn.Module, layer: nn.Module, batch: Tensor, state: State) -> State:
    """The output of a decoder layer for token ids [sequences, length].

    state: the layer's input (empty: the model's embeddings). The model itself prepares masks, positions and other arguments.
    Some layers return more than hidden states (ZAYA: a router state; GLM-5: the tokens to attend to), all part of the state.
    Raises ValueError where a layer also takes values that the model computes from earlier layers' hidden states.
    """
    hidden_states, *more = state or (None,)

    def enter(_module, args, named):
        if hidden_states is None:
            return None
        others = (*args[1:], *(value for name, value in named.items() if name != "hidden_states"))
        if any(torch.is_tensor(value) and value.is_floating_point() and value.isnan().any() for value in others):
            raise ValueError(f"{type(layer).__name__} also takes hidden states of earlier layers, which a walk cannot carry.")
        return ((hidden_states, *args[1:]), named) if args else (args, {**named, "hidden_states": hidden_states})

    def leave(_module, _args, output):
        raise _StopForward(output)

    _pass_on(model, more)
    try:
        with layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave):
            model.base_model(batch, use_cache=False)
    except _StopForward as stopped:
        output = stopped.args[0]
        return output if isinstance(output, tuple) else (output,)
    raise ValueError(f"{type(model).__name__} does not run its decoder layers one after the other.")


def forward_head(model: nn.Module, batch: Tensor, state: State) -> Tensor:
    """The logits [sequences, length, vocabulary] for token ids [sequences, length], from the last decoder layer's output."""
    with single_layer(model, None), router_logits_off(model):
        _pass_on(model, state[1:])
        with decoder_layers(model)[-1].register_forward_hook(lambda *_: state if len(state) > 1 else state[0]):
            return model(batch, use_cache=False).logits


@dataclass
class Walk:
    """Carries streams of hidden states of a calibration set through a decoder, one layer at a time.

    split: whether other ranks of torch.distributed have the other sequences. new_stream: makes the container of a layer's
    outputs from the stream's name and the layer's number (None: a list). streams: the next layer's input for each batch, by
    the stream's name; an absent stream starts from the embeddings. "original" is the stream with all experts, whose weights
    may be pruned on the way. "pruned" is the stream with fewer experts, in a progressive search.
    """

    model: nn.Module
    tokens: Tensor
    progressive: bool = False
    batch_size: int = BATCH
    chunk_tokens: int | None = None
    split: bool = False
    new_stream: Callable[[str, int], MutableSequence] | None = None
    streams: dict[str, MutableSequence] = field(default_factory=dict)

    def __post_init__(self):
        self.batches, self.scratch = self.tokens.split(self.batch_size), Scratch()

    def forward(self, decoder: nn.Module, b: int, stream: str = "original") -> State:
        """The output of a decoder layer for one batch of a stream."""
        batch = self.batches[b].to(input_device(self.model))
        state = self.streams[stream][b] if stream in self.streams else ()
        state = tuple(tensor if tensor is None else tensor.to(batch.device) for tensor in state)
        return forward_layer(self.model, decoder, batch, state)

    def advance(self, decoder: nn.Module, number: int, stream: str = "original", forward: Callable | None = None) -> None:
        """Take a stream past a decoder layer; forward(decoder, b, stream) replaces the method `forward`, if given."""
        after = self.new_stream(stream, number) if self.new_stream else [None] * len(self.batches)
        for b in range(len(self.batches)):
            after[b] = (forward or self.forward)(decoder, b, stream)
        self.streams[stream] = after

    def trace_layer(self, number: int, keep: int | None, choose: Callable | None = None) -> LayerTrace | None:
        """Take the original stream past a decoder layer; returns the trace of its MoE layer, or None without one.

        If `progressive`, the trace is that of the pruned stream, which waits before the MoE layer until `follow`.
        choose(trace), if given, is called after 8, 16, 32, ... sequences and returns the experts to keep. Once two successive
        results are the same, the trace is complete, and the other sequences pass through the layer unrecorded.
        """
        with single_layer(self.model, number) as decoder:
            layer = find_moe(decoder)
            if layer is None:
                for stream in ("original", "pruned")[: 1 + self.progressive]:
                    self.advance(decoder, number, stream)
                return None
            check_gram([layer], self.tokens.numel(), keep, input_device(self.model))
            recorder = Recorder(layer, self.tokens.numel(), keep, self.chunk_tokens, self.scratch)
            self.advance(decoder, number, forward=self._until_settled(recorder, choose))
        traced = recorder.finish(self.tokens.shape[1])
        traced.split = self.split
        return traced

    def _until_settled(self, recorder: Recorder, choose: Callable | None) -> Callable:
        """A function in place of `forward` that records, until `choose` has given the same answer twice in a row."""
        answers, look = [], FIRST_LOOK

        def forward(decoder: nn.Module, b: int, _stream: str) -> State:
            nonlocal look
            if len(answers) > 1 and answers[-1] == answers[-2]:
                return self.forward(decoder, b)
            after = (self._record_pruned if self.progressive else self._record)(decoder, recorder, b)
            seen = (b + 1) * self.batch_size
            if choose and look <= seen < len(self.tokens):
                answers.append(choose(recorder.finish(self.tokens.shape[1])))
                look = 2 * seen
            return after

        return forward

    def _record(self, decoder: nn.Module, recorder: Recorder, b: int) -> State:
        with recording([recorder], [decoder]):
            return self.forward(decoder, b)

    def _record_pruned(self, decoder: nn.Module, recorder: Recorder, b: int) -> State:
        """Record the pruned stream with the original stream's block outputs as target; returns the original stream's output."""
        layer = recorder.layer
        with block_outputs(layer) as target, recording_stream(recorder, decoder):
            after = self.forward(decoder, b)
        # The target excludes the shared experts' output on the pruned stream, which removing experts cannot change.
        if layer.output_is_linear and layer.shared and not layer.router.shared:
            with block_outputs(layer) as rest, experts_returning(layer):
                self.forward(decoder, b, "pruned")
            target[0] = target[0] - rest[0]
        recorder.target = target[0]
        with recording([recorder]):
            self.forward(decoder, b, "pruned")
        return after

    def follow(self, number: int, kept: Sequence[int]) -> None:
        """Take the pruned stream past the same layer with only these experts."""
        with single_layer(self.model, number) as decoder, masked_layer(find_moe(decoder), kept):
            self.advance(decoder, number, "pruned")


@contextmanager
def block_outputs(layer: MoELayer) -> Iterator[list[Tensor]]:
    """A list that collects the outputs [tokens, d] of the layer's block (of its experts, where `output_is_linear` is false)."""
    collected: list[Tensor] = []
    source = layer.block if layer.output_is_linear else layer.experts
    with source.register_forward_hook(lambda _module, _inputs, output: collected.append(flat_output(output))):
        yield collected
