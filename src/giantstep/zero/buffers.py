"""The memory of a distributed optimizer's state: one tensor per bucket for what this rank owns of it, or one per parameter.

Not here: what is saved of it (`reshardable`, `same_layout`), which both call this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from giantstep.errors import BadArgumentError
from giantstep.shards.flat_buffers import FlatLayout, OwnedRange

BucketTensors = Sequence[torch.Tensor | None]
"""Per bucket of the layout a 1-dimensional tensor of the rank's own range; None where the bucket has no such state."""

ParameterTensors = Mapping[str, torch.Tensor | None]
"""By parameter name a 1-dimensional tensor of the rank's own range of it, or one of the parameter's shape where the rank
owns all of it; None or absent where there is no such state."""


def empty_buffers(layout: FlatLayout, rank: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """New memory for one kind of state: per bucket a tensor of what the rank owns, padding included, filled with zeros."""
    layout.check_rank(rank)
    ranges = [bucket.range_of(rank) for bucket in layout.buckets]
    return [torch.zeros(high - low, dtype=dtype, device=device) for low, high in ranges]


def check_buckets(layout: FlatLayout, rank: int, name: str, tensors: BucketTensors) -> None:
    """Raise `BadArgumentError` unless the tensors are of this rank's own ranges of all buckets."""
    if len(tensors) != len(layout.buckets):
        raise BadArgumentError(
            f"state {name!r}: {len(tensors)} tensors for {len(layout.buckets)} buckets. Give one per bucket, in their order; "
            "None where a bucket has no such state."
        )
    for number, (bucket, tensor) in enumerate(zip(layout.buckets, tensors, strict=True)):
        low, high = bucket.range_of(rank)
        if tensor is not None:
            _check_flat(tensor, high - low, f"state {name!r}, bucket {number}: rank {rank} owns elements {low}:{high}")


def views_of(
    layout: FlatLayout, rank: int, name: str, tensors: BucketTensors | ParameterTensors
) -> Iterator[tuple[OwnedRange, torch.Tensor]]:
    """What the rank owns of each parameter, and its part of the memory. Parameters without such state are left out.

    Raises:
        BadArgumentError: the tensors do not fit the layout; names state, and bucket or parameter.
    """
    if isinstance(tensors, Mapping):
        yield from _views_by_name(layout, rank, name, tensors)
        return
    check_buckets(layout, rank, name, tensors)
    flat = [None if tensor is None else tensor.detach() for tensor in tensors]
    for owned in layout.owned(rank):
        tensor = flat[owned.bucket]
        if tensor is not None:
            yield owned, tensor[owned.at : owned.at + owned.stop - owned.start]


def _views_by_name(
    layout: FlatLayout, rank: int, name: str, tensors: ParameterTensors
) -> Iterator[tuple[OwnedRange, torch.Tensor]]:
    left = set(tensors)
    for owned in layout.owned(rank):
        parameter = owned.parameter.name
        tensor = tensors.get(parameter)
        left.discard(parameter)
        if tensor is None:
            continue
        what = f"state {name!r} of parameter {parameter!r}: rank {rank} owns elements {owned.start}:{owned.stop}"
        count = owned.stop - owned.start
        whole = isinstance(tensor, torch.Tensor) and count == owned.parameter.elements
        if whole and tensor.shape == owned.parameter.shape and tensor.is_contiguous():
            tensor = tensor.view(-1)
        _check_flat(tensor, count, what)
        yield owned, tensor.detach()
    for parameter in sorted(left):
        tensor = tensors[parameter]
        if tensor is not None and not (isinstance(tensor, torch.Tensor) and tensor.numel() == 0):
            found = f"{tensor.numel()} elements" if isinstance(tensor, torch.Tensor) else f"type {type(tensor).__name__}"
            raise BadArgumentError(
                f"state {name!r} of parameter {parameter!r} has {found}, but rank {rank} owns nothing of such a parameter: "
                "name the parameters of the layout, and give each rank's own ranges"
            )


def _check_flat(tensor: torch.Tensor, elements: int, what: str) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.shape != (elements,) or not tensor.is_contiguous():
        found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise BadArgumentError(f"{what}: expected a contiguous tensor of shape ({elements},), found {found}")
