"""Which regions that are filled on load share memory with others. Called by `filling`."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.overlap import disjoint, span_of
from giantstep.shards.region import Int64s
from giantstep.targets import Target, Targets

_MOST_TESTS = 20_000


def meeting(targets: Targets, made: Sequence[torch.Tensor]) -> list[int]:
    """Which targets reach over memory that others, or `made` tensors with elements, reach over too; judged by spans."""
    start, size = targets.address, targets.bytes.copy()
    for number in np.flatnonzero(~targets.contiguous).tolist():
        _, low, high = span_of(targets.views[number])
        # Memory begins at the first element: strides are not negative.
        size[number] = high - low
    if made:
        spans = [span_of(view) for view in made]
        start = np.concatenate((start, [low for _, low, _ in spans]))
        size = np.concatenate((size, [high - low for _, low, high in spans]))
    device = _devices(targets, made)
    if bool((device[1:] == device[:-1]).all()) and bool((start[1:] >= start[:-1] + size[:-1]).all()):
        # In the order of their memory already, and apart.
        return []
    order = np.lexsort((start, device))
    device, start = device[order], start[order]
    stop = start + size[order]
    meets = np.zeros(len(order) + 1, dtype=bool)
    for number in range(int(device.max(initial=-1)) + 1):
        low, high = np.searchsorted(device, (number, number + 1)).tolist()
        meets[low + 1 : high] = start[low + 1 : high] < np.maximum.accumulate(stop[low:high])[:-1]
    near = np.sort(order[meets[:-1] | meets[1:]])
    found: list[int] = near[near < len(targets)].tolist()
    return found


def _devices(targets: Targets, made: Sequence[torch.Tensor]) -> Int64s:
    """Numbers of the devices on which the memory lies."""
    if targets.on_host.all() and not made:
        return np.zeros(len(targets), dtype=np.int64)
    numbers: dict[torch.device, int] = {}
    found = [numbers.setdefault(view.device, len(numbers)) for view in (*targets.views, *made)]
    return np.array(found, dtype=np.int64)


def overlapping(filled: Sequence[Target], made: Sequence[torch.Tensor]) -> list[Target]:
    """Targets whose memory overlaps that of others, or may, without being the same.

    Args:
        filled: those that meet others.
        made: tensors that are made by dequantising.

    Raises:
        BadArgumentError: one of the latter overlaps something.
    """
    # None stands for the memory of a dequantised tensor, of which nothing is stored to compare it with.
    owners: list[Target | None] = [*filled, *([None] * len(made))]
    views = [*(target.view for target in filled), *made]
    spans = [(*span_of(view), view, owner) for view, owner in zip(views, owners, strict=True)]
    spans.sort(key=lambda span: span[:3])
    found: list[Target | None] = []
    # Spans that reach beyond where the present one begins, the first to end on top.
    active: list[tuple[tuple[tuple[str, int], int], int]] = []
    tests = 0
    for place, (device, start, stop, view, owner) in enumerate(spans):
        while active and active[0][0] <= (device, start):
            heapq.heappop(active)
        # If very many reach over each other, to look at all pairs takes longer than to read all of them twice.
        exhausted = tests > _MOST_TESTS
        pairs = [other for _, other in active if exhausted or not disjoint(spans[other][3], view)]
        tests += len(active)
        if pairs:
            found += [spans[other][4] for other in pairs] + [owner]
        heapq.heappush(active, ((device, stop), place))
        if exhausted:
            active = [max(active)]
    if None in found:
        raise BadArgumentError(
            "two tensors of the state dict share memory, or may, and one of them is to be dequantised from another stored "
            "tensor. Load them into memory of their own."
        )
    return [target for target in found if target is not None]
