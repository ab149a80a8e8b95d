"""`plan_objects`: which rank writes which object; are all positions there, and do replicas agree?"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import CoverageError, DisagreementError
from giantstep.planning.description import COPY, MAIN, OBJECT_COLUMNS, Description
from giantstep.planning.local_names import local_name_hint
from giantstep.planning.shard_table import classes_of
from giantstep.shards.object_keys import ObjectPosition, position_of, wrapped_tensor
from giantstep.shards.region import Int64s

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ObjectPlan:
    """Objects of the checkpoint.

    Attributes:
        keys: their names, sorted.
        writer: [objects] rank that writes each.
        holders: [objects] number of ranks that hold it.
        bytes: [objects] size of the writer's value.
        differs: [objects] whether some rank holds another value than the writer.
    """

    keys: list[str]
    writer: Int64s
    holders: Int64s
    bytes: Int64s
    differs: NDArray[np.bool_]

    def by_writer(self) -> dict[int, list[str]]:
        """Names of the objects that each rank writes, for ranks that write any."""
        found: dict[int, list[str]] = {}
        for key, rank in zip(self.keys, self.writer.tolist(), strict=True):
            found.setdefault(rank, []).append(key)
        return found

    def weights(self, descriptions: Sequence[Description]) -> list[Int64s]:
        """By rank, and per object of its description: the others that hold it for the writer, -1 for those others.

        0 where nobody else holds it or values are known to differ. So digests, multiplied with these, add up to 0 over
        all ranks as long as all who hold an object hold the same value.
        """
        number = {key: row for row, key in enumerate(self.keys)}
        others = np.where(self.differs, 0, self.holders - 1)
        rows: dict[int, Int64s] = {}
        copies: dict[int, Int64s] = {}
        writers = set(self.writer.tolist())
        found = []
        for rank, description in enumerate(descriptions):
            name = id(description.object_keys)
            if name not in rows:
                rows[name] = np.array([number[key] for key in description.object_keys], dtype=np.int64)
                copies[name] = -(others[rows[name]] > 0).astype(np.int64)
            if rank in writers:
                found.append(np.where(self.writer[rows[name]] == rank, others[rows[name]], copies[name]))
            else:
                found.append(copies[name])
        return found

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
    different, ranks = classes_of(descriptions, OBJECT_COLUMNS)
    lists = {id(d.object_keys): d.object_keys for d in different}
    keys = sorted(set().union(*lists.values()), key=lambda key: key.encode("utf-8"))
    number = {key: row for row, key in enumerate(keys)}
    rows = {name: np.array([number[key] for key in found], dtype=np.int64) for name, found in lists.items()}
    row = np.concatenate([rows[id(d.object_keys)] for d in different])
    member = np.repeat(np.arange(len(different)), [len(d.object_keys) for d in different])
    role = np.concatenate([d.object_role for d in different])
    digest = np.concatenate([d.object_digest.reshape(-1, 2) for d in different])
    _check_mains(keys, row, member, role, ranks)
    # Writers come first in this order: the main replica, or else the lowest rank.
    first_rank = np.array([int(found[0]) for found in ranks], dtype=np.int64)[member]
    order = np.lexsort((first_rank, role == COPY, row))
    first = order[np.searchsorted(row[order], np.arange(len(keys)))]
    differs = np.zeros(len(keys), dtype=bool)
    differs[row[(digest != digest[first][row]).any(axis=1)]] = True
    holders = np.bincount(row, _sizes(ranks)[member], minlength=len(keys)).astype(np.int64)
    _check_grids(keys, first_rank[first])
    sizes = np.concatenate([d.object_bytes for d in different])
    return ObjectPlan(keys, first_rank[first], holders, sizes[first], differs)


def _sizes(ranks: Sequence[Int64s]) -> Int64s:
    return np.array([len(found) for found in ranks], dtype=np.int64)


def _check_mains(keys: list[str], row: Int64s, member: Int64s, role: NDArray[np.uint8], ranks: Sequence[Int64s]) -> None:
    mains = np.bincount(row[role == MAIN], _sizes(ranks)[member[role == MAIN]], minlength=len(keys))
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
            held = sorted(rank for group in member[chosen].tolist() for rank in ranks[group].tolist())
            more = f" {len(rows) - 1} more like this." if len(rows) > 1 else ""
            raise CoverageError(
                f"object {keys[int(rows[0])]!r} {problem}: it is held by rank {_listed(held)}. Exactly one "
                f"holder of each position must have replica_id 0.{more}"
                + (local_name_hint(keys[int(rows[0])].partition("/")[0]) if mains[rows[0]] else "")
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
