"""Models larger than memory: traced and pruned from disk, one decoder layer at a time, resumable after every layer."""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..corpora import calibration_tokens
from ..files import digest, refuse_existing, versions, write_json
from ..machine import rank, ranks
from ..moe.identity import gate_digest
from ..moe.layers import MoELayer, decoder_layers, find_moe
from ..moe.running import check_tokens
from ..pruning.certainty import layer_certainty
from ..pruning.plan import PruningPlan
from ..pruning.search import BY_LOSS, Found, check_method, make_plan, search_layer
from ..pruning.weights import Sparsity, WeightPruner
from ..tracing.losses import check_loss, weighed
from ..tracing.recorder import tokens_digest
from ..tracing.statistics import median_ratios, nearly_top1
from ..tracing.trace import LayerTrace, Trace, check_beta, layer_file, save_layer, write_about
from ..tracing.walk import BATCH
from .folder import PLAN, side_files
from .layout import Checkpoint, Layout, count_experts, expert_counts
from .models import load_tokenizer, write_betas
from .progress import ResumableJob
from .reader import CheckpointReader, fetch
from .stored import StoredCheckpoint
from .streaming import CheckpointWalk, Streamed
from .writer import CheckpointWriter

FORMAT = 3  # of unfinished work
PRIVATE = ("gate", "n", "k")  # in a layer's record, but not in the report


class _Job:
    """The steps that every job takes: open and check the source, calibrate, start or resume, walk, publish."""

    def __init__(self, source, destination, revision: str | None, r: int | None = None, dtype=None, device=None, plan=None):
        """r: the experts to keep of each layer (None: all). Checks the source's headers and side files.

        What is written of a quantised source, `output`, stays quantised if r and no dtype is given."""
        self.destination = refuse_existing(destination)
        reader = CheckpointReader(fetch(str(source), revision))
        n = count_experts(reader.config)
        layout, stays = Layout(reader.config, n if r is None else r), bool(reader.method and r and dtype is None)
        decoded = Checkpoint(reader, layout) if reader.decoded or not (stays and plan) else None
        self.output = StoredCheckpoint(reader, layout) if stays else decoded
        self.checkpoint = decoded or self.output
        self.copied, not_copied = side_files(reader.folder, same_experts=r in (None, n), quantised=stays)
        self.origin = {"source": str(source), "revision": revision, "quantised": reader.method, "not_copied": not_copied}
        self.origin |= {"left_out": self.output.left_out, "carried": len(self.output.carried)}
        self.dtype, self.device = dtype, device
        # The inputs, for the report and for the check on resuming:
        self.about: dict = {"dequantised": not stays} if reader.method else {}

    def calibrate(self, calibration, sequences: int = 0, length: int = 0, seed: int | None = None) -> None:
        """Take token ids [sequences, length], or draw them from a corpus."""
        if isinstance(calibration, str):
            tokenizer = load_tokenizer(str(self.checkpoint.source.folder))
            self.tokens = calibration_tokens(calibration, tokenizer, sequences=sequences, length=length, seed=seed)
        else:
            self.tokens, calibration = calibration, "token ids"
        if len(self.tokens) < ranks():
            raise ValueError(f"{len(self.tokens)} sequences cannot be split over {ranks()} processes: use more sequences.")
        self.streamed = Streamed(self.checkpoint, self.dtype, self.device)
        check_tokens(self.streamed.model, self.tokens)
        self.about |= {"calibration": calibration, "seed": seed, "calibration set": tokens_digest(self.tokens)}
        self.about |= {"sequences": len(self.tokens), "length": self.tokens.shape[1]}
        self.about |= {"dtype": str(self.streamed.dtype), "ranks": ranks()}

    def start(self, check: Callable[[], None] | None = None, **inputs) -> None:
        """Begin, or resume unfinished work with the same source and inputs. `check` runs once, before anything is written."""
        started = time.perf_counter()
        inputs = {"format": FORMAT, "source": self.checkpoint.source.fingerprint, **self.about, **inputs}
        self.progress = ResumableJob(self.destination, inputs, check)
        self.origin["checking"] = time.perf_counter() - started
        self.writer = CheckpointWriter(self.output, self.progress.out)

    def walk(self, check: Callable[[], None] | None = None, **options) -> CheckpointWalk:
        """`start`, and a walk with these options."""
        self.start(check, **options)
        return CheckpointWalk(self.streamed.model, self.tokens, self.progress, **options)

    def run(self, *steps: Callable) -> list[dict]:
        """Visit and write every unfinished decoder layer; see `ResumableJob.run`."""
        return self.progress.run(len(self.streamed), self.streamed.layer, *steps)

    def publish(self, report: dict, r: int, method: str, records: list[dict], plan: PruningPlan | None = None) -> dict:
        """Write the other files, move the folder to its destination, and return the report."""
        report = self.about | self.origin | report
        report["layers"] = [{key: value for key, value in record.items() if key not in PRIVATE} for record in records]
        report["seconds"] = sum(sum(record["seconds"].values()) for record in records)
        report |= {"peak_gb": max(record["peak_gb"] for record in records), "versions": versions()}
        if rank() == 0:
            if plan is not None:
                write_json(self.progress.out / PLAN, asdict(plan))
            if "sequences" in report:
                method += f", calibrated on {report['sequences']} x {report['length']} tokens of {report['calibration']}"
            self.writer.finish(r, report, method, self.copied)
        self.progress.finish()
        return report


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

    source: a local folder of safetensors, or a hub id. dtype: the dtype to compute in, or its name (None: that of most stored
    weights). After a crash the same call resumes after the last finished layer. Raises ValueError as `CheckpointReader`,
    `Layout` and `trace` do, and if the unfinished work has other inputs or options; FileExistsError if `folder` exists.
    """
    if ranks() > 1:
        raise ValueError("trace_checkpoint works on one process: use prune_checkpoint under torchrun.")
    job = _Job(source, folder, revision, None, dtype, device)
    job.calibrate(tokens)
    job.about["keep"] = keep
    walk, out = job.walk(batch_size=batch_size, chunk_tokens=chunk_tokens), job.progress.out
    of_moe = [number for number, decoder in enumerate(decoder_layers(job.checkpoint.layout.text)) if find_moe(decoder)]

    def save(number: int, traced: LayerTrace) -> dict:
        return {"about": save_layer(traced, out / layer_file(of_moe.index(number)))}

    records = [record for record in job.run(walk.tracing(keep, save)) if "about" in record]
    model = digest([record["gate"] for record in records])
    write_about(out, model, job.about["calibration set"], [record["about"] for record in records])
    job.progress.finish()
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
    loss: str = "residual",
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    batch_size: int = BATCH,
    chunk_tokens: int | None = None,
    until_stable: bool = False,
    skip: bool = False,
) -> dict:
    """Prune a checkpoint to r experts a layer from disk to disk, one decoder layer and the hidden states at a time.

    r: how many to keep, or a `PruningPlan`; with a plan nothing is computed and no calibration set is read.
    source: a local folder of safetensors, or a hub id. destination: a folder of the same kind, with tokenizer, index,
    `plan.json`, a model card and `pruning_report.json`, which is also returned: kept experts, losses, betas, seconds, peak
    memory, versions, the calibration set, the tensors ("left_out") and files ("not_copied") of the source that are not
    copied, and a warning if skipping would be top-1 routing (`statistics.nearly_top1`). Weights are copied bit by bit and
    written in the layout that transformers publishes. A quantised source stays quantised, in its own layout, and the lists in
    its quantisation config name the experts by their new numbers; with a dtype, FP8 and MXFP4 become bfloat16. In a composite
    checkpoint the language model is pruned; every other tensor is copied as it is stored, so multi-token prediction layers
    keep all their experts. A quantisation that is not decoded here (GPTQ, AWQ, AutoRound, compressed-tensors) takes a plan,
    made with the model before quantisation; where its routers were stored anew in float16, it is not checked that the plan
    was made with this model ("unchecked").
    calibration: a corpus or path as for `calibration_tokens`, or token ids [sequences, length]. method, loss: as for
    `search_experts`. Scores and "random" run only the experts that a token is routed to, so that their losses are None.
    dtype: the dtype to compute in, or its name (None: that of most stored weights). batch_size: sequences in one forward
    pass. An enumeration also reports how sure each layer's choice is (`certainty`).
    until_stable: choose each layer's experts after 8, 16, 32, ... sequences, and stop recording it once two successive choices
    are the same. The layer's record says after how many "sequences"; its loss and betas are those of these sequences. The
    others still pass through the layer.
    skip: write the pruned model's betas to `esparse.json`, so that `load_model` and the plug-in for vLLM skip with them.

    After a crash, also for lack of disk or memory, the destination does not exist, and the same call resumes after the last
    finished layer. Under `torchrun` every process takes its share of the sequences, and all choose the same experts.
    Raises FileExistsError if the destination exists, and ValueError for r out of range, for unfinished work with other
    inputs or options, for until_stable on several processes, for skip with a plan or with one expert a token, and for any fault
    of the source, before any layer runs.
    """
    check_method(method)
    check_loss(loss)
    if isinstance(r, PruningPlan):
        if skip:
            raise ValueError("Skipping takes its betas from the calibration, which a plan leaves out: prune without a plan.")
        return _prune_to_plan(source, destination, r, revision, dtype)
    if until_stable and ranks() > 1:
        raise ValueError("until_stable counts the sequences of one process: run it without torchrun.")
    job = _Job(source, destination, revision, r, dtype, device)
    if skip:
        check_beta(0, expert_counts(job.checkpoint.source.config)[1])
    job.calibrate(calibration, sequences, length, seed)
    job.about |= {"r": r, "method": method, "loss": loss, "until_stable": until_stable}
    options = {"batch_size": batch_size, "chunk_tokens": chunk_tokens, "progressive": method == "progressive"}
    walk = job.walk(job.checkpoint.check_finite, **options)
    search = _searcher(r, method, loss, seed, job.checkpoint.layout.layers)

    def choose(number: int, traced: LayerTrace) -> dict:
        record = _choice(traced, search(number, traced))
        if method == "enumerate" and len(job.tokens) > 1:
            record["certainty"] = _certainty(weighed(traced, loss), record["kept"])
        return record | ({"sequences": len(traced.order) // traced.length} if until_stable else {})

    keep = r if method in BY_LOSS else job.checkpoint.layout.n  # the others need only the chosen experts
    records = job.run(walk.tracing(keep, choose, search if until_stable else None), job.writer.write_layer)
    pruned = [record for record in records if "kept" in record]
    chosen = [(record["kept"], record["loss"], record["runner_up"]) for record in pruned]
    plan = make_plan(method, loss, r, chosen, digest([record["gate"] for record in pruned]), job.about["calibration set"])
    if skip and rank() == 0:
        numbers = [number for number, record in enumerate(records) if "kept" in record]
        write_betas(job.progress.out, numbers, [record["beta_pruned"] for record in pruned])
    return job.publish(_counts(records), r, plan.label, records, plan)


def _prune_to_plan(source: str | Path, destination: str | Path, plan: PruningPlan, revision: str | None, dtype) -> dict:
    job = _Job(source, destination, revision, plan.r, dtype, plan=plan)
    planned, unchecked = _planned_records(plan, job.checkpoint)
    # Where bytes are copied, they are checked on their way.
    job.start(None if job.output.quantised else job.checkpoint.check_finite, plan=digest(asdict(plan)))
    try:
        records = job.progress.run(len(planned), nullcontext, lambda number, _: planned[number], job.writer.write_layer)
        report = {"method": plan.method, "r": plan.r, "calibration set": plan.tokens, **unchecked, **_counts(records)}
        return job.publish(report, plan.r, f"{plan.label}, by a plan made before", records, plan)
    except ValueError:  # a fault of the source, after whose repair the work begins anew
        job.progress.abandon()
        raise


def _planned_records(plan: PruningPlan, checkpoint: Checkpoint | StoredCheckpoint) -> tuple[list[dict], dict]:
    """Each decoder layer's record, from the plan; and {"unchecked": why} where it cannot be told whose plan it is.

    Raises ValueError for a plan of another model, before anything is written.
    """
    routers = [_stored_router(checkpoint, number) for number in range(checkpoint.layout.layers)]
    layers = [layer for layer, _ in routers if layer]
    model = digest([gate_digest(layer) for layer in layers])
    # Some quantisers store the routers in float16, which rounds the smallest weights of bfloat16.
    rounded = (
        not checkpoint.source.decoded and model != plan.model and all(kinds == {torch.float16} for _, kinds in routers if kinds)
    )
    plan.check(plan.model if rounded else model, [(layer.n, layer.k, layer.router) for layer in layers])
    kept = iter(zip(plan.kept, plan.losses, strict=True))
    records = [
        dict(zip(("kept", "loss"), next(kept), strict=True), n=layer.n, k=layer.k) if layer else {} for layer, _ in routers
    ]
    why = "whether the plan was made with this model: its routers were stored anew in float16"
    return records, {"unchecked": why} if rounded else {}


def _stored_router(checkpoint: Checkpoint | StoredCheckpoint, number: int) -> tuple[MoELayer | None, set[torch.dtype]]:
    """A decoder layer's MoE (None: dense) with the weights of its router alone, in float32, and their stored dtypes."""
    layers = decoder_layers(checkpoint.layout.text)
    layer, start = find_moe(copy.deepcopy(layers[number])), _name(checkpoint.layout.text, layers[number])
    if layer is None:
        return None, set()
    place, gate = f"{start}.{layer.name}".removesuffix("."), _name(layer.block, layer.gate)
    names = [name for name in layer.block.state_dict() if name.startswith(f"{gate}.") or "." not in name]
    stored = {name: checkpoint.read(f"{place}.{name}") for name in names}
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    layer.block.load_state_dict(state, strict=False, assign=True)
    return layer, {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()}


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _searcher(r: int, method: str, loss: str, seed: int, layers: int) -> Callable[[int, LayerTrace], Found]:
    """A function that searches each layer. Each layer has its own seed, so a random choice survives resuming."""
    seeds = torch.randint(2**31, (layers,), generator=torch.Generator().manual_seed(seed)).tolist()

    def search(number: int, traced: LayerTrace) -> Found:
        return search_layer(weighed(traced, loss), r, method, torch.Generator().manual_seed(seeds[number]))

    return search


def _choice(traced: LayerTrace, found: Found) -> dict:
    """A layer's kept experts, their loss, and betas."""
    kept, loss, runner_up = found
    record = {"kept": kept, "loss": loss, "runner_up": runner_up}
    if traced.k > 1:
        pruned, after_first = median_ratios(traced, kept)
        record |= {"beta": median_ratios(traced)[0], "beta_pruned": pruned, "after_first": after_first}
    return record


def _certainty(traced: LayerTrace, kept: list[int]) -> dict:
    """`layer_certainty` for a report, with the shares of the kept experts alone."""
    found = layer_certainty(traced, len(kept))
    return {"shares": [found["shares"][expert] for expert in kept], "margin": found["margin"], "settled": found["settled"]}


def _counts(records: list[dict]) -> dict:
    """n and k of a pruned model, and a sentence where its betas would leave little more than the top expert."""
    pruned = next(record for record in records if "kept" in record)
    warning = nearly_top1([record["after_first"] for record in records if "after_first" in record])
    return {"n": pruned["n"], "k": pruned["k"]} | ({"skipping": warning} if warning else {})


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
    """`prune_weights` from disk to disk, one decoder layer and the hidden states at a time, resumable as `prune_checkpoint`.

    The destination has the source's tensors, with zeros in those in scope. Zeros are stored, so it is no smaller.
    Returns the report, which is also written. Raises what `prune_weights` and `prune_checkpoint` raise.
    """
    pruner = WeightPruner(Sparsity.read(sparsity), method, scope, dense)
    job = _Job(source, destination, revision, None, dtype, device)
    pruner.check(job.checkpoint.layout.text)
    job.calibrate(calibration, sequences, length, seed)
    job.about |= {"sparsity": str(pruner.sparsity), "method": method, "scope": scope, "dense": dense}
    n, k = expert_counts(job.checkpoint.source.config)
    walk = job.walk(job.checkpoint.check_finite, batch_size=batch_size)

    def visit(number: int, decoder: nn.Module) -> dict:
        record = pruner.prune_layer(walk, number)
        if rank() == 0:
            stored, pruned = job.checkpoint.pruned(number, range(n)), job.streamed.state(number)
            job.writer.write(number, {name: _zeroed(stored[name], tensor) for name, tensor in pruned.items()})
        return record

    records = job.run(visit)
    report = pruner.summary(records) | {"n": n, "k": k}
    return job.publish(report, n, f"weights by {method}, sparsity {pruner.sparsity} of {scope}", records)


def _zeroed(stored: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """The source's tensor with the zeros of the pruned one, which may have another dtype. All other entries keep their bits,
    and so does a whole tensor whose only new zeros come from rounding to that dtype."""
    gone = pruned == 0
    return stored.masked_fill(gone, 0) if (gone & (stored.to(pruned.dtype) != 0)).any() else stored
