"""Leaves of a state dict as regions of global tensors, each with a view of the memory that holds (or will hold) it.

Made by `describe`; read by `save` and `load`, which know nothing of ShardedTensor, DTensor, flatness or strides.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from giantstep.errors import BadArgumentError
from giantstep.mapping.dtensor import DTensorReader
from giantstep.mapping.overlap import shares_elements
from giantstep.mapping.replica import is_main_replica
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.planning.description import COPY, IMPLICIT, MAIN
from giantstep.shards.dtypes import DType, dtype_of_torch_name
from giantstep.shards.paths import Path, dotted
from giantstep.shards.region import Region, check_shape
from giantstep.words import torch_dtype


@dataclass(slots=True)
class TensorLeaf:
    """One tensor of the state dict, as regions of its global tensor.

    Attributes:
        path: where it stands in the state dict.
        key, dtype, global_shape: the global tensor.
        source: the user's object.
        role: MAIN, COPY (explicit replica ids) or IMPLICIT (holders of one region are found by comparing).
        mesh: for IMPLICIT shards, the set of ranks within which equality is guaranteed; 0 for none.
        pieces: (region, view) pairs; the views are None where memory is still to be allocated.
        allow_shape_mismatch: see `ShardedTensor`.
    """

    path: Path
    key: str
    dtype: DType
    global_shape: tuple[int, ...]
    source: Any
    role: int
    mesh: int = 0
    mesh_size: int = 1
    pieces: list[tuple[Region, torch.Tensor | None]] = field(default_factory=list)
    allow_shape_mismatch: bool = False

    @property
    def lacks_memory(self) -> bool:
        """Whether memory is still to be allocated."""
        absent = isinstance(self.source, ShardedTensor) and self.source.data is None
        return absent or any(view is None for _, view in self.pieces)

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
            self.pieces = [*DTensorReader().shard(self.key, self.source).pieces]
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
    """Turns tensors of a state dict into leaves. One lives as long as one `describe`.

    Args:
        for_load: tensors without memory (None, meta) are allowed; tensors whose elements share memory are not.
    """

    def __init__(self, *, for_load: bool) -> None:
        self._for_load = for_load
        self._reader = DTensorReader()

    def leaf(self, path: Path, tensor: ShardedTensor | torch.Tensor) -> TensorLeaf:
        """The leaf of a tensor.

        Raises:
            BadArgumentError: it cannot be saved or loaded; names its key.
        """
        if isinstance(tensor, ShardedTensor):
            return self._sharded(path, tensor)
        key = dotted(path)
        dtype = dtype_of_torch_name(str(tensor.dtype))
        shape = check_shape(tuple(tensor.shape), f"tensor {key!r}")
        if isinstance(tensor, DTensor):
            shard = self._reader.shard(key, tensor)
            pieces = [(region, self._view(view, key)) for region, view in shard.pieces]
            return TensorLeaf(path, key, dtype, shape, tensor, IMPLICIT, shard.mesh, shard.mesh_size, pieces)
        pieces = [(Region.whole(shape), self._view(tensor, key))]
        return TensorLeaf(path, key, dtype, shape, tensor, IMPLICIT, pieces=pieces)

    def _sharded(self, path: Path, tensor: ShardedTensor) -> TensorLeaf:
        tensor.validate()
        if isinstance(tensor.data, DTensor):
            raise BadArgumentError(
                f"tensor {tensor.key!r} is a ShardedTensor around a DTensor: give the DTensor itself, or its to_local()"
            )
        role = MAIN if is_main_replica(tensor.replica_id) else COPY
        leaf = TensorLeaf(path, tensor.key, dtype_of_torch_name(str(tensor.dtype)), tensor.global_shape, tensor, role)
        leaf.allow_shape_mismatch = tensor.allow_shape_mismatch
        if tensor.data is None:
            if not self._for_load:
                raise BadArgumentError(f"tensor {tensor.key!r} has no data to save: data is None")
            stand_in = torch.empty(tensor.data_shape(), dtype=tensor.dtype, device="meta")
            leaf.pieces = [(region, None) for region, _ in tensor.pieces(stand_in)]
        else:
            leaf.pieces = [(region, self._view(view, tensor.key)) for region, view in tensor.pieces(tensor.data.detach())]
        return leaf

    def _view(self, view: torch.Tensor, key: str) -> torch.Tensor | None:
        if view.layout != torch.strided:
            raise BadArgumentError(
                f"tensor {key!r} has layout {view.layout}: expected a dense (strided) one. "
                "Save its parts as tensors of their own."
            )
        if view.device.type == "meta":
            if self._for_load:
                return None
            raise BadArgumentError(f"tensor {key!r} is on the meta device and has no values to save")
        if self._for_load and not view.is_contiguous() and shares_elements(tuple(view.shape), view.stride()):
            raise BadArgumentError(
                f"tensor {key!r} is expanded or overlaps itself: several of its elements share memory, so it cannot be "
                "loaded into"
            )
        return view.detach()
