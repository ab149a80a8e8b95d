"""`ShardedTensorFactory`: a tensor that is stored in another shape than it has in memory, e.g. a fused weight as its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.replica import ReplicaId, check_replica_id

Build = Callable[[str, torch.Tensor, ReplicaId, slice | None], Any]
Merge = Callable[[Any], torch.Tensor]


@dataclass(eq=False, slots=True)
class ShardedTensorFactory:
    """Builds the sharded tensors that stand for a tensor, and merges them after loading.

    The same functions serve a parameter and its optimizer moments: use `dataclasses.replace(factory, key=...,
    data=...)`.

    Attributes:
        key: given to `build_fn`.
        data: the local tensor, owned by the caller; meta where it is to be allocated on load.
        build_fn: `(key, data, replica_id, flattened_range) -> ` nested dicts and lists of `ShardedTensor` and other
            leaves. If these hold views of `data`, saving copies nothing and loading fills `data` directly.
        merge_fn: what `build_fn` returned, with loaded tensors in place of the sharded ones, to the tensor. Where it
            returns another tensor of `data`'s shape and dtype, that is copied into `data`.
        replica_id, flattened_range: given to `build_fn`.
    """

    key: str
    data: torch.Tensor
    build_fn: Build
    merge_fn: Merge
    replica_id: ReplicaId = 0
    flattened_range: slice | None = None

    def __post_init__(self) -> None:
        self.validate()

    def build(self) -> Any:
        """What is stored in place of the tensor."""
        return self.build_fn(self.key, self.data, self.replica_id, self.flattened_range)

    def merge(self, loaded: Any) -> Any:
        """The tensor from what was loaded: `data`, filled, if it has memory and the shape and dtype of the result."""
        merged = self.merge_fn(loaded)
        data = self.data
        if not isinstance(data, torch.Tensor) or not isinstance(merged, torch.Tensor) or merged is data or data.is_meta:
            return merged
        if (merged.shape, merged.dtype) != (data.shape, data.dtype):
            return merged
        with torch.no_grad():
            # A copy first where the result shares memory with the data in another order.
            shares = merged.device == data.device and _storage(merged) == _storage(data)
            same_place = shares and merged.data_ptr() == data.data_ptr() and merged.stride() == data.stride()
            if not same_place:
                data.copy_(merged.clone() if shares else merged)
        return data

    def validate(self) -> None:
        """Raise `BadArgumentError` unless the attributes can be used."""
        if not isinstance(self.key, str) or not self.key:
            raise BadArgumentError(f"factory key {self.key!r} must be a str that is not empty")
        for name in ("build_fn", "merge_fn"):
            if not callable(getattr(self, name)):
                raise BadArgumentError(f"factory {self.key!r}: {name} {getattr(self, name)!r} must be callable")
        self.replica_id = check_replica_id(self.replica_id, f"factory {self.key!r}")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
