"""`StoredState`: the names, shapes and dtypes of a checkpoint, prepared for matching. Made by `load`, once per index."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import numpy as np

from giantstep.format.index import Index
from giantstep.mapping.leaves import Extent
from giantstep.planning.matching import Holdings
from giantstep.reading.checkpoint import Checkpoint
from giantstep.shards.dtypes import BY_CODE, DType
from giantstep.shards.object_keys import ObjectPosition, position_of, wrapped_tensor
from giantstep.shards.region import Int64s, ragged_to_padded, same_rows


class StoredState:
    """The names of a checkpoint, prepared for matching.

    Attributes:
        checkpoint, index: where they come from.
        keys, row: tensors by row, rows by key.
        twin: [tensors] number shared by tensors that share their bytes (tied ones); -1 for those without bytes.
        tied_rows: rows of tensors that share their bytes with another.
        grids: positions of sharded objects, by key and shape.
        wrapped: keys of wrapper tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.index: Index = checkpoint.index_tables().load_all()
        self.keys = checkpoint.keys()
        self.row: dict[str | None, int] = dict(zip(self.keys, range(len(self.keys)), strict=True))
        self.twin = _twins(self.index)
        numbers, counts = np.unique(self.twin[self.twin >= 0], return_counts=True)
        self.tied_rows = set(np.flatnonzero(np.isin(self.twin, numbers[counts > 1])).tolist())
        self.grids: dict[str, dict[tuple[int, ...], dict[tuple[int, ...], ObjectPosition]]] = {}
        self.wrapped: set[str] = set()
        for name in checkpoint.object_keys():
            position, tensor = position_of(name), wrapped_tensor(name)
            if position is not None:
                self.grids.setdefault(position.key, {}).setdefault(position.shape, {})[position.offset] = position
            elif tensor is not None:
                self.wrapped.add(tensor)

    def of(self, checkpoint: Checkpoint) -> StoredState:
        """The same names for another `Checkpoint` of the same save."""
        found = copy.copy(self)
        found.checkpoint = checkpoint
        return found

    def shape(self, row: int) -> tuple[int, ...]:
        """Global shape of a tensor."""
        start, stop = self.index.tensor_dims_ends[row : row + 2].tolist()
        return tuple(self.index.tensor_dims[start:stop].tolist())

    def dtype(self, row: int) -> DType:
        """Dtype of a tensor."""
        return BY_CODE[int(self.index.tensor_dtype[row])]

    def unlike(self, rows: Sequence[int], extents: Sequence[Extent], extent_of: Int64s) -> list[int]:
        """Positions of rows whose tensors have another dtype or global shape than the extents of these numbers."""
        found = np.fromiter(rows, np.int64, len(rows))
        shapes = [extent.global_shape for extent in extents]
        dims, ends = np.array(list(map(len, shapes)), dtype=np.int64), self.index.tensor_dims_ends
        held = np.diff(ends)
        codes = np.array([extent.dtype.code for extent in extents], dtype=np.int64)
        same = (codes[extent_of] == self.index.tensor_dtype[found]) & (dims[extent_of] == held[found])
        width = max(1, int(dims.max(initial=0)), int(held.max(initial=0)))
        flat = np.array(list(itertools.chain.from_iterable(shapes)), dtype=np.int64)
        ours = ragged_to_padded(flat, np.cumsum(dims) - dims, dims, 1, width)
        theirs = ragged_to_padded(self.index.tensor_dims, ends[:-1], held, 1, width)
        differing: list[int] = np.flatnonzero(~(same & same_rows(ours[extent_of], theirs[found]))).tolist()
        return differing

    def holdings(self) -> Holdings:
        """The names, for judging requests."""
        return Holdings(self.checkpoint.location, self.keys, self.grids.keys(), self.wrapped)


def _twins(index: Index) -> Int64s:
    first = index.tensor_chunk_ends[:-1]
    filled = np.diff(index.tensor_chunk_ends) > 0
    twin = np.full(len(filled), -1, dtype=np.int64)
    file, start = index.chunk_file[first[filled]], index.chunk_start[first[filled]]
    order = np.lexsort((start, file))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(file[order]) != 0) | (np.diff(start[order]) != 0)
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    twin[filled] = number
    return twin
