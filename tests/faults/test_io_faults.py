"""Disks that fail, are slow, full, read-only, removed or exchanged while a save or a load is on its way."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_disks import mounted, read_only

import giantstep as gs
import giantstep.loading
from giantstep.errors import CorruptionError, GiantstepError, IncompleteError, OpenError, StoreError
from giantstep.storage.base import ReadHandle
from giantstep.storage.local import LocalStore
from giantstep.storage.memory import MemoryStore
from giantstep.testing.crash_points import unneeded_files
from giantstep.testing.ranks import run_ranks_collecting

RANKS = 2
_NAMES = itertools.count()


def state_of(rank: int, value: float, length: int = 3000) -> dict[str, Any]:
    part = gs.ShardedTensor.from_rank_offsets("w", torch.full((length,), value), (0, rank, RANKS))
    return {"w": part, "same": torch.full((40,), value), "value": value}


def save(place: Any, value: float, *, later: bool = False, length: int = 3000) -> list[BaseException | None]:
    options = gs.SaveOptions(timeout_secs=20, block_bytes=4096, buffer_bytes=4096, writer_threads=1)

    def rank(group: Any) -> None:
        state = state_of(group.rank, value, length)
        if later:
            gs.async_save(state, place, process_group=group, options=options).result(60)
        else:
            gs.save(state, place, process_group=group, options=options)

    return run_ranks_collecting(RANKS, rank)[1]


def load(place: Any, exchange: Any = "auto") -> tuple[set[float], list[BaseException | None]]:
    """All values that any rank found, and what each raised."""
    found: set[float] = set()

    def rank(group: Any) -> None:
        options = gs.LoadOptions(timeout_secs=20, exchange=exchange)
        loaded = gs.load(state_of(group.rank, 0.0), place, process_group=group, options=options)
        found.update(loaded["w"].tolist(), loaded["same"].tolist(), [loaded["value"]])

    errors = run_ranks_collecting(RANKS, rank)[1]
    return found, errors


def the_same(errors: list[BaseException | None]) -> GiantstepError:
    """The one error that all ranks raised."""
    assert len({(type(error), str(error)) for error in errors}) == 1, errors
    assert isinstance(errors[0], GiantstepError)
    return errors[0]


# Reading.


class FailingReads(MemoryStore):
    """The n-th thing that is asked of it in order to read fails. What comes after a commit does not count: tests read it."""

    def __init__(self) -> None:
        super().__init__(f"failing-{next(_NAMES)}")
        self._lock = threading.Lock()
        self.arm(None)

    def arm(self, fail_at: int | None) -> None:
        self.count, self.fail_at, self._published = 0, fail_at, False

    def asked(self, what: str) -> None:
        with self._lock:
            if self._published:
                return
            self.count += 1
            if self.count - 1 == self.fail_at:
                raise OSError(errno.EIO, f"injected at {what}")

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        super().publish(name, data, temporary)
        self._published = True

    def open_read(self, name: str, *, direct: bool = False) -> Any:
        self.asked(f"open {name}")
        return _Failing(super().open_read(name, direct=direct), name, self)

    def size(self, name: str) -> int:
        self.asked(f"size of {name}")
        return super().open_read(name).size


class _Failing(ReadHandle):
    def __init__(self, handle: ReadHandle, name: str, store: FailingReads) -> None:
        self._handle, self._name, self._store = handle, name, store

    @property
    def size(self) -> int:
        return self._handle.size

    def read_into(self, offset: int, target: memoryview) -> None:
        self._store.asked(f"read {self._name} {offset}")
        self._handle.read_into(offset, target)

    def close(self) -> None:
        self._handle.close()


@pytest.mark.parametrize("exchange", ["none", "all"])
def test_an_error_at_any_read_of_a_load_is_told_to_all_ranks_and_the_next_load_works(exchange: str) -> None:
    store = FailingReads()
    assert save(store, 1.0) == [None] * RANKS
    store.arm(None)
    how = range(RANKS) if exchange == "all" else "none"
    assert load(store, how) == ({1.0}, [None] * RANKS)
    count = store.count
    assert count > 8
    for position in range(count):
        store.arm(position)
        error = the_same(load(store, how)[1])
        assert isinstance(error, StoreError)
        assert "injected at" in str(error)
    store.arm(None)
    assert load(store, how) == ({1.0}, [None] * RANKS)


def test_an_error_at_any_read_of_a_save_is_told_to_all_ranks_and_the_next_save_works() -> None:
    store = FailingReads()
    assert save(store, 1.0) == [None] * RANKS
    store.arm(None)
    assert save(store, 2.0) == [None] * RANKS
    count, value = store.count, 2.0
    assert count >= 3
    for position in range(count):
        value += 1
        store.arm(position)
        error = the_same(save(store, value))
        assert isinstance(error, StoreError)
        assert "injected at" in str(error)
        store.arm(None)
        assert load(store) == ({value - 1}, [None] * RANKS)
        assert save(store, value) == [None] * RANKS
        assert unneeded_files(store) == []


# System calls that do less than they were asked to, or are interrupted.


def test_system_calls_that_move_a_part_only_lose_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0, 0]
    pwritev, preadv = os.pwritev, os.preadv

    def short_write(descriptor: int, parts: Any, offset: int, *flags: int) -> int:
        calls[0] += 1
        return pwritev(descriptor, [memoryview(parts[0])[:1000]], offset, *flags)

    def short_read(descriptor: int, parts: Any, offset: int, *flags: int) -> int:
        calls[1] += 1
        return preadv(descriptor, [memoryview(parts[0])[:1000]], offset, *flags)

    monkeypatch.setattr(os, "pwritev", short_write)
    monkeypatch.setattr(os, "preadv", short_read)
    assert save(tmp_path, 1.0) == [None] * RANKS
    assert load(tmp_path) == ({1.0}, [None] * RANKS)
    assert min(calls) > 24
    monkeypatch.undo()
    assert gs.open_checkpoint(tmp_path).verify().ok
    assert load(tmp_path) == ({1.0}, [None] * RANKS)


def test_signals_that_interrupt_system_calls_do_no_harm(tmp_path: Path) -> None:
    """EINTR: the handler does not raise, so every call is to be made again."""
    caught = [0]

    def count(*_: Any) -> None:
        caught[0] += 1

    before = signal.signal(signal.SIGALRM, count)
    # Not by default: calls that are interrupted return EINTR.
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    state = {"w": torch.arange(1 << 20), "value": 1}
    try:
        for value in range(8):
            state["value"] = value
            gs.save(state, tmp_path)
            gs.async_save(state, tmp_path).result(60)
            target = {"w": torch.zeros(1 << 20, dtype=torch.int64), "value": None}
            assert gs.load(target, tmp_path)["value"] == value
            assert torch.equal(target["w"], state["w"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert caught[0] > 100
    assert gs.open_checkpoint(tmp_path).verify().ok


# Directories that cannot be written to, or go away.


@pytest.mark.parametrize("later", [False, True], ids=["save", "async_save"])
def test_a_file_system_that_became_read_only_is_told_on_all_ranks_and_still_loads(later: bool, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, 8) as place:
        path = place / "checkpoint"
        assert save(path, 1.0) == [None] * RANKS
        with read_only(place):
            for target in (path, place / "another"):
                error = the_same(save(target, 2.0, later=later))
                assert isinstance(error, StoreError)
                assert os.strerror(errno.EROFS) in str(error)
            assert load(path) == ({1.0}, [None] * RANKS)
        assert save(path, 3.0, later=later) == [None] * RANKS
        assert load(path) == ({3.0}, [None] * RANKS)


class Meddled(LocalStore):
    """Calls a function before its n-th operation."""

    def __init__(self, root: Path, at: int | None, meddle: Callable[[], None]) -> None:
        super().__init__(root)
        self._lock = threading.Lock()
        self.count, self._at, self._meddle = 0, at, meddle

    def before(self) -> None:
        with self._lock:
            here, self.count = self.count, self.count + 1
            if here == self._at:
                self._meddle()

    def prepare(self, folder: str) -> None:
        self.before()
        super().prepare(folder)

    def create(self, name: str, size: int, *, direct: bool) -> Any:
        self.before()
        return super().create(name, size, direct=direct)

    def sync_names(self, folder: str) -> None:
        self.before()
        super().sync_names(folder)

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        self.before()
        super().publish(name, data, temporary)

    def delete(self, name: str) -> None:
        self.before()
        super().delete(name)


@pytest.mark.parametrize("later", [False, True], ids=["save", "async_save"])
def test_a_directory_that_is_deleted_at_any_moment_of_a_save_is_told_and_the_next_save_works(
    later: bool, tmp_path: Path
) -> None:
    place = tmp_path / "checkpoint"
    whole = Meddled(place, None, lambda: None)
    assert save(whole, 1.0) == [None] * RANKS
    assert whole.count > 6
    told = 0
    for position in range(whole.count):
        store = Meddled(place, position, lambda: shutil.rmtree(place))
        errors = save(store, 2.0, later=later)
        if errors == [None] * RANKS:
            # Before anything was made in it, or after the commit.
            assert position < 2 or position >= whole.count - 2
        else:
            told += 1
            assert isinstance(the_same(errors), StoreError | OpenError)
        assert save(place, 3.0) == [None] * RANKS
        assert load(place) == ({3.0}, [None] * RANKS)
        assert unneeded_files(LocalStore(place)) == []
    assert told >= 4


# Files that change during a load.


def meddle_before_reading(monkeypatch: pytest.MonkeyPatch, meddle: Callable[[], None]) -> None:
    """All ranks know what to read; rank 0 meddles before any reads."""
    real = giantstep.loading._Load._prepare

    def prepare(run: Any) -> Any:
        if run._group.rank == 0:
            meddle()
        return real(run)

    monkeypatch.setattr(giantstep.loading._Load, "_prepare", prepare)


def only_data_file(place: Path, rank: int) -> Path:
    (found,) = (place / "data").glob(f"*-r{rank:05d}-0.safetensors")
    return found


def exchanged(place: Path) -> None:
    """A file of the same size from another save, in the place of one."""
    other = place.parent / "other"
    assert save(other, 7.0) == [None] * RANKS
    shutil.copy(only_data_file(other, 1), only_data_file(place, 1))


def shortened(place: Path) -> None:
    os.truncate(only_data_file(place, 1), 5000)


def removed(place: Path) -> None:
    only_data_file(place, 1).unlink()


def emptied(place: Path) -> None:
    shutil.rmtree(place)


@pytest.mark.parametrize("meddle", [exchanged, shortened, removed, emptied])
@pytest.mark.parametrize("exchange", ["none", "all"])
def test_files_that_are_exchanged_cut_or_removed_during_a_load_are_told_on_all_ranks(
    meddle: Callable[[Path], None], exchange: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "checkpoint"
    assert save(place, 1.0) == [None] * RANKS
    with monkeypatch.context() as patch:
        meddle_before_reading(patch, lambda: meddle(place))
        error = the_same(load(place, range(RANKS) if exchange == "all" else "none")[1])
    assert isinstance(error, CorruptionError | IncompleteError | StoreError)
    assert isinstance(error, CorruptionError) or meddle is not exchanged
    assert ".safetensors" in str(error) or "checkpoint" in str(error)
    assert save(place, 2.0) == [None] * RANKS
    assert load(place) == ({2.0}, [None] * RANKS)


def test_a_checkpoint_that_is_overwritten_during_a_load_is_told_or_loads_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "checkpoint"
    assert save(place, 1.0) == [None] * RANKS
    with monkeypatch.context() as patch:
        meddle_before_reading(patch, lambda: gs.save({"w": torch.full((2 * 3000,), 2.0), "value": 2.0}, place) and None)
        found, errors = load(place)
    assert found in ({1.0}, set())
    if not found:
        assert isinstance(the_same(errors), IncompleteError | StoreError)
    assert gs.open_checkpoint(place).common["value"] == 2.0
