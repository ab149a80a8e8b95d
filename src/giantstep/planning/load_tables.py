"""What a load plan is made from: chunks and wanted regions as tables. Called by `load_plan` and its callers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.format.index import Index
from giantstep.shards.dtypes import ITEM_BYTES
from giantstep.shards.region import Int64s, Region, ragged_to_padded


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """Chunks of some tensors.

    Attributes:
        ends: [tensors + 1] chunks of a tensor are consecutive.
        item_bytes: [tensors] bytes per element.
        file, start: [chunks] where each lies.
        offset, size: [chunks, width] regions, padded in front.
    """

    ends: Int64s
    item_bytes: Int64s
    file: Int64s
    start: Int64s
    offset: Int64s
    size: Int64s

    @property
    def width(self) -> int:
        """Number of columns of a region."""
        return int(self.offset.shape[1])

    def tensors(self) -> Int64s:
        """[chunks] tensor of each chunk."""
        return np.repeat(np.arange(len(self.ends) - 1), np.diff(self.ends))

    def chunk_item_bytes(self) -> Int64s:
        """[chunks] bytes per element."""
        return np.repeat(self.item_bytes, np.diff(self.ends))

    def rows(self, chunks: Int64s) -> ChunkTable:
        """Some chunks, ascending, of the same tensors."""
        columns = (self.file[chunks], self.start[chunks], self.offset[chunks], self.size[chunks])
        return ChunkTable(np.searchsorted(chunks, self.ends), self.item_bytes, *columns)

    def within(self, file: int, start: int, stop: int) -> list[int]:
        """Chunks of which some bytes lie in [start, stop) of a file."""
        chunk = np.flatnonzero((self.file == file) & (self.start < stop))
        end = self.start[chunk] + self.size[chunk].prod(axis=1) * self.chunk_item_bytes()[chunk]
        found: list[int] = chunk[end > start].tolist()
        return found


@dataclass(frozen=True, slots=True)
class WantedTable:
    """Regions to be filled.

    Attributes:
        tensor: [wanted] row of the tensor in the chunk table.
        offset, size: [wanted, width] regions, padded in front.
        partial: [wanted] elements that no chunk holds are fine.
    """

    tensor: Int64s
    offset: Int64s
    size: Int64s
    partial: NDArray[np.bool_]

    @property
    def width(self) -> int:
        """Number of columns of a region."""
        return int(self.offset.shape[1])


def tabulate_chunks(index: Index) -> ChunkTable:
    """All chunks of an index."""
    dims = np.diff(index.tensor_dims_ends)
    width = int(dims.max(initial=1))
    chunk_dims = np.repeat(dims, np.diff(index.tensor_chunk_ends))
    starts = np.cumsum(chunk_dims) - chunk_dims
    return ChunkTable(
        ends=index.tensor_chunk_ends,
        item_bytes=np.array(ITEM_BYTES, dtype=np.int64)[index.tensor_dtype],
        file=index.chunk_file,
        start=index.chunk_start,
        offset=ragged_to_padded(index.chunk_offset, starts, chunk_dims, 0, width),
        size=ragged_to_padded(index.chunk_size, starts, chunk_dims, 1, width),
    )


def row_strides(size: Int64s, item_bytes: Int64s) -> Int64s:
    """[rows, width] bytes between neighbours along each axis of boxes whose elements lie in one row."""
    strides = np.empty_like(size)
    strides[:, -1] = item_bytes
    for axis in range(size.shape[1] - 1, 0, -1):
        strides[:, axis - 1] = strides[:, axis] * size[:, axis]
    return strides


def tabulate_wanted(
    tensors: Sequence[int], regions: Sequence[Region], partial: Sequence[bool] | NDArray[np.bool_], width: int
) -> WantedTable:
    """Regions of tensors (rows of the chunk table), padded to `width` columns."""
    distinct, number = numbered(regions)
    dims = np.array([len(region.size) for region in distinct], dtype=np.int64)
    starts = np.cumsum(dims) - dims
    offset, size = (
        ragged_to_padded(np.array(list(itertools.chain.from_iterable(parts)), dtype=np.int64), starts, dims, pad, width)
        for parts, pad in (([region.offset for region in distinct], 0), ([region.size for region in distinct], 1))
    )
    rows = np.fromiter(tensors, np.int64, len(tensors))
    return WantedTable(rows, np.take(offset, number, axis=0), np.take(size, number, axis=0), np.array(partial, dtype=bool))


def numbered(regions: Sequence[Region]) -> tuple[list[Region], Int64s]:
    """The regions without repetitions of one object, and the number of each among them. Regions alike are mostly one object."""
    identity = np.fromiter(map(id, regions), np.int64, len(regions))
    _, first, number = np.unique(identity, return_index=True, return_inverse=True)
    return [regions[row] for row in first.tolist()], number


def tabulate_spans(file: Sequence[int], start: Sequence[int], length: Sequence[int]) -> tuple[ChunkTable, WantedTable]:
    """Spans of bytes as tensors of one chunk each, all of which is wanted; empty ones have no chunk."""
    count = len(length)
    size = np.array(length, dtype=np.int64)
    filled = size > 0
    chunks = ChunkTable(
        ends=np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(filled, dtype=np.int64))),
        item_bytes=np.ones(count, dtype=np.int64),
        file=np.array(file, dtype=np.int64)[filled],
        start=np.array(start, dtype=np.int64)[filled],
        offset=np.zeros((int(filled.sum()), 1), dtype=np.int64),
        size=size[filled, None],
    )
    rows = np.arange(count, dtype=np.int64)
    return chunks, WantedTable(rows, np.zeros((count, 1), dtype=np.int64), size[:, None], np.zeros(count, dtype=bool))
