"""How one axis of a local tensor is put together: cut, a span, several fused widths, query-key-value heads.

Each layout says, given the length of the local axis, of which runs of the stored axis it consists. Pure. Public as names of
`giantstep.fused`; called by it and by `giantstep.experts`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, Protocol

from giantstep.errors import BadArgumentError
from giantstep.shards.arrangement import Axis, Run


class AxisLayout(Protocol):
    """How an axis is put together."""

    def axis(self, length: int, what: str) -> Axis:
        """The axis of a local tensor with `length` elements along it.

        Raises:
            BadArgumentError: there is no such axis; begins with `what`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Cut:
    """Part `index` of `parts` equal ones: tensor parallelism of a weight that is not fused."""

    index: int
    parts: int

    def axis(self, length: int, what: str) -> Axis:
        _check_index(self.index, self.parts, what)
        return Axis((Run(self.index * length, length),), (self.parts * length,))


@dataclass(frozen=True, slots=True)
class Span:
    """From `start` on, of a global axis of `length`: parts of different sizes."""

    start: int
    length: int

    def axis(self, length: int, what: str) -> Axis:
        if not 0 <= self.start <= self.start + length <= self.length:
            raise BadArgumentError(
                f"{what}: {length} local elements from {self.start} on do not lie in a global axis of {self.length}"
            )
        return Axis((Run(self.start, length),), (self.length,))


@dataclass(frozen=True, slots=True)
class Fused:
    """Several widths one after another, each cut into `parts` equal ones, of which the rank holds part `index` of each.

    Attributes:
        widths: global ones, of all ranks together.
        index, parts: of the cut.
        names: None to store one tensor, with the widths one after another as without a cut; or a name for each width, which
            are then stored as tensors of their own.
    """

    widths: tuple[int, ...]
    index: int = 0
    parts: int = 1
    names: tuple[str, ...] | None = None

    def axis(self, length: int, what: str) -> Axis:
        _check_index(self.index, self.parts, what)
        widths = tuple(self.widths)
        if not widths or any(width < 0 or width % self.parts for width in widths):
            raise BadArgumentError(f"{what}: widths {widths} must each be divisible by the {self.parts} parts of the cut")
        if sum(widths) != length * self.parts:
            raise BadArgumentError(
                f"{what}: {self.parts} parts of widths {widths} have {sum(widths) // self.parts} elements each, but there are "
                f"{length} locally. Widths are those of all ranks together."
            )
        held = [(width // self.parts * self.index, width // self.parts) for width in widths]
        if self.names is None:
            before = itertools.accumulate(widths, initial=0)
            return Axis(
                tuple(Run(first + start, count) for first, (start, count) in zip(before, held, strict=False)), (sum(widths),)
            )
        _check_names(self.names, len(widths), what)
        return Axis(tuple(Run(start, count, n) for n, (start, count) in enumerate(held)), widths, tuple(self.names))


@dataclass(frozen=True, slots=True)
class Gated:
    """Two equal halves, gate and up, each cut: `Fused` with widths that follow from the local tensor."""

    index: int = 0
    parts: int = 1

    def axis(self, length: int, what: str) -> Axis:
        if length % 2:
            raise BadArgumentError(f"{what}: {length} local elements cannot be gate and up, which are equally many")
        _check_index(self.index, self.parts, what)
        half = length // 2 * self.parts
        return Fused((half, half), self.index, self.parts).axis(length, what)


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention layer on all ranks together, and how they lie in the fused projection.

    Attributes:
        query: number of query heads.
        groups: number of key heads, and of value heads: each serves `query / groups` query heads. Equal to `query` where
            every query head has its own.
        size: elements per query and key head.
        value_size: elements per value head; None if they are as long.
        order: "grouped": group by group its query heads, its key head, its value head, as Megatron has it. "blocks": all
            query heads, all key heads, all value heads, as most other code has it. On every rank, of those it holds.
    """

    query: int
    groups: int
    size: int
    value_size: int | None = None
    order: Literal["grouped", "blocks"] = "grouped"

    def __post_init__(self) -> None:
        sizes = (self.query, self.groups, self.size, self.size if self.value_size is None else self.value_size)
        if any(not isinstance(size, int) or size < 1 for size in sizes) or self.query % self.groups:
            raise BadArgumentError(
                f"{self}: numbers of heads and their sizes must be positive, and query heads a multiple of the groups"
            )
        if self.order not in ("grouped", "blocks"):
            raise BadArgumentError(f"{self}: order must be 'grouped' or 'blocks'")

    @property
    def value_elements(self) -> int:
        """Elements per value head."""
        return self.size if self.value_size is None else self.value_size


@dataclass(frozen=True, slots=True)
class FusedHeads:
    """Queries, keys and values in one axis, cut by groups; stored as three tensors.

    With fewer groups than parts, key and value heads are copied: `parts / groups` neighbouring ranks hold the same
    ones, the first of them as main replica.

    Attributes:
        heads: of the layer.
        index, parts: of the cut.
        names: of the stored tensors.
    """

    heads: Heads
    index: int = 0
    parts: int = 1
    names: tuple[str, str, str] = ("q", "k", "v")

    def axis(self, length: int, what: str) -> Axis:
        _check_index(self.index, self.parts, what)
        _check_names(self.names, 3, what)
        heads = self.heads
        if heads.query % self.parts or (heads.groups % self.parts and self.parts % heads.groups):
            raise BadArgumentError(
                f"{what}: {heads.query} query heads in {heads.groups} groups cannot be divided among {self.parts} ranks: query "
                "heads must be a multiple of the ranks, and groups a multiple or a divisor of them"
            )
        lengths = (heads.query * heads.size, heads.groups * heads.size, heads.groups * heads.value_elements)
        runs = self._grouped() if heads.order == "grouped" else sorted(self._grouped(), key=lambda run: run.tensor)
        axis = Axis(tuple(runs), lengths, tuple(self.names))
        if axis.local_length != length:
            raise BadArgumentError(
                f"{what}: {heads} on {self.parts} ranks have {axis.local_length} elements each, but there are {length} locally"
            )
        return axis

    def _grouped(self) -> list[Run]:
        """What the rank holds, group by group."""
        heads = self.heads
        copies = max(1, self.parts // heads.groups)
        groups = max(1, heads.groups // self.parts)
        first = self.index // copies * groups
        queries = heads.query // self.parts // groups
        found = []
        for n in range(groups):
            query, group = self.index * groups * queries + n * queries, first + n
            found.append(Run(query * heads.size, queries * heads.size))
            found.append(Run(group * heads.size, heads.size, 1, self.index % copies))
            found.append(Run(group * heads.value_elements, heads.value_elements, 2, self.index % copies))
        return found


def _check_index(index: int, parts: int, what: str) -> None:
    if not 0 <= index < parts:
        raise BadArgumentError(f"{what}: index {index} must be from 0 to {parts - 1}, of {parts} parts")


def _check_names(names: tuple[str, ...], count: int, what: str) -> None:
    if len(names) != count or len(set(names)) != count or not all(isinstance(name, str) and name for name in names):
        raise BadArgumentError(f"{what}: names {tuple(names)} must be {count} different names, none empty")
