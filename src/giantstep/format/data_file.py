"""Data files: which entries one rank's files hold, in which order, and how they are named.

Entries are sorted so that those of larger items come first: every entry then begins at a multiple of its
item size without filler. Pure; `writing` streams the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.format.container import (
    DATA_ALIGNMENT,
    MAX_HEADER_BYTES,
    Entry,
    Section,
    header_bytes_bound,
    header_of,
    headers_bytes_bound,
    kind_text,
    lay_out,
    names_bytes_bound,
    section_of,
)
from giantstep.shards.dtypes import DType
from giantstep.shards.region import Int64s, Region

# Keeps every header far below what safetensors allows, however small the tensors.
MAX_ENTRIES_PER_FILE = 100_000


def chunk_entry(key: str, dtype: DType, region: Region) -> Entry:
    """The entry of a chunk: named by key and region, as `decoder.weight[0:1024,0:4096]`."""
    return Entry(key + str(region), dtype.container, dtype.container_shape(region.size), region.elements * dtype.item_bytes)


def object_entry(key: str, encoded_bytes: int) -> Entry:
    """The entry of an encoded object: named by its key in braces, which no chunk's name ends in."""
    return Entry(f"{{{key}}}", "U8", (encoded_bytes,), encoded_bytes)


@dataclass(frozen=True, slots=True)
class DataFilePlan:
    """One data file before it is written.

    Attributes:
        header: leading bytes, up to the first entry's data.
        order: which of the given entries it holds, in file order.
        starts: first byte of each, parallel to `order`.
        bytes: size of the file.
    """

    header: bytes
    order: Int64s
    starts: Int64s
    bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ChunkLayout:
    """A rank's chunks as they follow one another if one file holds them all, as it mostly does.

    It depends on keys, dtypes and regions alone, so it can be kept for later saves of the same chunks.

    Attributes:
        bytes: size of each chunk, in the order in which they were given.
        order: which of them comes where in the file.
        section: their part of the header.
        header_bytes_bound: at least what they add to a header.
    """

    bytes: Int64s
    order: Int64s
    section: Section
    header_bytes_bound: int

    @classmethod
    def of(cls, keys: Sequence[str], dtypes: Sequence[DType], regions: Sequence[Region]) -> ChunkLayout:
        """The layout of these chunks. What many say of one `Region` object is worked out once."""
        likes = list(zip(map(id, regions), map(id, dtypes), strict=True))
        first = dict(zip(likes, zip(dtypes, regions, strict=True), strict=True))
        # Entries of chunks with an empty key: what comes behind the key in the name, and all else.
        known = {like: chunk_entry("", dtype, region) for like, (dtype, region) in first.items()}
        kinds = {like: kind_text(entry.dtype, entry.shape) for like, entry in known.items()}
        names = [key + known[like].name for key, like in zip(keys, likes, strict=True)]
        order = np.argsort(-np.array([dtype.item_bytes for dtype in dtypes], dtype=np.int64), kind="stable")
        rows = order.tolist()
        size = np.array([known[like].bytes for like in likes], dtype=np.int64)
        section = section_of([names[row] for row in rows], [kinds[likes[row]] for row in rows], size[order].tolist())
        dims = max([len(entry.shape) for entry in known.values()], default=0)
        return cls(size, order, section, names_bytes_bound(names, dims))

    def with_objects(self, objects: Sequence[Entry], max_file_bytes: int, metadata: dict[str, str]) -> DataFilePlan | None:
        """The plan of one file of the chunks and these objects behind them; None if they may not fit one file."""
        count = len(self.bytes) + len(objects)
        header_bound = 2 * DATA_ALIGNMENT + self.header_bytes_bound + headers_bytes_bound(objects)
        file_bound = header_bound + self.section.stop + sum([entry.bytes for entry in objects])
        if count > MAX_ENTRIES_PER_FILE or header_bound > MAX_HEADER_BYTES // 2 or file_bound > max_file_bytes:
            return None
        # Objects have no items to be aligned, and names that no chunk has: they come last, as in `plan_data_files`.
        kinds = [kind_text(entry.dtype, entry.shape) for entry in objects]
        behind = section_of([entry.name for entry in objects], kinds, [entry.bytes for entry in objects], self.section.stop)
        header = header_of([self.section, behind], metadata)
        order = np.concatenate((self.order, np.arange(len(self.bytes), count)))
        starts = np.concatenate((self.section.starts, behind.starts)) + len(header)
        return DataFilePlan(header, order, starts, len(header) + behind.stop)


def file_metadata(save_id: str, rank: int) -> dict[str, str]:
    """What the header of a data file says besides its entries."""
    return {"format": "giantstep", "save_id": save_id, "rank": str(rank)}


def plan_data_files(
    entries: Sequence[Entry], alignments: Sequence[int], max_file_bytes: int, metadata: dict[str, str]
) -> list[DataFilePlan]:
    """Distribute entries over as few files as `max_file_bytes` allows; an entry is never divided.

    Args:
        entries: what the rank writes.
        alignments: item size of each entry, a power of two.
        max_file_bytes: limit per file, header included, unless one entry alone is larger.
    """
    order = sorted(range(len(entries)), key=[-alignment for alignment in alignments].__getitem__)
    plans: list[DataFilePlan] = []
    group: list[int] = []
    header_bound, data_bytes = DATA_ALIGNMENT, 0
    for position in order:
        entry = entries[position]
        bound = header_bytes_bound(entry)
        too_large = header_bound + bound + DATA_ALIGNMENT + data_bytes + entry.bytes > max_file_bytes
        too_many = len(group) == MAX_ENTRIES_PER_FILE or header_bound + bound > MAX_HEADER_BYTES // 2
        if group and (too_large or too_many):
            plans.append(_data_file(entries, group, metadata))
            group, header_bound, data_bytes = [], DATA_ALIGNMENT, 0
        group.append(position)
        header_bound += bound
        data_bytes += entry.bytes
    if group:
        plans.append(_data_file(entries, group, metadata))
    return plans


def _data_file(entries: Sequence[Entry], group: Sequence[int], metadata: dict[str, str]) -> DataFilePlan:
    header, starts = lay_out([entries[position] for position in group], metadata)
    size = len(header) + sum(entries[position].bytes for position in group)
    return DataFilePlan(header, np.array(group, dtype=np.int64), starts, size)
