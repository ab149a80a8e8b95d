"""`ShardedObject`: one Python value per rank or position; `LocalNonpersistentObject`: a value that is never stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from giantstep.errors import BadArgumentError
from giantstep.mapping.replica import ReplicaId, check_replica_id
from giantstep.shards.object_keys import ObjectPosition, position_of
from giantstep.shards.region import as_ints


@dataclass(eq=False, slots=True)
class ShardedObject:
    """One of a grid of objects with a common key: RNG state per rank, loader position per data-parallel rank.

    Saving stores every position of the grid once, by its main replica; loading gives each rank the object of the
    position that it asks for. A grid of another shape than the stored one is met as
    `LoadOptions.on_object_reshard` says.

    Attributes:
        key: name of the grid, the same on all ranks.
        data: the value, of types that the object codec knows; ignored (may be None) on load.
        global_shape: positions per axis of the grid, e.g. `(world_size,)`; `()` is a single object.
        global_offset: position of this object.
        replica_id: 0 (or zeros) on exactly one of the ranks that hold this position.
    """

    key: str
    data: Any
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    replica_id: ReplicaId = 0

    def __post_init__(self) -> None:
        self.validate()

    @property
    def position(self) -> ObjectPosition:
        """Key, grid and place in it."""
        return ObjectPosition(self.key, self.global_shape, self.global_offset)

    @property
    def unique_key(self) -> str:
        """The name of this object among all: `{key}/shard_{offset}_{shape}`, numbers joined by dots."""
        return self.position.unique_key

    @classmethod
    def empty_from_unique_key(cls, unique_key: str, replica_id: ReplicaId = 0) -> ShardedObject:
        """The object of a unique key, without data; the inverse of `unique_key`.

        Raises:
            BadArgumentError: the text is no unique key.
        """
        position = position_of(unique_key)
        if position is None:
            raise BadArgumentError(f"{unique_key!r} is not the unique key of a sharded object: expected key/shard_0.3_1.8")
        return cls(position.key, None, position.shape, position.offset, replica_id)

    def without_data(self) -> ShardedObject:
        """A copy that holds no value."""
        return replace(self, data=None)

    def validate(self) -> None:
        """Raise `BadArgumentError` unless all attributes fit each other."""
        what = f"object {self.key!r}"
        if not isinstance(self.key, str) or not self.key:
            raise BadArgumentError(f"object key {self.key!r} must be a str that is not empty")
        self.global_shape = as_ints(self.global_shape, f"global_shape of {what}")
        self.global_offset = as_ints(self.global_offset, f"global_offset of {what}")
        if len(self.global_offset) != len(self.global_shape) or not all(
            0 <= place < count for place, count in zip(self.global_offset, self.global_shape, strict=True)
        ):
            raise BadArgumentError(f"{what}: global_offset {self.global_offset} is no position of grid {self.global_shape}")
        if math.prod(self.global_shape) >= 1 << 62:
            raise BadArgumentError(f"{what}: grid {self.global_shape} has too many positions")
        self.replica_id = check_replica_id(self.replica_id, what)


class SharedObject(ShardedObject):
    """A sharded object that is equal on all ranks that hold it, of which any may write it: `replica_id` means nothing.

    For what belongs to a parameter and so is on whichever ranks that is on: nobody need say which of them is the main one.
    """

    __slots__ = ()


class LocalNonpersistentObject:
    """A value that is never stored: on load, the local value is put in its place.

    Args:
        obj: the value.
    """

    __slots__ = ("obj",)

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def unwrap(self) -> Any:
        """The value."""
        return self.obj

    def __repr__(self) -> str:
        return f"LocalNonpersistentObject({self.obj!r})"
