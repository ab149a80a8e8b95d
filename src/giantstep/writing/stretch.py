"""A stretch of a file, given as parts in memory: the runs of bytes to hand to the store, and the checksums of its blocks.

Blocks that lie within one part stay where they are. Blocks made of several parts, or of memory that the device cannot take,
are copied together, each just before it is checksummed, so that it is then still in the processor's cache. Called by `stream`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.format.digests import Checksums, block_checksums

Bytes = NDArray[np.uint8]

# Past the page cache every run is a request to the device, for which shorter ones are not worth saving a copy.
_DIRECT_RUN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive whole blocks: of one part, to stay in place; or of several, to be gathered."""

    parts: list[Bytes]
    in_place: bool


def lay_stretch(parts: Sequence[Bytes], buffer: Bytes, block_bytes: int, direct_bytes: int) -> tuple[list[Bytes], Checksums]:
    """Lay out the bytes of all parts, one after another.

    Args:
        parts: a stretch of a file that begins at a multiple of `block_bytes`; none is empty.
        buffer: where bytes are gathered, at least as long as the stretch, and aligned to `direct_bytes`.
        block_bytes: size of the checksummed blocks; the last one may be shorter.
        direct_bytes: alignment of memory that the device takes; 0 if any will do.

    Returns:
        Arrays that hold the stretch in order, valid as long as parts and buffer keep their bytes; a checksum per block.
    """
    laid: list[Bytes] = []
    checksums: list[Checksums] = []
    start = 0
    for run in _runs(parts, block_bytes, direct_bytes):
        if run.in_place:
            data = run.parts[0]
            checksums.append(block_checksums(data.data, block_bytes))
        else:
            stop = start
            for block in _blocks(run.parts, block_bytes):
                begin, stop = stop, stop + sum(len(part) for part in block)
                np.concatenate(block, out=buffer[begin:stop])
                checksums.append(block_checksums(buffer.data[begin:stop], block_bytes))
            data = buffer[start:stop]
        laid.append(data)
        start += len(data)
    return laid, np.concatenate(checksums)


def _runs(parts: Sequence[Bytes], block_bytes: int, direct_bytes: int) -> Iterator[_Run]:
    """The stretch as runs in order."""
    total = sum(len(part) for part in parts)
    least = _DIRECT_RUN_BYTES if direct_bytes else block_bytes
    gathered: list[Bytes] = []
    start = 0
    for part in parts:
        stop = start + len(part)
        # The whole blocks within the part; the last one ends where the stretch does.
        low = -(-start // block_bytes) * block_bytes
        high = stop if stop == total else stop // block_bytes * block_bytes
        if high - low < min(least, total) or (direct_bytes and (_address(part) + low - start) % direct_bytes):
            gathered.append(part)
        else:
            if low > start:
                gathered.append(part[: low - start])
            if gathered:
                yield _Run(gathered, in_place=False)
            yield _Run([part[low - start : high - start]], in_place=True)
            gathered = [part[high - start :]] if high < stop else []
        start = stop
    if gathered:
        yield _Run(gathered, in_place=False)


def _blocks(parts: Sequence[Bytes], block_bytes: int) -> Iterator[list[Bytes]]:
    """Parts cut so that each list makes one block."""
    block: list[Bytes] = []
    room = block_bytes
    for part in parts:
        rest = part
        while len(rest) >= room:
            yield [*block, rest[:room]]
            rest, block, room = rest[room:], [], block_bytes
        if len(rest):
            block.append(rest)
            room -= len(rest)
    if block:
        yield block


def _address(part: Bytes) -> int:
    """Where the bytes lie in memory."""
    return int(part.__array_interface__["data"][0])
