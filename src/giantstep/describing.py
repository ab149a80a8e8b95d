"""From a state dict taken apart to the columns that the planner needs, digests and ties included.

Called by `save`, and by tests that plan for ranks that do not exist.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from giantstep.codecs import OBJECT_CODEC
from giantstep.mapping.describe import Described, StoredObject
from giantstep.mapping.differences import fingerprint_digest
from giantstep.mapping.leaves import Extent, TensorLeaf
from giantstep.mapping.overlap import memory_of
from giantstep.planning.description import IMPLICIT, Description
from giantstep.staging.host import content_digest


def description_of(described: Described, ranks: int, buffer_bytes: int) -> Description:
    """What this rank tells the planner.

    Args:
        described: its state dict.
        ranks: number of ranks that save together; one rank needs no digests.
        buffer_bytes: how much of a tensor is brought to the host at a time to digest it.
    """
    return with_digests(structure_of(described), described, ranks, buffer_bytes)


def with_digests(structure: Description, described: Described, ranks: int, buffer_bytes: int) -> Description:
    """The description with the digests that `structure_of` left out; see `description_of`."""
    objects = [described.stored[key] for key in structure.object_keys]
    shard_digest = _digests(described, ranks, buffer_bytes)
    return replace(structure, shard_digest=shard_digest, object_digest=object_digests(objects, ranks))


def structure_of(described: Described) -> Description:
    """What there is on this rank, without digests of values and sizes of objects: they are zeros."""
    keys, outline = list(described.stored), described.outline
    tensors = outline.structure if outline is not None else None
    if tensors is None:
        tensors = _tensors_of(described.leaves)
        if outline is not None:
            outline.structure = tensors
    return replace(
        tensors,
        object_keys=keys,
        object_role=np.array([described.stored[key].role for key in keys], dtype=np.uint8),
        object_digest=np.zeros((len(keys), 2), dtype=np.uint64),
        object_bytes=np.zeros(len(keys), dtype=np.int64),
    )


def _tensors_of(leaves: Sequence[TensorLeaf]) -> Description:
    """The description of tensors alone."""
    first: dict[str, TensorLeaf] = {}
    for leaf in leaves:
        first.setdefault(leaf.key, leaf)
    numbers = {key: number for number, key in enumerate(first)}
    extents = [leaf.extent for leaf in first.values()]
    shapes = [extent.global_shape for extent in extents]
    dims_ends = np.zeros(len(extents) + 1, dtype=np.int64)
    np.cumsum([len(shape) for shape in shapes], out=dims_ends[1:])
    regions = [region for leaf in leaves for region, _ in leaf.pieces]
    counts = np.array([len(leaf.pieces) for leaf in leaves], dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    return Description(
        keys=list(first),
        dtype=np.array([extent.dtype.code for extent in extents], dtype=np.uint8),
        dims_ends=dims_ends,
        dims=_ints(shapes),
        shard_tensor=np.repeat(np.array([numbers[leaf.key] for leaf in leaves], dtype=np.int64), counts),
        shard_role=np.repeat(np.array([leaf.extent.role for leaf in leaves], dtype=np.uint8), counts),
        shard_mesh=np.repeat(np.array([leaf.extent.mesh for leaf in leaves], dtype=np.int64), counts),
        shard_offset=_ints([region.offset for region in regions]),
        shard_size=_ints([region.size for region in regions]),
        shard_digest=np.zeros((len(regions), 2), dtype=np.uint64),
        tied=_ties(leaves, numbers),
        object_keys=[],
        object_role=none.astype(np.uint8),
        object_digest=none.astype(np.uint64).reshape(0, 2),
        object_bytes=none,
    )


def _ints(parts: list[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.array(list(itertools.chain.from_iterable(parts)), dtype=np.int64)


def _digests(described: Described, ranks: int, buffer_bytes: int) -> NDArray[np.uint64]:
    """[shards, 2] digests of shards whose replicas nobody vouches for; zeros for all others.

    A DTensor's mesh vouches for its own ranks; if it spans all ranks, no other can hold the key. Tied tensors are
    digested once.
    """
    found = np.zeros((len(described.views), 2), dtype=np.uint64)
    if described.outline is not None and all(_is_vouched(extent, ranks) for extent in described.outline.extents):
        return found
    known: dict[Hashable, tuple[int, int]] = {}
    row = 0
    for leaf in described.leaves:
        if _is_vouched(leaf.extent, ranks):
            row += len(leaf.pieces)
            continue
        for _, view in leaf.pieces:
            if view is not None:
                memory = memory_of(view)
                digest = known.get(memory) if memory is not None else None
                if digest is None:
                    digest = known[memory] = content_digest(view, buffer_bytes)
                found[row] = digest
            row += 1
    return found


def _is_vouched(extent: Extent, ranks: int) -> bool:
    return extent.role != IMPLICIT or ranks in (1, extent.mesh_size)


def object_digests(objects: Sequence[StoredObject], ranks: int) -> NDArray[np.uint64]:
    """[objects, 2] digests of values; zeros if there is one rank alone."""
    if ranks == 1:
        return np.zeros((len(objects), 2), dtype=np.uint64)
    found = [fingerprint_digest(item, OBJECT_CODEC) for item in objects]
    return np.array(found, dtype=np.uint64).reshape(len(objects), 2)


def _ties(leaves: Sequence[TensorLeaf], numbers: dict[str, int]) -> NDArray[np.int64]:
    """Per key, the row of the first key (in order of text) whose shards are the same regions in the same memory.

    A key's own row if there is none, or if it has no memory; -1 if this rank holds nothing of it.
    """
    tied = np.full(len(numbers), -1, dtype=np.int64)
    begins: dict[str, int] = {}
    for leaf in leaves:
        for region, view in leaf.pieces:
            if view.numel() if view is not None else region.elements:
                begins.setdefault(leaf.key, 0 if view is None else view.data_ptr())
                break
    filled = np.array([numbers[key] for key in begins], dtype=np.int64)
    tied[filled] = filled
    # Few tensors begin where another does, and only those are looked at more closely.
    repeated = {begin for begin, count in Counter(begins.values()).items() if count > 1 and begin}
    if not repeated:
        return tied
    shards: dict[str, list[Hashable]] = {key: [] for key in sorted(begins) if begins[key] in repeated}
    for leaf in leaves:
        if leaf.key in shards:
            shards[leaf.key] += [(leaf.dtype.code, leaf.global_shape), *_places(leaf)]
    first: dict[Hashable, int] = {}
    for key, held in shards.items():
        tied[numbers[key]] = first.setdefault(tuple(held), numbers[key])
    return tied


def _places(leaf: TensorLeaf) -> list[Hashable]:
    """The leaf's regions with their memory; a region without memory is like no other."""
    return [
        (region.offset, region.size, object() if view is None else memory_of(view))
        for region, view in leaf.pieces
        if region.elements
    ]
