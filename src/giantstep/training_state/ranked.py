"""`RankedState`: one value per rank or position, with a policy of its own for checkpoints of another number of ranks.

The base of everything in this package. Not here: what the values are.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

from giantstep.errors import BadArgumentError, ShapeMismatchError
from giantstep.group.torch_group import group_of
from giantstep.mapping.placed import PlacedState, StoredNames
from giantstep.mapping.replica import ReplicaId
from giantstep.mapping.sharded_object import LocalNonpersistentObject, ShardedObject
from giantstep.mapping.tree import Tree
from giantstep.shards.object_keys import ObjectPosition

Position = tuple[int, ...]

Reshard = Callable[[Mapping[Position, Any], Position, Position], Any]
"""(stored values by position, grid, position) to the value of a position of another grid; grid and position are those now."""

_VALUE = "value"


class _Absent:
    """Stands where nothing was loaded."""


_ABSENT = _Absent()


class RankedState(PlacedState):
    """A value per position of a grid, as a leaf for `save`, `async_save` and `load`.

    Args:
        capture: gives the value of this rank, of types that the object codec knows; called by each save.
        restore: takes the value of this rank; called at the end of a load.
        grid: number of ranks, or positions per axis, such as `(pipeline, data)`; None: the ranks of `process_group`.
        position: this rank's, in the grid; None: its rank.
        replica_id: 0 (or zeros) on one of the ranks that have this position, where several do.
        process_group: for `grid=None`; default: the default group, or one process alone.
        on_reshard: when the checkpoint has another grid: `raise` a `ShapeMismatchError` before anything is loaded; or a
            function that makes the value of a position of all that is stored, the same wherever it is called.
        on_missing: when the checkpoint has no such state: `strict`, as `load(strict=)` says, or `keep` what there is.

    Attributes:
        loaded: whether the last load has restored anything.
    """

    def __init__(
        self,
        capture: Callable[[], Any],
        restore: Callable[[Any], None],
        *,
        grid: int | Position | None = None,
        position: int | Position | None = None,
        replica_id: ReplicaId = 0,
        process_group: Any = None,
        on_reshard: Literal["raise"] | Reshard = "raise",
        on_missing: Literal["strict", "keep"] = "strict",
    ) -> None:
        if (grid is None) != (position is None):
            raise BadArgumentError(f"grid={grid!r} and position={position!r} must be given together, or both left out")
        if on_reshard != "raise" and not callable(on_reshard):
            raise BadArgumentError(f"on_reshard must be 'raise' or a function, not {on_reshard!r}")
        if on_missing not in ("strict", "keep"):
            raise BadArgumentError(f"on_missing must be 'strict' or 'keep', not {on_missing!r}")
        self._capture, self._restore = capture, restore
        self._grid = None if grid is None else _position(grid)
        self._position = None if position is None else _position(position)
        self._replica_id, self._process_group = replica_id, process_group
        self._on_reshard, self._on_missing = on_reshard, on_missing
        self.loaded = False
        if self._grid is not None:
            # Says at once what does not fit.
            self._object("state", None)

    def _object(self, key: str, data: Any) -> ShardedObject:
        if self._grid is None or self._position is None:
            group = group_of(self._process_group)
            return ShardedObject(key, data, (group.size,), (group.rank,), self._replica_id)
        return ShardedObject(key, data, self._grid, self._position, self._replica_id)

    def state_dict(self) -> Tree:
        """The state under the name "state"."""
        return self.state_at("state")

    def state_at(self, place: str) -> Tree:
        """One object, under the name of the place."""
        return {_VALUE: self._object(place, self._capture())}

    def state_for_load(self, place: str, stored: StoredNames) -> Tree:
        """The object of this position; or what the policy makes of the stored ones.

        Raises:
            ShapeMismatchError: the stored grid is another one, and the policy is to raise.
        """
        wanted, shape = self._object(place, _ABSENT), stored.grid(place)
        if shape is None and self._on_missing == "keep":
            stored.leave(place)
            return {_VALUE: LocalNonpersistentObject(_ABSENT)}
        if shape is None or shape == wanted.global_shape:
            return {_VALUE: wanted}
        if self._on_reshard == "raise":
            raise ShapeMismatchError(
                f"state {place!r} is stored for a grid of {shape} positions and wanted for one of {wanted.global_shape}: say "
                "with on_reshard what is to become of it"
            )
        offsets = list(itertools.product(*map(range, shape)))
        found = stored.objects([ObjectPosition(place, shape, offset) for offset in offsets])
        stored.settle(place)
        value = self._on_reshard(dict(zip(offsets, found, strict=True)), wanted.global_shape, wanted.global_offset)
        return {_VALUE: LocalNonpersistentObject(value)}

    def load_state_dict(self, state_dict: Tree) -> None:
        """Restore what was loaded. Called by `load`."""
        value = state_dict.get(_VALUE, _ABSENT)
        self.loaded = value is not _ABSENT
        if self.loaded:
            self._restore(value)


def _position(given: int | Position) -> Position:
    try:
        return (operator.index(given),) if isinstance(given, int) else tuple(map(operator.index, given))
    except TypeError as error:
        raise BadArgumentError(f"grid and position must be an int or a tuple of ints, not {given!r}") from error
