"""Chooses the experts to keep by the output of the whole model, in memory or from disk with one decoder layer at a time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files import digest
from ..moe.identity import gate_digest
from ..moe.layers import decoder_layers, find_moe
from ..moe.masking import masked_layer
from ..moe.running import check_tokens, input_device
from ..pruning.candidates import Kept, in_turn, ranked_subsets
from ..pruning.plan import PruningPlan
from ..pruning.search import make_plan
from ..tracing.losses import reconstruction_loss
from ..tracing.trace import Trace
from ..tracing.walk import BATCH, State, forward_head, forward_layer, single_layer
from .layout import opened
from .streaming import Streamed

Stream = Sequence[State]  # the hidden states of each batch under one plan


def kl(expected: Tensor, logits: Tensor) -> Tensor:
    """The KL between log-probabilities [..., vocabulary] and a model's logits, summed over positions."""
    return nn.functional.kl_div(logits.float().log_softmax(-1), expected, log_target=True, reduction="sum")


@dataclass
class Branches:
    """A model under several plans at once, with each decoder layer loaded once for all of them.

    loaded(number) is a context in which that decoder layer has its weights. batches: token ids [sequences, length]. A plan
    here maps the numbers of decoder layers to the experts that they keep; {} is the full model. expected: the full model's
    log-probabilities, from the first call of `mean_kls`.
    """

    model: nn.Module
    loaded: Callable[[int], AbstractContextManager]
    batches: Sequence[Tensor]
    expected: list[Tensor] = field(default_factory=list)

    def gates(self) -> dict[int, str]:
        """The digest of each gate, by number of the decoder layer."""
        found = {}
        for number in range(len(decoder_layers(self.model))):
            with self.loaded(number):
                if layer := find_moe(decoder_layers(self.model)[number]):
                    found[number] = gate_digest(layer)
        return found

    def forward(self, number: int, streams: Sequence[Stream], kept: Sequence[Kept | None]) -> list[Stream]:
        """The streams behind a decoder layer that keeps, for each stream, these experts (None: all)."""
        with self.loaded(number), single_layer(self.model, number) as decoder:
            layer, after = find_moe(decoder), []
            for stream, experts in zip(streams, kept, strict=True):
                with masked_layer(layer, experts) if experts else nullcontext():
                    pairs = zip(self.batches, stream, strict=True)
                    after.append([forward_layer(self.model, decoder, *pair) for pair in pairs])
        return after

    def mean_kls(self, number: int, streams: Sequence[Stream], plans: Sequence[Mapping[int, Kept]]) -> list[float]:
        """The KL under each plan, from its stream before a decoder layer. In the first call, the first plan is {}."""
        for later in range(number, len(decoder_layers(self.model))) if streams else ():
            streams = self.forward(later, streams, [plan.get(later) for plan in plans])
        return [self._mean_kl(stream) for stream in streams]

    def _mean_kl(self, stream: Stream) -> float:
        logits = [forward_head(self.model, *pair) for pair in zip(self.batches, stream, strict=True)]
        self.expected = self.expected or [found.float().log_softmax(-1).cpu() for found in logits]
        total = sum(kl(e.to(found.device), found).item() for e, found in zip(self.expected, logits, strict=True))
        return total / sum(map(Tensor.numel, self.batches))

    def descend(self, plan: dict[int, Kept], best: float, options: Mapping[int, Sequence[Kept]]) -> float:
        """Change a plan in place: from the first layer to the last, each takes the option with the smallest KL. best: the KL of
        the plan at first; returns it at last."""
        state: Stream = [()] * len(self.batches)
        for number in tqdm(range(len(decoder_layers(self.model))), desc="choose by output", unit="layer"):
            others = [kept for kept in options.get(number, ()) if kept != plan[number]]
            state, *after = self.forward(number, [state] * (1 + len(others)), [plan.get(number), *others])
            found = self.mean_kls(number + 1, after, [plan] * len(others))
            for kept, stream, now in zip(others, after, found, strict=True):
                if now < best * (1 - 1e-6):  # more than rounding
                    best, state, plan[number] = now, stream, kept
        return best


@torch.no_grad()
def choose_by_output(
    model, trace: Trace, r: int, tokens: Tensor, *, candidates: int = 8, batch_size: int = BATCH, **options
) -> tuple[PruningPlan, dict]:
    """A plan whose KL on a validation split is at most that of every single method's plan, and a report.

        plan, report = esparse.choose_by_output(model, trace, 6, validation)

    The KL is that of the next-token distributions from the full model's, in nats, a mean over tokens. The start is the best
    of the plans by enumeration (by greedy removal, where subsets are too many) and by each score, under every loss. Then each
    layer, from first to last, takes another subset where that lowers the KL. It tries `candidates` subsets: the best of each
    of these methods, then the second best of each, and so on. It tries all of the best, even where these are more.

    model: in memory, or a checkpoint's folder or hub id, of which one decoder layer is in memory at a time; options:
    revision, dtype, device of a checkpoint, as for `trace_checkpoint`. tokens: [sequences, length], not those of the trace.
    Report: {"single": KL by method and loss, "start": one of these, "before": its KL, "after": the plan's}.
    Raises ValueError for r out of range, a trace of another model, and a model that does not run layer by layer.
    """
    for layer in trace.layers:
        layer.check_size(r)
    if options and isinstance(model, nn.Module):
        raise ValueError(f"A model in memory takes no {', '.join(options)}: these are options of a checkpoint.")
    model, loaded = (model, lambda _: nullcontext()) if isinstance(model, nn.Module) else from_disk(model, **options)
    check_tokens(model, tokens)
    branches = Branches(model, loaded, tokens.to(input_device(model)).split(batch_size))
    gates = branches.gates()
    if digest(list(gates.values())) != trace.model:
        raise ValueError("This trace was made with another model: trace the model you want to use it with.")
    found = dict(zip(gates, ranked_subsets(trace, r, candidates), strict=True))
    single = {label: {number: some[label][0] for number, some in found.items()} for label in found[min(found)]}
    embedded: Stream = [()] * len(branches.batches)
    distinct = {tuple(plan.values()): plan for plan in single.values()}  # frequency is the same under every loss
    _, *kls = branches.mean_kls(0, [embedded] * (1 + len(distinct)), [{}, *distinct.values()])
    kls = dict(zip(distinct, kls, strict=True))
    report = {"single": {label: kls[tuple(plan.values())] for label, plan in single.items()}}
    report["start"] = start = min(single, key=report["single"].get)
    report["before"] = report["single"][start]
    options = {number: in_turn([*some.values()], candidates) for number, some in found.items()}
    report["after"] = branches.descend(single[start], report["before"], options)
    pairs = zip(single[start].values(), trace.layers, strict=True)
    chosen = [(list(kept), reconstruction_loss(layer, kept), None) for kept, layer in pairs]
    return make_plan("output", "eq3", r, chosen, trace.model, trace.tokens), report


def from_disk(source: str | Path, revision: str | None = None, dtype=None, device=None) -> tuple[nn.Module, Callable]:
    """A checkpoint's model without its decoder layers, and the context that reads one of them. Raises ValueError for a model
    without an output layer of its own."""
    streamed = Streamed(opened(source, revision), dtype, device, head=True)
    if streamed.model.get_output_embeddings() is None:
        raise ValueError(f"{type(streamed.model).__name__} has no output layer of its own: load the whole model into memory.")
    return streamed.model, streamed.layer
