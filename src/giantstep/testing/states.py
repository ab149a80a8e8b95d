"""State dicts of simulated ranks taken apart, with or without values, and their replicas compared.

Called by `simulated` and its siblings.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from giantstep.describing import description_of
from giantstep.errors import BadArgumentError, DisagreementError, GiantstepError, located
from giantstep.mapping.describe import Described, describe
from giantstep.mapping.expand import expand
from giantstep.mapping.leaves import TensorLeaf
from giantstep.mapping.overlap import memory_of
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.tree import flatten
from giantstep.planning.description import IMPLICIT, Description
from giantstep.shards.region import Region
from giantstep.staging.host import content_digest

States = Sequence[dict[Any, Any]]
"""State dicts by simulated rank."""

# In place of the digests of tensors that have no values: equal, and not the zeros of those that need none.
_NO_VALUES = (1, 1)


def counted(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@contextmanager
def failing(phase: str, rank: int | None = None) -> Iterator[None]:
    """Errors of ours inside say the phase and the rank, as they do when real ranks raise them."""
    try:
        yield
    except GiantstepError as error:
        located(error, rank, phase)
        raise


def describe_states(states: States, *, for_load: bool = False, need_values: bool = False) -> list[Described]:
    """The states taken apart, by rank.

    Args:
        states: by rank.
        for_load: describe them as `load` does.
        need_values: describe them as `save` does. Without either, the same but for tensors without values.

    Raises:
        BadArgumentError: there is no state, or one cannot be described; names the rank.
    """
    if not isinstance(states, Sequence) or not len(states):
        raise BadArgumentError(f"state dicts of simulated ranks must be a sequence, one per rank, at least one; not {states!r}")
    found = []
    for rank, state in enumerate(states):
        with failing("describe", rank):
            absent = not for_load and not need_values and _lacks_values(state)
            described = describe(state, for_load=for_load or absent)
            if absent:
                _check_positions(described)
            found.append(described)
    return found


def _lacks_values(state: Any) -> bool:
    """Whether some tensor of a state dict is meta, or a ShardedTensor whose data are None."""
    leaves = flatten(expand(state).tree).values() if isinstance(state, dict) else ()
    data = [
        leaf.data if isinstance(leaf, ShardedTensor) else leaf
        for leaf in leaves
        if isinstance(leaf, ShardedTensor | torch.Tensor)
    ]
    return any(tensor is None or tensor.is_meta for tensor in data)


def _check_positions(described: Described) -> None:
    """What `describe` checks of objects for a save only."""
    names = Counter(leaf.source.unique_key for leaf in described.objects)
    doubled = [name for name, count in names.items() if count > 1]
    if doubled:
        raise BadArgumentError(f"two objects of the state dict are {doubled[0]!r}. Give them different keys or positions.")


def descriptions_of(described: Sequence[Described], buffer_bytes: int) -> list[Description]:
    """What the ranks tell the planner. Where some replica of a tensor has no values, it is told that all are equal."""
    absent = {
        leaf.key for found in described for leaf in found.leaves for region, view in leaf.pieces if _is_absent(region, view)
    }
    ranks = len(described)
    descriptions = []
    for found in described:
        description = description_of(found, ranks, buffer_bytes)
        pieces = [leaf for leaf in found.leaves for _ in leaf.pieces]
        digested = [leaf.key in absent and leaf.role == IMPLICIT and ranks not in (1, leaf.mesh_size) for leaf in pieces]
        digest, tied = description.shard_digest.copy(), description.tied.copy()
        digest[np.array(digested, dtype=bool)] = _NO_VALUES
        # Without memory, equal layouts look like one tensor under two names.
        own = np.array([key in absent for key in description.keys], dtype=bool) & (tied >= 0)
        tied[own] = np.flatnonzero(own)
        descriptions.append(dataclasses.replace(description, shard_digest=digest, tied=tied))
    return descriptions


def _is_absent(region: Region, view: torch.Tensor | None) -> bool:
    return view is None and region.elements > 0


def compare_declared(described: Sequence[Described], buffer_bytes: int) -> set[str]:
    """Compare replicas that `save` takes on trust; return keys of tensors with some that have no values."""
    holders: dict[tuple[str, Region], list[tuple[int, TensorLeaf, torch.Tensor | None]]] = {}
    for rank, found in enumerate(described):
        for leaf in found.leaves:
            for region, view in leaf.pieces:
                if region.elements:
                    holders.setdefault((leaf.key, region), []).append((rank, leaf, view))
    known: dict[Hashable, tuple[int, int]] = {}
    uncompared = set()
    for (key, region), held in holders.items():
        meshes = {leaf.mesh for _, leaf, _ in held}
        if len(held) < 2 or (len(meshes) == 1 and 0 not in meshes):
            # One holder, or replicas for which the mesh of a DTensor vouches.
            continue
        if any(view is None for _, _, view in held):
            uncompared.add(key)
        elif all(leaf.role != IMPLICIT for _, leaf, _ in held):
            digests = [_digest(view, known, buffer_bytes) for _, _, view in held if view is not None]
            other = next((n for n, digest in enumerate(digests) if digest != digests[0]), None)
            if other is not None:
                raise DisagreementError(
                    f"tensor {key!r}, region {region}: rank {held[0][0]} and rank {held[other][0]} hold different values, with "
                    f"replica_id {held[0][1].source.replica_id} and {held[other][1].source.replica_id}. Replicas are equal by "
                    "declaration, and save would write a part of each: give shards that differ their own offsets or keys."
                )
    return uncompared


def _digest(view: torch.Tensor, known: dict[Hashable, tuple[int, int]], buffer_bytes: int) -> tuple[int, int]:
    memory = memory_of(view)
    if memory not in known:
        known[memory] = content_digest(view, buffer_bytes)
    return known[memory]
