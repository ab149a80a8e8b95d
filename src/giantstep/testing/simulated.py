"""`check_coverage`: whether the state dicts of simulated ranks fit together, planned as `save` plans them; nothing is written.

For tests of layouts: one process makes the state dict of every rank, with values or without (meta). Who holds what is
drawn by `drawing`; `roundtrip` saves and loads for real. Called by users' tests.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import CoverageError, DisagreementError
from giantstep.mapping.describe import Described
from giantstep.mapping.differences import describe_differences, fingerprints
from giantstep.mapping.flat_ranges import describe_flat, flat_shards
from giantstep.mapping.leaves import TensorLeaf
from giantstep.options import SaveOptions
from giantstep.planning.description import COPY, Description
from giantstep.planning.save_plan import SavePlan, plan_save
from giantstep.reports import size_text
from giantstep.shards.object_keys import COMMON_KEY
from giantstep.testing.states import States, compare_declared, counted, describe_states, descriptions_of, failing
from giantstep.writers import Balanced, Caller

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Coverage:
    """What saving the states would store and who would write it. That there is one means: every tensor is covered once.

    Attributes:
        tensors, objects: stored by all ranks together, as in `SaveReport`.
        shards: what the ranks hold of the tensors, empty shards left out: one per rank and leaf.
        replicas: how many of the shards repeat the regions of another.
        bytes_by_rank: payload that each rank would write, as `SaveReport.bytes_written`.
        differences: objects that are meant to be equal but are not (common state, replicas of a `ShardedObject`), with
            paths and ranks, in the words of the warning that `save` logs; empty if there are none.
        uncompared: keys of tensors with replicas that could not be compared, because some have no values.
    """

    tensors: int
    objects: int
    shards: int
    replicas: int
    bytes_by_rank: tuple[int, ...]
    differences: str
    uncompared: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Payload of the checkpoint."""
        return sum(self.bytes_by_rank)

    @property
    def imbalance(self) -> float:
        """Bytes of the rank that writes most, as a multiple of the mean; 1.0 is the best there is."""
        return max(self.bytes_by_rank) * len(self.bytes_by_rank) / self.bytes if self.bytes else 1.0

    def __str__(self) -> str:
        most = int(np.argmax(self.bytes_by_rank))
        ranks, tensors = counted(len(self.bytes_by_rank), "rank"), counted(self.tensors, "tensor")
        shards, repeated = counted(self.shards, "shard"), counted(self.replicas, "replica")
        lines = [
            f"{tensors} on {ranks}, each covered once: {shards}, {repeated} among them",
            f"  {counted(self.objects, 'object')}, {size_text(self.bytes)} in all",
            f"  most on rank {most}: {size_text(self.bytes_by_rank[most])}, {self.imbalance:.2f} x the mean",
        ]
        if self.uncompared:
            names = ", ".join(self.uncompared[:_SHOWN]) + (" ..." if len(self.uncompared) > _SHOWN else "")
            lines.append(f"  replicas not compared, since some have no values: {len(self.uncompared)}: {names}")
        return "\n".join([*lines, f"  {self.differences}"] if self.differences else lines)


def check_coverage(states: States, *, options: SaveOptions | None = None) -> Coverage:
    """Say whether the states of all ranks fit together, without saving them.

        rows = [
            {"w": gs.ShardedTensor.from_rank_offsets("w", torch.ones(2, 4), (0, rank, 3))} for rank in range(3)
        ]
        assert check_coverage(rows).imbalance == 1.0

    They are described and planned exactly as `save` does it. Beyond that, shards of the same region that their
    `replica_id` declares to be equal are compared, which `save` takes on trust.

    States may be without values (meta tensors, ShardedTensors whose data are None), so that the layout of a model is
    checked that fits in no memory. Replicas without values cannot be compared (see `Coverage.uncompared`), and tied
    tensors without values count as separate ones.

    Args:
        states: by rank, as each rank would give it to `save`; only read. Of DTensors each process knows only its own
            shard: describe those of simulated ranks with `ShardedTensor`.
        options: as for `save`; `split_bytes` and `max_file_bytes` decide who writes what.

    Raises:
        BadArgumentError, UnsupportedTypeError: something cannot be saved; names rank and path or key.
        CoverageError: a gap, an overlap or a doubled main replica; with flat ranges where shards are flattened.
        DisagreementError: ranks mean different things by one key, or replicas hold different values.
    """
    options = options if options is not None else SaveOptions()
    described = describe_states(states)
    object_bytes = [_object_bytes(found, rank) for rank, found in enumerate(described)]
    with failing("plan"):
        descriptions = descriptions_of(described, options.buffer_bytes)
        sizes = [_written_bytes(found, object_bytes[rank]) for rank, found in enumerate(described)]
        descriptions = [replace(found, object_bytes=size) for found, size in zip(descriptions, sizes, strict=True)]
        plan = _planned(described, descriptions, options)
        uncompared = compare_declared(described, options.buffer_bytes)
    with failing("describe"):
        differences = _differences(described, plan, options)
    written = np.zeros(len(states), dtype=np.int64)
    np.add.at(written, plan.writer, plan.bytes)
    stored = list(zip(plan.objects.keys, plan.objects.writer.tolist(), strict=True))
    for name, rank in stored:
        written[rank] += object_bytes[rank][name]
    shards = [_shard(leaf) for found in described for leaf in found.leaves if any(region.elements for region, _ in leaf.pieces)]
    return Coverage(
        tensors=len(plan.keys),
        objects=sum(object_bytes[rank][name] > 0 for name, rank in stored),
        shards=len(shards),
        replicas=len(shards) - len(set(shards)),
        bytes_by_rank=tuple(written.tolist()),
        differences=differences,
        uncompared=tuple(sorted(uncompared)),
    )


def _object_bytes(described: Described, rank: int) -> dict[str, int]:
    """Stored size of the objects of a rank, by name; 0 for a common state without anything in it."""
    with failing("describe", rank):
        return {
            name: 0 if name == COMMON_KEY and item.value == {} else len(OBJECT_CODEC.encode(item.value, item.path))
            for name, item in described.stored.items()
        }


def _written_bytes(described: Described, object_bytes: dict[str, int]) -> np.ndarray:
    """What the planner is told of the sizes of a rank's objects: as `save`, of those alone that it may write."""
    return np.array([object_bytes[name] if item.role != COPY else 0 for name, item in described.stored.items()], dtype=np.int64)


def _cells(ranks: int, options: SaveOptions) -> np.ndarray:
    """By rank, the number of its cell."""
    policy = options.writers if options.writers is not None else Balanced()
    names: dict[str, int] = {}
    return np.array([names.setdefault(policy.cell(Caller(rank, ranks)), len(names)) for rank in range(ranks)], dtype=np.int64)


def _planned(described: Sequence[Described], descriptions: Sequence[Description], options: SaveOptions) -> SavePlan:
    # As `save`: a file holds at least one chunk beside its header.
    max_chunk_bytes = max(1, options.max_file_bytes - (64 << 10))
    try:
        return plan_save(
            descriptions,
            split_bytes=options.split_bytes,
            max_chunk_bytes=max_chunk_bytes,
            cells=_cells(len(descriptions), options),
        )
    except CoverageError as error:
        key = error.tensor_key
        if key is None:
            raise
        refusal = CoverageError(error.message + describe_flat(key, [flat_shards(found.leaves, key) for found in described]))
        refusal.tensor_key = key
        raise refusal from error


def _differences(described: Sequence[Described], plan: SavePlan, options: SaveOptions) -> str:
    differing = plan.objects.differing()
    if not differing:
        return ""
    reports = [fingerprints(found.stored, list(differing), OBJECT_CODEC) for found in described]
    message = describe_differences(reports, differing)
    held = [(name, found.stored[name]) for found in described for name in differing if name in found.stored]
    shared = any(name != COMMON_KEY and item.is_shared for name, item in held)
    if shared or options.on_object_difference == "raise":
        raise DisagreementError(message + ". Make them equal, or give each rank a ShardedObject position of its own.")
    return message


def _shard(leaf: TensorLeaf) -> Hashable:
    """Equal for shards of the same regions of one tensor."""
    return leaf.key, frozenset(region for region, _ in leaf.pieces if region.elements)
