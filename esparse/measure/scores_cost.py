"""The cost of calibration by a score, and by losses, compared with the model's own forward pass over the same tokens."""

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..checkpoints.by_output import Branches, from_disk
from ..checkpoints.jobs import trace_checkpoint
from ..checkpoints.models import load_model
from ..corpora import calibration_tokens
from ..files import data_folder
from ..moe.layers import decoder_layers, moe_layers
from ..pruning.search import search_experts
from ..tracing.recorder import trace
from .streaming_cost import write_random_checkpoint
from .timing import keep, median_ratio, processor_seconds, report, rounds

WIDE = {"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4, "num_attention_heads": 16}
WIDE |= {"num_key_value_heads": 4, "tie_word_embeddings": False}


@torch.no_grad()
def _forward(model, tokens: torch.Tensor) -> None:
    for batch in tokens.split(8):
        model.base_model(batch, use_cache=False)


@torch.no_grad()
def _forward_from_disk(folder: Path, tokens: torch.Tensor) -> None:
    """The same with one decoder layer in memory at a time."""
    model, loaded = from_disk(folder, dtype=torch.float32)
    branches, stream = Branches(model, loaded, tokens.split(8)), [()] * len(tokens.split(8))
    for number in range(len(decoder_layers(model))):
        (stream,) = branches.forward(number, [stream], [None])


def _costs(folder: Path, sequences: int, repeats: int) -> Iterator[dict]:
    """Rows of processor seconds, medians over rounds in turn, for a model in memory and from disk, in float32."""
    model, tokenizer = load_model(str(folder), dtype=torch.float32)
    n, tokens = moe_layers(model)[0].n, calibration_tokens("web", tokenizer, sequences=sequences, length=256)

    def from_folder(size: int):
        with tempfile.TemporaryDirectory(prefix="esparse-scores-") as name:
            return trace_checkpoint(folder, tokens, Path(name) / "trace", keep=size, dtype=torch.float32)

    places = {
        "memory": (lambda: _forward(model, tokens), lambda size: trace(model, tokens, keep=size)),
        "disk": (lambda: _forward_from_disk(folder, tokens), from_folder),
    }
    for place, (forward, traced) in places.items():
        calls = {"forward": forward, "score": lambda: search_experts(traced(n), n - 2, method="reap")}  # noqa: B023
        calls["losses"] = lambda: search_experts(traced(n - 2), n - 2)  # noqa: B023
        turns = rounds({name: lambda call=call: processor_seconds(call) for name, call in calls.items()}, repeats)
        row = {"from": place, "tokens": tokens.numel()} | {name: statistics.median(times) for name, times in turns.items()}
        yield row | {f"{name}_over_forward": median_ratio(turns[name], turns["forward"]) for name in ("score", "losses")}


def bench_scores(out: Path | None = None, shape: Mapping[str, object] | None = None, repeats: int = 3) -> str:
    """Calibration by REAP, and enumeration, keeping all but two experts: the tiny model on 64 x 256 tokens, and a four-layer
    Mixtral of hidden 1024 on 4 x 256, in memory and from disk."""
    with tempfile.TemporaryDirectory(prefix="esparse-scores-") as name:
        write_random_checkpoint(Path(name), shape or WIDE)
        models = {"tiny": (data_folder() / "tiny", 64), "hidden 1024" if shape is None else "random": (Path(name), 4)}
        rows = [{"model": name} | row for name, (folder, size) in models.items() for row in _costs(folder, size, repeats)]
    result = keep({"rows": rows, "shape": dict(shape or WIDE), "weights": "random but for tiny"}, out)
    return report({"processor seconds": result["rows"]})
