"""Faults while a save or load runs: all ranks hear of the same one, in time, and what was committed before stays."""

from __future__ import annotations

import datetime as dt
import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import giantstep as gs
import giantstep.commit.publish
import giantstep.manager.manager
import giantstep.saving
from giantstep.commit.publish import publish
from giantstep.errors import (
    CorruptionError,
    GiantstepError,
    IncompleteError,
    PhaseTimeoutError,
    StoreError,
    UnexpectedError,
)
from giantstep.group.threads import ThreadGroup
from giantstep.loading import _Load
from giantstep.saving import Save
from giantstep.steps import scan_steps
from giantstep.storage.local import LocalReadHandle, LocalStore
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from giantstep.writing.write import write

RANKS, ROWS, COLUMNS = 3, 64, 1024
OPTIONS = gs.SaveOptions(timeout_secs=30.0)


def state_of(value: float, rank: int, size: int = RANKS) -> dict[str, Any]:
    """256 KiB per rank."""
    shard = gs.ShardedTensor.from_rank_offsets("w", torch.full((ROWS, COLUMNS), value), (0, rank, size))
    return {"w": shard, "value": value}


def save(place: Any, value: float, options: gs.SaveOptions = OPTIONS, size: int = RANKS) -> list[BaseException | None]:
    """What each rank raised. `place` may be a function of the rank."""

    def rank(group: ThreadGroup) -> None:
        gs.save(state_of(value, group.rank, size), at(place, group.rank), process_group=group, options=options)

    return run_ranks_collecting(size, rank)[1]


def load(place: Any, **settings: Any) -> list[BaseException | None]:
    def rank(group: ThreadGroup) -> None:
        state = {"w": torch.zeros(RANKS * ROWS, COLUMNS)}
        options = gs.LoadOptions(**{"timeout_secs": 30.0, **settings})
        gs.load(state, at(place, group.rank), process_group=group, options=options)

    return run_ranks_collecting(RANKS, rank)[1]


def at(place: Any, rank: int) -> Any:
    return place(rank) if callable(place) else place


def value_at(place: Path, rows: int = RANKS * ROWS) -> float:
    """The one value in all of the checkpoint."""
    assert gs.open_checkpoint(place).verify().ok
    state = gs.load({"w": torch.zeros(rows, COLUMNS)}, place)
    assert torch.equal(state["w"], torch.full((rows, COLUMNS), state["value"]))
    return float(state["value"])


def files_in(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


def same(errors: list[BaseException | None]) -> GiantstepError:
    """The error that all ranks raised."""
    assert len({(type(error), str(error)) for error in errors}) == 1, errors
    assert isinstance(errors[0], GiantstepError)
    return errors[0]


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=8m", "none"]
    done = mount and subprocess.run([mount, *options, str(place)], check=False, capture_output=True, text=True)
    if not done or done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip() if done else 'no mount command'}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def leave(disk: Path, free_bytes: int) -> None:
    """Fill the disk up to so many bytes."""
    there = os.statvfs(disk)
    (disk / "ballast").write_bytes(b"x" * (there.f_bavail * there.f_frsize - free_bytes))


@pytest.mark.parametrize("direct_io", ["auto", "never"])
def test_a_full_disk_is_the_same_error_on_all_ranks_and_with_room_the_next_save_works(small_disk: Path, direct_io: Any) -> None:
    place = small_disk / "run"
    options = gs.SaveOptions(timeout_secs=30.0, direct_io=direct_io)
    assert save(place, 1.0) == [None] * RANKS
    before = files_in(place)
    leave(small_disk, 300 << 10)
    error = same(save(place, 2.0, options))
    assert isinstance(error, StoreError)
    assert "No space left on device" in str(error)
    assert error.phase == "write"
    assert value_at(place) == 1.0
    assert files_in(place) == before
    (small_disk / "ballast").unlink()
    assert save(place, 3.0, options) == [None] * RANKS
    assert value_at(place) == 3.0


def test_a_disk_that_gets_full_at_any_page_of_a_save_leaves_the_old_or_the_new_checkpoint(small_disk: Path) -> None:
    place = small_disk / "run"
    assert save(place, 0.0, size=1) == [None]
    used = sum(-(-(place / name).stat().st_size // 4096) * 4096 for name in files_in(place))
    outcomes = []
    value = 0.0
    for free in range(used - (48 << 10), used + (16 << 10), 4096):
        leave(small_disk, free)
        (error,) = save(place, value + 1, size=1)
        outcomes.append(error is None)
        if error is None:
            value += 1
        assert error is None or isinstance(error, StoreError)
        assert value_at(place, ROWS) == value
        (small_disk / "ballast").unlink()
    assert set(outcomes) == {False, True}
    assert save(place, 99.0, size=1) == [None]
    assert len(files_in(place)) == 3


def test_a_full_disk_fails_a_save_in_the_background_on_all_ranks(small_disk: Path) -> None:
    place = small_disk / "run"
    assert save(place, 1.0) == [None] * RANKS
    leave(small_disk, 300 << 10)

    def rank(group: ThreadGroup) -> str:
        error = gs.async_save(state_of(2.0, group.rank), place, process_group=group, options=OPTIONS).exception(60)
        return f"{type(error).__name__}: {error}"

    (told,) = set(run_ranks(RANKS, rank))
    assert told.startswith("StoreError")
    assert "No space left on device" in told
    assert value_at(place) == 1.0


# Reads that fail on one rank.


class FaultyStore(LocalStore):
    """Calls `before(name)` before a file is opened, and `fault(name)` before each read."""

    def __init__(
        self, root: Path, fault: Callable[[str], None] = lambda name: None, before: Callable[[str], None] = lambda name: None
    ) -> None:
        super().__init__(root)
        self._fault, self._before = fault, before

    def open_read(self, name: str, *, direct: bool = False) -> LocalReadHandle:
        self._before(name)
        handle = super().open_read(name, direct=False)
        handle.read_parts = self._faulty(name, handle.read_parts)  # type: ignore[method-assign]
        return handle

    def _faulty(self, name: str, read: Any) -> Any:
        def faulty(*arguments: Any) -> Any:
            self._fault(name)
            return read(*arguments)

        return faulty


READERS = [("checkpoint.json", 0), (".index.", 0), ("data/", 0), ("data/", 2)]


@pytest.mark.parametrize(
    ("part", "victim", "exchange"),
    # Only where every rank reads for itself does another one than rank 0 read the index.
    [*((*reader, how) for reader in READERS for how in ("auto", "none", "group")), (".index.", 1, "none")],
)
def test_a_read_error_on_one_rank_is_the_same_error_on_all(part: str, victim: int, exchange: str, tmp_path: Path) -> None:
    assert save(tmp_path, 1.0) == [None] * RANKS
    happened = []

    def fault(name: str) -> None:
        if part in name:
            happened.append(name)
            raise OSError(errno.EIO, "Input/output error", name)

    how = range(RANKS) if exchange == "group" else exchange
    errors = load(lambda rank: FaultyStore(tmp_path, fault) if rank == victim else LocalStore(tmp_path), exchange=how)
    error = same(errors)
    assert happened
    assert isinstance(error, StoreError)
    assert "Input/output error" in str(error)
    assert part in str(error)
    assert load(tmp_path, exchange=how) == [None] * RANKS


@pytest.mark.parametrize("verify", ["reading", "before"])
@pytest.mark.parametrize("part", ["data/", ".index."])
def test_a_file_that_is_replaced_by_another_of_its_size_during_a_load_is_corruption(
    part: str, verify: str, tmp_path: Path
) -> None:
    assert save(tmp_path, 1.0) == [None] * RANKS
    name = min(name for name in files_in(tmp_path) if part in name)
    replaced = threading.Event()

    def before(opened: str) -> None:
        if opened == name and not replaced.is_set():
            replaced.set()
            other = tmp_path / "other"
            data = bytearray((tmp_path / name).read_bytes())
            data[-4096:] = bytes(4096)
            other.write_bytes(data)
            other.rename(tmp_path / name)

    error = same(load(lambda rank: FaultyStore(tmp_path, before=before), verify=verify))
    assert replaced.is_set()
    assert isinstance(error, CorruptionError)
    assert name in str(error)


# System calls that do less than was asked for, or are interrupted.


@pytest.mark.parametrize("call", ["pwritev", "preadv"])
def test_a_system_call_that_does_nothing_is_an_error_and_not_tried_for_ever(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert save(tmp_path, 1.0) == [None] * RANKS
    real, count = getattr(os, call), 0

    def idle(descriptor: int, views: Any, *where: Any) -> int:
        nonlocal count
        count += 1
        if count > 1000:
            raise AssertionError("tried for ever")
        return 0 if sum(view.nbytes for view in views) > 1000 else int(real(descriptor, views, *where))

    monkeypatch.setattr(os, call, idle)
    error = same(save(tmp_path, 2.0) if call == "pwritev" else load(tmp_path))
    monkeypatch.undo()
    assert isinstance(error, StoreError)
    assert value_at(tmp_path) == 1.0


@pytest.mark.parametrize("call", ["pwritev", "preadv"])
def test_an_interrupted_system_call_is_the_same_error_on_all_ranks_or_none(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python itself repeats calls that a signal interrupts; here it is the file system that says so."""
    assert save(tmp_path, 1.0) == [None] * RANKS
    real, interrupted = getattr(os, call), threading.Event()

    def once(descriptor: int, views: Any, *where: Any) -> int:
        if not interrupted.is_set():
            interrupted.set()
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        return int(real(descriptor, views, *where))

    monkeypatch.setattr(os, call, once)
    error = same(save(tmp_path, 2.0) if call == "pwritev" else load(tmp_path))
    assert interrupted.is_set()
    assert isinstance(error, StoreError)
    assert value_at(tmp_path) == 1.0
    assert save(tmp_path, 3.0) == [None] * RANKS
    assert value_at(tmp_path) == 3.0


def test_signals_that_come_all_the_time_change_nothing(tmp_path: Path) -> None:
    came = 0

    def note(_signum: int, _frame: Any) -> None:
        nonlocal came
        came += 1

    earlier = signal.signal(signal.SIGALRM, note)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for value in range(20):
            gs.save(state_of(float(value), 0, 1), tmp_path / "run")
            assert value_at(tmp_path / "run", ROWS) == value
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert came > 20


# The directory goes away.


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("what", ["data", "all"])
@pytest.mark.parametrize("when", ["before the writing", "after the writing", "before the record"])
def test_a_directory_that_is_deleted_during_a_save_is_the_same_error_on_all_ranks(
    when: str, what: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "run"
    assert first or save(place, 1.0) == [None] * RANKS
    gone = threading.Event()

    def delete() -> None:
        if not gone.is_set():
            gone.set()
            shutil.rmtree(place if what == "all" else place / "data")

    if when == "before the writing":
        monkeypatch.setattr(giantstep.saving, "write", _then(delete, write))
    elif when == "after the writing":
        monkeypatch.setattr(giantstep.saving, "publish", _then(delete, publish))
    else:
        monkeypatch.setattr(LocalStore, "publish", _then(delete, LocalStore.publish))
    errors = save(place, 2.0)
    monkeypatch.undo()
    assert gone.is_set()
    if errors != [None] * RANKS:
        error = same(errors)
        assert isinstance(error, StoreError | IncompleteError)
        assert "another save" not in str(error)
    else:
        # Nobody can know of what happens between the last look and the rename.
        assert (when, what) == ("before the record", "data")
        with pytest.raises(IncompleteError, match="data"):
            value_at(place)
    assert save(place, 3.0) == [None] * RANKS
    assert value_at(place) == 3.0


def _then(before: Callable[[], None], function: Any) -> Any:
    def run(*arguments: Any, **settings: Any) -> Any:
        before()
        return function(*arguments, **settings)

    return run


# A rank that fails, or does nothing, in one phase.

PHASES = [
    ("describe", Save, "describe"),
    ("write", Save, "_write"),
    ("describe", _Load, "_describe"),
    ("match", _Load, "_match"),
    ("read", _Load, "_fill"),
    ("restore", _Load, "_restore"),
]


@pytest.mark.parametrize("fault", ["raises", "lacks memory", "sleeps"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("phase", "of", "method"), PHASES, ids=[f"{of.__name__} {phase}" for phase, of, _ in PHASES])
def test_a_rank_that_fails_or_sleeps_in_a_phase_is_named_by_all_in_time(
    phase: str, of: type, method: str, victim: int, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert save(tmp_path, 1.0) == [None] * RANKS
    before, real = files_in(tmp_path), getattr(of, method)

    def faulty(self: Any, *arguments: Any) -> Any:
        if threading.current_thread().name == f"rank-{victim}":
            if fault == "sleeps":
                time.sleep(1.6)
            else:
                raise MemoryError("no more") if fault == "lacks memory" else RuntimeError("the roof is gone")
        return real(self, *arguments)

    monkeypatch.setattr(of, method, faulty)
    timeout_secs = 0.5 if fault == "sleeps" else 30.0
    begin = time.monotonic()
    options = gs.SaveOptions(timeout_secs=timeout_secs)
    errors = save(tmp_path, 2.0, options) if of is Save else load(tmp_path, timeout_secs=timeout_secs)
    assert time.monotonic() - begin < 15
    monkeypatch.undo()
    others = [error for rank, error in enumerate(errors) if rank != victim]
    error = same(others)
    assert (error.rank, error.phase) == (victim, phase)
    if fault == "sleeps":
        assert isinstance(error, PhaseTimeoutError)
        assert isinstance(errors[victim], GiantstepError)
    else:
        assert same(errors)
        assert isinstance(error, UnexpectedError)
        assert ("no more" if fault == "lacks memory" else "the roof is gone") in str(error)
        # By agreement nothing is left of it.
        assert files_in(tmp_path) == before
    assert value_at(tmp_path) == 1.0
    assert save(tmp_path, 3.0) == [None] * RANKS
    assert value_at(tmp_path) == 3.0


# Clocks that jump.


class Clock:
    """Stands in for the module `datetime`; every save has the next time."""

    UTC = dt.UTC

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
        self.datetime = SimpleNamespace(now=lambda zone: self.now)
        for module in (giantstep.saving, giantstep.commit.publish, giantstep.manager.manager):
            monkeypatch.setattr(module, "dt", self)

    def jump(self, days: float) -> None:
        self.now += dt.timedelta(days=days)


JUMPS = [0, -1, 0, 400, -800, -1e-5, 1e-5, 365, -365, 0]


def test_overwriting_under_a_clock_that_jumps_loses_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    for number, days in enumerate(JUMPS):
        clock.jump(days)
        assert save(tmp_path, float(number)) == [None] * RANKS
        assert value_at(tmp_path) == number
        assert len(files_in(tmp_path)) == 2 + RANKS


@pytest.mark.parametrize("settings", [{}, {"incremental": True}, {"asynchronous": True}, {"keep": 1}])
def test_steps_under_a_clock_that_jumps_stay_as_the_rules_say(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    keep = settings.get("keep", 2)
    for number, days in enumerate(JUMPS):
        clock.jump(days)
        # A job of its own for every two steps.
        with gs.CheckpointManager(tmp_path, **{"keep": 2, **settings}) as manager:
            for step in (2 * number, 2 * number + 1):
                manager.save(step, state_of(float(step), 0, 1))
                clock.jump(-days / 2)
        steps = [entry.step for entry in scan_steps(LocalStore(tmp_path))]
        assert steps == [2 * number, 2 * number + 1][-keep:]
        assert value_at(tmp_path / f"step_{steps[-1]:08d}", ROWS) == steps[-1]


def test_files_of_a_dead_save_from_the_future_are_no_checkpoint_and_go_once_time_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    assert save(tmp_path, 1.0) == [None] * RANKS
    clock.jump(10)

    def die(*_arguments: Any, **_settings: Any) -> Any:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(giantstep.saving, "publish", die)
        assert None not in save(tmp_path, 2.0)
    clock.jump(-20)
    assert len(files_in(tmp_path)) == 2 + 2 * RANKS
    assert value_at(tmp_path) == 1.0
    assert save(tmp_path, 3.0) == [None] * RANKS
    assert value_at(tmp_path) == 3.0
    # They may be those of a save that began later, and runs.
    assert len(files_in(tmp_path)) == 2 + 2 * RANKS
    clock.jump(30)
    assert save(tmp_path, 4.0) == [None] * RANKS
    assert value_at(tmp_path) == 4.0
    assert len(files_in(tmp_path)) == 2 + RANKS
