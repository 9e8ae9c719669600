"""The cost of pruning a checkpoint from disk as it grows, in runs beside their estimates; and estimates for published models.

    python -m esparse.measure.scale_cost FOLDER EXPERTS SEQUENCES LENGTH METHOD

prunes FOLDER/source in a process of its own, whose peak memory is that of this work, and writes FOLDER/run.json.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..checkpoints.estimate import Device, estimated, measured_device, numel
from ..checkpoints.jobs import prune_checkpoint
from ..checkpoints.layout import Layout, opened
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.streaming import FileStream
from ..files import read_json, write_json
from ..machine import seconds_of
from .streaming_cost import write_random_checkpoint
from .timing import MIXTRAL_8X7B, keep, processor_seconds, report, rise_of_memory

CLOCKS = (seconds_of, processor_seconds)  # other work on the machine slows the first alone
# A run: entries of a Mixtral's config, then what `prune_checkpoint` gets. Three quarters of the experts stay.
BASE = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
BASE |= {"num_key_value_heads": 4, "num_local_experts": 16, "num_experts_per_tok": 4, "tie_word_embeddings": False}
BASE |= {"dtype": "float32", "sequences": 8, "length": 512, "method": "greedy"}
RUNS: dict[str, dict] = {
    "base": {},
    "layers x 2": {"num_hidden_layers": 8},
    "experts x 2": {"num_local_experts": 32},
    "experts x 4": {"num_local_experts": 64},
    "tokens x 2": {"sequences": 16},
    "tokens x 4": {"sequences": 32},
    "width x 2": {"hidden_size": 1024, "intermediate_size": 1024},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, experts x 4, top-8": {"dtype": "bfloat16", "num_local_experts": 64, "num_experts_per_tok": 8},
    "8 experts, top-2, enumerated": {"num_local_experts": 8, "num_experts_per_tok": 2, "method": "enumerate"},
    # The constants of the estimate were fitted to the runs above, not to these.
    "other sizes": {"hidden_size": 768, "intermediate_size": 384, "num_hidden_layers": 6, "num_local_experts": 24}
    | {"num_experts_per_tok": 6, "sequences": 12, "length": 256},
    "128 thin experts, top-8": {"intermediate_size": 128, "num_local_experts": 128, "num_experts_per_tok": 8},
    "8 wide experts, top-2, bfloat16": {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 2}
    | {"num_local_experts": 8, "num_experts_per_tok": 2, "sequences": 4, "dtype": "bfloat16"},
}
# Entries of the published config.json; how many experts stay, the method, and the bytes in which a weight is stored.
QWEN3_235B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "head_dim": 128,
}
QWEN3_235B |= {"num_attention_heads": 64, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}
DEEPSEEK_V3 = {"vocab_size": 129280, "hidden_size": 7168, "moe_intermediate_size": 2048, "num_hidden_layers": 61}
DEEPSEEK_V3 |= {"num_attention_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
PUBLISHED = {
    "Mixtral 8x7B, 8 to 6": ("mixtral", MIXTRAL_8X7B, 6, "enumerate", 2),
    "Qwen3-235B-A22B, 128 to 96": ("qwen3_moe", QWEN3_235B, 96, "greedy", 2),
    "DeepSeek-V3, 256 to 192": ("deepseek_v3", DEEPSEEK_V3, 192, "greedy", 1),
}
GPU = Device(flop=400e12, memory=1e12, host=10e9, read=3e9, write=2e9, free=80e9, host_free=1e12)
DEVICES = {  # assumed, not measured; the processes that share the sequences
    "one GPU": (GPU, 1),
    "eight GPUs": (GPU, 8),
    "a laptop": (Device(flop=0.3e12, memory=5e9, host=5e9, read=3e9, write=1e9, free=24e9, host_free=24e9), 1),
}


def prune(folder: Path, r: int, sequences: int, length: int, method: str) -> dict:
    """Seconds, processor seconds and bytes of pruning the folder's `source`; their estimate; and this machine, as measured by
    both clocks before and after."""
    source, read, done = folder / "source", counted_reading(), {}
    checkpoint = opened(source, r=r)
    written = checkpoint.written()
    dtype = max(written, key=written.get)
    measured = lambda: [measured_device(dtype, folder, next(source.glob("*.safetensors")), timed) for timed in CLOCKS]  # noqa: E731
    devices = measured()
    about = {"method": method, "dtype": dtype, "result": written.total(), "free": devices[0].free}
    job = estimated(checkpoint.layout, r, sequences, length, **about)
    tokens = torch.randint(3, 1000, (sequences, length), generator=torch.Generator().manual_seed(0))
    options = {"calibration": tokens, "method": method}
    before, cpu, wall = handed_over(), time.process_time(), time.perf_counter()
    held = rise_of_memory(lambda: done.update(prune_checkpoint(source, folder / "pruned", r, **options)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    search, write = (sum(layer["seconds"][step] for layer in done["layers"]) for step in ("search", "write"))
    run = {"trace": wall - search - write, "search": search, "write": write, "seconds": wall, "processor": cpu}
    run |= {"read": sum(read), "written": handed_over() - before, "held": held}
    device, processor = map(between, devices, measured())
    steps = job.seconds(device)
    counted = {name: getattr(job, name) for name in ("read", "written", "held", "flop")}
    counted |= {"seconds": sum(steps.values()), "processor": sum(job.seconds(processor).values())}
    return {"run": run, "estimate": steps | counted, "device": asdict(device), "by processor": asdict(processor)}


def between(one: Device, other: Device) -> Device:
    """A machine that takes the mean of both times for the same work: other work may have slowed one of them down."""
    return Device(*(2 / (1 / first + 1 / second) for first, second in zip(astuple(one), astuple(other), strict=True)))


def counted_reading() -> list[int]:
    """A list to which all that a job reads from now on adds its bytes; the system counts no reading of mapped files."""
    sizes: list[int] = []

    def counted(read: Callable) -> Callable:
        def reading(*arguments):
            found = read(*arguments)
            sizes.extend(part.nbytes for part in (found if isinstance(found, tuple) else (found,)) if part is not None)
            return found

        return reading

    CheckpointReader.read_stored = counted(CheckpointReader.read_stored)
    FileStream.__getitem__ = counted(FileStream.__getitem__)
    return sizes


def handed_over() -> int:
    """The bytes that this process has handed to the system to write. Linux tells them."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["wchar"])


def grown(changes: Mapping[str, object]) -> dict:
    """`prune` of the base with these changes, in a process of its own."""
    shape = BASE | changes
    sequences, length, method = (shape.pop(name) for name in ("sequences", "length", "method"))
    with tempfile.TemporaryDirectory(prefix="esparse-scale-", dir=Path.cwd()) as name:
        write_random_checkpoint(Path(name) / "source", shape)
        numbers = map(str, (shape["num_local_experts"] * 3 // 4, sequences, length))
        subprocess.run([sys.executable, "-m", __name__, name, *numbers, method], check=True, capture_output=True)
        return read_json(Path(name) / "run.json", "result")


def on_paper() -> list[dict]:
    """Estimates for the published models on the assumed devices, for 128 x 2048 tokens."""
    rows = []
    for name, (kind, entries, r, method, stored) in PUBLISHED.items():
        layout = Layout(AutoConfig.for_model(kind, **entries), r)
        for place, (device, ranks) in DEVICES.items():
            about = {"method": method, "result": stored * numel(layout.small), "free": device.free}
            job = estimated(layout, r, 128, 2048, **about, ranks=ranks)
            steps = {f"{step}, h": seconds / 3600 for step, seconds in job.seconds(device).items()}
            row = {"model": name, "on": place, "FLOP": f"{job.flop:.1e}", "reach": job.reach} | steps
            row |= {"hours": sum(steps.values()), "read, GB": job.read / 1e9, "written, GB": job.written / 1e9}
            rows.append(row | {"held, GB": job.held / 1e9, "fits": "yes" if job.held < device.free else "no"})
    return rows


def bench_scale(out: Path | None = None, runs: Sequence[str] = tuple(RUNS)) -> str:
    """Pruning small Mixtrals with random weights as layers, experts, tokens and width grow, each run beside its estimate, and
    estimates for published models. Needs 2 GB of free disk. Runs on Linux alone."""
    if sys.platform != "linux":
        raise RuntimeError("A process's memory and bytes written are read from /proc: run this on Linux.")
    rows = []
    for name in tqdm(runs, desc="scale", unit="run"):
        rows.append({"name": name, "changes": RUNS[name]} | grown(RUNS[name]))
        result = keep({"base": BASE, "weights": "random", "rows": rows}, out)
    devices = {place: asdict(device) | {"processes": ranks} for place, (device, ranks) in DEVICES.items()}
    result = keep(result | {"assumed": devices, "on paper": on_paper()}, out)
    assumed = [{"device": place} | {name: f"{value:.1e}" for name, value in row.items()} for place, row in devices.items()]
    tables = {"runs, s and MB, and the estimate over each": list(map(_cells, rows))}
    return report(tables | {"on paper, not run": result["on paper"], "assumed": assumed})


def _cells(row: Mapping) -> dict:
    run, estimate = row["run"], row["estimate"]
    cells = {"run": row["name"]}
    for name in ("processor", "seconds", "trace", "search", "write", "read", "written", "held"):
        value = run[name] / (1e6 if name in ("read", "written", "held") else 1)
        cells[name] = f"{value:.3g} ({estimate[name] / run[name]:.2f})"
    return cells


if __name__ == "__main__":
    folder, *numbers, method = sys.argv[1:]
    write_json(Path(folder) / "run.json", prune(Path(folder), *map(int, numbers), method))
