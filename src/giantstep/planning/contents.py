"""What ranks tell rank 0 of the contents that they are to write, and what it answers. Messages of `reusing` and `saving`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import PeerFailureError
from giantstep.planning.columns import pack_column, pack_texts, unpack_column, unpack_texts
from giantstep.planning.description import Parts
from giantstep.planning.previous import Digests
from giantstep.shards.region import Int64s

REPORT_PARTS = 6
_VERDICT_PARTS = 4


@dataclass(frozen=True, slots=True)
class ContentReport:
    """Digests of what one rank is to write.

    Attributes:
        chunk_head, chunk_digest: [chunks of its part, 1 and 2]; zeros where none was taken.
        object_keys, object_bytes, object_digest: its objects.
    """

    chunk_head: Digests
    chunk_digest: Digests
    object_keys: list[str]
    object_bytes: Int64s
    object_digest: Digests

    def encode(self) -> Parts:
        """As a message."""
        digests = map(pack_column, (self.chunk_head, self.chunk_digest, self.object_digest))
        return (*pack_texts(self.object_keys), pack_column(self.object_bytes), *digests)

    @classmethod
    def decode(cls, parts: Parts) -> ContentReport:
        """Inverse of `encode`."""
        if len(parts) != REPORT_PARTS:
            raise PeerFailureError(f"a rank reported its contents in {len(parts)} parts, expected {REPORT_PARTS}")
        keys, sizes = unpack_texts(*parts[:2]), unpack_column(parts[2])
        heads = unpack_column(parts[3], np.uint64).reshape(-1, 1)
        chunks, objects = (unpack_column(part, np.uint64, 2) for part in parts[4:])
        if len(sizes) != len(keys) or len(objects) != len(keys):
            raise PeerFailureError(f"a rank reported {len(objects)} digests of {len(keys)} objects")
        return cls(heads, chunks, keys, sizes, objects)

    def check(self, chunks: int) -> None:
        """Raise `PeerFailureError` unless it is of so many chunks."""
        if len(self.chunk_digest) != chunks or len(self.chunk_head) != chunks:
            raise PeerFailureError(f"a rank reported {len(self.chunk_digest)} digests of {chunks} chunks")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a rank's entries.

    Attributes:
        state: [chunks of its part, then its objects] CHANGED, SETTLED or REUSED (`planning.previous`).
        bytes_reused, bytes_dead: of all ranks.
        problem: why not all that could be used again is; "" if there is nothing to be told.
    """

    state: NDArray[np.uint8]
    bytes_reused: int
    bytes_dead: int
    problem: str

    def encode(self) -> Parts:
        """As a message."""
        counts = (str(self.bytes_reused).encode("ascii"), str(self.bytes_dead).encode("ascii"))
        return (pack_column(self.state), *counts, self.problem.encode("utf-8", "replace"))

    @classmethod
    def decode(cls, parts: Parts) -> Verdict:
        """Inverse of `encode`."""
        if len(parts) != _VERDICT_PARTS:
            raise PeerFailureError(f"rank 0 decided on contents in {len(parts)} parts, expected {_VERDICT_PARTS}")
        return cls(unpack_column(parts[0], np.uint8), int(parts[1]), int(parts[2]), parts[3].decode("utf-8"))
