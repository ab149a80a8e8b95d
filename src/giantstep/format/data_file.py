"""Data files: which entries one rank's files hold, in which order, and how they are named.

Entries are sorted so that those of larger items come first: every entry then begins at a multiple of its
item size without filler. Pure; `writing` streams the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from giantstep.format.container import (
    DATA_ALIGNMENT,
    MAX_HEADER_BYTES,
    Entry,
    header_bytes_bound,
    headers_bytes_bound,
    lay_out,
)
from giantstep.shards.dtypes import DType
from giantstep.shards.region import Region

# Keeps every header far below what safetensors allows, however small the tensors.
MAX_ENTRIES_PER_FILE = 100_000


def chunk_entry(key: str, dtype: DType, region: Region) -> Entry:
    """The entry of a chunk: named by key and region, as `decoder.weight[0:1024,0:4096]`."""
    return ChunkEntries().entry(key, dtype, region)


class ChunkEntries:
    """Makes entries of chunks as `chunk_entry` does. What many say of one `Region` object is worked out once."""

    def __init__(self) -> None:
        # The regions are kept too: an id means something only while its object lives.
        self._known: dict[tuple[int, int], tuple[str, str, tuple[int, ...], int, Region]] = {}

    def entry(self, key: str, dtype: DType, region: Region) -> Entry:
        """One entry."""
        like = (id(region), dtype.code)
        known = self._known.get(like)
        if known is None:
            size = region.elements * dtype.item_bytes
            known = self._known[like] = (str(region), dtype.container, dtype.container_shape(region.size), size, region)
        text, container, shape, size, _ = known
        return Entry(key + text, container, shape, size)


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
    order: tuple[int, ...]
    starts: tuple[int, ...]
    bytes: int


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
    if entries and _fit_one_file(entries, max_file_bytes):
        return [_data_file(entries, order, metadata)]
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


def _fit_one_file(entries: Sequence[Entry], max_file_bytes: int) -> bool:
    """Whether it can be seen without a closer look at each entry that all fit one file, as they mostly do."""
    header_bound = 2 * DATA_ALIGNMENT + headers_bytes_bound(entries)
    few = len(entries) <= MAX_ENTRIES_PER_FILE and header_bound <= MAX_HEADER_BYTES // 2
    return few and header_bound + sum([entry.bytes for entry in entries]) <= max_file_bytes


def _data_file(entries: Sequence[Entry], group: Sequence[int], metadata: dict[str, str]) -> DataFilePlan:
    header, starts = lay_out([entries[position] for position in group], metadata)
    return DataFilePlan(header, tuple(group), tuple(starts), len(header) + sum(entries[position].bytes for position in group))
