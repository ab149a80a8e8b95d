"""Flat ranges as regions: consecutive elements of a row-major box, written as few boxes.

ZeRO and FSDP1 give each rank a range of the *flattened* local tensor. Everything after `mapping` knows only
regions, so a range is cut into at most 2n-1 boxes of an n-d tensor, each consecutive in memory: an
incomplete leading row, whole rows, an incomplete trailing row, in every dimension. Pure integer work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from giantstep.errors import BadArgumentError
from giantstep.shards.region import Region


def flat_range_to_regions(shape: Sequence[int], start: int, stop: int) -> list[tuple[int, Region]]:
    """Boxes that partition elements [start, stop) of a row-major tensor of `shape`.

    Returns:
        (position, box) pairs in order: the box's elements are positions `position ...` of the flattened
        tensor, consecutively, so its data are `flat[position - start :][: box.elements]`.

    Raises:
        BadArgumentError: the range is not inside the flattened tensor.
    """
    total = math.prod(shape)
    if not 0 <= start <= stop <= total:
        raise BadArgumentError(
            f"flattened range {start}:{stop} does not lie in a tensor of shape {tuple(shape)} with {total} elements"
        )
    return _boxes(tuple(shape), start, stop, 0) if start < stop else []


def _boxes(shape: tuple[int, ...], start: int, stop: int, position: int) -> list[tuple[int, Region]]:
    if not shape:
        return [(position, Region((), ()))]
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        return _prefixed(first, _boxes(shape[1:], head, tail, position + first * row))
    result: list[tuple[int, Region]] = []
    if head:
        result += _prefixed(first, _boxes(shape[1:], head, row, position + first * row))
        first += 1
    if first < last:
        result.append((position + first * row, Region((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))))
    if tail:
        result += _prefixed(last, _boxes(shape[1:], 0, tail, position + last * row))
    return result


def _prefixed(index: int, boxes: list[tuple[int, Region]]) -> list[tuple[int, Region]]:
    return [(position, Region((index, *box.offset), (1, *box.size))) for position, box in boxes]
