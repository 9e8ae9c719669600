"""esparse beside llm-compressor, on the same checkpoint and tokens, in turn."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file

from ..checkpoints.models import load_tokenizer
from ..corpora import calibration_tokens
from ..files import PACKAGE, data_folder, read_json
from .peer_work import WORKS
from .scores_cost import WIDE
from .streaming_cost import write_random_checkpoint
from .timing import keep, median_ratio, report

PINNED = "llmcompressor==0.14.0.1"
PAIRS = (  # our work, and theirs beside it
    ("reap", "their reap"),
    ("reap", "their reap, 8 at once"),
    ("reap", "their reap, basic"),
    ("enumeration", "their reap"),
    ("enumeration", "their reap, 8 at once"),
    ("wanda", "their wanda"),
    ("wanda", "their wanda, 8 at once"),
    ("wanda, dense", "their wanda, basic"),
)


def environment() -> Path:
    """The interpreter of an environment with llm-compressor, made below the user's cache if it is not there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "esparse" / PINNED.replace("==", "-")
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    command = [folder / "bin" / "python", "-m", "pip", "install", "-q", f"torch=={torch.__version__.split('+')[0]}", PINNED]
    if subprocess.run(command).returncode:
        raise RuntimeError(f"{PINNED} cannot be installed in {folder}: see pip's words above.")
    return folder / "bin" / "python"


def turns(python: Path, folder: Path, repeats: int) -> dict[str, list[dict]]:
    """The results of each work in `repeats` rounds, each in a process of its own, one thread, in turn."""
    found: dict[str, list[dict]] = {name: [] for name in WORKS}
    settings = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    for turn in range(repeats):
        for name in [*WORKS][turn:] + [*WORKS][:turn]:
            command = [python, "-m", "esparse.measure.peer_work", name, folder]
            done = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=folder.parent)
            if done.returncode:
                raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
            found[name].append(read_json(folder.parent / f"{name}.json", "result"))
    return found


def equal_share(folder: Path, one: str, other: str) -> float:
    """The share of linear maps' entries that both kept or both removed. Raises ValueError where the maps differ."""
    masks = [load_file(folder / f"{name}.safetensors") for name in (one, other)]
    if masks[0].keys() != masks[1].keys():
        raise ValueError(f"{one} and {other} pruned other linear maps: {sorted(masks[0].keys() ^ masks[1].keys())}.")
    apart = sum(int(numpy.unpackbits((masks[0][name] ^ masks[1][name]).numpy()).sum()) for name in masks[0])
    return 1 - apart / sum(8 * mask.numel() for mask in masks[0].values())


def compared(model: str, folder: Path, found: Mapping[str, list[dict]]) -> list[dict]:
    """Rows of `PAIRS`: medians of processor seconds and of MiB, ratios of one round, and what both chose."""
    rows = []
    for ours, theirs in PAIRS:
        row = {"model": model, "ours": ours, "theirs": theirs}
        for key in ("seconds", "peak_mib"):
            one, other = ([turn[key] for turn in found[work]] for work in (ours, theirs))
            row |= {key: statistics.median(one), f"their {key}": statistics.median(other)}
            row[f"{key} ratio"] = median_ratio(one, other)
        if (kept := found[ours][0]["kept"]) is None:
            row["equal"] = equal_share(folder.parent, ours, theirs)
        else:
            row["equal"] = sum(one == other for one, other in zip(kept, found[theirs][0]["kept"], strict=True)) / len(kept)
        rows.append(row)
    return rows


def bench_peers(out: Path | None = None, shape: Mapping[str, object] | None = None, repeats: int = 3) -> str:
    """REAP, enumeration and Wanda beside llm-compressor: the tiny model on 64 x 256 tokens and a four-layer Mixtral of hidden
    1024 with random weights on 8 x 256, in float32 on one thread.

    Both run in llm-compressor's environment. It takes one sequence at a time, through its sequential pipeline, as its example
    of REAP does; beside that, eight at once as we do, and its basic pipeline. "equal": the share of layers in which both keep
    the same experts, or of the entries that both masks keep or remove. Runs on Linux alone.
    """
    if sys.platform != "linux":
        raise RuntimeError("The peak memory of a process is read from /proc: run this on Linux.")
    python, rows = environment(), []
    with tempfile.TemporaryDirectory(prefix="esparse-peers-") as name:
        shutil.copytree(data_folder() / "tiny", Path(name) / "tiny" / "model")
        write_random_checkpoint(Path(name) / "random" / "model", shape or WIDE)
        for model, sequences in {"tiny": 64, "random": 8}.items():
            folder = Path(name) / model / "model"
            tokens = calibration_tokens("web", load_tokenizer(str(folder)), sequences=sequences, length=256)
            save_file({"tokens": tokens}, folder / "tokens.safetensors")
            found = turns(python, folder, repeats)
            rows += compared(model, folder, found)
            about = {"transformers": found["reap"][0]["transformers"], "peer": PINNED, "shape": dict(shape or WIDE)}
            result = keep(about | {"rows": rows}, out)
    return report({f"esparse beside {PINNED}": result["rows"]})
