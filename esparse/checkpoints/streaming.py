"""A checkpoint's model with one decoder layer in memory at a time, and the walk through it."""

import copy
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from ..machine import rank, ranks
from ..moe.identity import gate_digest, remember_stored
from ..moe.layers import decoder_layers, find_moe, moe_blocks
from ..tracing.trace import LayerTrace
from ..tracing.walk import Bypass, State, Walk
from .folder import write_tensors
from .layout import Checkpoint
from .models import read_device, read_dtype
from .progress import ResumableJob


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


def _partial(kind: type, number: int | None, head: bool) -> type:
    """The model class with one decoder layer alone. If number is None: without decoder layers, and without the output layer
    unless `head`."""

    def __init__(self, config):
        kind.__init__(self, config)
        layers = decoder_layers(self)
        for other, layer in enumerate(layers):
            if other != number:
                layers[other] = Bypass(layer)
        without_layers = set() if head else {self} - {self.base_model}
        for holder in without_layers if number is None else {self, self.base_model}:
            for name, child in list(holder.named_children()):
                if child is not self.base_model and child is not layers:
                    setattr(holder, name, nn.Identity())

    tied = kind._tied_weights_keys if number is None and head else None
    return type(kind.__name__, (kind,), {"__init__": __init__, "_tied_weights_keys": tied, "__module__": kind.__module__})


class Streamed:
    """The language model of a checkpoint whose decoder layers are read when they are needed, one at a time.

    head: whether to hold the output layer too.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        head: bool = False,
    ):
        self.checkpoint, self.device, self.head = checkpoint, read_device(device or "cpu"), head
        self.config = copy.deepcopy(checkpoint.layout.text.config)
        self.config.tie_word_embeddings = head and bool(checkpoint.layout.tied)
        self.dtype = read_dtype(dtype) or _usual_dtype(checkpoint)
        self.model = self._load(None)

    def _load(self, number: int | None) -> nn.Module:
        layout, options = self.checkpoint.layout, {"config": self.config, "dtype": self.dtype, "output_loading_info": True}
        with _sequential_loading():
            kind, state = _partial(type(layout.text), number, self.head), self.checkpoint.lazily(number)
            model, report = kind.from_pretrained(None, state_dict=state, **options)
        # The report lists other layers' parameters too: only the layer's own count.
        if missing := report["missing_keys"] & {layout.text_names[name] for name in layout.parameters[number]}:
            raise ValueError(f"{self.checkpoint.source.folder} lacks weights of the model: {', '.join(sorted(missing))}.")
        return model.eval().to(self.device)

    def __len__(self) -> int:
        return len(decoder_layers(self.model))

    def state(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of the decoder layer in memory, under their published names, in the dtype they are computed in."""
        layout, held = self.checkpoint.layout, self.model.state_dict()
        state = {name: held[layout.text_names[name]] for name in layout.parameters[number]}
        return {name: tensor.cpu() for name, tensor in revert_weight_conversion(layout.model, state).items()}

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """The decoder layer, in its place and with its weights; the system reads the next one ahead."""
        layers = decoder_layers(self.model)
        bypass, layers[number] = layers[number], decoder_layers(self._load(number))[number]
        remember_stored(self.model, moe_blocks(layers[number]), self.checkpoint.read)
        if number + 1 < len(self):
            self.checkpoint.source.announce(self.checkpoint.stored(number + 1))
        try:
            yield layers[number]
        finally:
            layers[number] = bypass


def _usual_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of the language model's weights are stored in."""
    sizes = Counter()
    for entry in map(checkpoint.source.entries.get, checkpoint.used):
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.nbytes
    return max(sizes, key=sizes.get)


class FileStream:
    """A decoder layer's outputs, one file for each batch. A walk uses it as a list."""

    def __init__(self, path: Path):
        """path: of the files, to whose names the batch's number is added."""
        self.path = path

    def _file(self, batch: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{batch:05d}")

    def __getitem__(self, batch: int) -> State:
        stored = load_file(self._file(batch))
        parts = [stored[str(j)] for j in range(len(stored))]
        return tuple(part if part.numel() else None for part in parts)

    def __setitem__(self, batch: int, value: State) -> None:
        parts = [torch.empty(0) if part is None else part.cpu() for part in value]
        parts = [part.clone() for part in parts] if len(parts) > 1 else parts  # some share memory
        write_tensors(self._file(batch), {str(j): part for j, part in enumerate(parts)})
        with self._file(batch).open("rb") as file:
            os.fsync(file.fileno())


class CheckpointWalk(Walk):
    """A walk through a source with its hidden states in files; it resumes after the last finished layer."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor, job: ResumableJob, **options):
        self.job, own = job, tokens.tensor_split(ranks())[rank()]
        super().__init__(model, own, split=ranks() > 1, new_stream=self._stream, **options)
        if done := len(job.records()):
            names = ("original", "pruned") if self.progressive else ("original",)
            self.streams = {name: self._stream(name, done - 1) for name in names}

    def _stream(self, name: str, number: int) -> FileStream:
        """The hidden states after a layer. Files that no layer needs any more are removed."""
        for path in self.job.streams.glob(f"*_{number - 2:05d}.{rank()}.*"):
            path.unlink()
        return FileStream(self.job.streams / f"{name}_{number:05d}.{rank()}")

    def tracing(
        self, keep: int | None, choose: Callable[[int, LayerTrace], dict], search: Callable | None = None
    ) -> Callable[[int, nn.Module], dict]:
        """A visit that traces. choose(number, trace) adds to an MoE layer's record; a progressive walk reads "kept" there.
        search(number, trace), if given, returns the experts to keep first; once they settle, recording ends (`trace_layer`)."""
        layers = decoder_layers(self.model)
        prefix = next(name for name, module in self.model.named_modules() if module is layers)

        def visit(number: int, decoder: nn.Module) -> dict:
            kept = (lambda traced: search(number, traced)[0]) if search else None
            traced, started = self.trace_layer(number, keep, kept), time.perf_counter()
            if traced is None:
                return {}
            layer = find_moe(decoder)
            traced.name = f"{prefix}.{number}.{layer.name}".removesuffix(".")
            record = {"name": traced.name, "gate": gate_digest(layer), "n": layer.n, "k": layer.k, **choose(number, traced)}
            if self.progressive:
                self.follow(number, record["kept"])
            return record | {"search": time.perf_counter() - started}

        return visit
