"""`describe`: the one entry of stage 1. Sorts the leaves of a state dict into tensors, objects and common state.

Nothing after this module knows of ShardedTensor, factories, wrappers, DTensor, flatness or strides: only regions, each
with a view of the memory that holds (or will hold) it. Called by `save` and `load`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from giantstep.errors import BadArgumentError
from giantstep.held_memory import no_memory
from giantstep.mapping.expand import Expanded, Joint, expand, stands_for_itself
from giantstep.mapping.leaves import LeafMaker, TensorLeaf
from giantstep.mapping.outline import Outline, outline_of
from giantstep.mapping.placed import StoredNames
from giantstep.mapping.replica import is_main_replica
from giantstep.mapping.sharded_object import LocalNonpersistentObject, ShardedObject, SharedObject
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.survey import survey
from giantstep.mapping.tree import DROPPED, Tree, map_leaves, prune
from giantstep.planning.description import COPY, IMPLICIT, MAIN
from giantstep.shards.dtypes import DType
from giantstep.shards.object_keys import COMMON_KEY
from giantstep.shards.paths import Path, dotted
from giantstep.shards.region import Region

_TENSORS = (torch.Tensor, ShardedTensor)


@dataclass(frozen=True, slots=True)
class ObjectLeaf:
    """One sharded object of the state dict: where it stands, and the user's object."""

    path: Path
    source: ShardedObject


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as it is stored.

    Attributes:
        value: what is stored.
        role: MAIN, COPY, or IMPLICIT: the same on all ranks that have it.
        path: where it stands in the state dict, for errors.
    """

    value: Any
    role: int
    path: Path = ()

    @property
    def is_shared(self) -> bool:
        """Whether no rank is declared to be the main one: all that have it say that it is the same."""
        return self.role == IMPLICIT


class Described:
    """A state dict taken apart.

    Args:
        tensors: its tensors in the order of the state dict: as leaves, or, of one that looks as another did, as that one's
            outline, the tensors themselves and the views of their shards.
        objects, locals, stored, tree, joints: see attributes.

    Attributes:
        outline: what it looks like; None if that cannot be kept.
        views: [shards] the views of all leaves' pieces, not detached from how they were computed.
        objects: its sharded objects.
        locals: (path, value) of its local nonpersistent objects.
        stored: what is stored as objects, by name: sharded objects, descriptions of wrapper tensors, and the common
            state, i.e. all other leaves (see `tree.prune`; an empty dict if there are none).
        tree: the state dict with Stateful objects, factories and wrapper tensors replaced by what stands for them.
        joints: see `Expanded`.
        asks: whether it has objects that ask what there is to be loaded: it is to be described again when that is known.
    """

    __slots__ = ("_leaves", "_sources", "asks", "joints", "locals", "objects", "outline", "stored", "tree", "views")

    def __init__(
        self,
        tensors: list[TensorLeaf] | tuple[Outline, Sequence[Any], list[torch.Tensor]],
        objects: list[ObjectLeaf],
        locals_: list[tuple[Path, Any]],
        stored: dict[str, StoredObject],
        tree: Tree,
        joints: list[Joint],
    ) -> None:
        self.objects, self.locals, self.stored, self.tree, self.joints = objects, locals_, stored, tree, joints
        self.asks = False
        self.outline: Outline | None = None
        self._leaves: list[TensorLeaf] | None = None
        self._sources: Sequence[Any] = ()
        self.views: list[torch.Tensor | None] = []
        if isinstance(tensors, tuple):
            self.outline, self._sources, views = tensors
            self.views += views
        else:
            self._leaves = tensors
            self.views = [view for leaf in tensors for _, view in leaf.pieces]

    @property
    def leaves(self) -> list[TensorLeaf]:
        """Its tensors, in the order of the state dict; made when they are first asked for."""
        if self._leaves is None:
            self._leaves = [] if self.outline is None else self.outline.leaves(self._sources, _given(self.views))
        return self._leaves

    @property
    def names(self) -> list[str]:
        """[shards] keys of their tensors."""
        if self.outline is not None:
            return self.outline.keys
        return [leaf.key for leaf in self.leaves for _ in leaf.pieces]

    @property
    def shards(self) -> tuple[list[str], list[DType], list[Region]]:
        """[shards] key and dtype of the tensor, and region."""
        if self.outline is not None:
            return self.outline.shards
        found = [(leaf.key, leaf.extent.dtype, region) for leaf in self.leaves for region, _ in leaf.pieces]
        return [key for key, _, _ in found], [dtype for _, dtype, _ in found], [region for _, _, region in found]

    def views_of(self, shards: Sequence[int]) -> list[torch.Tensor]:
        """Views of some shards, all of which have memory."""
        return _given([self.views[shard] for shard in shards])

    def check_memory(self) -> None:
        """Raise `BadArgumentError` if a tensor with elements has no memory, although it has a place for it."""
        views = [view for view in self.views if view is not None]
        begins = list(map(torch.Tensor.data_ptr, views))
        if 0 not in begins:
            return
        named = [(name, view) for name, view in zip(self.names, self.views, strict=True) if view is not None]
        for (name, view), begin in zip(named, begins, strict=True):
            if not begin and view.numel() and not view.is_meta:
                raise no_memory(name)

    @property
    def sources(self) -> Sequence[Any]:
        """The user's objects that its tensors are made of."""
        return self._sources if self._leaves is None else [leaf.source for leaf in self._leaves]

    def named_sources(self) -> Iterable[tuple[str, Any]]:
        """The same, with the keys of the tensors."""
        if self.outline is not None:
            return zip(self.outline.tensor_keys(), self.sources, strict=True)
        return [(leaf.key, leaf.source) for leaf in self.leaves]


NOTHING = Described([], [], [], {}, None, [])
"""An empty state, in the place of one that is to be let go."""


def _given(views: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    found = [view for view in views if view is not None]
    if len(found) < len(views):
        raise BadArgumentError("a tensor of the state dict has no memory, and so no values to save")
    return found


def describe(
    state_dict: Any, *, for_load: bool, known: Sequence[Outline] | None = None, stored: StoredNames | None = None
) -> Described:
    """Take a state dict apart.

    Args:
        state_dict: nested dicts and lists; see `giantstep.save`.
        for_load: tensors without memory (None, meta) are allowed; `TensorLeaf.allocate` gives it to them.
        known: outlines of state dicts as they were before; one that looks the same is taken apart much faster. None if
            no outline is wanted, not even of this one.
        stored: what is told to objects that ask what is to be loaded; None as long as that is not known.

    Raises:
        BadArgumentError: a leaf cannot be described; names its path or key.
    """
    if not isinstance(state_dict, dict):
        raise BadArgumentError(f"state_dict must be a dict, not {type(state_dict).__name__}")
    found = survey(state_dict)
    if found is not None and stands_for_itself(found):
        expanded = Expanded(state_dict)
    else:
        expanded = expand(state_dict, stored, for_load=for_load)
        found = survey(expanded.tree)
    for outline in known or ():
        seen = None if found is None else outline.views(found, for_load=for_load)
        if seen is not None:
            return _described((outline, *seen), outline.remainder(expanded.tree), expanded, for_load=for_load)
    leaves: list[TensorLeaf] = []
    described = _described(leaves, expanded.tree, expanded, for_load=for_load)
    if found is not None and known is not None:
        described.outline = outline_of(found, expanded.tree, leaves, for_load=for_load)
    return described


def _described(
    tensors: list[TensorLeaf] | tuple[Outline, Sequence[Any], list[torch.Tensor]],
    tree: Tree,
    expanded: Expanded,
    *,
    for_load: bool,
) -> Described:
    """The whole. Leaves of tensors are made and added to the list; if they are known, tensors in the tree do not count."""
    objects: list[ObjectLeaf] = []
    local: list[tuple[Path, Any]] = []
    maker = LeafMaker(for_load=for_load)

    def sort(path: Path, leaf: Any) -> Any:
        if isinstance(leaf, _TENSORS):
            if isinstance(tensors, list):
                tensors.append(maker.leaf(path, leaf))
        elif isinstance(leaf, ShardedObject):
            leaf.validate()
            objects.append(ObjectLeaf(path, leaf))
        elif isinstance(leaf, LocalNonpersistentObject):
            local.append((path, leaf.unwrap()))
        else:
            return leaf
        return DROPPED

    common = prune(map_leaves(tree, sort))
    if isinstance(tensors, list):
        _check_keys(tensors)
    stored = _stored(objects, for_load=for_load)
    stored |= {name: StoredObject(value, IMPLICIT, (name,)) for name, value in expanded.wrappers.items()}
    stored[COMMON_KEY] = StoredObject({} if common is DROPPED else common, IMPLICIT)
    described = Described(tensors, objects, local, stored, expanded.tree, expanded.joints)
    described.asks = expanded.asks
    described.check_memory()
    return described


def _stored(objects: Sequence[ObjectLeaf], *, for_load: bool) -> dict[str, StoredObject]:
    found: dict[str, StoredObject] = {}
    places: dict[str, Path] = {}
    for leaf in objects:
        name = leaf.source.unique_key
        _check_unicode(leaf.source.key, "object")
        if name in places and not for_load:
            raise BadArgumentError(
                f"two objects of the state dict are {name!r}: at {dotted(places[name])!r} and {dotted(leaf.path)!r}. Give them "
                "different keys or positions."
            )
        places[name] = leaf.path
        found[name] = StoredObject(leaf.source.data, _role_of(leaf.source), leaf.path)
    return found


def _role_of(item: ShardedObject) -> int:
    if isinstance(item, SharedObject):
        return IMPLICIT
    return MAIN if is_main_replica(item.replica_id) else COPY


def _check_unicode(key: str, noun: str) -> None:
    if key.isascii():
        return
    try:
        key.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadArgumentError(f"{noun} key {key!r} is not valid Unicode: {error}") from error


def _check_keys(leaves: Sequence[TensorLeaf]) -> None:
    """One key has one meaning on this rank, and only ShardedTensors may share a key."""
    first: dict[str, TensorLeaf] = {}
    for leaf in leaves:
        _check_unicode(leaf.key, "tensor")
        if not leaf.key:
            raise BadArgumentError(f"tensor at path {leaf.path} has an empty key")
        other = first.setdefault(leaf.key, leaf)
        if other is leaf:
            continue
        if IMPLICIT in (leaf.role, other.role):
            raise BadArgumentError(f"two tensors of the state dict have the key {leaf.key!r}: at {other.path} and {leaf.path}")
        if (leaf.dtype, leaf.global_shape) != (other.dtype, other.global_shape):
            raise BadArgumentError(
                f"tensor {leaf.key!r} is {other.dtype.name} {other.global_shape} at {dotted(other.path)!r} and "
                f"{leaf.dtype.name} {leaf.global_shape} at {dotted(leaf.path)!r}"
            )
