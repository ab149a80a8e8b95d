"""Digests of the entries that a rank is to write, and of their heads. Called by `saving`, before anything is written."""

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


# What is longer than this has a head of so many bytes, see docs/format.md.
HEAD_BYTES = 1 << 16


def heads_of(sources: Sources) -> NDArray[np.uint64]:
    """[entries, 1] xxh3-64 of the first `HEAD_BYTES` bytes of each entry that is longer and lies in memory; else 0."""
    found = np.zeros((len(sources.bytes), 1), dtype=np.uint64)
    rows = np.flatnonzero((sources.address != 0) & (sources.bytes > HEAD_BYTES))
    between, low = _memory(sources)
    for row, begin in zip(rows.tolist(), (sources.address[rows] - low).tolist(), strict=True):
        found[row, 0] = xxhash.xxh3_64_intdigest(between[begin : begin + HEAD_BYTES])
    return found


def digests_of(sources: Sources, rows: Int64s, threads: int, check: Callable[[], None] = lambda: None) -> NDArray[np.uint64]:
    """[entries, 2] xxh3-128 of all bytes of some entries, high words first; zeros for the others.

    Args:
        sources, rows: of which entries.
        threads: how many take digests at a time.
        check: called now and then; raises if nothing more is to be done.
    """
    between, low = _memory(sources)

    def digest(row: int) -> bytes:
        begin = int(sources.address[row])
        if begin:
            return xxhash.xxh3_128_digest(between[begin - low : begin - low + int(sources.bytes[row])])
        state = xxhash.xxh3_128()
        for piece in sources.pieces(row):
            state.update(piece.data)
        return state.digest()

    def digest_all(batch: Int64s) -> bytes:
        check()
        return b"".join(map(digest, batch.tolist()))

    batches = np.split(rows, _borders(sources.bytes[rows]))
    if threads == 1 or len(batches) == 1:
        taken = list(map(digest_all, batches))
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="giantstep-digest") as pool:
            taken = list(pool.map(digest_all, batches))
    found = np.zeros((len(sources.bytes), 2), dtype=np.uint64)
    found[rows] = np.frombuffer(b"".join(taken), dtype=">u8").reshape(-1, 2)
    return found


def _memory(sources: Sources) -> tuple[memoryview, int]:
    """All memory that entries lie in, and where it begins."""
    filled = np.flatnonzero(sources.address)
    if not len(filled):
        return memoryview(b""), 0
    low = int(sources.address[filled].min())
    return memory_between(low, int((sources.address + sources.bytes)[filled].max())), low


def _borders(sizes: Int64s) -> Int64s:
    """Where entries, in their order, are divided into batches."""
    batch = np.cumsum(sizes) // _BATCH_BYTES
    borders: Int64s = np.flatnonzero(np.diff(batch) > 0) + 1
    return borders
