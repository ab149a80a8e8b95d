"""The tree over which reports travel to rank 0 and answers back: who passes on whose.

Pure. With `fanout` F, the parent of a rank is the rank with its lowest non-zero digit to base F cleared. So a rank speaks
for a range of consecutive ranks, and with F ranks per host the first level stays within hosts. Called by `torch_group.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tree:
    """Ranks 0 to `size` - 1 as a tree with rank 0 at its root.

    Attributes:
        size: number of ranks.
        fanout: at least 2; a rank has at most `fanout` - 1 children per level below it.
    """

    size: int
    fanout: int

    def parent(self, rank: int) -> int:
        """Whom a rank other than 0 reports to."""
        return rank - rank % (self._stride(rank) * self.fanout)

    def children(self, rank: int) -> list[int]:
        """Who report to a rank, in ascending order."""
        found: list[int] = []
        stride, end = 1, self.span(rank).stop
        while rank + stride < end:
            found += range(rank + stride, min(end, rank + stride * self.fanout), stride)
            stride *= self.fanout
        return found

    def span(self, rank: int) -> range:
        """The ranks that a rank speaks for: itself and all below it."""
        return range(self.size) if rank == 0 else range(rank, min(self.size, rank + self._stride(rank)))

    def _stride(self, rank: int) -> int:
        """Value of the position of the lowest non-zero digit."""
        stride = 1
        while rank % (stride * self.fanout) == 0:
            stride *= self.fanout
        return stride
