"""The reshardable form: what a rank owns of every parameter, as shards of global tensors named by parameter.

Nothing of buckets, padding or ranks is stored: an optimizer that is not sharded, or sharded otherwise, has the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.flat_factory import FlatFactory
from giantstep.mapping.model_parameter import Described, ModelParameter, described
from giantstep.mapping.replica import ReplicaId
from giantstep.shards.flat_buffers import FlatLayout, OwnedRange
from giantstep.zero.buffers import BucketTensors, ParameterTensors, views_of


def reshardable_state(
    layout: FlatLayout,
    rank: int,
    states: Mapping[str, BucketTensors | ParameterTensors],
    model: Mapping[str, ModelParameter],
    *,
    prefix: str = "optimizer.state",
    instance: int = 0,
) -> dict[str, dict[str, Described]]:
    """A rank's optimizer state for `save` or `load`, under any layout.

    The tensor of state `exp_avg` of a model parameter with key `k` has the key `optimizer.state.exp_avg.k` and the model
    parameter's global shape. Saving reads the given memory, loading fills it; nothing is copied here.

    Args:
        layout: the buckets.
        rank: of this process among the data-parallel ranks that share them.
        states: by name (`exp_avg`, `exp_avg_sq`, `fp32_param`, ...), per bucket the rank's own range, or by parameter name
            its own range of that. Dtypes may differ from the parameters'. Owned by the caller.
        model: by the names in the layout, how the model describes its parameters: with their position in tensor, pipeline
            and expert parallelism, as for saving the model. Only those that the rank owns a part of are looked up. Of
            fused ones the factory, which need know nothing of ranges (see `FlatFactory`). DTensors of meshes without a
            data-parallel axis, and plain tensors where nothing cuts them, have the name in the layout as their key.
        prefix: put before the name of the state.
        instance: number of this copy of the optimizer where several hold the same state, such as groups of a hybrid sharded
            optimizer; the model is saved by instance 0.

    Returns:
        By name of the state and of the parameter, what is saved: a `ShardedTensor` or `ShardedTensorFactory`, after loading
        the view that was filled, 1-dimensional or, of parameters that the rank owns all of, in their shape. Parameters of
        which it owns nothing are left out.

    The replica id of a shard is its model parameter's, whose last number (that counts data-parallel copies) is replaced by
    `instance`; if it is a single number, all of it. So ids must be tuples where anything else repeats parameters too, such
    as tensor parallelism a norm.

    Raises:
        BadArgumentError: memory or model do not fit the layout; names state and parameter.
    """
    layout.check_rank(rank)
    maker = _Maker(model, prefix, instance)
    return {
        name: {owned.parameter.name: maker.leaf(name, owned, view) for owned, view in views_of(layout, rank, name, tensors)}
        for name, tensors in states.items()
    }


class _Maker:
    """Makes the leaves of one state dict; the part that all states of a parameter share is checked once."""

    def __init__(self, model: Mapping[str, ModelParameter], prefix: str, instance: int) -> None:
        if type(instance) is not int or instance < 0:
            raise BadArgumentError(f"instance {instance!r} must be an int of at least 0")
        self._model, self._prefix, self._instance = model, prefix, instance
        self._known: dict[str, Described] = {}

    def leaf(self, name: str, owned: OwnedRange, view: torch.Tensor) -> Described:
        """What is saved for one range of one state."""
        model = self._known.get(owned.parameter.name)
        if model is None:
            known = self._model.get(owned.parameter.name)
            model = self._known[owned.parameter.name] = described(owned.parameter, known)
        key, replica_id = f"{self._prefix}.{name}.{model.key}", self._replica_id(model.replica_id)
        flat = slice(owned.start, owned.stop)
        if isinstance(model, ShardedTensorFactory):
            fused = (model.build_fn, model.merge_fn, replica_id, flat, owned.parameter.shape)
            return FlatFactory(key, view, *fused)
        if flat.stop - flat.start == owned.parameter.elements:
            # One region instead of a range to be cut into several.
            whole = view.view(owned.parameter.shape)
            return replace(model, key=key, data=whole, dtype=view.dtype, replica_id=replica_id)
        return replace(model, key=key, data=view, dtype=view.dtype, replica_id=replica_id, flattened_range=flat)

    def _replica_id(self, replica_id: ReplicaId) -> ReplicaId:
        return (*replica_id[:-1], self._instance) if isinstance(replica_id, tuple) and replica_id else self._instance
