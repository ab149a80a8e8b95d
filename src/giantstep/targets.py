"""Regions that are filled on load, as columns: of tens of thousands, little needs to be known one by one.

Made by `filling`; read by `sharing` and `planned_load`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from giantstep.errors import BadArgumentError
from giantstep.mapping.leaves import Extent, TensorLeaf
from giantstep.planning.load_tables import numbered
from giantstep.shards.region import Int64s, Region
from giantstep.words import torch_dtype

Flags = NDArray[np.bool_]


class Target(NamedTuple):
    """One row of `Targets`."""

    number: int
    leaf: TensorLeaf
    row: int
    region: Region
    view: torch.Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """Regions of leaves, with the memory that they are filled to or compared with; none is empty.

    Attributes:
        leaves: what the regions belong to.
        rows: of the index, from which they are filled.
        regions: of the global tensors.
        views: their memory.
        address: of the first element.
        contiguous: whether elements lie in one row.
        on_host: whether the bytes there are the values: not on another device, nor lazily conjugated or negated.
        dtype_code, item_bytes: of the elements in memory.
        bytes: of all elements.
        partial: elements that are not stored are fine.
        overlaps: whether some of the memory is, or may be, that of another region that is filled.
    """

    leaves: list[TensorLeaf]
    rows: list[int]
    regions: list[Region]
    views: list[torch.Tensor]
    address: Int64s
    contiguous: Flags
    on_host: Flags
    dtype_code: Int64s
    item_bytes: Int64s
    bytes: Int64s
    partial: Flags
    overlaps: Flags

    @classmethod
    def of(cls, leaves: Sequence[TensorLeaf], rows: Sequence[int], extents: Sequence[Extent], extent_of: Int64s) -> Targets:
        """All regions of some leaves that have elements.

        Args:
            leaves: all have memory.
            rows: of each leaf.
            extents, extent_of: of the leaves: without repetitions, and the number of each leaf's.

        Raises:
            BadArgumentError: one has no memory.
        """
        pieces = [leaf.pieces for leaf in leaves]
        holders, rows = list(leaves), list(rows)
        flat = list(itertools.chain.from_iterable(pieces))
        elements = _elements([region for region, _ in flat])
        counts = np.fromiter(map(len, pieces), np.int64, len(pieces))
        if not (elements.all() and (counts == 1).all()):
            filled = np.flatnonzero(elements)
            leaf_of = np.repeat(np.arange(len(counts)), counts)[filled]
            flat, elements, extent_of = [flat[n] for n in filled.tolist()], elements[filled], extent_of[leaf_of]
            holders, rows = [holders[n] for n in leaf_of.tolist()], [rows[n] for n in leaf_of.tolist()]
        views = _views(holders, [view for _, view in flat])
        lazy = np.array([torch_dtype(extent.dtype).is_complex for extent in extents], dtype=bool)[extent_of]
        contiguous, on_host = _kinds(views, lazy)
        item_bytes = np.array([extent.dtype.item_bytes for extent in extents], dtype=np.int64)[extent_of]
        return cls(
            leaves=holders,
            rows=rows,
            regions=[region for region, _ in flat],
            views=views,
            address=np.array([view.data_ptr() for view in views], dtype=np.int64),
            contiguous=contiguous,
            on_host=on_host,
            dtype_code=np.array([extent.dtype.code for extent in extents], dtype=np.int64)[extent_of],
            item_bytes=item_bytes,
            bytes=elements * item_bytes,
            partial=np.array([extent.allow_shape_mismatch for extent in extents], dtype=bool)[extent_of],
            overlaps=np.zeros(len(views), dtype=bool),
        )

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, number: int) -> Target:
        return Target(number, self.leaves[number], self.rows[number], self.regions[number], self.views[number])

    def marked(self, overlaps: Collection[int]) -> Targets:
        """The same, with those that overlap marked."""
        marks = self.overlaps.copy()
        marks[list(overlaps)] = True
        return replace(self, overlaps=marks)

    def chosen(self, numbers: Sequence[int]) -> Targets:
        """Some of them."""
        chosen = np.array(numbers, dtype=np.int64)
        return Targets(
            [self.leaves[n] for n in numbers],
            [self.rows[n] for n in numbers],
            [self.regions[n] for n in numbers],
            [self.views[n] for n in numbers],
            self.address[chosen],
            self.contiguous[chosen],
            self.on_host[chosen],
            self.dtype_code[chosen],
            self.item_bytes[chosen],
            self.bytes[chosen],
            self.partial[chosen],
            self.overlaps[chosen],
        )


def _elements(regions: Sequence[Region]) -> Int64s:
    """Elements of each region."""
    distinct, number = numbered(regions)
    return np.array([region.elements for region in distinct], dtype=np.int64)[number]


def _views(leaves: Sequence[TensorLeaf], views: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    held = [view for view in views if view is not None]
    if len(held) < len(views):
        key = next(leaf.key for leaf, view in zip(leaves, views, strict=True) if view is None)
        raise BadArgumentError(f"tensor {key!r} has no memory: expected it to be allocated before it is filled")
    return held


def _kinds(views: Sequence[torch.Tensor], lazy: Flags) -> tuple[Flags, Flags]:
    """Which views lie in one row, and which have their values in host memory; `lazy` ones may be conjugated."""
    contiguous, on_host = np.ones(len(views), dtype=bool), np.ones(len(views), dtype=bool)
    odd = [n for n, view in enumerate(views) if not view.is_contiguous() or not view.is_cpu or view.is_neg()]
    for number in dict.fromkeys([*odd, *np.flatnonzero(lazy).tolist()]):
        view = views[number]
        contiguous[number] = view.is_contiguous()
        on_host[number] = view.is_cpu and not view.is_neg() and not view.is_conj()
    return contiguous, on_host
