"""Writing one stretch of a file, given as parts in memory, and taking the checksums of its blocks.

Called by `stream`, in its threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from giantstep.format.digests import Checksums, cut_parts, digests_of_parts
from giantstep.storage.base import WriteHandle
from giantstep.storage.buffers import address_of
from giantstep.writing.running import RunningDigests

Bytes = NDArray[np.uint8]

# About as much as the cache of one processor core holds.
_CACHE_BYTES = 1 << 20


def write_stretch(
    handle: WriteHandle,
    offset: int,
    parts: Sequence[memoryview],
    buffer: Bytes,
    block_bytes: int,
    digests: RunningDigests | None = None,
) -> Checksums:
    """Write all parts, one after another; return the checksum of each block.

    Args:
        handle: of the file.
        offset: where in the file they belong, a multiple of `block_bytes`.
        parts: none is empty; must not change meanwhile.
        buffer: at least as long as all parts, and aligned to `direct_bytes` of the handle.
        block_bytes: size of the checksummed blocks; the last one may be shorter.
        digests: are told of all parts.
    """
    if handle.direct_bytes:
        return _write_direct(handle, offset, parts, buffer, block_bytes, digests)
    # What the system copies is checksummed just before, so that it then is in the processor's cache.
    step = max(1, _CACHE_BYTES // block_bytes) * block_bytes if handle.nearby else len(buffer)
    found: list[int] = []
    for group in cut_parts(parts, step):
        found += digests_of_parts(group, block_bytes)
        if digests is not None:
            digests.passed(offset, group)
        handle.write_parts(offset, group)
        offset += step
    return np.array(found, dtype=np.uint64)


def _write_direct(
    handle: WriteHandle,
    offset: int,
    parts: Sequence[memoryview],
    buffer: Bytes,
    block_bytes: int,
    digests: RunningDigests | None,
) -> Checksums:
    """Write past the page cache: from where the bytes are, if the device can take them there, else from the buffer."""
    alignment = handle.direct_bytes
    if len(parts) == 1 and not _address(parts[0]) % alignment:
        data = parts[0]
        found = _digests_of_blocks(offset, data, block_bytes, digests)
    else:
        found = []
        end = 0
        # Each block is checksummed just after it was copied, while it is in the processor's cache.
        for block in cut_parts(parts, block_bytes):
            start, end = end, end + sum(map(len, block))
            np.concatenate([np.frombuffer(part, dtype=np.uint8) for part in block], out=buffer[start:end])
            found += digests_of_parts([buffer.data[start:end]], block_bytes)
            if digests is not None:
                # Of where they come from: the buffer is used again.
                digests.passed(offset + start, block)
        data = buffer.data[:end]
    # Only the end of the file may be no multiple of the alignment.
    whole = len(data) // alignment * alignment
    for start, part in ((offset, data[:whole]), (offset + whole, data[whole:])):
        if part:
            handle.write_at(start, part)
    return np.array(found, dtype=np.uint64)


def _digests_of_blocks(offset: int, data: memoryview, block_bytes: int, digests: RunningDigests | None) -> list[int]:
    found = []
    for start in range(0, len(data), block_bytes):
        block = data[start : start + block_bytes]
        found += digests_of_parts([block], block_bytes)
        if digests is not None:
            digests.passed(offset + start, [block])
    return found


def _address(part: memoryview) -> int:
    return address_of(np.frombuffer(part, dtype=np.uint8))
