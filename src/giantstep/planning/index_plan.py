"""From a save plan and what every rank reports to have written to the columns of the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from giantstep.errors import PeerFailureError
from giantstep.format.digests import Checksums
from giantstep.format.index import Index, encode_texts
from giantstep.format.record import FileEntry
from giantstep.planning.columns import pack_column, pack_texts, unpack_column, unpack_texts
from giantstep.planning.description import Parts
from giantstep.planning.save_plan import SavePlan
from giantstep.shards.region import Int64s, padded_to_ragged


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What one rank wrote.

    Attributes:
        file_names, file_bytes, file_blocks: its data files, with the number of their blocks.
        block_checksum: of all blocks of its files, file by file.
        chunk_file, chunk_start: per chunk of its part, row in `file_names` and first byte.
        object_keys: objects that it wrote.
        object_file, object_start, object_bytes: where.
    """

    file_names: list[str]
    file_bytes: Int64s
    file_blocks: Int64s
    block_checksum: Checksums
    chunk_file: Int64s
    chunk_start: Int64s
    object_keys: list[str]
    object_file: Int64s
    object_start: Int64s
    object_bytes: Int64s

    def encode(self) -> Parts:
        """As a message, a part for each column."""
        texts = [part for name in _TEXTS for part in pack_texts(getattr(self, name))]
        return (*texts, *(pack_column(getattr(self, name)) for name in _COLUMNS))

    @classmethod
    def decode(cls, parts: Parts) -> WriteReport:
        """Inverse of `encode`."""
        texts = 2 * len(_TEXTS)
        if len(parts) != texts + len(_COLUMNS):
            raise PeerFailureError(f"a rank reported what it wrote in {len(parts)} parts, expected {texts + len(_COLUMNS)}")
        values: dict[str, Any] = {name: unpack_texts(*parts[2 * row : 2 * row + 2]) for row, name in enumerate(_TEXTS)}
        for row, (name, dtype) in enumerate(_COLUMNS.items()):
            values[name] = unpack_column(parts[texts + row], dtype)
        return cls(**values)


_TEXTS = ("file_names", "object_keys")
_COLUMNS: dict[str, type[np.generic]] = {
    "file_bytes": np.int64,
    "file_blocks": np.int64,
    "block_checksum": np.uint64,
    "chunk_file": np.int64,
    "chunk_start": np.int64,
    "object_file": np.int64,
    "object_start": np.int64,
    "object_bytes": np.int64,
}


@dataclass(frozen=True, slots=True)
class Reused:
    """What an incremental save does not write, and the digests of everything.

    Attributes:
        files: of an earlier step, used again.
        file_blocks, block_checksum: of these files, file by file.
        chunk_file, chunk_start: [chunks of the plan] row in `files`, -1 where this save has written the chunk; first byte.
        chunk_head, chunk_digest: [chunks of the plan, 1 and 2].
        object_file, object_start, object_digest: likewise of objects, in the order in which ranks report them.
    """

    files: tuple[FileEntry, ...]
    file_blocks: Int64s
    block_checksum: Checksums
    chunk_file: Int64s
    chunk_start: Int64s
    chunk_head: Checksums
    chunk_digest: Checksums
    object_file: Int64s
    object_start: Int64s
    object_digest: Checksums

    @classmethod
    def nothing(cls, chunk_head: Checksums, chunk_digest: Checksums, object_digest: Checksums) -> Reused:
        """Digests alone."""

        def places(count: int) -> tuple[Int64s, Int64s]:
            return np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.int64)

        none = np.zeros(0, dtype=np.int64)
        chunks, objects = places(len(chunk_digest)), places(len(object_digest))
        return cls((), none, none.astype(np.uint64), *chunks, chunk_head, chunk_digest, *objects, object_digest)


@dataclass(frozen=True, slots=True)
class MoreFiles:
    """Files without entries, which are behind all others: their blocks, file by file."""

    files: tuple[FileEntry, ...]
    file_blocks: Int64s
    block_checksum: Checksums


def build_index(
    plan: SavePlan, reports: Sequence[WriteReport], reused: Reused | None = None, more: MoreFiles | None = None
) -> tuple[Index, tuple[FileEntry, ...]]:
    """The index of the checkpoint, and the data files in the order that its file numbers mean.

    Args:
        plan, reports: what was planned, and what every rank has written of it.
        reused: what was not written. None: nothing, and the index has no digests.
        more: files of parity.
    """
    first_file = np.cumsum([0, *(len(report.file_names) for report in reports)])
    files = tuple(
        FileEntry(name, int(size), rank)
        for rank, report in enumerate(reports)
        for name, size in zip(report.file_names, report.file_bytes, strict=True)
    )
    new_files = len(files)
    chunk_file = np.zeros(len(plan.tensor), dtype=np.int64)
    chunk_start = np.zeros(len(plan.tensor), dtype=np.int64)
    by_writer = plan.chunks_by_writer()
    for rank, report in enumerate(reports):
        rows = by_writer[rank]
        if len(rows) != len(report.chunk_file):
            raise PeerFailureError(f"reports {len(report.chunk_file)} chunks written, expected {len(rows)}", rank=rank)
        chunk_file[rows] = report.chunk_file + first_file[rank]
        chunk_start[rows] = report.chunk_start
    if reused is not None:
        files += reused.files
        held = np.flatnonzero(reused.chunk_file >= 0)
        chunk_file[held], chunk_start[held] = reused.chunk_file[held] + new_files, reused.chunk_start[held]
    if more is not None:
        files += more.files
    key_ends, key_bytes = encode_texts([key.encode("utf-8") for key in plan.keys])
    rows, chunks_per_tensor = _rows_by_tensor(plan)
    dims = np.repeat(plan.ndim, chunks_per_tensor)
    index = Index(
        tensor_key_ends=key_ends,
        tensor_key_bytes=key_bytes,
        tensor_dtype=plan.dtype.astype(np.uint8),
        tensor_dims_ends=_ends(plan.ndim),
        tensor_dims=padded_to_ragged(plan.shape, plan.ndim),
        tensor_chunk_ends=_ends(chunks_per_tensor),
        chunk_file=chunk_file[rows],
        chunk_start=chunk_start[rows],
        chunk_bytes=plan.bytes[rows],
        chunk_coordinate_ends=_ends(chunks_per_tensor * plan.ndim),
        chunk_offset=padded_to_ragged(plan.offset[rows], dims),
        chunk_size=padded_to_ragged(plan.size[rows], dims),
        **_object_columns(reports, first_file, reused),
        **_block_columns(reports, reused, more),
        chunk_head=None if reused is None else reused.chunk_head[rows],
        chunk_digest=None if reused is None else reused.chunk_digest[rows],
    )
    return index, files


def _block_columns(reports: Sequence[WriteReport], reused: Reused | None, more: MoreFiles | None) -> dict[str, np.ndarray]:
    blocks, checksums = [report.file_blocks for report in reports], [report.block_checksum for report in reports]
    for found in (reused, more):
        if found is not None:
            blocks.append(found.file_blocks)
            checksums.append(found.block_checksum)
    return {
        "file_block_ends": _ends(np.concatenate(blocks)),
        "block_checksum": np.concatenate([np.empty(0, np.uint64), *checksums]),
    }


def _rows_by_tensor(plan: SavePlan) -> tuple[Int64s, Int64s]:
    """Rows of the plan's chunks, tensor by tensor, and their number per tensor; a tied tensor has those of its twin."""
    counts = np.bincount(plan.tensor, minlength=len(plan.keys))
    first = np.cumsum(counts) - counts
    counts, first = counts[plan.tied], first[plan.tied]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + within, counts


def _ends(counts: Int64s) -> Int64s:
    ends = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=ends[1:])
    return ends


def _object_columns(reports: Sequence[WriteReport], first_file: Int64s, reused: Reused | None) -> dict[str, np.ndarray]:
    keys = [key.encode("utf-8") for report in reports for key in report.object_keys]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ends, data = encode_texts([keys[position] for position in order])
    file = np.concatenate([report.object_file + first_file[rank] for rank, report in enumerate(reports)])
    start = np.concatenate([report.object_start for report in reports])
    size = np.concatenate([report.object_bytes for report in reports])
    digests: dict[str, np.ndarray] = {}
    if reused is not None:
        held = np.flatnonzero(reused.object_file >= 0)
        file[held], start[held] = reused.object_file[held] + first_file[-1], reused.object_start[held]
        digests["object_digest"] = reused.object_digest[order]
    return {
        "object_key_ends": ends,
        "object_key_bytes": data,
        "object_file": file[order],
        "object_start": start[order],
        "object_bytes": size[order],
        **digests,
    }
