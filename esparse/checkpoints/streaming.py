"""A checkpoint's model with one decoder layer in memory at a time, and the walk through it."""

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from ..machine import everyone, rank, ranks
from ..moe.identity import gate_digest, remember_stored
from ..moe.layers import decoder_layers, find_moe, moe_blocks
from ..tracing.trace import LayerTrace
from ..tracing.walk import Bypass, Walk
from .layout import Checkpoint
from .models import read_device, read_dtype
from .progress import ResumableJob
from .streams import FileStream


@contextmanager
def _sequential_loading() -> Iterator[None]:
    """Makes transformers read tensors one by one, to save memory, and not log the parameters that are not loaded."""
    before, level = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD"), transformers.logging.get_verbosity()
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        os.environ.pop("HF_DEACTIVATE_ASYNC_LOAD")
        if before is not None:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


def _partial(kind: type, number: int | None) -> type:
    """The model class with one decoder layer alone (or, if None, with everything but decoder layers and the output)."""

    def __init__(self, config):
        kind.__init__(self, config)
        layers = decoder_layers(self)
        for other, layer in enumerate(layers):
            if other != number:
                layers[other] = Bypass(layer)
        for holder in {self, self.base_model} if number is not None else {self} - {self.base_model}:
            for name, child in list(holder.named_children()):
                if child is not self.base_model and child is not layers:
                    setattr(holder, name, nn.Identity())

    return type(kind.__name__, (kind,), {"__init__": __init__, "_tied_weights_keys": None, "__module__": kind.__module__})


class Streamed:
    """The language model of a checkpoint whose decoder layers are read when they are needed, one at a time."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | str | None = None, device: str | None = None):
        self.checkpoint, self.device = checkpoint, read_device(device or "cpu")
        self.config = copy.deepcopy(checkpoint.layout.text.config)
        self.config.tie_word_embeddings = False  # no output layer is held that could share the embeddings
        self.dtype = read_dtype(dtype) or _usual_dtype(checkpoint)
        self.model = self._load(None)

    def _load(self, number: int | None) -> nn.Module:
        layout, options = self.checkpoint.layout, {"config": self.config, "dtype": self.dtype, "output_loading_info": True}
        with _sequential_loading():
            kind, state = _partial(type(layout.text), number), self.checkpoint.lazily(number)
            model, report = kind.from_pretrained(None, state_dict=state, **options)
        # The report lists other layers' parameters too: only the layer's own count.
        if missing := report["missing_keys"] & {layout.text_names[name] for name in layout.parameters(number)}:
            raise ValueError(f"{self.checkpoint.source.folder} lacks weights of the model: {', '.join(sorted(missing))}.")
        return model.eval().to(self.device)

    def __len__(self) -> int:
        return len(decoder_layers(self.model))

    def state(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of the decoder layer in memory, under their published names, in the dtype they are computed in."""
        layout, held = self.checkpoint.layout, self.model.state_dict()
        state = {name: held[layout.text_names[name]] for name in layout.parameters(number)}
        return {name: tensor.cpu() for name, tensor in revert_weight_conversion(layout.model, state).items()}

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """The decoder layer, in its place and with its weights; the system reads the next one ahead."""
        layers = decoder_layers(self.model)
        bypass, layers[number] = layers[number], decoder_layers(self._load(number))[number]
        remember_stored(self.model, moe_blocks(layers[number]), self.checkpoint.read_text)
        if number + 1 < len(self):
            self.checkpoint.source.announce(self.checkpoint.stored(number + 1))
        try:
            yield layers[number]
        finally:
            layers[number] = bypass


def _usual_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of the language model's weights are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for name in checkpoint.used:
        dtype = checkpoint.source.entries[name].dtype
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + checkpoint.source.nbytes(name)
    return max(sizes, key=sizes.__getitem__)


class CheckpointWalk:
    """A walk through a source with its hidden states in files; it resumes after the last finished layer."""

    def __init__(self, streamed: Streamed, tokens: torch.Tensor, job: ResumableJob, *, batch_size: int, **options):
        self.streamed, self.job = streamed, job
        own = tokens.tensor_split(ranks())[rank()]
        self.sizes = [len(batch) for batch in own.split(batch_size)]
        options |= {"batch_size": batch_size, "split": ranks() > 1, "new_stream": self._stream}
        self.walk = Walk(streamed.model, own, **options)
        if records := job.records():
            for name, about in records[-1]["streams"].items():
                self.walk.streams[name] = self._stream(name, len(records) - 1, about[rank()])

    def _stream(self, name: str, number: int, about: list | None = None) -> FileStream:
        """The hidden states after a layer: in new files or, with `about`, in existing ones."""
        return FileStream(self.job.streams / f"{name}_{number:05d}.{rank()}", self.sizes, about)

    def _streams(self) -> tuple[dict, list[Path]]:
        about = {name: everyone(stream.about()) for name, stream in self.walk.streams.items()}
        return about, [path for stream in self.walk.streams.values() for path in stream.paths]

    @torch.no_grad()
    def run(
        self, visit: Callable[[int, nn.Module], dict], write: Callable[[int, dict], None] = lambda number, record: None
    ) -> list[dict]:
        """Take the calibration set past every decoder layer that is not finished; see `ResumableJob.run`."""
        return self.job.run(len(self.streamed), visit, write, weights=self.streamed.layer, streams=self._streams)

    def tracing(self, keep: int | None, choose: Callable[[int, LayerTrace], dict]) -> Callable[[int, nn.Module], dict]:
        """A visit that traces. choose(number, trace) adds to an MoE layer's record; a progressive walk reads "kept" there."""

        def visit(number: int, decoder: nn.Module) -> dict:
            traced, started = self.walk.trace_layer(number, keep), time.perf_counter()
            record = {} if traced is None else self._choose(number, decoder, traced, choose)
            return record | {"search": time.perf_counter() - started}

        return visit

    def _choose(self, number: int, decoder: nn.Module, traced: LayerTrace, choose) -> dict:
        layer = find_moe(decoder)
        layers = decoder_layers(self.streamed.model)
        prefix = next(name for name, module in self.streamed.model.named_modules() if module is layers)
        traced.name = f"{prefix}.{number}.{layer.name}".removesuffix(".")
        record = {"name": traced.name, "gate": gate_digest(layer), "n": layer.n, "k": layer.k, **choose(number, traced)}
        if self.walk.progressive:
            self.walk.follow(number, record["kept"])
        return record
