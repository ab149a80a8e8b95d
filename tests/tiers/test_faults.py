"""Ranks and hosts that fail in the middle of a save or of gathering: all ranks hear the same, and the step before stays."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import giantstep as gs
from giantstep.errors import GiantstepError, PeerFailureError, PhaseTimeoutError, StoreError, UnexpectedError
from giantstep.testing.faults import CrashError
from giantstep.testing.ranks import run_ranks_collecting
from giantstep.tiers.node_store import Protection
from tiers.clusters import Cluster, Layout, check_exact, one_error, state_of
from tiers.hooked import HookedStore

# Nothing may hang, whoever fails.
pytestmark = pytest.mark.timeout(60)

# How long ranks are waited for: where one is late on purpose, and otherwise.
LATE_SECS, SECS = 1.5, 20.0
LAYOUT = Layout(2, (1, 2))
PROTECTIONS = {"copies": Protection(1), "parity": Protection(0, (2, 1))}

Raise = Callable[[], None]


def raising(error: BaseException) -> Raise:
    def fail() -> None:
        raise error

    return fail


# When the rank fails, by the operation on its host's place; and the phase in which that is.
WHEN = {
    "write": (("prepare", "new/data", 1), "write"),
    "files": (("create", "new/data/", 1), "write"),
    "copy": (("open", "new/data/", 1), "copy"),
    "commit": (("publish", "new/checkpoint.json", 1), "commit"),
}
Kind = tuple[Callable[[threading.Event], Raise], type[GiantstepError], float]
# What it does, until the others have `heard` of it; what they raise; and how long they wait for it.
KINDS: dict[str, Kind] = {
    "raises": (lambda heard: raising(KeyError("lost")), UnexpectedError, SECS),
    "has no room": (lambda heard: raising(OSError(errno.ENOSPC, "no space")), StoreError, SECS),
    "dies": (lambda heard: raising(CrashError()), PeerFailureError, SECS),
    "is late": (lambda heard: lambda: heard.wait(SECS) and None, PhaseTimeoutError, LATE_SECS),
}


def cases(*when: str) -> list[Any]:
    """All combinations; of lateness, which takes its time, one for each moment."""
    found = itertools.product(when, KINDS, PROTECTIONS)
    return [
        pytest.param(moment, kind, PROTECTIONS[name], id=f"{moment}-{kind}-{name}")
        for moment, kind, name in found
        if kind != "is late" or name == ("parity" if moment == "copy" else "copies")
    ]


class Failing:
    """A hook that does something at the n-th operation of a kind on a path that has a text in it."""

    def __init__(self, operation: str, text: str, number: int, fail: Raise) -> None:
        self._wanted, self._text, self._fail = operation, text, fail
        self._count = itertools.count(1)
        self._number = number
        self.reached = False

    def __call__(self, operation: str, name: str) -> None:
        if operation == self._wanted and self._text in f"{name}" and next(self._count) == self._number:
            self.reached = True
            self._fail()


def in_step(cluster: Cluster, step: str) -> Cluster:
    """The same hosts, with a place of this name in their directories."""
    folders = [f"{folder}/{step}" for folder in cluster.names]
    return Cluster(cluster.root, cluster.ranks, cluster.names, folders=folders, protection=cluster.protection)


def run(cluster: Cluster, work: Callable[[Any], Any], heard: threading.Event) -> list[BaseException | None]:
    """What ranks raise; `heard` is set once one has."""

    def told(group: Any) -> None:
        try:
            work(group)
        except GiantstepError:
            heard.set()
            raise

    return run_ranks_collecting(cluster.size, told)[1]


def run_save(
    cluster: Cluster, seed: int, secs: float = SECS, heard: threading.Event | None = None
) -> list[BaseException | None]:
    options = gs.SaveOptions(timeout_secs=secs, block_bytes=4096)

    def work(group: Any) -> None:
        state = state_of(group.rank, cluster.size, LAYOUT, seed)
        gs.save(state, cluster.store(group.rank), process_group=group, options=options)

    return run(cluster, work, heard or threading.Event())


def hooked(cluster: Cluster, rank: int, hook: Any) -> None:
    cluster.wrapped[rank] = HookedStore(cluster.folder(cluster.host(rank)), hook)


def check_told(errors: list[BaseException | None], rank: int, kind: type[GiantstepError], phase: str) -> None:
    """All others raised the same; the rank itself too, unless it is dead."""
    alive = [error for number, error in enumerate(errors) if number != rank or kind is not PeerFailureError]
    error = one_error(alive, kind)
    assert (error.rank, error.phase) == (rank, phase), error


@pytest.mark.parametrize(("when", "kind", "protection"), cases(*WHEN))
def test_a_rank_that_fails_in_a_save_is_named_to_all_and_the_step_before_stays(
    tmp_path: Path, when: str, kind: str, protection: Protection
) -> None:
    (operation, phase), (make, expected, secs) = WHEN[when], KINDS[kind]
    base = Cluster(tmp_path, [1, 1, 1], protection=protection)
    before, new = in_step(base, "old"), in_step(base, "new")
    before.save(LAYOUT, 1)
    heard = threading.Event()
    failing = Failing(*operation, make(heard))
    hooked(new, 1, failing)
    errors = run_save(new, 2, secs, heard)
    assert failing.reached
    if when == "copy" and protection.parity is None and kind in ("raises", "has no room"):
        # Whoever receives what cannot be read sees it.
        assert all(type(error) is type(errors[0]) and str(error) == str(errors[0]) for error in errors), errors
        assert errors[0].phase == "copy"  # type: ignore[union-attr]
    else:
        check_told(errors, 1, expected, phase)
    before.check_load(LAYOUT, 1)
    # And the next save to the same place is as if nothing had been.
    new.wrapped.clear()
    assert run_save(new, 3) == [None] * 3
    new.check_load(LAYOUT, 3)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_host_that_cannot_write_a_received_copy_fails_the_save_on_all_ranks(tmp_path: Path, code: int) -> None:
    base = Cluster(tmp_path, [1, 1, 1])
    before, new = in_step(base, "old"), in_step(base, "new")
    before.save(LAYOUT, 1)

    def hook(operation: str, name: str) -> None:
        # Files of rank 0 arrive on host 1; its own ones are written before.
        if operation == "create" and "new/data/" in name and "-r00000-" in name and name.endswith("-10000.safetensors"):
            raise OSError(code, "injected")

    hooked(new, 1, hook)
    errors = run_save(new, 2)
    error = one_error(errors, StoreError, "injected")
    assert error.rank == 1
    assert error.phase in ("copy", "write")
    before.check_load(LAYOUT, 1)
    # Nothing of it is taken for a checkpoint, and the same place can be saved to.
    assert not list(tmp_path.glob("*/new/checkpoint.json"))
    new.wrapped.clear()
    assert run_save(new, 3) == [None] * 3
    new.check_load(LAYOUT, 3)


GATHER_WHEN = {
    "index": ("publish", "checkpoint.json", 1),
    "files": ("create", "/data/", 1),
}


@pytest.mark.parametrize(("when", "kind", "protection"), cases(*GATHER_WHEN))
def test_a_rank_that_fails_in_gathering_is_named_to_all_and_the_next_load_works(
    tmp_path: Path, when: str, kind: str, protection: Protection
) -> None:
    make, expected, secs = KINDS[kind]
    cluster = Cluster(tmp_path, [1, 1, 1], protection=protection)
    cluster.save(LAYOUT, 1)
    cluster.lose(1)
    heard = threading.Event()
    failing = Failing(*GATHER_WHEN[when], make(heard))
    # Files that are rebuilt go to the first host, others to the one that lacks them.
    rank = 0 if when == "files" and protection.parity else 1
    hooked(cluster, rank, failing)
    options = gs.LoadOptions(timeout_secs=secs)

    def work(group: Any) -> None:
        gs.load(state_of(group.rank, 3, LAYOUT, None), cluster.store(group.rank), process_group=group, options=options)

    errors = run(cluster, work, heard)
    assert failing.reached
    check_told(errors, rank, expected, "gather")
    cluster.wrapped.clear()
    cluster.check_load(LAYOUT, 1)


class BrokenDisk:
    """A hook: what lies on the disk now cannot be read, until it is written anew."""

    def __init__(self, data: Path) -> None:
        self._names = {path.name for path in data.iterdir()}

    def __call__(self, operation: str, name: str) -> None:
        if operation == "create":
            self._names.discard(Path(name).name)
        if operation == "read" and Path(name).name in self._names:
            raise OSError(errno.EIO, "injected")


@pytest.mark.parametrize("exchange", ["auto", "none"])
@pytest.mark.parametrize("protection", PROTECTIONS.values(), ids=PROTECTIONS.keys())
def test_a_disk_that_cannot_read_its_copies_is_passed_over(tmp_path: Path, protection: Protection, exchange: Any) -> None:
    cluster = Cluster(tmp_path, [1, 1, 1], protection=protection)
    cluster.save(LAYOUT, 1)
    hooked(cluster, 1, BrokenDisk(tmp_path / "h1" / "data"))
    found, errors = cluster.load(LAYOUT, gs.LoadOptions(timeout_secs=20, exchange=exchange))
    assert errors == [None] * 3, errors
    check_exact(found, LAYOUT, 1)
    assert any("damaged" in note for note in found[0].report.notes)


def test_a_copy_that_cannot_be_read_where_it_is_sent_from_is_fetched_from_elsewhere(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [1, 1, 1, 1], protection=Protection(2))
    cluster.save(LAYOUT, 1)
    cluster.lose(3)
    hooked(cluster, 0, BrokenDisk(tmp_path / "h0" / "data"))
    cluster.check_load(LAYOUT, 1)


def test_a_copy_cut_off_half_way_is_replaced(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [1, 1, 1])
    cluster.save(LAYOUT, 1)
    # As if the process had been killed while files arrived on hosts 1 and 2: one is short, one is full of zeros.
    sent = [path for path in sorted((tmp_path / "h1" / "data").iterdir()) if "-r00000-" in path.name]
    sent[0].write_bytes(sent[0].read_bytes()[:1000])
    other = [path for path in sorted((tmp_path / "h2" / "data").iterdir()) if "-r00001-" in path.name]
    other[0].write_bytes(bytes(other[0].stat().st_size))
    cluster.check_load(LAYOUT, 1)


def test_a_place_that_cannot_be_looked_at_is_told_with_its_host(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, [1, 1])
    cluster.save(LAYOUT, 1)

    class Unreadable(HookedStore):
        def names(self, folder: str) -> Any:
            raise OSError(errno.EIO, "injected")

    cluster.wrapped[1] = Unreadable(tmp_path / "h1", lambda operation, name: None)
    found, errors = cluster.load(LAYOUT)
    assert errors == [None, None], errors
    assert any("host h1" in note and "injected" in note for note in found[0].report.notes)
