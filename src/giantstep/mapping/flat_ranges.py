"""What ranks hold of a tensor in words of flat ranges: says which range is missing or doubled when a save cannot be planned.

Regions are all that the planner knows; a flat range that is missing is to it a few boxes. Called by `save` once the
planner has refused.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence

from giantstep.mapping.leaves import TensorLeaf
from giantstep.mapping.replica import is_main_replica
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.shards.region import Region

_SHOWN = 10


def flat_shards(leaves: Sequence[TensorLeaf], key: str) -> bytes:
    """The main shards that this rank holds of a tensor: box and flat range of it, as JSON."""
    found = []
    for leaf in leaves:
        shard = leaf.source
        if leaf.key != key or not isinstance(shard, ShardedTensor) or not is_main_replica(shard.replica_id):
            continue
        box, flat = shard.region(), shard.flattened_range
        span = (flat.start, flat.stop) if flat is not None else (0, box.elements)
        found.append([box.offset, box.size, span, flat is not None])
    return json.dumps(found).encode("ascii")


def describe_flat(key: str, reports: Sequence[bytes]) -> str:
    """From each rank's `flat_shards` to a sentence on missing and doubled ranges; empty if no shard is flattened."""
    held: dict[Region, list[tuple[int, int, int]]] = defaultdict(list)
    flattened = False
    for rank, report in enumerate(reports):
        for offset, size, (start, stop), flat in json.loads(report):
            flattened = flattened or flat
            if start < stop:
                held[Region(tuple(offset), tuple(size))].append((start, stop, rank))
    if not flattened:
        return ""
    problems = []
    for box in sorted(held, key=lambda region: region.offset):
        missing, doubled = _gaps_and_overlaps(held[box], math.prod(box.size))
        if missing or doubled:
            parts = [f"elements {low}:{high} are held by no rank" for low, high in missing[:_SHOWN]]
            parts += [f"elements {low}:{high} by ranks {a} and {b}" for low, high, a, b in doubled[:_SHOWN]]
            problems.append(f"of the flattened shard {box} ({math.prod(box.size)} elements), " + ", ".join(parts))
    if not problems:
        return ""
    more = f" {len(problems) - _SHOWN} more shards are like this." if len(problems) > _SHOWN else ""
    return f" Flat ranges of tensor {key!r}: " + "; ".join(problems[:_SHOWN]) + "." + more


def _gaps_and_overlaps(
    ranges: list[tuple[int, int, int]], total: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int, int, int]]]:
    """Ranges of [0, total) that none of (start, stop, rank) covers, and those that two do, with their ranks."""
    missing, doubled = [], []
    reached, holder = 0, -1
    for start, stop, rank in sorted(ranges):
        if start > reached:
            missing.append((reached, start))
        elif start < reached:
            doubled.append((start, min(stop, reached), holder, rank))
        if stop > reached:
            reached, holder = stop, rank
    if reached < total:
        missing.append((reached, total))
    return missing, doubled
