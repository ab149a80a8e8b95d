"""Replica ids: which of several equal shards or objects is the one that is written."""

from __future__ import annotations

import operator

from giantstep.errors import BadArgumentError

ReplicaId = int | tuple[int, ...]


def is_main_replica(replica_id: ReplicaId) -> bool:
    """Whether this replica id marks the copy that is written: 0, or a tuple of zeros."""
    return replica_id == 0 if isinstance(replica_id, int) else all(part == 0 for part in replica_id)


def check_replica_id(replica_id: object, what: str) -> ReplicaId:
    """The replica id with plain ints; raises `BadArgumentError` unless it is an int or a tuple of ints, none negative."""
    parts = replica_id if isinstance(replica_id, tuple) else (replica_id,)
    try:
        found = tuple(operator.index(part) for part in parts)
    except TypeError:
        found = (-1,)
    if any(part < 0 for part in found):
        raise BadArgumentError(f"{what}: replica_id {replica_id!r} must be an int or a tuple of ints, none negative")
    return found if isinstance(replica_id, tuple) else found[0]
