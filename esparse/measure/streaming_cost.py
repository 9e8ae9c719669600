"""The cost of pruning a checkpoint from disk, compared with reading and writing it."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

from ..checkpoints.folder import INDEX, PLAN, REPORT
from ..checkpoints.jobs import prune_checkpoint
from ..checkpoints.layout import Checkpoint, Layout
from ..checkpoints.models import load_tokenizer
from ..checkpoints.reader import CheckpointReader
from ..files import data_folder, read_json, write_json
from ..machine import seconds_of
from ..pruning.plan import PruningPlan
from .timing import MIXTRAL_8X7B, keep, report


def write_random_checkpoint(folder: Path, shape: Mapping[str, object], fp8: bool = False) -> None:
    """Write a Mixtral with random weights in the hub's layout, with the tiny tokenizer, one layer in memory at a time.

    shape: entries of its config, which may have another number of experts than 8, and another dtype than bfloat16. fp8: with
    attention and experts in FP8 and a scale of 1 for each block.
    """
    load_tokenizer(str(data_folder() / "tiny")).save_pretrained(folder)
    about = {"num_local_experts": 8, "num_experts_per_tok": 2, "dtype": "bfloat16", "architectures": ["MixtralForCausalLM"]}
    config = MixtralConfig(**about | shape)
    if fp8:
        config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.save_pretrained(folder)
    layout, generator, places = Layout(config, config.num_local_experts), torch.Generator().manual_seed(0), {}
    for number in (None, *range(layout.layers)):
        state = {name: torch.ones(layout.full[name], dtype=config.dtype) for name in layout.published_names(number)}
        for name, tensor in state.items():
            if "norm" not in name:
                tensor.normal_(0.0, 0.02, generator=generator)
        for name in [name for name in state if fp8 and name.endswith(("proj.weight", "w1.weight", "w2.weight", "w3.weight"))]:
            scale = torch.ones([-(-size // 128) for size in state[name].shape])
            state |= {name: state[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
        file = f"model-{0 if number is None else number + 1:05d}-of-{layout.layers:05d}.safetensors"
        save_file(state, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(state, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})


def stream_floor(folder: Path, r: int, tokens: int) -> dict[str, float]:
    """Seconds to read every weight of a Mixtral folder once, to write the kept ones, and for the bare matrix products."""
    source = CheckpointReader(folder)
    layout = Layout(source.config, r)
    checkpoint, seconds, state = Checkpoint(source, layout), dict.fromkeys(("reading", "writing", "products"), 0.0), {}

    def read(number: int | None) -> None:
        state.clear()
        state.update({name: source.read(name).clone() for name in checkpoint.stored(number)})

    seconds["reading"] += seconds_of(lambda: read(None))
    for number in range(layout.layers):
        seconds["reading"] += seconds_of(lambda: read(number))  # noqa: B023
        stay = {name: tensor for name, tensor in state.items() if name in layout.small}
        seconds["writing"] += seconds_of(lambda: save_file(stay, folder / "written.tmp"))  # noqa: B023
        (folder / "written.tmp").unlink()
        for name, tensor in state.items():
            if tensor.ndim == 2:
                rows = tokens * (2 + layout.n - r) // layout.n if ".experts." in name else tokens
                inputs = torch.ones(rows, tensor.shape[1], dtype=tensor.dtype)
                seconds["products"] += seconds_of(lambda: inputs @ tensor.T)  # noqa: B023
    return seconds


def bench_stream(out: Path | None = None, shape: Mapping[str, object] | None = None) -> str:
    """Pruning a four-layer Mixtral of full width from disk, 8 to 6 experts, 4 x 256 tokens; needs 25 GB of free disk.

    A fresh process prunes, so that its peak memory is its own. The tokens come from the corpus "web".
    """
    shape = shape or {**MIXTRAL_8X7B, "num_hidden_layers": 4}
    with tempfile.TemporaryDirectory(prefix="esparse-stream-", dir=Path.cwd()) as name:
        source, pruned = Path(name) / "source", Path(name) / "pruned"
        write_random_checkpoint(source, shape)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
        command = [sys.executable, "-m", "esparse", "prune", str(source), str(pruned), "--experts", "6"]
        command += ["--calibration", "web", "--sequences", "4", "--length", "256"]
        seconds = seconds_of(lambda: subprocess.run(command, check=True, capture_output=True))
        done = read_json(pruned / REPORT, "pruning report")
        floor = stream_floor(source, 6, 4 * 256)
    peak, checking, taken = done["peak_gb"], done["checking"], done["seconds"] + done["checking"]
    steps = {step: sum(layer["seconds"][step] for layer in done["layers"]) for step in done["layers"][0]["seconds"]}
    result = {"source_gb": size, "peak_gb": peak, "command": seconds, "layers": done["seconds"], "steps": steps}
    result |= {"checking": checking, "floor": floor, "shape": dict(shape), "weights": "random"}
    result = keep(result | {"over_floor": taken / sum(floor.values())}, out)
    totals = {"GB on disk": size, "peak GB of memory": peak, "with starting up": seconds, "s": taken}
    totals["times the least"] = result["over_floor"]
    return report({"pruning from disk": [totals], "its steps, s": [{"checking": checking} | steps], "the least, s": [floor]})


def bench_copy(out: Path | None = None, shape: Mapping[str, object] | None = None) -> str:
    """Pruning a one-layer Mixtral of full width in block FP8 by a plan, 8 to 6 experts, against `cp` of the same bytes.

    Each is the best of five, in turn, until the bytes are on the disk (`sync`); beside them, once, the dequantised copy in
    bfloat16. Needs 8 GB of free disk.
    """
    shape = shape or {**MIXTRAL_8X7B, "num_hidden_layers": 1}
    with tempfile.TemporaryDirectory(prefix="esparse-copy-", dir=Path.cwd()) as name:
        source, pruned, new = (Path(name) / part for part in ("source", "pruned", "new"))
        write_random_checkpoint(source, shape, fp8=True)
        prune_checkpoint(source, pruned, 6, method="random", calibration="web", sequences=1, length=32)
        plan, size = PruningPlan.load(pruned / PLAN), sum(path.stat().st_size for path in pruned.glob("*.safetensors")) / 1e9
        makes = {
            "cp": lambda: subprocess.run(["cp", "-r", pruned, new], check=True),
            "as stored": lambda: prune_checkpoint(source, new, plan),
            "bfloat16": lambda: prune_checkpoint(source, new, plan, dtype="bfloat16"),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in makes}
        for kind in (*makes, *("cp", "as stored") * 4):
            seconds[kind].append(seconds_of(lambda: (makes[kind](), os.sync())))  # noqa: B023
            shutil.rmtree(new)
    best = {kind: min(times) for kind, times in seconds.items()}
    result = {"written_gb": size, "seconds": seconds, "over_cp": best["as stored"] / best["cp"]}
    result = keep(result | {"shape": dict(shape), "weights": "random"}, out)
    row = {"GB written": size} | {f"{kind}, s": time for kind, time in best.items()} | {"times cp": result["over_cp"]}
    return report({"pruning FP8 by a plan": [row]})
