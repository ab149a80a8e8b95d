"""Torch's own ShardedTensor to regions: what FSDP1 gives as sharded state when it was made without a mesh.

It says itself where its shards lie. Not giantstep's `ShardedTensor`, and not to be confused with it: torch's stands for the
whole tensor, knows a process group, and stays what it is when it is loaded. Called by `leaves`, and by those who must not
take it for a tensor with memory of its own.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.distributed import get_process_group_ranks

from giantstep.errors import BadArgumentError
from giantstep.shards.region import Region


def is_torch_sharded(kind: type) -> bool:
    """Whether this is torch's class, told by its name: its module is deprecated, and importing it is not needed."""
    return kind.__name__ == "ShardedTensor" and kind.__module__.startswith("torch.distributed._shard.")


def facts_of(tensor: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and global shape. Torch warns of the class whenever the tensor itself is asked."""
    said = tensor.metadata()
    dtype: torch.dtype = said.tensor_properties.dtype
    return dtype, tuple(said.size)


def ranks_of(tensor: Any) -> tuple[int, int]:
    """A number that stands for the set of ranks over which the tensor is cut, equal on all of them; and how many they are."""
    ranks = get_process_group_ranks(tensor._process_group)
    name = int.from_bytes(hashlib.sha256(repr(sorted(ranks)).encode()).digest()[:8], "little") >> 1
    return name, len(ranks)


def pieces_of(key: str, tensor: Any) -> list[tuple[Region, torch.Tensor]]:
    """The regions that this rank holds, with views of their memory; none if it holds nothing.

    Raises:
        BadArgumentError: a shard has no memory.
    """
    found = []
    for shard in tensor.local_shards():
        if shard.tensor.is_meta:
            raise BadArgumentError(
                f"tensor {key!r} is a torch ShardedTensor on the meta device: give it memory, or describe its shards as "
                "giantstep.ShardedTensor with data=None"
            )
        region = Region(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes))
        found.append((region, shard.tensor.detach()))
    return found
