"""DTensor to regions: any mesh, any placements that shard or replicate.

The indices that a rank holds of one dimension follow from the splits applied to it, in order; a dimension may
come out as several runs (strided sharding), so a DTensor's local tensor is a product of runs: several boxes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from giantstep.errors import BadArgumentError
from giantstep.shards.region import Region
from giantstep.shards.splits import Run, Split, runs_after


@dataclass(frozen=True, slots=True)
class _Box:
    """A region, and where it lies in the local tensor: (axis, first, count) for each dimension; None if it is all of it."""

    region: Region
    place: list[tuple[int, int, int]] | None


@dataclass(frozen=True, slots=True, eq=False)
class DTensorLayout:
    """What one rank holds of all DTensors that are distributed alike.

    Attributes:
        mesh: identifies the set of ranks over which they are distributed, equal on all of them.
        mesh_size: number of those ranks.
        mesh_shape: as torch has it.
        local_shape: what the local tensors must have; None if this rank is not in the mesh.
        boxes: what they hold.
        region: the one region that all of the local tensor is; None if it is several, or none.
    """

    mesh: int
    mesh_size: int
    mesh_shape: tuple[int, ...]
    local_shape: tuple[int, ...] | None
    boxes: list[_Box]
    region: Region | None

    def pieces(self, key: str, tensor: DTensor) -> list[tuple[Region, torch.Tensor]]:
        """Regions that this rank holds of a DTensor of this layout, with views that share memory with its local tensor.

        Raises:
            BadArgumentError: the local tensor has not the shape that the placements imply.
        """
        if self.local_shape is None:
            return []
        local = tensor._local_tensor
        if local.shape != self.local_shape:
            raise BadArgumentError(
                f"tensor {key!r}: placements {tensor.placements} of shape {tuple(tensor.shape)} on mesh {self.mesh_shape} give "
                f"this rank a local shape of {self.local_shape}, but the local tensor has {tuple(local.shape)}. A DTensor made "
                "by from_local with uneven shards needs its global shape and stride given."
            )
        return self.parts(local)

    def parts(self, local: torch.Tensor) -> list[tuple[Region, torch.Tensor]]:
        """The same of any tensor of the local shape."""
        return [(box.region, local if box.place is None else _narrowed(local, box.place)) for box in self.boxes]


def _narrowed(local: torch.Tensor, place: list[tuple[int, int, int]]) -> torch.Tensor:
    for axis, first, count in place:
        local = local.narrow(axis, first, count)
    return local


@dataclass(frozen=True, slots=True)
class _Mesh:
    """What a mesh means for this rank; torch computes it anew at every access, so it is kept."""

    name: int
    size: int
    shape: tuple[int, ...]
    coordinate: tuple[int, ...] | None


class DTensorReader:
    """Takes DTensors apart. One lives as long as one `describe`: it remembers meshes it has met."""

    def __init__(self) -> None:
        # The mesh objects are kept too: an id means something only while its object lives.
        self._meshes: dict[int, tuple[Any, _Mesh]] = {}

    def layout(self, key: str, tensor: DTensor) -> DTensorLayout:
        """What this rank holds of a DTensor; nothing if it is not in the mesh.

        Raises:
            BadArgumentError: a placement is Partial, or is none that can be described.
        """
        mesh = self._mesh(tensor.device_mesh)
        if mesh.coordinate is None:
            return DTensorLayout(mesh.name, mesh.size, mesh.shape, None, [], None)
        order = getattr(tensor._spec, "shard_order", None)
        splits = splits_per_dimension(key, tensor.ndim, tensor.placements, mesh.shape, mesh.coordinate, order)
        runs = [runs_after(length, parts) for length, parts in zip(tensor.shape, splits, strict=True)]
        local_shape = tuple(sum(count for _, count in found) for found in runs)
        boxes = _boxes(runs)
        region = boxes[0].region if len(boxes) == 1 and boxes[0].place is None else None
        return DTensorLayout(mesh.name, mesh.size, mesh.shape, local_shape, boxes, region)

    def _mesh(self, mesh: Any) -> _Mesh:
        held = self._meshes.get(id(mesh))
        if held is None:
            ranks = repr(mesh.mesh.tolist()).encode()
            name = int.from_bytes(hashlib.sha256(ranks).digest()[:8], "little") >> 1
            coordinate = mesh.get_coordinate()
            seen = _Mesh(name, mesh.size(), tuple(mesh.shape), None if coordinate is None else tuple(coordinate))
            held = self._meshes[id(mesh)] = (mesh, seen)
        return held[1]


def _boxes(runs: list[list[Run]]) -> list[_Box]:
    if all(len(found) == 1 for found in runs):
        firsts, counts = zip(*(found[0] for found in runs), strict=True) if runs else ((), ())
        return [_Box(Region(firsts, counts), None)]
    boxes = []
    for combination in itertools.product(*(_with_positions(found) for found in runs)):
        region = Region(tuple(first for first, _, _ in combination), tuple(count for _, count, _ in combination))
        boxes.append(_Box(region, [(axis, position, count) for axis, (_, count, position) in enumerate(combination)]))
    return boxes


def _with_positions(runs: list[Run]) -> list[tuple[int, int, int]]:
    """(first index, count, position in the local dimension) of each run."""
    found, position = [], 0
    for first, count in runs:
        found.append((first, count, position))
        position += count
    return found


def splits_per_dimension(
    key: str,
    dims: int,
    placements: Sequence[Any],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    shard_order: Any = None,
) -> list[list[Split]]:
    """For each tensor dimension the splits applied to it, first one first.

    Args:
        shard_order: torch's record of an order of mesh dimensions other than left to right, or None.
    """
    splits: list[list[Split]] = [[] for _ in range(dims)]
    sharding: list[list[int]] = [[] for _ in range(dims)]
    for mesh_dim in _application_order(placements, shard_order):
        placement = placements[mesh_dim]
        if placement.is_partial():
            raise BadArgumentError(
                f"tensor {key!r} is Partial over mesh dimension {mesh_dim}: its ranks hold addends of values that "
                "exist nowhere yet, so there is nothing to save. Redistribute it to Replicate() or Shard() first."
            )
        if placement.is_replicate():
            continue
        axis = getattr(placement, "dim", None)
        if not isinstance(axis, int) or not -dims <= axis < dims:
            raise BadArgumentError(f"tensor {key!r}: placement {placement} cannot be described; expected Shard or Replicate")
        sharding[axis].append(mesh_dim)
    for axis, mesh_dims in enumerate(sharding):
        factors = [_split_factor(placements[mesh_dim]) for mesh_dim in mesh_dims]
        sizes = [int(mesh_shape[mesh_dim]) for mesh_dim in mesh_dims]
        plain = _plain_order(sizes, factors)
        # Where no order of plain splits explains the factors, they are taken literally, one after another.
        for place in plain if plain is not None else range(len(mesh_dims)):
            factor = 1 if plain is not None else factors[place]
            splits[axis].append(Split(sizes[place], int(coordinate[mesh_dims[place]]), factor))
    return splits


def _split_factor(placement: Any) -> int:
    return int(getattr(placement, "split_factor", 1))


def _plain_order(sizes: Sequence[int], factors: Sequence[int]) -> list[int] | None:
    """The order of plain splits that strided placements of one tensor dimension stand for; None if there is none.

    A split factor says into how many parts the dimension was cut before, by mesh dimensions further right: FSDP2 over
    tensor parallelism shards by TP first, and then divides what each rank holds. With uneven sizes this differs from
    the strided split taken literally, and it is what the local tensors are.
    """
    order: list[int] = []
    for place in reversed(range(len(sizes))):
        before, parts = 0, 1
        while parts < factors[place] and before < len(order):
            parts *= sizes[order[before]]
            before += 1
        if parts != factors[place]:
            return None
        order.insert(before, place)
    return order


def _application_order(placements: Sequence[Any], shard_order: Any) -> list[int]:
    """Mesh dimensions in the order in which their placements divide the tensor."""
    ordered = [int(mesh_dim) for entry in shard_order or () for mesh_dim in entry.mesh_dims]
    if not ordered or any(hasattr(placement, "split_factor") for placement in placements):
        return list(range(len(placements)))
    return ordered + [mesh_dim for mesh_dim in range(len(placements)) if mesh_dim not in ordered]
