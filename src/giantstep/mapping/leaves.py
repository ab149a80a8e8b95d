"""Leaves of a state dict as regions of global tensors, each with a view of the memory that holds (or will hold) it.

Made by `describe`; read by `save` and `load`, which know nothing of ShardedTensor, DTensor, flatness or strides. A state
dict may have tens of thousands of tensors, of which most are alike: what they have in common is worked out once.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from giantstep.errors import BadArgumentError
from giantstep.mapping.dtensor import DTensorLayout, DTensorReader
from giantstep.mapping.overlap import shares_elements
from giantstep.mapping.replica import is_main_replica
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.torch_sharded import facts_of, is_torch_sharded, pieces_of, ranks_of
from giantstep.planning.description import COPY, IMPLICIT, MAIN
from giantstep.shards.dtypes import DType
from giantstep.shards.paths import Path, dotted
from giantstep.shards.region import Region, check_shape
from giantstep.words import stored_dtype, torch_dtype

Pieces = list[tuple[Region, torch.Tensor | None]]


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """What leaves that are alike have in common: one object for many of them.

    Attributes:
        dtype, global_shape: of the global tensor.
        role: MAIN, COPY (explicit replica ids) or IMPLICIT (holders of one region are found by comparing).
        mesh: for IMPLICIT shards, the set of ranks within which equality is guaranteed; 0 for none.
        mesh_size: number of those ranks.
        allow_shape_mismatch: see `ShardedTensor`.
    """

    dtype: DType
    global_shape: tuple[int, ...]
    role: int
    mesh: int = 0
    mesh_size: int = 1
    allow_shape_mismatch: bool = False


@dataclass(slots=True)
class TensorLeaf:
    """One tensor of the state dict, as regions of its global tensor.

    Attributes:
        path: where it stands in the state dict.
        key: of the global tensor.
        source: the user's object.
        extent: what else there is to say of it.
        pieces: (region, view) pairs; the views are None where memory is still to be allocated. Leaves that are alike may
            share the regions.
    """

    path: Path
    key: str
    source: Any
    extent: Extent
    pieces: Pieces

    @property
    def dtype(self) -> DType:
        """See `Extent`."""
        return self.extent.dtype

    @property
    def global_shape(self) -> tuple[int, ...]:
        """See `Extent`."""
        return self.extent.global_shape

    @property
    def role(self) -> int:
        """See `Extent`."""
        return self.extent.role

    @property
    def mesh(self) -> int:
        """See `Extent`."""
        return self.extent.mesh

    @property
    def mesh_size(self) -> int:
        """See `Extent`."""
        return self.extent.mesh_size

    @property
    def allow_shape_mismatch(self) -> bool:
        """See `Extent`."""
        return self.extent.allow_shape_mismatch

    @property
    def lacks_memory(self) -> bool:
        """Whether memory is still to be allocated."""
        for _, view in self.pieces:
            if view is None:
                return True
        if self.pieces or not isinstance(self.source, ShardedTensor):
            return False
        # An empty flat range has no pieces.
        return self.source.data is None or self.source.data.is_meta

    @property
    def layout(self) -> Hashable:
        """Equal for leaves of one kind, dtype and shape that hold the same regions in the same way."""
        source = self.source
        layout: Hashable = ()
        if isinstance(source, ShardedTensor):
            flat = source.flattened_range
            layout = (source.local_shape, source.prepend_axis_num, (flat.start, flat.stop) if flat else None)
        elif isinstance(source, DTensor):
            layout = (source.device_mesh, source.placements, source.stride())
        regions = tuple((region.offset, region.size) for region, _ in self.pieces)
        return type(source).__name__, self.dtype.code, self.global_shape, layout, regions

    def allocate(self) -> None:
        """Give memory to a leaf that has none, on the CPU; `result` is then the new tensor."""
        if not self.lacks_memory:
            return
        kind = torch_dtype(self.dtype)
        if isinstance(self.source, ShardedTensor):
            self.source = ShardedTensor(
                **{name: getattr(self.source, name) for name in _SHARDED_FIELDS if name != "data"},
                data=torch.empty(self.source.data_shape(), dtype=kind, device="cpu"),
            )
            self.pieces = [*self.source.pieces(_data(self.source))]
        elif isinstance(self.source, DTensor):
            local = torch.empty_like(self.source._local_tensor, device=self.source.device_mesh.device_type)
            self.source = DTensor.from_local(
                local,
                self.source.device_mesh,
                self.source.placements,
                run_check=False,
                shape=self.source.shape,
                stride=self.source.stride(),
            )
            self.pieces = [*DTensorReader().layout(self.key, self.source).pieces(self.key, self.source)]
        else:
            self.source = torch.empty(self.global_shape, dtype=kind, device="cpu")
            self.pieces = [(Region.whole(self.global_shape), self.source)]

    def share(self, other: TensorLeaf) -> None:
        """Take the memory of another leaf of the same kind, dtype and regions instead of memory of its own."""
        self.source, self.pieces = other.source, other.pieces

    @property
    def result(self) -> Any:
        """What stands at `path` after loading: the local tensor of a ShardedTensor, else the tensor itself."""
        return self.source.data if isinstance(self.source, ShardedTensor) else self.source


_SHARDED_FIELDS = tuple(ShardedTensor.__dataclass_fields__)


def _data(tensor: ShardedTensor) -> torch.Tensor:
    if tensor.data is None:
        raise BadArgumentError(f"tensor {tensor.key!r} has no data")
    return tensor.data


class LeafMaker:
    """Turns tensors of a state dict into leaves. One lives as long as one `describe`: it remembers extents it has met.

    Args:
        for_load: tensors without memory (None, meta) are allowed; tensors whose elements share memory are not.
    """

    def __init__(self, *, for_load: bool) -> None:
        self._for_load = for_load
        self._reader = DTensorReader()
        self._whole: dict[tuple[torch.Size, torch.dtype], tuple[Extent, Region]] = {}
        self._distributed: dict[Any, tuple[Extent, DTensorLayout]] = {}
        self._sharded: dict[Hashable, tuple[Extent, Region]] = {}

    def leaf(self, path: Path, tensor: ShardedTensor | torch.Tensor) -> TensorLeaf:
        """The leaf of a tensor.

        Raises:
            BadArgumentError: it cannot be saved or loaded; names its key.
        """
        if isinstance(tensor, ShardedTensor):
            return self._sharded_leaf(path, tensor)
        key = dotted(path)
        if isinstance(tensor, DTensor):
            return self._distributed_leaf(path, key, tensor)
        if is_torch_sharded(type(tensor)):
            return self._torch_sharded_leaf(path, key, tensor)
        like = (tensor.shape, tensor.dtype)
        known = self._whole.get(like)
        if known is None:
            dtype, shape = stored_dtype(tensor.dtype), check_shape(tuple(tensor.shape), f"tensor {key!r}")
            known = self._whole[like] = (Extent(dtype, shape, IMPLICIT), Region.whole(shape))
        return TensorLeaf(path, key, tensor, known[0], [(known[1], tensor.detach() if self._has_memory(tensor, key) else None)])

    def _distributed_leaf(self, path: Path, key: str, tensor: DTensor) -> TensorLeaf:
        # Equal specs say the same of mesh, placements, shape, strides and dtype.
        spec: Any = tensor._spec
        known = self._distributed.get(spec)
        if known is None:
            dtype, shape = stored_dtype(tensor.dtype), check_shape(tuple(tensor.shape), f"tensor {key!r}")
            layout = self._reader.layout(key, tensor)
            known = self._distributed[spec] = (Extent(dtype, shape, IMPLICIT, layout.mesh, layout.mesh_size), layout)
        extent, layout = known
        local, region = tensor._local_tensor, layout.region
        if region is not None and local.shape == layout.local_shape:
            return TensorLeaf(path, key, tensor, extent, [(region, local.detach() if self._has_memory(local, key) else None)])
        parts = layout.pieces(key, tensor)
        pieces: Pieces = [(box, view.detach() if self._has_memory(view, key) else None) for box, view in parts]
        return TensorLeaf(path, key, tensor, extent, pieces)

    def _torch_sharded_leaf(self, path: Path, key: str, tensor: torch.Tensor) -> TensorLeaf:
        kind, size = facts_of(tensor)
        dtype, shape = stored_dtype(kind), check_shape(size, f"tensor {key!r}")
        mesh, ranks = ranks_of(tensor)
        pieces: Pieces = [(region, view) for region, view in pieces_of(key, tensor) if self._has_memory(view, key)]
        return TensorLeaf(path, key, tensor, Extent(dtype, shape, IMPLICIT, mesh, ranks), pieces)

    def _sharded_leaf(self, path: Path, tensor: ShardedTensor) -> TensorLeaf:
        tensor.validate()
        if isinstance(tensor.data, DTensor):
            raise BadArgumentError(
                f"tensor {tensor.key!r} is a ShardedTensor around a DTensor: give the DTensor itself, or its to_local()"
            )
        like = (
            tensor.dtype,
            tensor.local_shape,
            tensor.global_shape,
            tensor.global_offset,
            tensor.replica_id,
            tensor.allow_shape_mismatch,
        )
        known = self._sharded.get(like)
        if known is None:
            role = MAIN if is_main_replica(tensor.replica_id) else COPY
            dtype, mismatch = stored_dtype(tensor.dtype), tensor.allow_shape_mismatch
            extent = Extent(dtype, tensor.global_shape, role, allow_shape_mismatch=mismatch)
            known = self._sharded[like] = (extent, tensor.region())
        extent, region = known
        data = tensor.data
        if data is None:
            if not self._for_load:
                raise BadArgumentError(f"tensor {tensor.key!r} has no data to save: data is None")
            stand_in = torch.empty(tensor.data_shape(), dtype=tensor.dtype, device="meta")
            pieces: Pieces = [(box, None) for box, _ in tensor.pieces(stand_in)]
        elif tensor.flattened_range is None and not tensor.prepend_axis_num:
            pieces = [(region, data.detach() if self._has_memory(data, tensor.key) else None)]
        else:
            parts = tensor.pieces(data.detach())
            pieces = [(box, view if self._has_memory(view, tensor.key) else None) for box, view in parts]
        return TensorLeaf(path, tensor.key, tensor, extent, pieces)

    def _has_memory(self, view: torch.Tensor, key: str) -> bool:
        """Whether a tensor has memory; raises where it must have, or where it cannot be used."""
        if view.layout != torch.strided:
            raise BadArgumentError(
                f"tensor {key!r} has layout {view.layout}: expected a dense (strided) one. "
                "Save its parts as tensors of their own."
            )
        if view.is_meta:
            if self._for_load:
                return False
            raise BadArgumentError(f"tensor {key!r} is on the meta device and has no values to save")
        if self._for_load and not view.is_contiguous() and shares_elements(tuple(view.shape), view.stride()):
            raise BadArgumentError(
                f"tensor {key!r} is expanded or overlaps itself: several of its elements share memory, so it cannot be "
                "loaded into"
            )
        return True
