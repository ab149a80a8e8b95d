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
from giantstep.mapping.leaves import TensorLeaf
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
    def of(cls, leaves: Sequence[TensorLeaf], rows: Sequence[int]) -> Targets:
        """All regions of some leaves that have elements.

        Args:
            leaves: all have memory.
            rows: of each leaf.

        Raises:
            BadArgumentError: one has no memory.
        """
        pieces = [leaf.pieces for leaf in leaves]
        holders, counts = list(leaves), list(map(len, pieces))
        if counts.count(1) < len(counts):
            leaf_of = np.repeat(np.arange(len(counts)), counts).tolist()
            holders, rows = [leaves[n] for n in leaf_of], [rows[n] for n in leaf_of]
        flat = list(itertools.chain.from_iterable(pieces))
        elements = _elements([region for region, _ in flat])
        if not elements.all():
            filled = np.flatnonzero(elements).tolist()
            elements = elements[filled]
            holders, rows, flat = [holders[n] for n in filled], [rows[n] for n in filled], [flat[n] for n in filled]
        views = _views(holders, [view for _, view in flat])
        codes, sizes, partial, lazy = _extents(holders)
        return cls(
            holders,
            list(rows),
            [region for region, _ in flat],
            views,
            np.array([view.data_ptr() for view in views], dtype=np.int64),
            np.array([view.is_contiguous() for view in views], dtype=bool),
            _on_host(views, lazy),
            codes,
            sizes,
            elements * sizes,
            partial,
            np.zeros(len(views), dtype=bool),
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


def _extents(leaves: Sequence[TensorLeaf]) -> tuple[Int64s, Int64s, Flags, Flags]:
    """Dtype codes, bytes per element, whether elements may not be stored, and whether values may be conjugated lazily."""
    extents = [leaf.extent for leaf in leaves]
    distinct = dict.fromkeys(extents)
    number = dict(zip(distinct, range(len(distinct)), strict=True))
    rows = np.fromiter(map(number.__getitem__, extents), np.int64, len(extents))
    codes = np.array([extent.dtype.code for extent in distinct], dtype=np.int64)
    sizes = np.array([extent.dtype.item_bytes for extent in distinct], dtype=np.int64)
    partial = np.array([extent.allow_shape_mismatch for extent in distinct], dtype=bool)
    lazy = np.array([torch_dtype(extent.dtype).is_complex for extent in distinct], dtype=bool)
    return codes[rows], sizes[rows], partial[rows], lazy[rows]


def _on_host(views: Sequence[torch.Tensor], lazy: Flags) -> Flags:
    found = np.array([view.is_cpu for view in views], dtype=bool)
    found &= ~np.array([view.is_neg() for view in views], dtype=bool)
    for number in np.flatnonzero(lazy).tolist():
        found[number] &= not views[number].is_conj()
    return found
