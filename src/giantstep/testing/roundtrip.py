"""`round_trip`: save the states of N simulated ranks, load them into those of M, and compare every element. For tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from giantstep.errors import BadArgumentError, GiantstepError
from giantstep.group.threads import ThreadGroup
from giantstep.loading import load
from giantstep.mapping.describe import Described
from giantstep.options import MIB, LoadOptions, SaveOptions, StrictHandling
from giantstep.reports import LoadedState
from giantstep.saving import save
from giantstep.storage.locate import StoreLike
from giantstep.storage.memory import MemoryStore
from giantstep.testing.checking import Loaded, Saved, check_loaded
from giantstep.testing.comparing import integers_of
from giantstep.testing.ranks import RanksFailedError, run_ranks_collecting
from giantstep.testing.simulated import check_coverage
from giantstep.testing.states import States, describe_states

Result = TypeVar("Result")

_NUMBERS = itertools.count()
_PATTERN = 0xA5


def round_trip(
    states: States,
    targets: States,
    *,
    path: StoreLike | None = None,
    strict: StrictHandling = StrictHandling.RAISE_ALL,
    save_options: SaveOptions | None = None,
    load_options: LoadOptions | None = None,
) -> list[LoadedState]:
    """Save the states of N ranks and load them into the states of M ranks, in this process; check that all came back.

        rows = [{"w": gs.ShardedTensor.from_rank_offsets("w", torch.rand(2, 4), (0, n, 2))} for n in range(2)]
        columns = [{"w": gs.ShardedTensor.from_rank_offsets("w", torch.empty(4, 1), (1, n, 4))} for n in range(4)]
        round_trip(rows, columns)

    Compared to the bit: every element of every target's tensors with the global tensor that the shards of `states` make
    up (with zero where `allow_shape_mismatch` lets the target be larger), sharded objects, and the common state, but for
    what objects with `load_state_dict` keep of it. Of a factory, what `build_fn` makes of the merged tensor is compared.

    The targets' tensors are overwritten in place, first with a pattern, so that one that is never filled is found. They
    may share memory with `states`. The global tensors are in memory once beside both.

    Args:
        states, targets: by rank, as for `save` and for `load`; at least one each.
        path: where to save; default: in memory, forgotten afterwards.
        strict: as for `load`. Keys that it lets pass are not compared.
        save_options, load_options: as for `save` and `load`; default: small buffers and few threads.

    Returns:
        What `load` returned, by rank.

    Raises:
        RoundTripError: something came back otherwise; names rank, key, and first index of the global tensor.
        GiantstepError: as `check_coverage`, `save` and `load` raise it.
        RanksFailedError: ranks failed in different ways.
    """
    saving = save_options if save_options is not None else SaveOptions(writer_threads=1, buffer_bytes=MIB)
    loading = load_options if load_options is not None else LoadOptions(reader_threads=1, buffer_bytes=MIB)
    if loading.dequantise:
        raise BadArgumentError("dequantise=True loads other values than were saved, so there is nothing to compare: use False")
    check_coverage(states, options=saving)
    trip = _Trip(states, targets, strict, saving, loading)
    if path is not None:
        return trip.through(path)
    memory = MemoryStore(f"round-trip-{next(_NUMBERS)}")
    try:
        return trip.through(memory)
    finally:
        memory.clear()


@dataclass(frozen=True, slots=True)
class _Trip:
    """What is saved and loaded, and how; see `round_trip`."""

    states: States
    targets: States
    strict: StrictHandling
    saving: SaveOptions
    loading: LoadOptions

    def through(self, path: StoreLike) -> list[LoadedState]:
        """Save, load and compare."""
        saved = Saved.of(describe_states(self.states, need_values=True))
        before = describe_states(self.targets, for_load=True)
        _on_ranks(len(self.states), lambda group: self._save(path, group))
        _overwrite(before, saved, self.loading)
        loaded = _on_ranks(len(self.targets), lambda group: self._load(path, group))
        for rank, state in enumerate(loaded):
            check_loaded(Loaded(rank, self.targets[rank], before[rank], state, self.loading), saved)
        return loaded

    def _save(self, path: StoreLike, group: ThreadGroup) -> None:
        save(self.states[group.rank], path, process_group=group, options=self.saving)

    def _load(self, path: StoreLike, group: ThreadGroup) -> LoadedState:
        return load(self.targets[group.rank], path, strict=self.strict, process_group=group, options=self.loading)


def _on_ranks(size: int, function: Callable[[ThreadGroup], Result]) -> list[Result]:
    """Results by rank; an error of ours that all ranks share is raised as it is."""
    results, errors = run_ranks_collecting(size, function)
    raised = [error for error in errors if error is not None]
    if not raised:
        return results  # type: ignore[return-value]
    shared = len(raised) == size and len({(type(error), str(error)) for error in raised}) == 1
    if shared and isinstance(raised[0], GiantstepError):
        raise raised[0]
    raise RanksFailedError(errors) from raised[0]


def _overwrite(targets: Sequence[Described], saved: Saved, options: LoadOptions) -> None:
    """Fill what is to be loaded with a pattern."""
    for leaf in (leaf for described in targets for leaf in described.leaves):
        if options.stored_key(leaf.key) not in saved.tensors:
            continue
        for _, view in leaf.pieces:
            if view is None:
                continue
            if view.is_conj() or view.is_neg():
                # Lazily conjugated memory cannot be seen as integers.
                view.fill_(_PATTERN)
            else:
                integers = integers_of(view)
                pattern = bytes([_PATTERN]) * integers.element_size()
                integers.fill_(int.from_bytes(pattern, "little", signed=integers.dtype != torch.uint8))
