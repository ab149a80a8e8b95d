"""Which indices of one dimension a rank holds after a sequence of splits, as runs of consecutive indices.

Two splits exist, both in the sense of `torch.chunk` (pieces of ceil(length / parts), the last ones short or
empty): a plain one, and a strided one that first cuts into `split_factor` blocks, splits each of them, and
joins the pieces of one part. The strided one is how FSDP2 over tensor parallelism divides a dimension (see
`torch.distributed.tensor.placement_types._StridedShard`). Pure: placements and meshes are `mapping.dtensor`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

Run = tuple[int, int]
"""(first index, count)."""


@dataclass(frozen=True, slots=True)
class Split:
    """One split of a dimension: this rank takes part `index` of `parts`; `split_factor` 1 is the plain split."""

    parts: int
    index: int
    split_factor: int = 1


def _chunk(length: int, parts: int, index: int) -> Run:
    piece = -(-length // parts)
    start = min(length, piece * index)
    return start, min(length, start + piece) - start


def _take(runs: list[Run], start: int, count: int) -> list[Run]:
    """The runs that hold positions [start, start + count) of the concatenation of `runs`."""
    taken: list[Run] = []
    position = 0
    for first, length in runs:
        low, high = max(start, position), min(start + count, position + length)
        if low < high:
            taken.append((first + low - position, high - low))
        position += length
    return taken


def _joined(runs: list[Run]) -> list[Run]:
    joined: list[Run] = []
    for first, count in runs:
        if joined and joined[-1][0] + joined[-1][1] == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


def runs_after(length: int, splits: list[Split]) -> list[Run]:
    """Runs of indices of a dimension of `length` that remain after `splits`, in local order."""
    runs: list[Run] = [(0, length)] if length else []
    for split in splits:
        total = sum(count for _, count in runs)
        taken: list[Run] = []
        for block in range(split.split_factor):
            block_start, block_count = _chunk(total, split.split_factor, block)
            start, count = _chunk(block_count, split.parts, split.index)
            taken += _take(runs, block_start + start, count)
        runs = _joined(taken)
    return runs
