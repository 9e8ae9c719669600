"""Models larger than memory: traced and pruned from disk, one decoder layer at a time, and again from where it stopped."""

import copy
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers.core_model_loading import revert_weight_conversion

from .checkpoints import load_tokenizer, read_device, read_dtype
from .corpora import calibration_tokens
from .destination import Progress, ShardWriter
from .files import digest, refuse_existing, versions, write_json
from .folder import PLAN
from .layout import Checkpoint, Layout, count_experts, expert_counts
from .models import check_tokens, decoder_layers, find_moe, gate_digest, moe_blocks, remember_stored
from .processes import everyone, rank, ranks, summed
from .pruning import PruningPlan
from .search import check_method, make_plan, search_layer
from .shards import Source, fetch
from .traces import (
    LayerTrace,
    Trace,
    about_layer,
    check_experts,
    layer_file,
    median_ratios,
    nearly_top1,
    save_layer,
    tokens_digest,
    write_about,
)
from .walk import BATCH, FileStream, Passing, Walk
from .weights import Sparsity, Weigher, check_model, check_options, summary

PRIVATE = ("streams", "gate", "n", "k")  # of a layer's record: not for the report


# --- a model that holds one decoder layer -------------------------------------------------------------------------------


@contextmanager
def _little_memory() -> Iterator[None]:
    """Transformers reading tensors one after the other, and not telling what else a whole checkpoint would hold."""
    former, level = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD"), transformers.logging.get_verbosity()
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        os.environ.pop("HF_DEACTIVATE_ASYNC_LOAD")
        if former is not None:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = former


def _partial(kind: type, number: int | None) -> type:
    """The model class with one decoder layer alone (or, if None, with everything but decoder layers and the output)."""

    def __init__(self, config):
        kind.__init__(self, config)
        layers = decoder_layers(self)
        for other, layer in enumerate(layers):
            if other != number:
                layers[other] = Passing(layer)
        for holder in {self, self.base_model} if number is not None else {self} - {self.base_model}:
            for name, child in list(holder.named_children()):
                if child is not self.base_model and child is not layers:
                    setattr(holder, name, nn.Identity())

    return type(kind.__name__, (kind,), {"__init__": __init__, "_tied_weights_keys": None, "__module__": kind.__module__})


class Streamed:
    """The language model of a checkpoint whose decoder layers are read when asked for, one at a time."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype | str | None = None, device: str | torch.device | None = None
    ):
        self.checkpoint, self.device = checkpoint, read_device(device or "cpu")
        self.config = copy.deepcopy(checkpoint.layout.text.config)
        self.config.tie_word_embeddings = False  # no output layer is held that could share the embeddings
        self.dtype = read_dtype(dtype) or _usual_dtype(checkpoint)
        self.model = self._load(None)

    def _load(self, number: int | None) -> nn.Module:
        options = {"config": self.config, "dtype": self.dtype, "output_loading_info": True}
        kind, state = _partial(type(self.checkpoint.layout.text), number), self.checkpoint.lazily(number)
        with _little_memory():
            model, found = kind.from_pretrained(None, state_dict=state, **options)
        layout = self.checkpoint.layout  # of a layer, its own weights alone are asked for
        if lacking := found["missing_keys"] & {layout.text_names[name] for name in layout.parameters(number)}:
            raise ValueError(f"{self.checkpoint.source.folder} lacks weights of the model: {', '.join(sorted(lacking))}.")
        return model.eval().to(self.device)

    def __len__(self) -> int:
        return len(decoder_layers(self.model))

    def state(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of the decoder layer in its place, under their published names, in the dtype they are computed in."""
        layout, held = self.checkpoint.layout, self.model.state_dict()
        state = {name: held[layout.text_names[name]] for name in layout.parameters(number)}
        return {name: tensor.cpu() for name, tensor in revert_weight_conversion(layout.model, state).items()}

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """The decoder layer in its place, with its weights, for as long as it is needed."""
        layers = decoder_layers(self.model)
        passing, layers[number] = layers[number], decoder_layers(self._load(number))[number]
        remember_stored(self.model, moe_blocks(layers[number]), self.checkpoint.read_text)
        try:
            yield layers[number]
        finally:
            layers[number] = passing


def _usual_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of the language model's weights are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for name in checkpoint.used:
        dtype = checkpoint.source.entries[name].dtype
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + checkpoint.source.nbytes(name)
    return max(sizes, key=sizes.__getitem__)


# --- the walk through a checkpoint --------------------------------------------------------------------------------------


class CheckpointWalk:
    """A walk through a source whose streams lie in files, which goes on after the last finished layer."""

    def __init__(self, streamed: Streamed, tokens: torch.Tensor, progress: Progress, kind: type = Walk, **options):
        self.streamed, self.progress = streamed, progress
        mine = tokens.tensor_split(ranks())[rank()]
        self.sizes = [len(batch) for batch in mine.split(options["batch_size"])]
        self.walk = kind(streamed.model, mine, stream=self._stream, **options)
        self.done = progress.records()
        if self.done:
            for name, about in self.done[-1]["streams"].items():
                setattr(self.walk, name, self._open(name, len(self.done) - 1, about[rank()]))

    def _path(self, name: str, number: int) -> Path:
        return self.progress.streams / f"{name}_{number:05d}.{rank()}"

    def _stream(self, name: str, number: int) -> FileStream:
        return FileStream(self._path(name, number), self.sizes)

    def _open(self, name: str, number: int, about: list) -> FileStream:
        return FileStream(self._path(name, number), self.sizes, about)

    def run(
        self, visit: Callable[[int, nn.Module], dict], write: Callable[[int, dict], None] = lambda number, answer: None
    ) -> list[dict]:
        """Take every decoder layer that is not done past the calibration set; the records of all.

        visit(number, decoder) answers with a dict while the layer's weights are there, write(number, answer) puts down what
        comes of it once they are gone.
        """
        numbers = range(len(self.done), len(self.streamed))
        for number in tqdm(numbers, desc="layers", unit="layer", initial=len(self.done), total=len(self.streamed)):
            times = [time.perf_counter()]
            with self.streamed.layer(number) as decoder:
                times.append(time.perf_counter())
                if number + 1 < len(self.streamed):
                    self.streamed.checkpoint.announce(number + 1)
                record = visit(number, decoder)
                del decoder
            times.append(time.perf_counter())
            write(number, record)
            times.append(time.perf_counter())
            steps = dict(zip(("read", "run", "write"), (b - a for a, b in itertools.pairwise(times)), strict=True))
            steps["run"] -= (search := record.pop("search", 0.0))
            self._finish(number, {**record, "seconds": steps | {"search": search}, "peak_gb": peak_gb()})
        return self.progress.records()

    def tracing(self, keep: int | None, choose: Callable[[int, LayerTrace], dict]) -> Callable[[int, nn.Module], dict]:
        """A visit that traces; choose(number, traced) answers for an MoE layer, "kept" in the answer is what a progressive
        walk goes on with."""

        def visit(number: int, decoder: nn.Module) -> dict:
            traced, started = self.walk.trace_layer(number, keep), time.perf_counter()
            record = {} if traced is None else self._choose(number, decoder, traced, choose)
            return record | {"search": time.perf_counter() - started}

        return visit

    def _choose(self, number: int, decoder: nn.Module, traced: LayerTrace, choose) -> dict:
        layer = find_moe(decoder)
        layers = decoder_layers(self.streamed.model)
        prefix = next(name for name, module in self.streamed.model.named_modules() if module is layers)
        traced.split, traced.name = ranks() > 1, f"{prefix}.{number}.{layer.name}".removesuffix(".")
        record = {"name": traced.name, "gate": gate_digest(layer), "n": layer.n, "k": layer.k, **choose(number, traced)}
        if self.walk.progressive:
            self.walk.follow(number, record["kept"])
        return record

    def _finish(self, number: int, record: dict) -> None:
        found = {name: getattr(self.walk, name, None) for name in ("original", "pruned")}
        streams = {name: stream for name, stream in found.items() if stream is not None}
        record["streams"] = {name: everyone(stream.about()) for name, stream in streams.items()}
        self.progress.finish_layer(number, record, [path for stream in streams.values() for path in stream.paths])


def peak_gb() -> float:
    """The most memory this process has held so far, in GB: resident, mapped pages of files included; or the GPU's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def trace_checkpoint(
    source: str | Path,
    tokens: torch.Tensor,
    folder: str | Path,
    *,
    keep: int | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    batch_size: int = BATCH,
    chunk_tokens: int | None = None,
) -> Trace:
    """`trace`, with one decoder layer in memory at a time; the trace is written to `folder` and read from there.

    source: a local folder of safetensors, or a hub id. dtype: what to compute in, or its name (None: what most weights are of).
    Killed, the same call goes on after the last finished layer. Raises ValueError as `Source`, `Layout.check` and `trace`
    do, and for other inputs or options than the unfinished work has; FileExistsError if `folder` is there.
    """
    refuse_existing(folder)
    if ranks() > 1:
        raise ValueError("trace_checkpoint works on one process: use prune_checkpoint under torchrun.")
    opened = _open(source, revision)
    streamed = Streamed(opened, dtype, device)
    check_tokens(streamed.model, tokens)
    options = {"batch_size": batch_size, "chunk_tokens": chunk_tokens}
    job = {
        "source": opened.source.fingerprint,
        "calibration set": tokens_digest(tokens),
        "keep": keep,
        "dtype": str(streamed.dtype),
    }
    progress = Progress(folder, {**job, **options})

    def choose(number: int, traced: LayerTrace) -> dict:
        save_layer(traced, progress.out / f"of_decoder_layer_{number:05d}")
        return {"about": about_layer(traced)}

    with torch.no_grad():
        walk = CheckpointWalk(streamed, tokens, progress, **options)
        records = walk.run(walk.tracing(keep, choose))
    found = [(number, record) for number, record in enumerate(records) if "about" in record]
    for place, (number, _) in enumerate(found):
        os.replace(progress.out / f"of_decoder_layer_{number:05d}", progress.out / layer_file(place))
    model = digest([record["gate"] for _, record in found])
    write_about(progress.out, model, tokens_digest(tokens), [record["about"] for _, record in found])
    progress.finish()
    return Trace.load(folder)


def prune_checkpoint(
    source: str | Path,
    destination: str | Path,
    r: int | PruningPlan,
    *,
    calibration: str | torch.Tensor = "c4",
    sequences: int = 128,
    length: int = 2048,
    seed: int = 42,
    method: str = "enumerate",
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    batch_size: int = BATCH,
    chunk_tokens: int | None = None,
) -> dict:
    """Prune a checkpoint to r experts a layer from disk to disk, one decoder layer and the hidden states at a time.

    r: how many to keep, or a `PruningPlan` made before, after which nothing is computed and no calibration set is read.
    source: a local folder of safetensors, or a hub id. destination: a folder of the same kind, with tokenizer, index,
    `plan.json`, a model card and `pruning_report.json`, which is also returned: kept experts, losses, betas, seconds, peak
    memory, versions, the calibration set, the tensors ("left_out") and files ("not_copied") of the source that do not go
    along, and in a sentence where skipping would be top-1 routing (`traces.nearly_top1`). Weights are copied bit by bit and
    written in the layout that transformers publishes, whatever the source's is; FP8 and MXFP4 become bfloat16. In a composite
    checkpoint the language model is pruned, and every other tensor is carried as it is stored, layers that predict further
    tokens with all their experts.
    calibration: a corpus or path as for `calibration_tokens`, or token ids [sequences, length]. method: as for
    `search_experts`. dtype: what to compute in, or its name (None: what most weights are of). batch_size: sequences a pass.

    Killed, out of disk or of memory, the destination stays absent, and the same call goes on after the last finished
    layer. Under `torchrun` every process takes its share of the sequences, and all choose alike.
    Raises FileExistsError if the destination is there, and ValueError for r out of range, other inputs or options than the
    unfinished work has, and everything wrong with the source, named, before any layer runs.
    """
    refuse_existing(destination)
    check_method(method)
    if isinstance(r, PruningPlan):
        return _prune_as_planned(source, destination, r, revision)
    opened = _open(source, revision, r)
    tokens = _calibration_set(opened.source, calibration, sequences, length, seed)
    streamed = Streamed(opened, dtype, device)
    check_tokens(streamed.model, tokens)
    about = _about(calibration, tokens, seed, streamed) | {"r": r, "method": method}
    options = {"batch_size": batch_size, "chunk_tokens": chunk_tokens, "progressive": method == "progressive"}
    checking = time.perf_counter()
    progress = Progress(destination, {"source": opened.source.fingerprint, **about, **options}, opened.check_finite)
    about |= _origin(opened, source, revision) | {"checking": time.perf_counter() - checking}
    writer = ShardWriter(opened, progress.out)
    with torch.no_grad():
        walk = CheckpointWalk(streamed, tokens, progress, **options)
        records = walk.run(walk.tracing(r, _chooser(r, method, seed, opened.layout.layers)), writer.write_layer)
    report = _report(about, records)
    if rank() == 0:
        write_json(progress.out / PLAN, asdict(_plan_of(report, records)))
        writer.finish(r, report, f"method: {method}, r = {r}, {_calibrated(report)}")
    progress.finish()
    return report


def _prune_as_planned(source: str | Path, destination: str | Path, plan: PruningPlan, revision: str | None) -> dict:
    """`prune_checkpoint` by a plan: weights are copied, nothing else happens."""
    opened = _open(source, revision, plan.r)
    about = _origin(opened, source, revision)
    about |= {"method": plan.method, "r": plan.r, "calibration set": plan.tokens}
    records = _records_of(plan, Streamed(opened))
    progress = Progress(destination, {"source": opened.source.fingerprint, "plan": digest(asdict(plan))}, opened.check_finite)
    writer = ShardWriter(opened, progress.out)
    for number in tqdm(range(len(progress.records()), len(records)), desc="layers", unit="layer"):
        started = time.perf_counter()
        writer.write_layer(number, records[number])
        steps = {"write": time.perf_counter() - started}
        progress.finish_layer(number, records[number] | {"seconds": steps, "peak_gb": peak_gb()}, [])
    report = _report(about, progress.records())
    if rank() == 0:
        write_json(progress.out / PLAN, asdict(plan))
        writer.finish(plan.r, report, f"method: {plan.method}, r = {plan.r}, by a plan made before")
    progress.finish()
    return report


def _records_of(plan: PruningPlan, streamed: Streamed) -> list[dict]:
    """What a plan says of each decoder layer. Raises ValueError for a plan of another model, before anything is written."""
    records = []
    for number in tqdm(range(len(streamed)), desc="checking the plan", unit="layer"):
        with streamed.layer(number) as decoder:
            layer = find_moe(decoder)
            records.append({"gate": gate_digest(layer), "n": layer.n, "k": layer.k} if layer else {})
            if layer:
                check_experts(plan.r, layer.n, layer.k, router=layer.router)
    found = [record for record in records if record]
    if digest([record["gate"] for record in found]) != plan.model or len(found) != len(plan.kept):
        raise ValueError("This pruning plan was made with another model: trace the model you want to use it with.")
    for record, kept, loss in zip(found, plan.kept, plan.losses, strict=True):
        if sorted(set(kept)) != list(kept) or len(kept) != plan.r or not 0 <= kept[0] <= kept[-1] < record["n"]:
            raise ValueError(f"The plan must keep {plan.r} different experts of a layer in rising order, got {kept}.")
        record |= {"kept": kept, "loss": loss}
    return records


def prune_weights_checkpoint(
    source: str | Path,
    destination: str | Path,
    sparsity: float | str,
    *,
    method: str = "moe-pruner",
    scope: str = "experts",
    dense: bool = False,
    calibration: str | torch.Tensor = "c4",
    sequences: int = 128,
    length: int = 2048,
    seed: int = 42,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    batch_size: int = BATCH,
) -> dict:
    """`prune_weights` from disk to disk, one decoder layer and the hidden states at a time, as `prune_checkpoint` does it.

    The destination has the source's tensors, those in scope with zeros; zeros are written out, so it is no smaller.
    Returns the report, which is also written. Raises what `prune_weights` and `prune_checkpoint` raise.
    """
    refuse_existing(destination)
    check_options(method, scope)
    asked = Sparsity.read(sparsity)
    opened = _open(source, revision)
    check_model(opened.layout.text, asked, scope)
    tokens = _calibration_set(opened.source, calibration, sequences, length, seed)
    streamed = Streamed(opened, dtype, device)
    check_tokens(streamed.model, tokens)
    about = _about(calibration, tokens, seed, streamed)
    about |= {"sparsity": str(asked), "method": method, "scope": scope, "dense": dense}
    job = {"source": opened.source.fingerprint, **about, "batch_size": batch_size}
    progress = Progress(destination, job, opened.check_finite)
    writer = ShardWriter(opened, progress.out)
    n, k = expert_counts(opened.source.config)
    options = {"sparsity": asked, "method": method, "scope": scope, "dense": dense, "batch_size": batch_size}
    walk = CheckpointWalk(streamed, tokens, progress, Weigher, **options)
    walk.walk.together = summed

    def visit(number: int, decoder: nn.Module) -> dict:
        found = walk.walk.prune_layer(number)
        if rank() == 0:
            stored = opened.pruned(number, range(n))
            writer.write(number, {name: _zeroed(stored[name], tensor) for name, tensor in streamed.state(number).items()})
        return found

    records = walk.run(visit)
    about |= _origin(opened, source, revision)
    about |= {**summary(asked, method, scope, records), "n": n, "k": k}
    report = about | _costs(records)
    if rank() == 0:
        writer.finish(n, report, f"weights by {method}, sparsity {asked} of {scope}, {_calibrated(report)}")
    progress.finish()
    return report


def _open(source: str | Path, revision: str | None, r: int | None = None) -> Checkpoint:
    """A checkpoint to be pruned to r experts (to none fewer, if None), with everything checked that its headers tell."""
    found = Source(fetch(str(source), revision))
    opened = Checkpoint(found, Layout(found.config, count_experts(found.config) if r is None else r))
    _ = opened.side_files  # or a sentence on one that leads out of the folder
    return opened


def _origin(opened: Checkpoint, source: str | Path, revision: str | None) -> dict:
    """What a report says of the source: tensors that are no part of the model, how many of another part were copied as they
    are, and files that were not, with why."""
    found = {"left_out": opened.left_out, "carried": len(opened.carried), "not_copied": opened.side_files[1]}
    return {"source": str(source), "revision": revision, "quantised": opened.source.method, **found}


def _zeroed(stored: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """A tensor of the source with the zeros of the pruned one, which was computed in another dtype: what is not zero keeps
    every bit, and so does a tensor that was not pruned, whatever that dtype rounds to zero."""
    gone = pruned == 0
    return stored.masked_fill(gone, 0) if (gone & (stored.to(pruned.dtype) != 0)).any() else stored


def _calibration_set(source: Source, calibration: str | torch.Tensor, sequences: int, length: int, seed: int) -> torch.Tensor:
    tokens = calibration
    if isinstance(calibration, str):
        tokenizer = load_tokenizer(str(source.folder))
        tokens = calibration_tokens(calibration, tokenizer, sequences=sequences, length=length, seed=seed)
    if len(tokens) < ranks():
        raise ValueError(f"{len(tokens)} sequences cannot be split over {ranks()} processes: use more sequences.")
    return tokens


def _chooser(r: int, method: str, seed: int, layers: int) -> Callable[[int, LayerTrace], dict]:
    """What to do with each layer's trace; a random choice depends on the layer alone, so that it is the same on resuming."""
    seeds = torch.randint(2**31, (layers,), generator=torch.Generator().manual_seed(seed)).tolist()

    def choose(number: int, traced: LayerTrace) -> dict:
        generator = torch.Generator().manual_seed(seeds[number])
        kept, loss, runner_up = search_layer(traced, r, "enumerate" if method == "progressive" else method, generator)
        found = {"kept": kept, "loss": loss, "runner_up": runner_up}
        if traced.k > 1:
            pruned, after_first = median_ratios(traced, kept)
            found |= {"beta": median_ratios(traced)[0], "beta_pruned": pruned, "after_first": after_first}
        return found

    return choose


def _about(calibration: str | torch.Tensor, tokens: torch.Tensor, seed: int, streamed: Streamed) -> dict:
    """What a report, and unfinished work, say of the calibration set and of how it is computed on."""
    return {
        "calibration": calibration if isinstance(calibration, str) else "token ids",
        "seed": seed,
        "calibration set": tokens_digest(tokens),
        "sequences": len(tokens),
        "length": tokens.shape[1],
        "dtype": str(streamed.dtype),
        "ranks": ranks(),
    }


def _calibrated(report: dict) -> str:
    return f"calibrated on {report['sequences']} x {report['length']} tokens of {report['calibration']}"


def _report(about: dict, records: list[dict]) -> dict:
    pruned = next(record for record in records if "kept" in record)
    told = nearly_top1([record["after_first"] for record in records if "after_first" in record])
    return {**about, "n": pruned["n"], "k": pruned["k"], **_costs(records)} | ({"skipping": told} if told else {})


def _costs(records: list[dict]) -> dict:
    return {
        "layers": [{key: value for key, value in record.items() if key not in PRIVATE} for record in records],
        "seconds": sum(sum(record["seconds"].values()) for record in records),
        "peak_gb": max(record["peak_gb"] for record in records),
        "versions": versions(),
    }


def _plan_of(report: dict, records: list[dict]) -> PruningPlan:
    found = [(record["kept"], record["loss"], record["runner_up"]) for record in records if "kept" in record]
    model = digest([record["gate"] for record in records if "kept" in record])
    return make_plan(report["method"], report["r"], found, model, report["calibration set"])
