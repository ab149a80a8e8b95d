"""Parameters of a model as flat buffers need them: how the model describes them, checked against the flat layout.

DTensors and plain tensors, which carry no key, are named as in the layout. Not here: state. Called by `giantstep.zero`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from giantstep.errors import BadArgumentError
from giantstep.mapping.dtensor import DTensorReader
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.shards.flat_buffers import FlatParameter
from giantstep.shards.region import Region

Described = ShardedTensor | ShardedTensorFactory

ModelParameter = Described | torch.Tensor
"""How a model describes a parameter; a plain tensor is one that model parallelism does not cut."""


def described(parameter: FlatParameter, model: ModelParameter | None) -> Described:
    """A parameter as a `ShardedTensor` without data, or as a factory.

    Args:
        parameter: as the layout has it.
        model: as the model has it. A DTensor's mesh is one of model parallelism only: where it is replicated, the replica
            id counts that axis, which the ranks that share the buckets must not differ in.

    Raises:
        BadArgumentError: it is none of these, or of another shape; names it.
    """
    name = parameter.name
    if isinstance(model, torch.Tensor):
        model = _distributed(name, model) if isinstance(model, DTensor) else _plain(name, model)
    if not isinstance(model, ShardedTensor | ShardedTensorFactory):
        found = "nothing" if model is None else f"a {type(model).__name__}"
        raise BadArgumentError(
            f"parameter {name!r} of the flat layout: expected the model's ShardedTensor, ShardedTensorFactory, DTensor or "
            f"tensor, found {found}"
        )
    if model.flattened_range is not None:
        raise BadArgumentError(
            f"parameter {name!r}: the model's {model.key!r} is flattened itself; give it as it is in the model"
        )
    shape = model.local_shape if isinstance(model, ShardedTensor) else tuple(model.data.shape)
    if shape != parameter.shape:
        raise BadArgumentError(
            f"parameter {name!r} has shape {parameter.shape} in the flat layout, the model's {model.key!r} has {shape}: lay "
            "out the local parameters, as tensor parallelism leaves them"
        )
    # The model's values are not needed any more.
    return model.without_data() if isinstance(model, ShardedTensor) else model


def _plain(name: str, tensor: torch.Tensor) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(name, tensor.detach())


def _distributed(name: str, tensor: DTensor) -> Described:
    layout, local = DTensorReader().layout(name, tensor), tensor._local_tensor.detach()
    coordinate = tensor.device_mesh.get_coordinate()
    if layout.local_shape is None or coordinate is None:
        raise BadArgumentError(f"parameter {name!r}: this rank is not in the mesh {layout.mesh_shape} of the model's DTensor")
    copies = [index for index, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()]
    replica_id = (*copies, 0)

    def shard(key: str, region: Region, data: torch.Tensor, replica: Any) -> ShardedTensor:
        return ShardedTensor(key, data, data.dtype, region.size, tuple(tensor.shape), region.offset, None, replica)

    if layout.region is not None:
        return shard(name, layout.region, local, replica_id)

    def build(key: str, data: torch.Tensor, replica: Any, _: slice | None) -> list[ShardedTensor]:
        # Strided placements: the local tensor is several regions.
        return [shard(key, region, view, replica) for region, view in layout.parts(data)]

    return ShardedTensorFactory(name, local, build, lambda parts: parts, replica_id)
