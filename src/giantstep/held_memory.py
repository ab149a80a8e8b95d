"""`hold`: where the elements of tensors in host memory lie, and what keeps that memory alive whatever becomes of the tensors.

A tensor is no owner of its memory: `.data =` and `set_` give it another one, `resize_` of its storage takes it away. Who works
with addresses holds storages. Called by `sources` and `filling`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from giantstep.errors import BadArgumentError
from giantstep.shards.region import Int64s


class Held(NamedTuple):
    """Memory of tensors.

    Attributes:
        address: [tensors] of the first element.
        owner: as long as it is referred to, that memory exists.
    """

    address: Int64s
    owner: Sequence[torch.UntypedStorage]


def hold(tensors: Sequence[torch.Tensor], key_of: Callable[[int], str]) -> Held:
    """Hold the memory of dense tensors with elements, of any strides, on the host.

    Args:
        tensors: whose memory is held.
        key_of: their keys, for errors.

    Raises:
        BadArgumentError: the storage of a tensor is shorter than the tensor.
    """
    count = len(tensors)
    owner = list(map(torch.Tensor.untyped_storage, tensors))
    # Asked after the storages: should another thread change a tensor at this moment, its address is not in its storage.
    address = np.fromiter(map(torch.Tensor.data_ptr, tensors), dtype=np.int64, count=count)
    low = np.fromiter(map(torch.UntypedStorage.data_ptr, owner), dtype=np.int64, count=count)
    size = np.fromiter(map(torch.UntypedStorage.nbytes, owner), dtype=np.int64, count=count)
    reach = np.fromiter(map(_reach, tensors), dtype=np.int64, count=count)
    wrong = np.flatnonzero((address < low) | (address + reach > low + size) | (low == 0))
    if len(wrong):
        raise no_memory(key_of(int(wrong[0])))
    return Held(address, owner)


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    if tensor.is_contiguous():
        return tensor.nbytes
    steps = sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def no_memory(key: str) -> BadArgumentError:
    """The error for a tensor whose storage was freed or made shorter."""
    return BadArgumentError(
        f"tensor {key!r} has no memory for its elements: its storage was freed or made shorter (resize_), as FSDP1 does with "
        "parameters that are gathered. Save or load when it has its memory, or leave it out"
    )
