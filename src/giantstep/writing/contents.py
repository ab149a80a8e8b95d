"""`digests_of`: a 128-bit digest of each entry that a rank is to write. Called by `saving`, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash
from numpy.typing import NDArray

from giantstep.shards.region import Int64s
from giantstep.storage.buffers import memory_between
from giantstep.writing.write import Sources

# About as much as a thread takes at a time; entries are not divided.
_BATCH_BYTES = 8 << 20


def digests_of(sources: Sources, threads: int, check: Callable[[], None] = lambda: None) -> NDArray[np.uint64]:
    """[entries, 2] xxh3-128 of the bytes of each entry, high words first.

    Args:
        sources: of the entries.
        threads: how many take digests at a time.
        check: called now and then; raises if nothing more is to be done.
    """
    filled = np.flatnonzero(sources.address)
    low = int(sources.address[filled].min(initial=0 if not len(filled) else int(sources.address[filled[0]])))
    high = int((sources.address + sources.bytes)[filled].max(initial=0))
    between = memory_between(low, high)

    def digest(row: int) -> bytes:
        begin = int(sources.address[row])
        if begin:
            return xxhash.xxh3_128_digest(between[begin - low : begin - low + int(sources.bytes[row])])
        state = xxhash.xxh3_128()
        for piece in sources.pieces(row):
            state.update(piece.data)
        return state.digest()

    def digest_all(rows: Int64s) -> bytes:
        check()
        return b"".join(map(digest, rows.tolist()))

    batches = np.split(np.arange(len(sources.bytes)), _borders(sources.bytes))
    if threads == 1 or len(batches) == 1:
        found = list(map(digest_all, batches))
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="giantstep-digest") as pool:
            found = list(pool.map(digest_all, batches))
    return np.frombuffer(b"".join(found), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _borders(sizes: Int64s) -> Int64s:
    """Where entries, in their order, are divided into batches."""
    batch = np.cumsum(sizes) // _BATCH_BYTES
    borders: Int64s = np.flatnonzero(np.diff(batch) > 0) + 1
    return borders
