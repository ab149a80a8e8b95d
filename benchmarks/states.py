"""The state that is saved and loaded: DTensors over page-aligned memory, with values known by formula."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
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
    """Equal bfloat16 matrices: how many, and the rows and columns of each."""

    tensors: int
    rows: int
    columns: int

    @property
    def bytes(self) -> int:
        """Size of all tensors together."""
        return self.tensors * self.rows * self.columns * _ITEM_BYTES

    def share(self, layout: Layout, rank: int, ranks: int) -> Share:
        """The part of every tensor that a rank holds when rows or columns are divided over the ranks."""
        rows, columns = self.rows, self.columns
        if layout == "rows":
            return Share(slice(rows * rank // ranks, rows * (rank + 1) // ranks), slice(0, columns))
        return Share(slice(0, rows), slice(columns * rank // ranks, columns * (rank + 1) // ranks))


@dataclass(frozen=True, slots=True)
class Share:
    """Rows and columns that one rank holds of every tensor."""

    rows: slice
    columns: slice

    @property
    def size(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def bytes(self) -> int:
        """Bytes of one tensor's part."""
        return self.size[0] * self.size[1] * _ITEM_BYTES


def aligned_memory(size: int) -> Memory:
    """Page-aligned memory, every page of it touched."""
    memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    memory[:] = 0
    return memory


def _words(memory: Memory, share: Share, tensor: int) -> NDArray[np.int16]:
    """The part of one tensor, as words in `memory`, where the parts lie one after another."""
    start = tensor * share.bytes
    return memory[start : start + share.bytes].view(np.int16).reshape(share.size)


def _values(tensor: int, shape: Shape, share: Share) -> NDArray[np.int16]:
    """What the words of a part have to be: the product of a random column and a random row, modulo 2**16."""
    random = np.random.default_rng(tensor)
    rows = random.integers(-(1 << 15), 1 << 15, shape.rows, dtype=np.int16) | np.int16(1)
    columns = random.integers(-(1 << 15), 1 << 15, shape.columns, dtype=np.int16)
    values: NDArray[np.int16] = np.multiply.outer(rows[share.rows], columns[share.columns])
    return values


def fill(memory: Memory, shape: Shape, share: Share) -> None:
    """Give all parts their values."""
    for tensor in range(shape.tensors):
        _words(memory, share, tensor)[...] = _values(tensor, shape, share)


def wrong_tensors(memory: Memory, shape: Shape, share: Share) -> list[int]:
    """The tensors whose part does not have its values."""
    return [
        tensor
        for tensor in range(shape.tensors)
        if not np.array_equal(_words(memory, share, tensor), _values(tensor, shape, share))
    ]


def state_over(memory: Memory, shape: Shape, layout: Layout, mesh: DeviceMesh) -> dict[str, Any]:
    """A state dict of DTensors whose local parts lie in `memory`."""
    share = shape.share(layout, mesh.get_local_rank(), mesh.size())
    placement = Shard(0 if layout == "rows" else 1)
    model = {}
    for tensor in range(shape.tensors):
        local = torch.from_numpy(_words(memory, share, tensor)).view(torch.bfloat16)
        model[f"layers.{tensor:05d}.weight"] = DTensor.from_local(local, mesh, [placement], run_check=False)
    return {"model": model, "step": 100}
