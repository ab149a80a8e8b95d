"""An exchange in which something goes wrong on one rank: all ranks raise the same error, in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import giantstep as gs
from counting_store import CountingStore, counting_store
from giantstep.errors import CorruptionError, GiantstepError, PeerFailureError, PhaseTimeoutError, StoreError
from giantstep.group.base import Parcel
from giantstep.group.threads import ThreadGroup
from giantstep.storage.memory import _MEDIA
from giantstep.testing.ranks import run_ranks_collecting

BLOCK, RANKS, COUNT = 4096, 4, 1 << 18


@pytest.fixture
def store() -> Iterator[CountingStore]:
    with counting_store() as found:

        def save(group: ThreadGroup) -> None:
            half = COUNT // 2
            data = torch.arange(half, dtype=torch.int64) + half * group.rank
            state = {"big": gs.ShardedTensor.from_rank_offsets("big", data, (0, group.rank, 2)), "small": torch.arange(100)}
            gs.save(state, found, process_group=group, options=gs.SaveOptions(block_bytes=BLOCK, buffer_bytes=BLOCK))

        run_ranks_collecting(2, save)
        yield found


def load(
    store: CountingStore, wrap: Callable[[ThreadGroup], Any] = lambda group: group, **settings: Any
) -> list[BaseException | None]:
    """Load everything on all ranks in rounds of 64 KiB per reader; what each raised."""

    def rank(group: ThreadGroup) -> None:
        state = {"big": torch.zeros(COUNT, dtype=torch.int64), "small": torch.zeros(100, dtype=torch.int64)}
        options = gs.LoadOptions(**{"exchange": range(RANKS), "buffer_bytes": 1 << 16, "timeout_secs": 30.0, **settings})
        gs.load(state, store, process_group=wrap(group), options=options)

    return run_ranks_collecting(RANKS, rank)[1]


def same_everywhere(errors: list[BaseException | None], but: Sequence[int] = ()) -> GiantstepError:
    """The error that all ranks raised, some left out."""
    found = [error for rank, error in enumerate(errors) if rank not in but]
    assert len({(type(error), str(error)) for error in found}) == 1, found
    assert isinstance(found[0], GiantstepError)
    return found[0]


class Wrapped:
    """A group whose transfers or end can be another."""

    def __init__(self, group: ThreadGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self.exchange, self.withdraw = group.exchange, group.withdraw
        self.transfers = 0

    def before(self) -> None:
        """What happens before the third transfer."""

    def transfer(self, sends: Sequence[Parcel], receives: Sequence[Parcel], phase: str, timeout_secs: float) -> None:
        self.transfers += 1
        if self.transfers == 3:
            self.before()
        self._group.transfer(sends, receives, phase, timeout_secs)


@pytest.mark.parametrize("verify", ["reading", "before"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.99])
def test_a_damaged_block_is_the_same_error_on_all_ranks(store: CountingStore, place: float, verify: str) -> None:
    files = _MEDIA[store.location.removeprefix("memory://")]
    name = max(name for name in files if name.startswith("data/"))
    at = BLOCK + int(place * (len(files[name]) - BLOCK))
    files[name][at] ^= 1
    error = same_everywhere(load(store, verify=verify))
    assert isinstance(error, CorruptionError)
    start = at // BLOCK * BLOCK
    for text in ("'big'", name, f"bytes {start} to {min(start + BLOCK, len(files[name]))}", "written by rank 1"):
        assert text in str(error)
    assert error.phase == ("verify" if verify == "before" else "read")


def test_a_block_that_cannot_be_read_is_the_same_error_on_all_ranks(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = store.count

    def fail(name: str, offset: int, length: int) -> None:
        if name.startswith("data/") and offset > 1 << 19 and "r00001" in name:
            raise OSError(5, "the medium is gone")
        count(name, offset, length)

    monkeypatch.setattr(store, "count", fail)
    error = same_everywhere(load(store, reader_threads=1))
    assert isinstance(error, StoreError)
    assert "the medium is gone" in str(error)


def test_of_several_damaged_blocks_all_ranks_name_the_same(store: CountingStore) -> None:
    for name, data in _MEDIA[store.location.removeprefix("memory://")].items():
        if name.startswith("data/"):
            for at in range(BLOCK, len(data), 5 * BLOCK):
                data[at] ^= 1
    assert isinstance(same_everywhere(load(store)), CorruptionError)


class Broken(KeyboardInterrupt):
    """Ends a transfer half-way."""


@pytest.mark.parametrize("kind", [Broken, RuntimeError])
def test_a_transfer_that_ends_half_way_on_one_rank_ends_one_load_and_not_the_next(
    store: CountingStore, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = ThreadGroup._take, threading.Event()

    def take(self: ThreadGroup, *arguments: Any) -> None:
        if self.rank == 2 and not broken.is_set():
            broken.set()
            raise kind("can't start new thread")
        real(self, *arguments)

    monkeypatch.setattr(ThreadGroup, "_take", take)

    def rank(group: ThreadGroup) -> list[str]:
        found = []
        for _ in range(3):
            state = {"big": torch.zeros(COUNT, dtype=torch.int64), "small": torch.zeros(100, dtype=torch.int64)}
            options = gs.LoadOptions(exchange=range(RANKS), buffer_bytes=1 << 16, timeout_secs=30)
            try:
                gs.load(state, store, process_group=group, options=options)
            except (GiantstepError, Broken) as error:
                found.append("interrupted" if isinstance(error, Broken) else f"{type(error).__name__} {error}")
            else:
                found.append("right" if torch.equal(state["big"], torch.arange(COUNT)) else "wrong")
        return found

    found, errors = run_ranks_collecting(RANKS, rank)
    assert errors == [None] * RANKS
    assert [after for _, *after in found] == [["right"] * 2] * RANKS
    first = [first for first, *_ in found]
    if kind is Broken:
        assert first.pop(2) == "interrupted"
    assert len(set(first)) == 1
    assert "rank 2, phase read" in first[0]
    assert ("Broken ended the call" if kind is Broken else "can't start new thread") in first[0]


def test_the_group_can_be_used_again_after_a_failed_exchange(store: CountingStore) -> None:
    files = _MEDIA[store.location.removeprefix("memory://")]
    name = max(name for name in files if name.startswith("data/"))

    def rank(group: ThreadGroup) -> None:
        state = {"big": torch.zeros(COUNT, dtype=torch.int64), "small": torch.zeros(100, dtype=torch.int64)}
        options = gs.LoadOptions(exchange=range(RANKS), buffer_bytes=1 << 16, timeout_secs=30)
        for attempt in range(2):
            if group.rank == 0:
                files[name][len(files[name]) // 2] ^= 1
            try:
                gs.load(state, store, process_group=group, options=options)
            except CorruptionError:
                failed = True
            else:
                failed = False
            if failed != (attempt == 0):
                raise AssertionError(f"attempt {attempt} on rank {group.rank}: failed={failed}")
            if not failed and not torch.equal(state["big"], torch.arange(COUNT)):
                raise AssertionError(f"wrong values on rank {group.rank}")

    assert run_ranks_collecting(RANKS, rank)[1] == [None] * RANKS


def test_a_rank_that_dies_in_an_exchange_is_named_by_all_others(store: CountingStore) -> None:
    class Dying(Wrapped):
        def before(self) -> None:
            raise SystemExit

    def wrap(group: ThreadGroup) -> Any:
        if group.rank != 2:
            return group
        dying = Dying(group)
        # The dead say nothing.
        dying.withdraw = lambda error: None
        return dying

    errors = load(store, wrap)
    error = same_everywhere(errors, but=[2])
    assert isinstance(error, PeerFailureError)
    assert (error.rank, error.phase) == (2, "read")


def test_a_rank_that_sleeps_in_an_exchange_is_named_by_all_others(store: CountingStore) -> None:
    class Sleeping(Wrapped):
        def before(self) -> None:
            time.sleep(4)

    begin = time.monotonic()
    errors = load(store, lambda group: Sleeping(group) if group.rank == 1 else group, timeout_secs=1)
    error = same_everywhere(errors, but=[1])
    assert isinstance(error, PhaseTimeoutError)
    assert (error.rank, error.phase) == (1, "read")
    assert time.monotonic() - begin < 60
    assert isinstance(errors[1], GiantstepError)


def test_an_interrupt_on_one_rank_ends_the_exchange_on_all(store: CountingStore) -> None:
    class Interrupted(Wrapped):
        def before(self) -> None:
            raise KeyboardInterrupt

    errors = load(store, lambda group: Interrupted(group) if group.rank == 3 else group)
    assert isinstance(errors[3], KeyboardInterrupt)
    error = same_everywhere(errors, but=[3])
    assert isinstance(error, PeerFailureError)
    assert "KeyboardInterrupt" in str(error)


def test_a_rank_that_dies_while_planning_is_named_by_all_others(store: CountingStore) -> None:
    def wrap(group: ThreadGroup) -> Any:
        if group.rank != 1:
            return group
        wrapped = Wrapped(group)

        def exchange(report: Any, answer: Any, phase: str, timeout_secs: float) -> Any:
            if phase == "plan":
                raise SystemExit
            return group.exchange(report, answer, phase, timeout_secs)

        wrapped.exchange = exchange
        return wrapped

    error = same_everywhere(load(store, wrap), but=[1])
    assert isinstance(error, PeerFailureError)
    assert (error.rank, error.phase) == (1, "plan")
