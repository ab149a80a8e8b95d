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

_REPORT_PARTS = 5
_VERDICT_PARTS = 4


@dataclass(frozen=True, slots=True)
class ContentReport:
    """Digests of what one rank is to write.

    Attributes:
        chunk_digest: [chunks of its part, 2].
        object_keys, object_bytes, object_digest: its objects.
    """

    chunk_digest: Digests
    object_keys: list[str]
    object_bytes: Int64s
    object_digest: Digests

    def encode(self) -> Parts:
        """As a message."""
        digests = (pack_column(self.chunk_digest), pack_column(self.object_digest))
        return (*pack_texts(self.object_keys), pack_column(self.object_bytes), *digests)

    @classmethod
    def decode(cls, parts: Parts) -> ContentReport:
        """Inverse of `encode`."""
        if len(parts) != _REPORT_PARTS:
            raise PeerFailureError(f"a rank reported its contents in {len(parts)} parts, expected {_REPORT_PARTS}")
        keys, sizes = unpack_texts(*parts[:2]), unpack_column(parts[2])
        chunks, objects = (unpack_column(part, np.uint64, 2) for part in parts[3:])
        if len(sizes) != len(keys) or len(objects) != len(keys):
            raise PeerFailureError(f"a rank reported {len(objects)} digests of {len(keys)} objects")
        return cls(chunks, keys, sizes, objects)

    def checked_chunks(self, count: int) -> Digests:
        """The digests of chunks, which must be so many."""
        if len(self.chunk_digest) != count:
            raise PeerFailureError(f"a rank reported {len(self.chunk_digest)} digests of {count} chunks")
        return self.chunk_digest


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
