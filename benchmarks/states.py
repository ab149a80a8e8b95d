"""The state that is saved and loaded: tensors over page-aligned memory, with values known by formula.

Used by `rank.py` and `interference.py`. Memory of a rank: its parts of all tensors, one after another.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

Layout = Literal["rows", "columns"]
Memory = NDArray[np.uint8]

_ITEM_BYTES = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Bfloat16 matrices of equally many rows.

    Attributes:
        tensors: how many.
        rows: of each.
        columns: of each, or the most if `least_columns` is given.
        least_columns: if not 0, the numbers of columns are spread between the two, evenly on a logarithmic scale.
    """

    tensors: int
    rows: int
    columns: int
    least_columns: int = 0

    @property
    def bytes(self) -> int:
        """Size of all tensors together."""
        return sum(columns_of(self)) * self.rows * _ITEM_BYTES


@cache
def columns_of(shape: Shape) -> tuple[int, ...]:
    """Columns of each tensor."""
    if not shape.least_columns:
        return (shape.columns,) * shape.tensors
    low, high = np.log(shape.least_columns), np.log(shape.columns)
    drawn = np.random.default_rng(shape.tensors).uniform(low, high, shape.tensors)
    return tuple(np.exp(drawn).astype(int).tolist())


def _chunk(length: int, part: int, parts: int) -> slice:
    """What DTensor gives to one of several ranks: all parts alike, rounded up, the last ones shorter."""
    each = -(-length // parts)
    return slice(min(length, each * part), min(length, each * (part + 1)))


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds: of every tensor, one of several parts of its rows or columns."""

    shape: Shape
    layout: Layout
    part: int
    parts: int

    def cut(self, columns: int) -> tuple[slice, slice]:
        """Rows and columns of a tensor that has so many columns."""
        if self.layout == "rows":
            return _chunk(self.shape.rows, self.part, self.parts), slice(0, columns)
        return slice(0, self.shape.rows), _chunk(columns, self.part, self.parts)

    @property
    def bytes(self) -> int:
        """Size of all parts that the rank holds."""
        return sum(_area(self.cut(columns)) for columns in columns_of(self.shape)) * _ITEM_BYTES

    def words(self, memory: Memory) -> Iterator[NDArray[np.int16]]:
        """The part of each tensor, as words in `memory`."""
        start = 0
        for columns in columns_of(self.shape):
            cut = self.cut(columns)
            stop = start + _area(cut) * _ITEM_BYTES
            yield memory[start:stop].view(np.int16).reshape([one.stop - one.start for one in cut])
            start = stop

    def values(self, tensor: int) -> NDArray[np.int16]:
        """What the words of a part have to be: the product of a random column and a random row, modulo 2**16."""
        random, columns = np.random.default_rng(tensor), columns_of(self.shape)[tensor]
        cut = self.cut(columns)
        left = random.integers(-(1 << 15), 1 << 15, self.shape.rows, dtype=np.int16) | np.int16(1)
        right = random.integers(-(1 << 15), 1 << 15, columns, dtype=np.int16)
        values: NDArray[np.int16] = np.multiply.outer(left[cut[0]], right[cut[1]])
        return values

    def fill(self, memory: Memory) -> None:
        """Give all parts their values."""
        for tensor, words in enumerate(self.words(memory)):
            words[...] = self.values(tensor)

    def wrong_tensors(self, memory: Memory) -> list[int]:
        """The tensors whose part does not have its values."""
        return [tensor for tensor, words in enumerate(self.words(memory)) if not np.array_equal(words, self.values(tensor))]

    def plain(self, memory: Memory) -> dict[str, torch.Tensor]:
        """Tensors over `memory` that know nothing of other ranks."""
        return {
            f"layers.{tensor:05d}.weight": torch.from_numpy(words).view(torch.bfloat16)
            for tensor, words in enumerate(self.words(memory))
        }

    def sharded(self, memory: Memory, mesh: DeviceMesh) -> dict[str, Any]:
        """A state dict of DTensors whose local parts lie in `memory`."""
        placement = [Shard(0 if self.layout == "rows" else 1)]
        model = {}
        for columns, (key, local) in zip(columns_of(self.shape), self.plain(memory).items(), strict=True):
            size = torch.Size([self.shape.rows, columns])
            model[key] = DTensor.from_local(local, mesh, placement, run_check=False, shape=size, stride=(columns, 1))
        return {"model": model, "step": 100}


def _area(cut: tuple[slice, slice]) -> int:
    rows, columns = (int(one.stop - one.start) for one in cut)
    return rows * columns


def whole_pages(size: int) -> int:
    """A size rounded up to whole pages, so that O_DIRECT can transfer it."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def aligned_memory(size: int) -> Memory:
    """Page-aligned memory of whole pages, every page of it touched."""
    memory = np.frombuffer(mmap.mmap(-1, whole_pages(size)), dtype=np.uint8)
    memory[:] = 0
    return memory
