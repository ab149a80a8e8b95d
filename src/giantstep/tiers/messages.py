"""What rank 0 tells ranks of the files that they are to carry."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from giantstep.errors import PeerFailureError
from giantstep.format.digests import Checksums
from giantstep.planning.description import Parts
from giantstep.tiers.copying import FACTS_PARTS, FileFacts
from giantstep.tiers.courier import Move

# What a rank holds of files on their way, in all lines together; a line moves at least a block at a time.
_IN_FLIGHT_BYTES = 8 << 20
_MOVES_PARTS = FACTS_PARTS + 1


def moves_to(moves: Sequence[tuple[str, int, int, int, Checksums]], ranks: int, block_bytes: int) -> list[Parts]:
    """By rank, its part of the moves (file's name, bytes, from, to, checksums); decoded by `moves_from`."""
    sends: list[list[Move]] = [[] for _ in range(ranks)]
    receives: list[list[Move]] = [[] for _ in range(ranks)]
    for name, size, source, target, sums in moves:
        sends[source].append(Move(name, size, target))
        receives[target].append(Move(name, size, source, sums))
    lines = max((len({move.peer for move in found}) for found in (*sends, *receives)), default=0)
    piece = max(1, _IN_FLIGHT_BYTES // max(1, lines) // block_bytes) * block_bytes
    head = str(piece).encode("ascii")
    return [(head, *_packed(sends[rank]), *_packed(receives[rank])) for rank in range(ranks)]


def _packed(moves: Sequence[Move]) -> Parts:
    sums = [np.empty(0, np.uint64) if move.checksums is None else move.checksums for move in moves]
    facts = FileFacts([move.name for move in moves], [move.bytes for move in moves], sums)
    return (*facts.encode(), json.dumps([move.peer for move in moves]).encode("ascii"))


def moves_from(plan: Parts) -> tuple[int, list[Move], list[Move]]:
    """Bytes of a piece, and what this rank sends and receives."""
    if len(plan) != 1 + 2 * _MOVES_PARTS:
        raise PeerFailureError(f"rank 0 told in {len(plan)} parts what to carry, expected {1 + 2 * _MOVES_PARTS}")
    sends, receives = plan[1 : 1 + _MOVES_PARTS], plan[1 + _MOVES_PARTS :]
    return int(plan[0]), _unpacked(sends, sent=True), _unpacked(receives, sent=False)


def _unpacked(parts: Parts, *, sent: bool) -> list[Move]:
    facts, peers = FileFacts.decode(parts[:FACTS_PARTS]), json.loads(parts[FACTS_PARTS])
    if len(peers) != len(facts.names):
        raise PeerFailureError(f"rank 0 told of {len(facts.names)} files to be carried and of {len(peers)} ranks")
    return [
        Move(name, size, peer, None if sent else found)
        for name, size, peer, found in zip(facts.names, facts.bytes, peers, facts.checksums, strict=True)
    ]
