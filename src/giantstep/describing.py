"""From a state dict taken apart to the columns that the planner needs, digests and ties included.

Called by `save`, and by tests that plan for ranks that do not exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from giantstep.codecs import OBJECT_CODEC
from giantstep.mapping.describe import Described, StoredObject
from giantstep.mapping.differences import fingerprint_digest
from giantstep.mapping.leaves import TensorLeaf
from giantstep.mapping.overlap import memory_of
from giantstep.planning.description import IMPLICIT, Description
from giantstep.shards.region import Region
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
    shards = [(leaf, region, view) for leaf in described.leaves for region, view in leaf.pieces]
    objects = [described.stored[key] for key in structure.object_keys]
    return replace(structure, shard_digest=_digests(shards, ranks, buffer_bytes), object_digest=object_digests(objects, ranks))


def structure_of(described: Described) -> Description:
    """What there is on this rank, without digests of values and sizes of objects: they are zeros."""
    leaves = described.leaves
    numbers: dict[str, int] = {}
    tensors: list[TensorLeaf] = []
    for leaf in leaves:
        if leaf.key not in numbers:
            numbers[leaf.key] = len(tensors)
            tensors.append(leaf)
    shards = [(leaf, region, view) for leaf in leaves for region, view in leaf.pieces]
    dims_ends = np.zeros(len(tensors) + 1, dtype=np.int64)
    np.cumsum([len(leaf.global_shape) for leaf in tensors], out=dims_ends[1:])
    keys = list(described.stored)
    return Description(
        keys=[leaf.key for leaf in tensors],
        dtype=np.array([leaf.dtype.code for leaf in tensors], dtype=np.uint8),
        dims_ends=dims_ends,
        dims=_ints(leaf.global_shape for leaf in tensors),
        shard_tensor=np.array([numbers[leaf.key] for leaf, _, _ in shards], dtype=np.int64),
        shard_role=np.array([leaf.role for leaf, _, _ in shards], dtype=np.uint8),
        shard_mesh=np.array([leaf.mesh for leaf, _, _ in shards], dtype=np.int64),
        shard_offset=_ints(region.offset for _, region, _ in shards),
        shard_size=_ints(region.size for _, region, _ in shards),
        shard_digest=np.zeros((len(shards), 2), dtype=np.uint64),
        tied=_ties(leaves, numbers),
        object_keys=keys,
        object_role=np.array([described.stored[key].role for key in keys], dtype=np.uint8),
        object_digest=np.zeros((len(keys), 2), dtype=np.uint64),
        object_bytes=np.zeros(len(keys), dtype=np.int64),
    )


def _ints(parts: Iterable[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.array([number for part in parts for number in part], dtype=np.int64)


def _digests(
    shards: Sequence[tuple[TensorLeaf, Region, torch.Tensor | None]], ranks: int, buffer_bytes: int
) -> NDArray[np.uint64]:
    """Digests of shards whose replicas nobody vouches for; zeros for all others.

    A DTensor's mesh vouches for its own ranks; if it spans all ranks, no other can hold the key. Tied tensors are
    digested once.
    """
    known: dict[Hashable, tuple[int, int]] = {}
    found = []
    for leaf, _, view in shards:
        if view is None or leaf.role != IMPLICIT or ranks in (1, leaf.mesh_size):
            found.append((0, 0))
            continue
        memory = memory_of(view)
        digest = known.get(memory) if memory is not None else None
        if digest is None:
            digest = known[memory] = content_digest(view, buffer_bytes)
        found.append(digest)
    return np.array(found, dtype=np.uint64).reshape(len(shards), 2)


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
            if region.elements:
                tied[numbers[leaf.key]] = numbers[leaf.key]
                begins.setdefault(leaf.key, 0 if view is None else view.data_ptr())
                break
    # Few tensors begin where another does, and only those are looked at more closely.
    repeated = {begin for begin, count in Counter(begins.values()).items() if count > 1 and begin}
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
