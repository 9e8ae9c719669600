"""Quantised folders pruned as they are stored: bytes of the kept experts are copied, and no weight is decoded.

A quantiser stores a weight as several tensors: its numbers, packed or not, and scales, zero points or shapes beside them.
Their names begin as the weight's own, or lie in its module, which tells whose they are in every format.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from ..moe.layers import moe_layers
from ..moe.routers import pruned_table
from .folder import BITS, DTYPES, write_file
from .layout import NUMBERED, Group, Layout, grouped
from .reader import CheckpointReader

CHUNK = 2**20  # bytes read at once
_LITERAL = r"[^:*+?^$()\[\]{}|\\]*"  # text without signs of a pattern, but for the dot
_EXPERT = re.compile(rf"({_LITERAL}?\.(\d+)\.{_LITERAL}\bexperts\.)(\d+)((?:\.{_LITERAL})?)")
_SOME_EXPERT = re.compile(r"experts\W*[\d(\[]")  # names or patterns that may tell experts apart


class Part(NamedTuple):
    """A tensor to be written: its bytes lie in stretches of a file, in the tensor of this name, or are `data`."""

    name: str
    stored: str  # safetensors' name of the dtype
    shape: tuple[int, ...]
    file: Path
    stretches: list[tuple[int, int]]
    data: bytes | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BITS[self.stored] // 8

    def chunks(self, buffer: bytearray) -> Iterator[memoryview]:
        """The bytes, at most a buffer full at once, in whole numbers of the tensor's elements."""
        if self.data is not None:
            yield memoryview(self.data)
        with self.file.open("rb") as file:
            for start, stop in self.stretches:
                file.seek(start)
                while start < stop:
                    chunk = memoryview(buffer)[: min(len(buffer), stop - start)]
                    if file.readinto(chunk) != len(chunk):
                        raise ValueError(f"{self.file} became shorter while it was read.")
                    start += len(chunk)
                    yield chunk


def write_parts(path: Path, parts: dict[str, Part]) -> None:
    """Write a safetensors file. Raises OSError where the disk is full, ValueError for NaN and infinite numbers."""
    order = sorted(parts, key=lambda name: (-BITS[parts[name].stored], name))  # as safetensors does, for aligned tensors
    told, place, buffer = {"__metadata__": {"format": "pt"}}, 0, bytearray(CHUNK)
    for name in order:
        part = parts[name]
        told[name] = {"dtype": part.stored, "shape": part.shape, "data_offsets": (place, place + part.nbytes)}
        place += part.nbytes
    header = json.dumps(told, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for name in order:
                for chunk in parts[name].chunks(buffer):
                    if not _finite(parts[name].stored, chunk):
                        raise ValueError(f"{parts[name].file}: tensor {parts[name].name} holds NaN or infinite weights.")
                    out.write(chunk)

    write_file(path, write)


def _finite(stored: str, chunk: memoryview) -> bool:
    """Whether numbers of a dtype that safetensors calls so are neither NaN nor infinite; True for bits of other dtypes."""
    if stored == "F8_E4M3" and len(chunk):  # NaN are the bits 7F and FF, and nothing is infinite
        bits = torch.frombuffer(chunk, dtype=torch.uint8)
        return bits.max().item() < 0xFF and bits.view(torch.int8).max().item() < 0x7F
    dtype = DTYPES.get(stored)
    if dtype is None or not dtype.is_floating_point or not len(chunk):
        return True
    numbers = torch.frombuffer(chunk, dtype=dtype)
    return bool(torch.isfinite(numbers.sum()) or torch.isfinite(numbers).all())


def _owners(model, names: Iterable[str]) -> tuple[dict[str, str], dict[str, Group]]:
    """The weights that stored tensors belong to, by stored name, and the groups of weights by parameter."""
    candidates = {name: [name, *_stems(name)] for name in names}
    groups = grouped(model, {stem for stems in candidates.values() for stem in stems})
    known = {name for group in groups.values() for name in group.all}
    found = {name: next((stem for stem in stems if stem in known), None) for name, stems in candidates.items()}
    return {name: owner for name, owner in found.items() if owner}, groups


def _stems(name: str) -> Iterator[str]:
    """Names of the weight that a tensor may belong to: `x.weight` of `x.weight_scale_inv` and of `x.qzeros`, `x.down_proj` of
    `x.down_proj_blocks`."""
    module, _, leaf = name.rpartition(".")
    while "_" in leaf:
        leaf = leaf.rpartition("_")[0]
        yield f"{module}.{leaf}"
    yield f"{module}.weight"


class StoredCheckpoint:
    """What is written of a quantised source: the interface of `Checkpoint` to a writer, with `Part`s for tensors.

    entries: the stored tensors. carried, left_out: as for `Checkpoint`. The result keeps the source's own names.
    Raises ValueError naming a weight that is missing, and a tensor that cannot be cut to some of the experts.
    """

    quantised = True
    write = staticmethod(write_parts)

    def __init__(self, source: CheckpointReader, layout: Layout):
        self.source, self.layout, self.entries = source, layout, source.stored
        owners, self.groups = _owners(layout.model, self.entries)
        parameter = {name: group.parameter for group in self.groups.values() for name in group.all}
        self._check_complete(owners, parameter)
        number_of = {name: number for number, names in layout.parameters.items() for name in names}
        self.names: dict[int | None, list[str]] = {number: [] for number in (None, *range(layout.layers))}
        self.axes: dict[str, int] = {}  # of the tensors that hold all experts
        self.tables = {name for name, owner in owners.items() if parameter[owner] in layout.tables}
        stacked = self._stacked()
        for name, owner in owners.items():
            if parameter[owner] in number_of:
                self.names[number_of[parameter[owner]]].append(name)
                if (axis := self._axis(name, owner, parameter[owner], stacked)) is not None:
                    self.axes[name] = axis
        numbers = {_start(name): number for number, names in self.names.items() for name in names if number is not None}
        placed = {name for names in self.names.values() for name in names}
        others = [name for name in self.entries if name not in placed]
        inside = [name for name in others if _start(name) in numbers]  # such as scales of the keys and values
        for name in inside:
            self.names[numbers[_start(name)]].append(name)
        others = [name for name in others if _start(name) not in numbers]
        self.carried, self.left_out = (others, []) if layout.composite else ([], others)

    def _check_complete(self, owners: dict[str, str], parameter: dict[str, str]) -> None:
        there, tied = set(owners.values()), self.layout.tied
        made = {parameter[owner] for owner in there}
        made |= {original for target, original in tied.items() if target in made}
        for name in self.layout.text_names:
            wanted = self.layout.published[name].all if name in self.layout.published else [name]
            missing = [published for published in wanted if published not in there]
            if (name not in made and name not in tied) or (missing and there.intersection(wanted)):
                raise ValueError(f"{self.source.folder} has no tensor {missing[0]}, which its config asks for.")

    def _stacked(self) -> set[str]:
        """The parameters that hold all experts of a layer."""
        places = {module: name for name, module in self.layout.model.named_modules()}
        modules = [layer.experts for layer in moe_layers(self.layout.model)]
        return {f"{places[module]}.{name}" for module in modules for name, _ in module.named_parameters()}

    def _axis(self, name: str, owner: str, parameter: str, stacked: set[str]) -> int | None:
        """The axis of a stored tensor along which its experts lie; None for one expert's, or one without experts."""
        entry, full, small = self.entries[name], self.layout.shapes[parameter], self.layout.small_shapes[parameter]
        axis = next((axis for axis, size in enumerate(full) if size != small[axis]), None)
        if axis is None or NUMBERED.fullmatch(name) or prod(entry.shape) == 1:  # the last: one scale for the whole tensor
            return None
        if name == owner and entry.shape == full:
            return axis
        if parameter in stacked and entry.shape[:1] == (self.layout.n,):
            return 0
        raise ValueError(
            f"{entry.file}: tensor {name} of shape {list(entry.shape)} cannot be cut to some of {self.layout.n} experts: only "
            "experts may be quantised, not the router, and stacked ones must lie along the first axis."
        )

    def read(self, name: str) -> torch.Tensor:
        """One parameter that is not quantised, by its name in the stock model or in the text model."""
        group = self.groups[self.layout.stock_names.get(name, name)]
        return group.make(self.layout.model, self.source.read_stored)[group.parameter]

    def pruned(self, number: int | None, kept: Sequence[int]) -> dict[str, Part]:
        """A decoder layer (None: the rest) with only the kept experts, by new name."""
        return {new: self._part(name, kept) for name in self.names[number] if (new := _renamed(name, kept))}

    def carry(self, names: Iterable[str]) -> dict[str, Part]:
        """Tensors as they are stored."""
        return {name: self._part(name, []) for name in names}

    def _part(self, name: str, kept: Sequence[int]) -> Part:
        entry, axis = self.entries[name], self.axes.get(name)
        if kept and name in self.tables:
            data = pruned_table(self.source.read_stored(name), kept, self.layout.n).numpy().tobytes()
            return Part(name, entry.stored, entry.shape, entry.file, [], data)
        if axis is None or not kept:
            return Part(name, entry.stored, entry.shape, entry.file, [(entry.start, entry.stop)])
        size, outer = entry.shape[axis], prod(entry.shape[:axis])
        rows, each = [*kept, *range(self.layout.n, size)], (entry.stop - entry.start) // (outer * size)
        starts = [entry.start + (place * size + row) * each for place in range(outer) for row in rows]
        shape = (*entry.shape[:axis], len(rows), *entry.shape[axis + 1 :])
        return Part(name, entry.stored, shape, entry.file, [(start, start + each) for start in starts])

    def nbytes(self, r: int) -> int:
        """The bytes that will be written if r experts stay."""
        parts = [part for number in self.names for part in self.pruned(number, range(r)).values()]
        return sum(part.nbytes for part in [*parts, *self.carry(self.carried).values()])

    def renumbered(self, value, kept: dict[int, Sequence[int]]):
        """A value of a quantisation config whose lists and keys name experts by their new numbers.

        kept: by number of the decoder layer. The names of removed experts are dropped. A pattern that would now match other
        modules becomes a list of the modules that it matched.
        """
        if isinstance(value, dict):
            named = [(new, inner) for name, inner in value.items() for new in self._named(name, kept)]
            return {name: self.renumbered(inner, kept) for name, inner in named}
        if isinstance(value, list):
            texts = [self._named(item, kept) if isinstance(item, str) else [self.renumbered(item, kept)] for item in value]
            return [item for items in texts for item in items]
        return value

    def _named(self, text: str, kept: dict[int, Sequence[int]]) -> list[str]:
        if _EXPERT.fullmatch(text):
            return [new] if (new := _renumbered(text, kept)) else []
        if not _SOME_EXPERT.search(text):
            return [text]
        modules = {name.rpartition(".")[0] for names in self.names.values() for name in names}
        new = {module: renumbered for module in sorted(modules) if (renumbered := _renumbered(module, kept))}
        wanted = [new[module] for module in new if _matches(text, module)]
        if set(wanted) == {module for module in new.values() if _matches(text, module)}:
            return [text]
        sign = text[:2] if text[:2] in ("+:", "-:") else ""
        return [f"{sign}^{re.escape(module)}$" if sign else module for module in wanted]


def _start(name: str) -> str:
    """A name up to its first number, which in a decoder layer's name is the layer's."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""


def _renamed(name: str, kept: Sequence[int]) -> str | None:
    """A stored tensor's new name when only `kept` stay, or None where it goes with its expert."""
    if not (kept and (numbered := NUMBERED.fullmatch(name))):
        return name
    expert = int(numbered[2])
    return f"{numbered[1]}{kept.index(expert)}{numbered[3]}" if expert in kept else None


def _renumbered(module: str, kept: dict[int, Sequence[int]]) -> str | None:
    """A module's new name, or None where it goes with its expert. kept: by number of the decoder layer."""
    named = _EXPERT.fullmatch(module)
    if not named or int(named[2]) not in kept:
        return module
    experts, expert = kept[int(named[2])], int(named[3])
    return f"{named[1]}{experts.index(expert)}{named[4]}" if expert in experts else None


def _matches(text: str, module: str) -> bool:
    """Whether a quantiser takes this text for a module: `re:`, `+:` and `-:` announce a pattern that matches from the start,
    special characters one that matches anywhere; any other text is a part of the name."""
    pattern = re.sub(r"^(re|[+-]):", "", text)
    if pattern != text:
        return re.match(pattern, module) is not None
    if not re.fullmatch(_LITERAL, text):
        return re.search(text, module) is not None
    return f".{text}." in f".{module}."
