"""How fast the medium takes bytes: measured once, with files of no use, by all ranks at once."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from giantstep.group.base import Group, consult
from giantstep.storage.base import Store
from giantstep.storage.buffers import device_buffer

_SCRATCH_BYTES = 64 << 20
_PIECE_BYTES = 8 << 20


def raw_bytes_per_sec(root: Store, group: Group, timeout_secs: float) -> float:
    """Bytes per second that all ranks together can write durably.

    Each writes 64 MiB to a file beside the steps, and removes it.
    """
    consult(group, "measure", timeout_secs, lambda: b"")

    def slowest(reports: Sequence[bytes]) -> list[bytes]:
        return [max(reports, key=float)] * len(reports)

    secs = consult(group, "measure", timeout_secs, lambda: repr(_secs_of(root)).encode("ascii"), slowest)
    return group.size * _SCRATCH_BYTES / float(secs)


def _secs_of(root: Store) -> float:
    root.prepare("")
    name = f"giantstep-speed-{secrets.token_hex(8)}.tmp"
    buffer = device_buffer(_PIECE_BYTES)
    # Pages that were never touched are no memory yet.
    buffer.fill(0xA5)
    piece = buffer.data
    try:
        begin = time.perf_counter()
        handle = root.create(name, _SCRATCH_BYTES, direct=True)
        try:
            for offset in range(0, _SCRATCH_BYTES, _PIECE_BYTES):
                handle.write_at(offset, piece)
            handle.sync()
        finally:
            handle.close()
        return time.perf_counter() - begin
    finally:
        root.delete(name)
