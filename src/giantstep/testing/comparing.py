"""Tensors compared to the bit, and put together of shards without the code that loads them. Called by `checking`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from giantstep.errors import DisagreementError
from giantstep.mapping.describe import Described
from giantstep.mapping.leaves import TensorLeaf
from giantstep.planning.description import COPY
from giantstep.shards.region import Region
from giantstep.words import torch_dtype, words_of

_PRINTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8)


def integers_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as integers that share its memory; elements of 16 bytes are two, along one more axis.

    The tensor must not be lazily conjugated or negated.
    """
    if tensor.element_size() == 16:
        return torch.view_as_real(tensor.detach()).view(torch.int64)
    return words_of(tensor.detach())


class GlobalTensor:
    """A whole tensor in host memory, put together of shards.

    Attributes:
        dtype, shape: as described.
        integers: its bits, see `integers_of`.
    """

    def __init__(self, leaf: TensorLeaf) -> None:
        self.dtype: torch.dtype = torch_dtype(leaf.dtype)
        self.shape = leaf.global_shape
        self.integers = integers_of(torch.empty(self.shape, dtype=self.dtype, device="cpu")).zero_()

    def put(self, region: Region, view: torch.Tensor) -> None:
        """Copy a shard to its place."""
        self.integers[region.slices()] = integers_of(_resolved(view))

    def part(self, region: Region, dtype: torch.dtype) -> torch.Tensor:
        """The bits of a region that need not lie inside: zeros beyond. Cast as torch does if the dtype is another one."""
        expected = torch.empty(region.size, dtype=dtype, device="cpu")
        inside = region.intersect(Region.whole(self.shape))
        integers = integers_of(expected).zero_()
        found = self.integers[inside.slices()]
        if dtype == self.dtype:
            integers[inside.relative_to(region.offset).slices()] = found
        elif inside.elements:
            values = torch.empty(inside.size, dtype=self.dtype, device="cpu")
            integers_of(values).copy_(found)
            expected[inside.relative_to(region.offset).slices()] = values.to(dtype)
        return integers


def _resolved(view: torch.Tensor) -> torch.Tensor:
    return view.detach().resolve_conj().resolve_neg().cpu()


def first_difference(region: Region, view: torch.Tensor, expected: torch.Tensor) -> tuple[tuple[int, ...], str] | None:
    """The first element in row-major order whose bits differ, as index of the global tensor and as text; or None.

    Args:
        region: where `view` lies in the global tensor.
        view: what is there.
        expected: the integers that should be.
    """
    values = _resolved(view)
    found = integers_of(values)
    if torch.equal(found, expected):
        return None
    place = tuple((found != expected).nonzero()[0].tolist())
    local = place[: len(region.offset)]
    index = tuple(start + step for start, step in zip(region.offset, local, strict=True))
    text = f"bits {_hex(found[place])}, expected {_hex(expected[place])}"
    if values.dtype in _PRINTED:
        wanted = expected[place].view(values.dtype).item()
        text = f"{values[local].item()!r}, expected {wanted!r} ({text})"
    return index, text


def _hex(integer: torch.Tensor) -> str:
    bits = 8 * integer.element_size()
    return f"0x{int(integer.item()) & ((1 << bits) - 1):0{bits // 4}x}"


def assemble(described: Sequence[Described]) -> dict[str, GlobalTensor]:
    """The global tensors of states that cover each once, from their main replicas; the copies are compared with them.

    Raises:
        DisagreementError: a copy differs.
    """
    tensors: dict[str, GlobalTensor] = {}
    leaves = [(rank, leaf) for rank, found in enumerate(described) for leaf in found.leaves]
    for _, leaf in leaves:
        if leaf.key not in tensors:
            tensors[leaf.key] = GlobalTensor(leaf)
        for region, view in leaf.pieces:
            if view is not None and leaf.role != COPY:
                tensors[leaf.key].put(region, view)
    for rank, leaf in leaves:
        for region, view in leaf.pieces:
            whole = tensors[leaf.key]
            found = None if view is None else first_difference(region, view, whole.part(region, whole.dtype))
            if found is not None:
                raise DisagreementError(
                    f"tensor {leaf.key!r}: rank {rank} holds at {list(found[0])} {found[1]} by the main replicas. Replicas are "
                    "equal by declaration: give shards that differ their own offsets or keys."
                )
    return tensors
