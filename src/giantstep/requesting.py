"""What a state dict requests of a checkpoint: which stored tensor or object each leaf is filled from.

Pure matching of names, shapes and dtypes; reads the index and descriptions, no tensor data. Called by `load`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import CorruptionError, UnsupportedTypeError
from giantstep.mapping.describe import Described, ObjectLeaf, StoredObject
from giantstep.mapping.differences import fingerprint_digest
from giantstep.mapping.leaves import Extent, TensorLeaf
from giantstep.mapping.tree import Tree, is_dict
from giantstep.mapping.wrappers import stored_wrapper
from giantstep.options import LoadOptions, ObjectsReshard
from giantstep.planning.description import IMPLICIT
from giantstep.planning.matching import Requests
from giantstep.shards.dtypes import BY_TORCH_NAME, DType
from giantstep.shards.object_keys import ObjectPosition, wrapped_tensor, wrapper_key
from giantstep.shards.paths import Path, dotted
from giantstep.shards.region import Int64s
from giantstep.stored_state import StoredState
from giantstep.words import torch_dtype


@dataclass(frozen=True, slots=True)
class WrappedSource:
    """A leaf that is filled by dequantising a stored wrapper tensor.

    Attributes:
        leaf: what is filled.
        key: key of the wrapper.
        description: what is stored beside its parts.
        shape: its global shape.
        parts: rows of its parts, by name.
    """

    leaf: TensorLeaf
    key: str
    description: Mapping[str, Any]
    shape: tuple[int, ...]
    parts: dict[str, int]


@dataclass(frozen=True, slots=True)
class ObjectSource:
    """What a sharded object is loaded from.

    Attributes:
        leaf: where it goes.
        positions: the stored objects to be read: the one of its position, or all of a grid of another shape.
        reshard: makes a value of the latter; None for the former.
    """

    leaf: ObjectLeaf
    positions: tuple[ObjectPosition, ...]
    reshard: ObjectsReshard | None = None


@dataclass(slots=True)
class Matched:
    """The leaves of a state dict with what they are filled from.

    Attributes:
        leaves, rows: tensors, and from which row each is filled.
        extents, extent_of: of these leaves, without repetitions, and the number of each leaf's.
        dequantised: leaves that are filled from wrapper tensors.
        objects: sharded objects that are stored.
        requests: the same for the judge of all ranks.
        cast: as in `LoadReport`.
        skipped: requested keys that `rename` left out.
        absent: places of Stateful objects of which nothing is stored.
        dropped: keys of sharded objects whose stored ones are dropped.
    """

    leaves: list[TensorLeaf] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    extent_of: Int64s = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    dequantised: list[WrappedSource] = field(default_factory=list)
    objects: list[ObjectSource] = field(default_factory=list)
    requests: Requests = field(default_factory=Requests)
    cast: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    absent: list[Path] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)


def match(described: Described, stored: StoredState, common: Tree, options: LoadOptions) -> Matched:
    """Find for every leaf what it is filled from.

    Args:
        described: what is wanted.
        stored, common: what there is: tensors and objects, and the common state.
        options: how names, dtypes and grids may differ.

    Raises:
        CorruptionError: the description of a wrapper tensor does not fit its parts.
        UnsupportedTypeError: a wrapper tensor that is to be dequantised is not registered.
    """
    matched = Matched()
    leaves = described.leaves
    keys: list[str | None] = [leaf.key for leaf in leaves]
    wrapped: set[str] = set()
    if options.rename is not None:
        keys = [options.stored_key(leaf.key) for leaf in leaves]
    if options.rename is not None or options.dequantise:
        pairs = zip(leaves, keys, strict=True)
        wrapped = {leaf.key if key is None else key for leaf, key in pairs if key is None or options.dequantise}
    wrapped |= {tensor for tensor in map(wrapped_tensor, described.stored) if tensor is not None}
    with stored.checkpoint.reading_ahead([wrapper_key(key) for key in sorted(wrapped & stored.wrapped)]):
        _match_leaves(leaves, keys, stored, options, matched)
        _compare_extents(stored, options, matched)
        _match_descriptions(described, stored, options, matched)
    for item in described.objects:
        key = options.stored_key(item.source.key)
        if key is None:
            matched.skipped.add(item.source.key)
            matched.requests.objects.append(item.source.key)
        else:
            _match_object(item, key, stored, options, matched)
    _match_statefuls(described, common, matched)
    return matched


def _match_leaves(
    leaves: Sequence[TensorLeaf],
    keys: Sequence[str | None],
    stored: StoredState,
    options: LoadOptions,
    matched: Matched,
) -> None:
    rows = list(map(stored.row.get, keys, itertools.repeat(-1)))
    if -1 not in rows:
        # All are stored under their keys.
        matched.leaves, matched.rows = list(leaves), rows
        matched.requests.rows.extend(rows)
        return
    for leaf, key in zip(leaves, keys, strict=True):
        if key is None:
            # The caller knows of it: it is not missing.
            matched.skipped.add(leaf.key)
            matched.requests.rows.extend([stored.row[leaf.key]] if leaf.key in stored.row else [])
            if leaf.key in stored.wrapped:
                matched.requests.rows.extend(_part_rows(leaf.key, _description(leaf.key, stored), stored).values())
        elif key in stored.row:
            matched.leaves.append(leaf)
            matched.rows.append(stored.row[key])
            matched.requests.rows.append(stored.row[key])
        elif options.dequantise and key in stored.wrapped:
            _match_wrapper(leaf, key, stored, options, matched)
        else:
            matched.requests.unexpected.append(leaf.key)


def _compare_extents(stored: StoredState, options: LoadOptions, matched: Matched) -> None:
    """Note which leaves have another shape or dtype than what they are filled from."""
    extents = [leaf.extent for leaf in matched.leaves]
    matched.extents = list(dict.fromkeys(extents))
    number = dict(zip(matched.extents, range(len(matched.extents)), strict=True))
    matched.extent_of = np.fromiter(map(number.__getitem__, extents), np.int64, len(extents))
    for place in stored.unlike(matched.rows, matched.extents, matched.extent_of):
        _compare(matched.leaves[place], matched.rows[place], stored, options, matched)


def _match_statefuls(described: Described, common: Tree, matched: Matched) -> None:
    """Objects with a state of plain values only are requested as a whole."""
    if all(joint.merge is not None for joint in described.joints):
        return
    paths = [leaf.path for leaf in described.leaves] + [leaf.path for leaf in described.objects]
    paths += [path for path, _ in described.locals]
    leading = {path[:length] for path in paths for length in range(len(path) + 1)}
    for joint in described.joints:
        plain = joint.merge is None and joint.path not in leading
        if plain and _has_state(_at(described.tree, joint.path)) and _at(common, joint.path) is None:
            matched.requests.unexpected.append(dotted(joint.path))
            matched.absent.append(joint.path)


def _has_state(state: Tree) -> bool:
    return not (state is None or (isinstance(state, dict | list | tuple) and not state))


def _at(tree: Tree, path: Path) -> Tree:
    """What is at a path; None if it does not exist."""
    for step in path:
        inside = (is_dict(tree) and step in tree) or (
            type(tree) in (list, tuple) and isinstance(step, int) and step < len(tree)
        )
        if not inside:
            return None
        tree = tree[step]
    return tree


def _match_descriptions(described: Described, stored: StoredState, options: LoadOptions, matched: Matched) -> None:
    """Parts mean what they meant when they were saved: the same class, dtype and attributes put them together."""
    for name, item in described.stored.items():
        tensor = wrapped_tensor(name)
        key = options.stored_key(tensor) if tensor is not None else None
        if tensor is None or key is None or key not in stored.wrapped:
            continue
        found, wanted = _description(key, stored), item.value
        # Classes that were not registered have a name and attributes of their own process only.
        known = found["attributes"] is not None and wanted["attributes"] is not None
        fields = ("parts", "dtype", *(("wrapper", "attributes") if known else ()))
        if any(_digest(found[name]) != _digest(wanted[name]) for name in fields):
            texts = [", ".join(f"{name} {item[name]!r:.60}" for name in fields) for item in (found, wanted)]
            matched.requests.wrappers.append((tensor, texts[0], texts[1]))


def _digest(value: Any) -> tuple[int, int]:
    return fingerprint_digest(StoredObject(value, IMPLICIT), OBJECT_CODEC)


def _compare(leaf: TensorLeaf, row: int, stored: StoredState, options: LoadOptions, matched: Matched) -> None:
    """Note how a leaf's shape and dtype differ from those of its row."""
    shape, dtype, extent = stored.shape(row), stored.dtype(row), leaf.extent
    wanted = extent.global_shape
    if wanted != shape and not (extent.allow_shape_mismatch and len(shape) == len(wanted)):
        matched.requests.shapes.append((leaf.key, str(shape), str(wanted)))
    # Each dtype is one object.
    if extent.dtype is not dtype:
        if _may_cast(dtype, extent.dtype, options.cast):
            matched.cast.add(f"{leaf.key}: {dtype.torch_name} -> {extent.dtype.torch_name}")
        else:
            matched.requests.dtypes.append((leaf.key, dtype.torch_name, extent.dtype.torch_name))


def _match_wrapper(leaf: TensorLeaf, key: str, stored: StoredState, options: LoadOptions, matched: Matched) -> None:
    source = _wrapped_source(leaf, key, stored)
    matched.dequantised.append(source)
    matched.requests.rows.extend(source.parts.values())
    if leaf.global_shape != source.shape:
        matched.requests.shapes.append((leaf.key, str(source.shape), str(leaf.global_shape)))
    presented = BY_TORCH_NAME[source.description["dtype"]]
    castable = leaf.dtype == presented or _may_cast(presented, leaf.dtype, options.cast)
    if not castable or not torch_dtype(leaf.dtype).is_floating_point:
        matched.requests.dtypes.append((leaf.key, f"quantised {presented.torch_name}", leaf.dtype.torch_name))


def _description(key: str, stored: StoredState) -> dict[str, Any]:
    """The description of a stored wrapper tensor, checked."""
    found = stored.checkpoint.object(wrapper_key(key))
    fits = isinstance(found, dict) and set(found) == {"wrapper", "shape", "dtype", "parts", "attributes"}
    fits = fits and isinstance(found["shape"], list) and all(type(size) is int and size >= 0 for size in found["shape"])
    fits = fits and isinstance(found["parts"], list) and all(isinstance(name, str) for name in found["parts"])
    fits = fits and isinstance(found["wrapper"], str) and found["dtype"] in BY_TORCH_NAME
    fits = fits and (found["attributes"] is None or isinstance(found["attributes"], dict))
    if not fits:
        raise CorruptionError(f"object {wrapper_key(key)!r} in {stored.checkpoint.location} does not describe a wrapper tensor")
    checked: dict[str, Any] = found
    return checked


def _part_rows(key: str, description: Mapping[str, Any], stored: StoredState) -> dict[str, int]:
    """Rows of those parts of a wrapper tensor that are stored as tensors."""
    rows = {name: stored.row.get(f"{key}.{name}", -1) for name in description["parts"]}
    return {name: row for name, row in rows.items() if row >= 0}


def _wrapped_source(leaf: TensorLeaf, key: str, stored: StoredState) -> WrappedSource:
    found = _description(key, stored)
    stored_wrapper(found, f"tensor {key!r} in {stored.checkpoint.location}")
    nested = [name for name in found["parts"] if f"{key}.{name}" in stored.wrapped]
    if nested:
        raise UnsupportedTypeError(
            f"tensor {key!r} in {stored.checkpoint.location} is stored as a wrapper whose part {nested[0]!r} is a wrapper too: "
            "it cannot be dequantised. Load into a tensor of its class."
        )
    parts, shape = _part_rows(key, found, stored), tuple(found["shape"])
    wrong = [name for name in found["parts"] if name not in parts or len(stored.shape(parts[name])) != len(shape)]
    if wrong or not parts:
        raise CorruptionError(
            f"wrapper tensor {key!r} in {stored.checkpoint.location} has {len(shape)} dimensions: its part "
            f"{wrong[0] if wrong else '(none)'!r} is missing or has another number of them"
        )
    return WrappedSource(leaf, key, found, shape, parts)


def _match_object(item: ObjectLeaf, key: str, stored: StoredState, options: LoadOptions, matched: Matched) -> None:
    asked = item.source
    grids = stored.grids.get(key)
    if grids is None:
        matched.requests.unexpected.append(asked.key)
        return
    matched.requests.objects.append(key)
    position = grids.get(asked.global_shape, {}).get(asked.global_offset)
    if position is not None:
        matched.objects.append(ObjectSource(item, (position,)))
        return
    policy = options.object_reshard(asked.key)
    (shape, held), *others = grids.items()
    if others or len(held) != math.prod(shape):
        raise CorruptionError(f"object {key!r} in {stored.checkpoint.location}: not every position of grid {shape} is stored")
    if policy == "drop":
        matched.dropped.add(asked.key)
    elif callable(policy):
        matched.objects.append(ObjectSource(item, tuple(held.values()), policy))
    else:
        matched.requests.grids.append((asked.key, str(shape), str(asked.global_shape)))


def _may_cast(stored: DType, wanted: DType, cast: str) -> bool:
    if "F4X2" in (stored.name, wanted.name) or cast == "never":
        return False
    kinds = [torch_dtype(dtype) for dtype in (stored, wanted)]
    if cast == "floating":
        return all(kind.is_floating_point for kind in kinds)
    return not (kinds[0].is_complex and not kinds[1].is_complex)
