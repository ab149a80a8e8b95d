"""`write`: a rank's entries to its data files, durable when it returns. Called by `save` and `removal`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.format.container import Entry
from giantstep.format.data_file import DataFilePlan, plan_data_files
from giantstep.format.digests import Checksums
from giantstep.format.names import DATA_DIR, data_file_name
from giantstep.options import SaveOptions
from giantstep.storage.base import Store
from giantstep.writing.stream import BlockStream, BufferPool

# Below this a file is not worth bypassing the page cache.
_DIRECT_FROM_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """One entry and where its bytes come from.

    Attributes:
        entry: name, dtype and size in the data file.
        alignment: its item size.
        pieces: gives its bytes in order, as one-dimensional uint8 arrays. Each keeps its bytes as long as it is referred
            to: they are checksummed and written later, in other threads, and mostly without a copy.
    """

    entry: Entry
    alignment: int
    pieces: Callable[[], Iterable[NDArray[np.uint8]]]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A data file as it lies in the store: name, size, and the checksum of each block."""

    name: str
    bytes: int
    checksums: Checksums


@dataclass(frozen=True, slots=True)
class Written:
    """All that one rank wrote.

    Attributes:
        files: its data files.
        file, start: per source, row in `files` and first byte.
    """

    files: list[WrittenFile]
    file: list[int]
    start: list[int]


def write(store: Store, save_id: str, rank: int, sources: Sequence[Source], options: SaveOptions) -> Written:
    """Write a rank's data files and flush them.

    When it returns, bytes and names are durable. When it raises, files of `save_id` may be left; no other save
    uses their names.

    Raises:
        OSError: a storage operation failed.
    """
    entries = [source.entry for source in sources]
    metadata = {"format": "giantstep", "save_id": save_id, "rank": str(rank)}
    plans = plan_data_files(entries, [source.alignment for source in sources], options.max_file_bytes, metadata)
    written = Written([], [0] * len(sources), [0] * len(sources))
    if not plans:
        return written
    with BufferPool(options.buffer_bytes, options.writer_threads) as pool:
        for number, plan in enumerate(plans):
            name = data_file_name(save_id, rank, number)
            checksums = _write_file(store, name, plan, sources, pool, options)
            written.files.append(WrittenFile(name, plan.bytes, checksums))
            for position, start in zip(plan.order, plan.starts, strict=True):
                written.file[position], written.start[position] = number, start
    store.sync_names(DATA_DIR)
    return written


def _write_file(
    store: Store, name: str, plan: DataFilePlan, sources: Sequence[Source], pool: BufferPool, options: SaveOptions
) -> Checksums:
    direct = options.direct_io == "auto" and plan.bytes >= _DIRECT_FROM_BYTES
    handle = store.create(name, plan.bytes, direct=direct)
    try:
        with BlockStream(handle, pool, options.block_bytes) as stream:
            stream.append([np.frombuffer(plan.header, dtype=np.uint8)])
            for position in plan.order:
                stream.append(sources[position].pieces())
            checksums = stream.finish()
        handle.sync()
    finally:
        handle.close()
    return checksums
