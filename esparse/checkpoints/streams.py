"""Streams of hidden states on disk."""

import math
import os
from collections.abc import MutableSequence, Sequence
from pathlib import Path

import torch

from ..tracing.walk import State


class FileStream(MutableSequence):
    """A decoder layer's outputs for all batches: one memory-mapped file per tensor, made when the first batch is set."""

    def __init__(self, path: Path, sizes: Sequence[int], about: Sequence[dict | None] | None = None):
        """sizes: sequences of each batch; about: a result of the method `about`, to open existing files."""
        self.path, self.starts = path, [sum(sizes[:b]) for b in range(len(sizes) + 1)]
        self.parts = about and [one and self._map(j, one["shape"], getattr(torch, one["dtype"])) for j, one in enumerate(about)]

    def _file(self, part: int) -> Path:
        return self.path.with_name(f"{self.path.stem}_{part}{self.path.suffix}") if part else self.path

    def _map(self, part: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_file(str(self._file(part)), True, math.prod(shape), dtype=dtype).view(*shape)

    def _create(self, part: int, like: torch.Tensor | None) -> torch.Tensor | None:
        if like is None:
            return None
        shape = (self.starts[-1], *like.shape[1:])
        with self._file(part).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * like.element_size())  # a full disk fails here
        return self._map(part, shape, like.dtype)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, batch: int) -> State:
        rows = slice(self.starts[batch], self.starts[batch + 1])
        found = tuple(None if part is None else part[rows].clone() for part in self.parts)
        return found if len(found) > 1 else found[0]

    def __setitem__(self, batch: int, value: State) -> None:
        values = value if isinstance(value, tuple) else (value,)
        if self.parts is None:
            self.parts = [self._create(j, tensor) for j, tensor in enumerate(values)]
        for part, tensor in zip(self.parts, values, strict=True):
            if part is not None:
                part[self.starts[batch] : self.starts[batch + 1]] = tensor.cpu()

    def insert(self, index, value):
        raise TypeError("a stream has as many batches as it was made for")

    __delitem__ = insert

    @property
    def paths(self) -> list[Path]:
        return [self._file(j) for j, part in enumerate(self.parts) if part is not None]

    def about(self) -> list[dict | None]:
        """Flush all files to disk; returns the shapes and dtypes needed to open them again."""
        for path in self.paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        of = lambda part: {"shape": list(part.shape), "dtype": str(part.dtype).removeprefix("torch.")}  # noqa: E731
        return [None if part is None else of(part) for part in self.parts]
