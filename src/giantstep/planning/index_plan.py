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


def build_index(plan: SavePlan, reports: Sequence[WriteReport]) -> tuple[Index, tuple[FileEntry, ...]]:
    """The index of the checkpoint, and the data files in the order that its file numbers mean."""
    first_file = np.cumsum([0, *(len(report.file_names) for report in reports)])
    files = tuple(
        FileEntry(name, int(size), rank)
        for rank, report in enumerate(reports)
        for name, size in zip(report.file_names, report.file_bytes, strict=True)
    )
    chunk_file = np.zeros(len(plan.tensor), dtype=np.int64)
    chunk_start = np.zeros(len(plan.tensor), dtype=np.int64)
    by_writer = plan.chunks_by_writer()
    for rank, report in enumerate(reports):
        rows = by_writer[rank]
        if len(rows) != len(report.chunk_file):
            raise PeerFailureError(f"reports {len(report.chunk_file)} chunks written, expected {len(rows)}", rank=rank)
        chunk_file[rows] = report.chunk_file + first_file[rank]
        chunk_start[rows] = report.chunk_start
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
        **_object_columns(reports, first_file),
        file_block_ends=_ends(np.concatenate([report.file_blocks for report in reports])),
        block_checksum=np.concatenate([np.empty(0, np.uint64), *(report.block_checksum for report in reports)]),
    )
    return index, files


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


def _object_columns(reports: Sequence[WriteReport], first_file: Int64s) -> dict[str, np.ndarray]:
    keys = [key.encode("utf-8") for report in reports for key in report.object_keys]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ends, data = encode_texts([keys[position] for position in order])
    file = np.concatenate([report.object_file + first_file[rank] for rank, report in enumerate(reports)])
    start = np.concatenate([report.object_start for report in reports])
    size = np.concatenate([report.object_bytes for report in reports])
    return {
        "object_key_ends": ends,
        "object_key_bytes": data,
        "object_file": file[order],
        "object_start": start[order],
        "object_bytes": size[order],
    }
