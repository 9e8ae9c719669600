"""Reads which experts of a full checkpoint a pruned one holds, whoever pruned it."""

import hashlib
import re
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..files import digest, read_json
from ..moe.identity import gate_digest
from ..moe.layers import MoELayer, find_moe
from ..pruning.plan import PruningPlan
from .layout import opened
from .streaming import Streamed

NEARER = 0.5  # how far a changed expert may lie from its own, as a share of the distance from the next
COLUMNS = 2**16  # weights of each expert that are compared at once


def kept_experts(full: str | Path, other: str | Path) -> PruningPlan:
    """The plan by which `other` was pruned from `full`, a folder of safetensors or a hub id.

    other: such a folder or hub id with fewer experts a layer; or a JSON file: a saved plan, which is returned as it is if it is
    one of `full`, or the `report_path` of llm-compressor's REAPPruningModifier, kept experts by module name. Of two folders the
    experts' weights are compared, in any order, layout and dtype, with one layer of each in memory. First experts are matched
    bit by bit, in the dtype of `other`. An expert without a match, such as a trained or scaled one, is taken for the nearest
    (Frobenius norm of the difference) if the next is more than twice as far. The mean of two experts has no such nearest one.
    The plan's method says how near the experts are. Its losses are None, its tokens "".
    Raises ValueError for an expert that is no single one of `full`, for another model, also a plan's, and for a folder that
    cannot be read.
    """
    written = Path(other).is_file()
    report = read_json(other, "pruning plan") if written else None
    saved = PruningPlan.load(other) if isinstance(report, dict) and "kept" in report else None
    small = None if written else Streamed(opened(other))
    whole = Streamed(opened(full, r=small and small.checkpoint.layout.n))
    if small and _shapes(small, "shapes") != _shapes(whole, "small_shapes"):
        raise ValueError(f"{other} was not pruned from {full}: apart from its number of experts it has other tensors.")
    numbers = tqdm(range(len(whole)), desc=f"comparing {Path(other).name}", unit="layer", leave=False)
    found = [about for number in numbers if (about := _compared(whole, small, number))]
    gates, layers, held, ratios = zip(*found, strict=True)
    model, plan = digest(list(gates)), saved
    if plan is None:
        kept = [sorted(experts) for experts in held] if small else _reported(other, report)
        changed = f", experts up to {max(ratios):.1%} as far from their own as from the next" * (max(ratios) > 0)
        method = f"read from {Path(other).name}{changed}"
        plan = PruningPlan(method, len(kept[0]), kept, [None] * len(kept), model, tokens="")
    plan.check(model, layers)
    return plan


def _shapes(model: Streamed, which: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the text model's parameters: "shapes" or "small_shapes" of the layout."""
    layout = model.checkpoint.layout
    return {text: getattr(layout, which)[name] for name, text in layout.text_names.items()}


def _reported(path: str | Path, report: object) -> list[list[int]]:
    """The kept experts of llm-compressor's report, by layer. ValueError for any other file."""
    lists = [*report.values()] if isinstance(report, dict) else []
    if not lists or not all(isinstance(kept, list) and kept and {int}.issuperset(map(type, kept)) for kept in lists):
        raise ValueError(f"{path} is neither a pruning plan nor a report of the experts kept in each layer.")
    return [report[name] for name in sorted(report, key=lambda name: [*map(int, re.findall(r"\d+", name))])]


def _compared(whole: Streamed, small: Streamed | None, number: int) -> tuple | None:
    """Of a decoder layer's MoE: the gate's digest; n, k and router; and what `_held` returns. None for a dense layer."""
    with whole.layer(number) as decoder, small.layer(number) if small else nullcontext() as pruned:
        if (layer := find_moe(decoder)) is None:
            return None
        held = _held(layer, find_moe(pruned), number) if small else (None, 0.0)
        return gate_digest(layer), (layer.n, layer.k, layer.router), *held


@torch.no_grad()
def _held(whole: MoELayer, small: MoELayer, number: int) -> tuple[list[int], float]:
    """The experts of `whole` in the order in which `small` holds them; the largest ratio of the distance from the nearest
    to the distance from the next, 0 where all are equal bit by bit."""
    own = {name: p for name, p in small.experts.named_parameters(recurse=False) if len(p) == small.n}
    pairs = [(getattr(whole.experts, name).flatten(1), p.flatten(1)) for name, p in own.items()]
    full, pruned = _digests([p.to(other.dtype) for p, other in pairs]), _digests([other for _, other in pairs])
    held = [full.index(bits) if full.count(bits) == 1 else None for bits in pruned]
    changed, ratios = [place for place, expert in enumerate(held) if expert is None], [0.0]
    for place, distances in zip(changed, _distances(pairs, changed), strict=True):
        near = distances.topk(2, largest=False)
        held[place], (first, second) = near.indices[0].item(), near.values.tolist()
        ratios.append(first / second if second else 1.0)
        if ratios[-1] >= NEARER:
            raise ValueError(
                f"Expert {place} of decoder layer {number} is no single expert of the full model: it lies {ratios[-1]:.0%} as "
                f"far from the nearest, {held[place]}, as from the next, so it was merged, or trained too far."
            )
    return held, max(ratios)


def _digests(parameters: list[Tensor]) -> list[bytes]:
    """A digest of the bits of each expert's weights, from parameters [experts, size]."""
    bits = lambda row: row.contiguous().view(torch.uint8).numpy()  # noqa: E731
    return [hashlib.sha256(b"".join(map(bits, rows))).digest() for rows in zip(*parameters, strict=True)]


def _distances(pairs: list[tuple[Tensor, Tensor]], places: list[int]) -> Tensor:
    """The Frobenius norm of the difference of each pruned expert at `places` from each full one, float64 [places, n]."""
    squares = torch.zeros(len(places), len(pairs[0][0]), dtype=torch.float64)
    for full, pruned in pairs if places else ():
        for one, other in zip(full.split(COLUMNS, 1), pruned[places].split(COLUMNS, 1), strict=True):
            squares += torch.cdist(other.float(), one.float()).double().square()
    return squares.sqrt()
