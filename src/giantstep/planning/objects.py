"""`plan_objects`: which rank writes which object; are all positions there, and do replicas agree?"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.errors import CoverageError, DisagreementError
from giantstep.planning.description import COPY, MAIN, Description
from giantstep.shards.object_keys import ObjectPosition, position_of, wrapped_tensor
from giantstep.shards.region import Int64s

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ObjectPlan:
    """Objects of the checkpoint.

    Attributes:
        keys: their names, sorted.
        writer: [objects] rank that writes each.
        differs: [objects] whether some rank holds another value than the writer.
    """

    keys: list[str]
    writer: Int64s
    differs: np.ndarray

    def of(self, rank: int) -> list[str]:
        """Names of the objects that a rank writes."""
        return [self.keys[row] for row in np.flatnonzero(self.writer == rank).tolist()]

    def differing(self) -> dict[str, int]:
        """Names of the objects that differ between ranks, with the rank whose value is stored."""
        return {self.keys[row]: int(self.writer[row]) for row in np.flatnonzero(self.differs).tolist()}


def check_wrappers(tensors: Collection[str], objects: Sequence[str]) -> None:
    """Raise `DisagreementError` if a key is a wrapper tensor on some rank and a plain tensor on another."""
    held = set(tensors)
    both = [key for key in map(wrapped_tensor, objects) if key is not None and key in held]
    if both:
        raise DisagreementError(
            f"tensor {both[0]!r} is a wrapper tensor, stored as its parts, and also a plain tensor, on the same rank or on "
            "others. Describe it in one way on all ranks."
        )


def plan_objects(descriptions: Sequence[Description]) -> ObjectPlan:
    """Decide who writes which object: its main replica, or the lowest rank of those that hold it alike.

    Raises:
        CoverageError: a position has no main replica or several, or is missing.
        DisagreementError: ranks say different things of the shape of one grid.
    """
    keys = sorted({key for d in descriptions for key in d.object_keys}, key=lambda key: key.encode("utf-8"))
    number = {key: row for row, key in enumerate(keys)}
    row = np.array([number[key] for d in descriptions for key in d.object_keys], dtype=np.int64)
    rank = np.repeat(np.arange(len(descriptions)), [len(d.object_keys) for d in descriptions])
    role = np.concatenate([np.empty(0, np.uint8), *(d.object_role for d in descriptions)])
    digest = np.concatenate([np.empty((0, 2), np.uint64), *(d.object_digest for d in descriptions)])
    _check_mains(keys, row, rank, role)
    # Writers come first in this order: the main replica, or else the lowest rank.
    order = np.lexsort((rank, role == COPY, row))
    first = order[np.searchsorted(row[order], np.arange(len(keys)))]
    differs = np.zeros(len(keys), dtype=bool)
    differs[row[(digest != digest[first][row]).any(axis=1)]] = True
    _check_grids(keys, rank[first])
    return ObjectPlan(keys, rank[first], differs)


def _check_mains(keys: list[str], row: Int64s, rank: Int64s, role: np.ndarray) -> None:
    mains = np.bincount(row[role == MAIN], minlength=len(keys))
    for problem, wrong in (
        ("has several main replicas", mains > 1),
        (
            "has no main replica",
            (mains == 0) & (np.bincount(row[role == COPY], minlength=len(keys)) > 0),
        ),
    ):
        rows = np.flatnonzero(wrong)
        if len(rows):
            chosen = (row == rows[0]) & ((role == MAIN) if mains[rows[0]] else (role == COPY))
            more = f" {len(rows) - 1} more like this." if len(rows) > 1 else ""
            raise CoverageError(
                f"object {keys[int(rows[0])]!r} {problem}: it is held by rank {_listed(rank[chosen].tolist())}. Exactly one "
                f"holder of each position must have replica_id 0.{more}"
            )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:20])) + (" ..." if len(ranks) > 20 else "")


def _check_grids(keys: list[str], writer: Int64s) -> None:
    """Every position of every grid of objects is there."""
    grids: dict[str, dict[tuple[int, ...], list[tuple[ObjectPosition, int]]]] = {}
    for key, rank in zip(keys, writer.tolist(), strict=True):
        position = position_of(key)
        if position is not None:
            grids.setdefault(position.key, {}).setdefault(position.shape, []).append((position, rank))
    for key, shapes in grids.items():
        if len(shapes) > 1:
            told = [f"{shape} on rank {held[0][1]}" for shape, held in list(shapes.items())[:_SHOWN]]
            raise DisagreementError(f"object {key!r} has different global shapes: {', '.join(told)}. Give one on all ranks.")
        (shape, held), *_ = shapes.items()
        total = int(np.prod(shape, dtype=object))
        if len(held) < total:
            missing = list(itertools.islice(_absent(shape, {position.offset for position, _ in held}), _SHOWN))
            more = total - len(held) - len(missing)
            raise CoverageError(
                f"object {key!r} with global shape {shape}: no rank saves position {', '.join(map(str, missing))}"
                + (f" and {more} more" if more else "")
                + ". Every position must be held by a rank with replica_id 0."
            )


def _absent(shape: tuple[int, ...], held: set[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    return (offset for offset in itertools.product(*(range(count) for count in shape)) if offset not in held)
