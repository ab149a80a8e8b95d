"""From a save plan and what every rank reports to have written to the columns of the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.errors import PeerFailureError
from giantstep.format.digests import Checksums
from giantstep.format.index import Index, encode_texts
from giantstep.format.record import FileEntry
from giantstep.planning.description import pack_columns, pack_texts, unpack_columns, unpack_texts
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

    def encode(self) -> bytes:
        """As bytes."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        for name in _TEXTS:
            columns |= pack_texts(name, getattr(self, name))
        return pack_columns(columns)

    @classmethod
    def decode(cls, data: bytes) -> WriteReport:
        """Inverse of `encode`."""
        columns = unpack_columns(data)
        texts = {name: unpack_texts(name, columns) for name in _TEXTS}
        return cls(**texts, **{name: columns[name] for name in _COLUMNS})  # type: ignore[arg-type]


_TEXTS = ("file_names", "object_keys")
_COLUMNS = tuple(name for name in WriteReport.__dataclass_fields__ if name not in _TEXTS)


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
    by_writer = np.split(
        np.argsort(plan.writer, kind="stable"), np.cumsum(np.bincount(plan.writer, minlength=len(reports)))[:-1]
    )
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
