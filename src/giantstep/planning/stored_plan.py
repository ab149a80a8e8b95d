"""A save plan as one rank keeps it for later saves, and its form as bytes. Called by `stored_plans` and `planned_save`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from giantstep.errors import CorruptionError, PeerFailureError
from giantstep.format.data_file import ChunkLayout
from giantstep.planning.description import Parts
from giantstep.planning.reuse import PLAN_ID_BYTES
from giantstep.planning.save_plan import SavePlan
from giantstep.planning.write_part import WritePart

_KIND = b"giantstep plan 2"
_DIGEST = "digest"


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """What one rank keeps of a plan.

    Attributes:
        fingerprint: of the description and circumstances for which it was made.
        plan_id: the same on all ranks of the save that made it.
        part: what this rank writes.
        plan: all of it; on rank 0 alone.
        layout: of this rank's chunks in a file, once it has been worked out; not among the bytes of `encode`.
    """

    fingerprint: bytes
    plan_id: bytes
    part: WritePart
    plan: SavePlan | None
    layout: ChunkLayout | None = None

    def encode(self) -> bytes:
        """As bytes that show whether they are intact."""
        part = self.part.encode()
        parts = [_KIND, self.fingerprint, self.plan_id, bytes([len(part)]), *part, *(self.plan.encode() if self.plan else ())]
        entries = {f"{row:03d}": np.frombuffer(found, dtype=np.uint8) for row, found in enumerate(parts)}
        return safetensors_numpy.save({**entries, _DIGEST: np.frombuffer(_digest(parts), dtype=np.uint8)})

    @classmethod
    def decode(cls, data: bytes) -> StoredPlan:
        """Inverse of `encode`.

        Raises:
            CorruptionError: these are not the bytes of a plan, or are damaged, or of another version.
        """
        try:
            # Of dtypes that NumPy has not it raises other errors.
            entries = safetensors_numpy.load(data)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptionError(f"a kept plan cannot be read: {error}") from error
        digest = entries.pop(_DIGEST, np.zeros(0, dtype=np.uint8)).tobytes()
        parts = tuple(entries[name].tobytes() for name in sorted(entries))
        if digest != _digest(parts) or len(parts) < 4 or parts[0] != _KIND or len(parts[2]) != PLAN_ID_BYTES:
            raise CorruptionError("a kept plan is damaged or of another version")
        count = parts[3][0]
        try:
            part, rest = WritePart.decode(parts[4 : 4 + count]), parts[4 + count :]
            return cls(parts[1], parts[2], part, SavePlan.decode(rest) if rest else None)
        except PeerFailureError as error:
            raise CorruptionError(f"a kept plan cannot be read: {error.message}") from error


def _digest(parts: Parts | list[bytes]) -> bytes:
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()
