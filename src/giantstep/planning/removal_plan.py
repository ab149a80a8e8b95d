"""`plan_removal`: which data files stay, go, or are written anew when some tensors and objects are removed.

Works on *extents*: spans of a data file that the index names. Usually each chunk has its own; tied tensors share
theirs, and an extent stays as long as one entry that stays names it. Called by `removal`, and by `materializing`, which
removes nothing and copies all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from giantstep.format.container import Entry
from giantstep.format.data_file import chunk_entry, object_entry
from giantstep.format.digests import Checksums
from giantstep.format.index import Index
from giantstep.shards.dtypes import BY_CODE
from giantstep.shards.region import Int64s, Region

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Extents:
    """Distinct spans of data files, sorted by file and first byte.

    Attributes:
        file, start, bytes: where each lies; `file` is a row of the commit record.
        row: an entry that names it, one that stays if there is any: chunks first, then objects.
        stays: whether any entry that stays names it.
    """

    file: Int64s
    start: Int64s
    bytes: Int64s
    row: Int64s
    stays: Bools


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """What becomes of entries, extents and files.

    Attributes:
        tensor_stays, object_stays: per row of the index.
        extents: see there.
        chunk_extent, object_extent: per chunk and object, row of its extent.
        file_stays: files that hold nothing but extents that stay; they are not touched.
        copied: rows of the extents that must be copied: they stay, and share their file with some that go.
    """

    tensor_stays: Bools
    object_stays: Bools
    extents: Extents
    chunk_extent: Int64s
    object_extent: Int64s
    file_stays: Bools
    copied: Int64s


def plan_removal(index: Index, tensor_stays: Bools, object_stays: Bools, files: int) -> RemovalPlan:
    """Decide what is copied and which files stay.

    Args:
        index: of the checkpoint.
        tensor_stays, object_stays: per row, whether it is kept.
        files: number of data files.
    """
    chunks = len(index.chunk_file)
    stays = np.concatenate((np.repeat(tensor_stays, np.diff(index.tensor_chunk_ends)), object_stays))
    extents, extent_of_row = _find_extents(index, stays)
    staying = np.bincount(extents.file[extents.stays], minlength=files) > 0
    going = np.bincount(extents.file[~extents.stays], minlength=files) > 0
    return RemovalPlan(
        tensor_stays=tensor_stays,
        object_stays=object_stays,
        extents=extents,
        chunk_extent=extent_of_row[:chunks],
        object_extent=extent_of_row[chunks:],
        file_stays=staying & ~going,
        copied=np.flatnonzero(extents.stays & going[extents.file]),
    )


def plan_copy(index: Index, files: int) -> RemovalPlan:
    """Everything stays, and all of it is copied, so that no file of before is needed any more."""
    tensors, objects = np.ones(len(index.tensor_dtype), dtype=bool), np.ones(len(index.object_file), dtype=bool)
    plan = plan_removal(index, tensors, objects, files)
    return replace(plan, file_stays=np.zeros(files, dtype=bool), copied=np.arange(len(plan.extents.row)))


def _find_extents(index: Index, stays: Bools) -> tuple[Extents, Int64s]:
    """The extents, and per row (chunks, then objects) which is its own."""
    file = np.concatenate((index.chunk_file, index.object_file))
    start = np.concatenate((index.chunk_start, index.object_start))
    size = np.concatenate((index.chunk_bytes, index.object_bytes))
    # Among rows of one extent those that stay come first, and name it.
    order = np.lexsort((~stays, size, start, file))
    place = np.stack((file, start, size))[:, order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (place[:, 1:] != place[:, :-1]).any(axis=0)
    extent_of_row = np.zeros(len(order), dtype=np.int64)
    extent_of_row[order] = np.cumsum(new) - 1
    row = order[new]
    return Extents(file[row], start[row], size[row], row, stays[row]), extent_of_row


def entry_of(index: Index, keys: Sequence[str], object_keys: Sequence[str], row: int) -> tuple[Entry, int]:
    """The data file entry of a row (chunks, then objects), and the size of its items."""
    chunks = len(index.chunk_file)
    if row >= chunks:
        place = row - chunks
        return object_entry(object_keys[place], int(index.object_bytes[place])), 1
    tensor = int(np.searchsorted(index.tensor_chunk_ends, row, side="right")) - 1
    dims = int(index.tensor_dims_ends[tensor + 1] - index.tensor_dims_ends[tensor])
    base = int(index.chunk_coordinate_ends[tensor]) + (row - int(index.tensor_chunk_ends[tensor])) * dims
    region = Region(
        tuple(index.chunk_offset[base : base + dims].tolist()), tuple(index.chunk_size[base : base + dims].tolist())
    )
    dtype = BY_CODE[int(index.tensor_dtype[tensor])]
    return chunk_entry(keys[tensor], dtype, region), dtype.item_bytes


@dataclass(frozen=True, slots=True)
class NewPlaces:
    """Where the extents lie afterwards.

    Attributes:
        file, start: per extent; of extents that go, anything. `file` counts the files of the new commit record.
        file_blocks: per file of the new commit record, its number of blocks.
        block_checksum: of all blocks of these files, file by file.
    """

    file: Int64s
    start: Int64s
    file_blocks: Int64s
    block_checksum: Checksums


def index_after(index: Index, plan: RemovalPlan, places: NewPlaces) -> Index:
    """The index of what stays. The order of tensors, chunks and objects is that of before."""
    tensors, objects = plan.tensor_stays, plan.object_stays
    key_stays = np.repeat(tensors, np.diff(index.tensor_key_ends))
    object_key_stays = np.repeat(objects, np.diff(index.object_key_ends))
    dims_stay = np.repeat(tensors, np.diff(index.tensor_dims_ends))
    chunk_stays = np.repeat(tensors, np.diff(index.tensor_chunk_ends))
    coordinate_stays = np.repeat(tensors, np.diff(index.chunk_coordinate_ends))
    chunk_extent, object_extent = plan.chunk_extent[chunk_stays], plan.object_extent[objects]
    return Index(
        tensor_key_ends=_ends_of(index.tensor_key_ends, tensors),
        tensor_key_bytes=index.tensor_key_bytes[key_stays],
        tensor_dtype=index.tensor_dtype[tensors],
        tensor_dims_ends=_ends_of(index.tensor_dims_ends, tensors),
        tensor_dims=index.tensor_dims[dims_stay],
        tensor_chunk_ends=_ends_of(index.tensor_chunk_ends, tensors),
        chunk_file=places.file[chunk_extent],
        chunk_start=places.start[chunk_extent],
        chunk_bytes=index.chunk_bytes[chunk_stays],
        chunk_coordinate_ends=_ends_of(index.chunk_coordinate_ends, tensors),
        chunk_offset=index.chunk_offset[coordinate_stays],
        chunk_size=index.chunk_size[coordinate_stays],
        object_key_ends=_ends_of(index.object_key_ends, objects),
        object_key_bytes=index.object_key_bytes[object_key_stays],
        object_file=places.file[object_extent],
        object_start=places.start[object_extent],
        object_bytes=index.object_bytes[objects],
        file_block_ends=_ends(places.file_blocks),
        block_checksum=places.block_checksum,
        chunk_head=None if index.chunk_head is None else index.chunk_head[chunk_stays],
        chunk_digest=None if index.chunk_digest is None else index.chunk_digest[chunk_stays],
        object_digest=None if index.object_digest is None else index.object_digest[objects],
    )


def _ends_of(ends: Int64s, stays: Bools) -> Int64s:
    return _ends(np.diff(ends)[stays])


def _ends(counts: Int64s) -> Int64s:
    ends = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=ends[1:])
    return ends
