"""Whether a rank got back what was saved: tensors, sharded objects, common state, local objects. Called by `roundtrip`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from giantstep.codecs import OBJECT_CODEC
from giantstep.format.codec import TensorSlot
from giantstep.mapping.describe import Described, describe
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.leaves import TensorLeaf
from giantstep.mapping.sharded_object import LocalNonpersistentObject, ShardedObject
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.tree import Tree, diff, flatten, map_leaves
from giantstep.options import LoadOptions
from giantstep.planning.description import MAIN
from giantstep.reports import LoadedState
from giantstep.shards.object_keys import COMMON_KEY, ObjectPosition, position_of
from giantstep.shards.paths import Path, dotted
from giantstep.testing.comparing import GlobalTensor, assemble, first_difference

_SHOWN = 5


class RoundTripError(AssertionError):
    """What was loaded is not what was saved.

    Attributes:
        key: of the tensor or object; None where it is the common state.
        rank: that loaded it.
        index: first element of the global tensor that differs; None where it is no tensor.
    """

    def __init__(self, message: str, rank: int, key: str | None = None, index: tuple[int, ...] | None = None) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.key = key
        self.rank = rank
        self.index = index


@dataclass(frozen=True, slots=True)
class Saved:
    """What was saved, put together without the code that loads it.

    Attributes:
        tensors: by key.
        objects: values of sharded objects by unique key.
        common: the common state that is stored.
    """

    tensors: dict[str, GlobalTensor]
    objects: dict[str, Any]
    common: Tree

    @classmethod
    def of(cls, described: Sequence[Described]) -> Saved:
        """What states that cover every tensor once are stored as."""
        objects = {
            name: item.value
            for found in described
            for name, item in found.stored.items()
            if position_of(name) is not None and item.role == MAIN
        }
        return cls(assemble(described), objects, described[0].stored[COMMON_KEY].value)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One rank after loading.

    Attributes:
        rank: which.
        target: the state that it gave to `load`.
        before: the same, taken apart before loading.
        state: what `load` returned.
        options: those of the load.
    """

    rank: int
    target: dict[Any, Any]
    before: Described
    state: LoadedState
    options: LoadOptions

    def at(self, path: Path) -> Any:
        """What was loaded to a path."""
        tree: Any = self.state
        for step in path:
            try:
                tree = tree[step]
            except (KeyError, IndexError, TypeError) as error:
                raise RoundTripError(f"nothing stands at {dotted(path)!r} after loading", self.rank) from error
        return tree


def check_loaded(loaded: Loaded, saved: Saved) -> None:
    """Raise `RoundTripError` unless a rank got what was saved.

    What was loaded is put in the place of the data of the rank's own description of its state, so that regions come
    from there and not from the loader.
    """
    stateful = {joint.path for joint in loaded.before.joints if joint.merge is None}
    after = describe(map_leaves(loaded.target, lambda path, leaf: _refilled(path, leaf, loaded, stateful)), for_load=True)
    for leaf in after.leaves:
        _check_tensor(leaf, loaded, saved)
    for item in after.objects:
        _check_object(item.source, loaded, saved)
    before = loaded.before
    owned = stateful | {path for path, _ in before.locals} | {joint.path for joint in before.joints}
    owned |= {leaf.path for leaf in before.leaves} | {leaf.path for leaf in before.objects}
    _check_common(saved.common, dict(loaded.state), owned, loaded.rank)


def _refilled(path: Path, leaf: Any, loaded: Loaded, stateful: Collection[Path]) -> Any:
    """The leaf with what was loaded as its data. What was given memory for must be that memory."""
    if isinstance(leaf, ShardedTensor | ShardedTensorFactory | ShardedObject):
        value = loaded.at(path)
        if isinstance(leaf, ShardedTensor):
            _check_in_place(path, leaf.data, value, loaded.rank)
        return replace(leaf, data=value)
    if isinstance(leaf, torch.Tensor):
        _check_in_place(path, leaf, loaded.at(path), loaded.rank)
        return loaded.at(path)
    if isinstance(leaf, LocalNonpersistentObject):
        if loaded.at(path) is not leaf.unwrap():
            raise RoundTripError(f"the local object at {dotted(path)!r} is another one after loading", loaded.rank)
        return leaf
    return loaded.at(path) if path in stateful else None


def _check_in_place(path: Path, given: torch.Tensor | None, value: Any, rank: int) -> None:
    if given is not None and not given.is_meta and value is not given:
        raise RoundTripError(f"the tensor at {dotted(path)!r} was not filled in place: another one was returned", rank)


def _check_tensor(leaf: TensorLeaf, loaded: Loaded, saved: Saved) -> None:
    key = loaded.options.stored_key(leaf.key)
    whole = None if key is None else saved.tensors.get(key)
    if whole is None:
        # Strictness or a filter has let it pass.
        return
    for region, view in leaf.pieces:
        if not region.elements:
            continue
        if view is None:
            raise RoundTripError(f"tensor {leaf.key!r} was not loaded: it has no values", loaded.rank, leaf.key)
        found = first_difference(region, view, whole.part(region, view.dtype))
        if found is not None:
            index, text = found
            raise RoundTripError(f"tensor {leaf.key!r} at {list(index)}: loaded {text}", loaded.rank, leaf.key, index)


def _check_object(source: ShardedObject, loaded: Loaded, saved: Saved) -> None:
    key = loaded.options.stored_key(source.key)
    if key is None:
        return
    name = ObjectPosition(key, source.global_shape, source.global_offset).unique_key
    if name in saved.objects:
        expected = saved.objects[name]
    else:
        places = [(position_of(other), value) for other, value in saved.objects.items()]
        stored = {place.offset: value for place, value in places if place is not None and place.key == key}
        policy = loaded.options.object_reshard(source.key)
        if not stored or not callable(policy):
            # Not stored, or dropped: the local value stays.
            return
        expected = policy(source.key, stored, source.global_shape, source.global_offset)
    if not _same(expected, source.data):
        found = diff(expected, source.data, _same)
        paths = [dotted(path) for path in (*found.only_left, *found.only_right, *found.mismatched) if path]
        where = f" at {', '.join(map(repr, paths[:_SHOWN]))}" if paths else ""
        raise RoundTripError(
            f"object {source.unique_key!r} came back with another value{where}: {_short(source.data)}, expected "
            + _short(expected),
            loaded.rank,
            source.unique_key,
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _same(a: Any, b: Any) -> bool:
    """Whether two values are stored as the same bytes."""
    return bool(OBJECT_CODEC.encode(a) == OBJECT_CODEC.encode(b))


def _check_common(expected: Tree, loaded: Tree, owned: Collection[Path], rank: int) -> None:
    """Raise `RoundTripError` unless the loaded state holds the common state, and nothing else but what is at `owned` paths."""
    left, right = (
        {path: leaf for path, leaf in flatten(tree).items() if _is_common(path, leaf, owned)} for tree in (expected, loaded)
    )
    # A list keeps None where nothing was loaded into it.
    added = [path for path in right if path not in left and not (right[path] is None and isinstance(path[-1], int))]
    for paths, what in (
        ([path for path in left if path not in right], "was saved and did not come back"),
        ([path for path in left if path in right and not _same(left[path], right[path])], "came back with another value"),
        (added, "was not saved but came back"),
    ):
        if paths:
            names = ", ".join(repr(dotted(path)) for path in paths[:_SHOWN])
            more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
            raise RoundTripError(f"common state at {names}{more} {what}", rank)


def _is_common(path: Path, leaf: Any, owned: Collection[Path]) -> bool:
    return not isinstance(leaf, TensorSlot) and not any(path[:length] in owned for length in range(len(path) + 1))
