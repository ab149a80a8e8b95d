"""May a plan be used again? Fingerprints of descriptions, and the tokens on which all ranks agree.

A rank that finds its description unchanged reports a token of 16 bytes instead: the number of the plan, and a sum over the
digests of those of its objects that others hold too, each multiplied so that the sums of all ranks add up to 0 (modulo
2**64) as long as equal objects stayed equal. Called by `planned_save`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from giantstep.planning.description import STRUCTURE_PARTS, Description
from giantstep.planning.write_part import WritePart
from giantstep.shards.region import Int64s
from giantstep.shards.words import mixed

PLAN_ID_BYTES = 8
TOKEN_BYTES = 16


def fingerprint(description: Description, circumstances: bytes) -> bytes:
    """16 bytes that change with anything that a plan depends on: the description without digests, and `circumstances`."""
    state = xxhash.xxh3_128()
    parts = description.encode()
    for part in (circumstances, *(parts[position] for position in STRUCTURE_PARTS)):
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def token(plan_id: bytes, names: Sequence[str], weights: Int64s, digests: np.ndarray) -> bytes:
    """What a rank reports if its description is the one of a plan.

    Args:
        plan_id: number of the plan.
        names, digests: its objects with their digests, [objects, 2]; those of weight 0 do not count.
        weights: from its part of the plan.
    """
    salts = np.array([xxhash.xxh3_64_intdigest(name.encode("utf-8")) for name in names], dtype=np.uint64)
    words = mixed(digests[:, 0] ^ mixed(digests[:, 1], 1), salts) if len(names) else np.zeros(0, dtype=np.uint64)
    # Both are modulo 2**64, negative weights included.
    total = int((words * weights.astype(np.uint64)).sum(dtype=np.uint64))
    return plan_id + total.to_bytes(TOKEN_BYTES - PLAN_ID_BYTES, "little")


def all_as_before(tokens: Sequence[bytes]) -> bool:
    """Whether all ranks' tokens are of one plan and no object that was equal differs."""
    if any(len(found) != TOKEN_BYTES for found in tokens):
        return False
    halves = np.frombuffer(b"".join(tokens), dtype="<u8").reshape(-1, 2)
    return bool((halves[:, 0] == halves[0, 0]).all()) and int(halves[:, 1].sum(dtype=np.uint64)) == 0


def weighted(part: WritePart, names: Sequence[str]) -> list[str]:
    """The objects whose digests count in the token."""
    return [name for name, weight in zip(names, part.weights.tolist(), strict=True) if weight]
