"""The states that a power loss may leave are all that POSIX allows, and none that it does not."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.commit.remove import remove_checkpoint
from giantstep.errors import OpenError
from giantstep.format.names import save_id_of
from giantstep.storage.base import read_all
from giantstep.storage.record_file import files_of_ours
from giantstep.testing.crash_points import CrashPointError, CrashReport, explore
from giantstep.testing.faults import CrashingHandle, CrashingStore
from giantstep.testing.power_loss import states_after
from giantstep.testing.ranks import run_ranks, run_ranks_collecting

OPTIONS = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096, writer_threads=1, timeout_secs=20)


def write(store: Any, name: str, data: bytes, *, sync: bool) -> None:
    handle = store.create(name, len(data), direct=False)
    handle.write_at(0, data)
    if sync:
        handle.sync()


def found(store: CrashingStore, most: int = 10_000) -> set[tuple[tuple[str, bytes], ...]]:
    """Names and contents of each state."""
    states = set()
    for state in states_after(store, most):
        names = sorted(state.store.names(""))
        states.add(tuple((name, read_all(state.store, name, 1 << 20)) for name in names))
    return states


def test_what_is_flushed_is_there_and_nothing_else_is_possible() -> None:
    store = CrashingStore()
    store.prepare("")
    write(store, "a", b"x" * 2000, sync=True)
    store.sync_names("")
    assert found(store) == {(("a", b"x" * 2000),)}


def test_a_file_that_was_not_flushed_may_be_empty_zero_torn_whole_or_missing() -> None:
    store = CrashingStore()
    store.prepare("")
    write(store, "a", b"x" * 2000, sync=False)
    torn = bytearray(2000)
    for start in (0, 1024):
        torn[start : start + 512] = b"x" * len(torn[start : start + 512])
    contents = {b"", bytes(2000), bytes(torn), b"x" * 2000}
    assert found(store) == {(), *((("a", content),) for content in contents)}
    store.sync_names("")
    assert found(store) == {(("a", content),) for content in contents}, "the name is durable, the bytes are not"


def test_of_a_rename_either_half_may_be_lost_and_deleted_names_may_be_back() -> None:
    store = CrashingStore()
    store.prepare("")
    store.publish("r", b"old", "t")
    write(store, "gone", b"1", sync=True)
    store.sync_names("")
    store.delete("gone")
    write(store, "t", b"new", sync=True)
    # The rename alone, which `publish` would flush.
    file = store._disk.files["t"]
    store._bind("t", None)
    store._bind("r", file)
    states = found(store)
    records = {dict(state).get("r") for state in states}
    assert records == {b"old", b"new"}
    assert {"gone" in dict(state) for state in states} == {True, False}
    assert {("t" in dict(state), dict(state)["r"]) for state in states} == {
        (True, b"old"),
        (False, b"old"),
        (True, b"new"),
        (False, b"new"),
    }


def test_where_there_are_too_many_states_the_extremes_are_among_those_drawn() -> None:
    store = CrashingStore()
    store.prepare("")
    for number in range(12):
        write(store, f"f{number:02d}", bytes([65 + number]) * 3000, sync=False)
    states = [tuple(sorted(state.store.names(""))) for state in states_after(store, 60)]
    assert len(states) == 60
    assert () in states
    assert tuple(f"f{number:02d}" for number in range(12)) in states
    assert states == [tuple(sorted(state.store.names(""))) for state in states_after(store, 60)], "the same each time"


def test_names_that_share_a_file_still_do() -> None:
    store = CrashingStore()
    store.prepare("data")
    write(store, "data/a", b"12", sync=True)
    store.sync_names("data")
    other = store.folder("other")
    other.prepare("data")
    other.link("data/b", store, "data/a")
    contents = {tuple(sorted(state.store._disk.files)) for state in states_after(store, 100)}
    assert contents == {("data/a",), ("data/a", "other/data/b")}


# Giantstep's own operations.


def save(store: Any, value: float, ranks: int = 2, **settings: Any) -> list[BaseException | None]:
    def rank(group: Any) -> None:
        shard = gs.ShardedTensor.from_rank_offsets("w", torch.full((3, 1024), value), (0, group.rank, ranks))
        state = {"w": shard, "value": value}
        if settings.get("asynchronous"):
            gs.async_save(state, store, process_group=group, options=OPTIONS).result()
        else:
            gs.save(state, store, process_group=group, options=OPTIONS)

    return run_ranks_collecting(ranks, rank)[1]


def must_save(store: Any, value: float, **settings: Any) -> None:
    errors = [error for error in save(store, value, **settings) if error is not None]
    if errors:
        raise errors[0]


def outcome(store: Any) -> str:
    try:
        checkpoint = gs.open_checkpoint(store)
    except OpenError:
        return "nothing"
    assert checkpoint.verify().ok
    (value,) = {*checkpoint["w"][...].reshape(-1).tolist(), checkpoint.common["value"]}
    return f"{value:g}"


def next_save(store: Any) -> None:
    must_save(store, 5.0)
    assert outcome(store) == "5"
    assert len({save_id_of(name) for name in files_of_ours(store)} - {None}) == 1, "leftovers"


def test_a_first_save_leaves_nothing_or_the_checkpoint() -> None:
    report = explore(lambda store: must_save(store, 1.0), check=outcome, again=next_save, states_per_point=6)
    assert set(report.outcomes) == {"nothing", "1"}
    assert report.points > 40
    assert report.states > 200
    assert "crash points" in str(report)


def overwritten(operation: Any, most: int = 6, **settings: Any) -> CrashReport:
    return explore(operation, before=lambda store: must_save(store, 1.0), check=outcome, states_per_point=most, **settings)


def test_an_overwrite_leaves_the_old_or_the_new_checkpoint() -> None:
    report = overwritten(lambda store: must_save(store, 2.0), again=next_save)
    assert set(report.outcomes) == {"1", "2"}


def test_an_asynchronous_overwrite_leaves_the_old_or_the_new_checkpoint() -> None:
    report = overwritten(lambda store: must_save(store, 2.0, ranks=1, asynchronous=True), most=12)
    assert set(report.outcomes) == {"1", "2"}


def test_removing_a_tensor_leaves_the_checkpoint_with_or_without_it() -> None:
    def before(store: Any) -> None:
        gs.save({"w": torch.full((3, 1024), 1.0), "value": 1.0, "x": torch.ones(3000)}, store, options=OPTIONS)

    def check(store: Any) -> str:
        return outcome(store) + (" with x" if "x" in gs.open_checkpoint(store) else "")

    report = explore(lambda store: gs.remove_sharded_tensors(store, "x"), before=before, check=check, states_per_point=12)
    assert set(report.outcomes) == {"1", "1 with x"}


def test_removing_a_checkpoint_leaves_it_whole_or_gone() -> None:
    report = overwritten(remove_checkpoint, most=40, again=remove_checkpoint)
    assert set(report.outcomes) == {"1", "nothing"}


@pytest.mark.slow
def test_an_overwrite_by_four_ranks_in_many_more_states() -> None:
    report = explore(
        lambda store: must_save(store, 2.0, ranks=4),
        before=lambda store: must_save(store, 1.0, ranks=4),
        check=outcome,
        again=next_save,
        states_per_point=400,
    )
    assert set(report.outcomes) == {"1", "2"}
    assert report.states > 20_000


# What would not do is noticed.


class Careless(CrashingStore):
    """Lets some things be left undone, by the name of the mistake."""

    mistake = ""

    def create(self, name: str, size: int, *, direct: bool) -> Any:
        handle = super().create(name, size, direct=direct)
        if self.mistake == "no flush of data" and name.startswith("data/"):
            return _Unflushed(self, handle._name, handle._file)
        if self.mistake == "no flush of the index" and ".index." in name:
            return _Unflushed(self, handle._name, handle._file)
        return handle

    def sync_names(self, folder: str) -> None:
        if self.mistake == "no flush of data's folder" and folder == "data":
            return
        super().sync_names(folder)

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        if self.mistake == "record without flush":
            handle = self.create(temporary, len(data), direct=False)
            handle.write_at(0, data)
            file = self._disk.files[temporary]
            self._operation("rename", lambda: (self._bind(temporary, None), self._bind(name, file), None)[2])
            self.sync_names("")
        elif self.mistake == "record in place" and name in self._disk.files:
            handle = CrashingHandle(self, name, self._disk.files[name])
            self._operation("truncate", lambda: setattr(handle._file, "data", bytearray(len(data))))
            handle.write_at(0, data)
            handle.sync()
        elif self.mistake == "rename without flush":
            handle = self.create(temporary, len(data), direct=False)
            handle.write_at(0, data)
            handle.sync()
            file = self._disk.files[temporary]
            self._operation("rename", lambda: (self._bind(temporary, None), self._bind(name, file), None)[2])
        else:
            super().publish(name, data, temporary)


class _Unflushed(CrashingHandle):
    def sync(self) -> None:
        """Forgets to."""


MISTAKES = [
    "no flush of data",
    "no flush of the index",
    "no flush of data's folder",
    "record without flush",
    "record in place",
    "rename without flush",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_store_that_leaves_a_flush_out_is_found_out(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these loses a checkpoint, or mixes two; a checker that did not notice would be worth nothing."""
    monkeypatch.setattr(Careless, "mistake", mistake)
    monkeypatch.setattr("giantstep.testing.crash_points.CrashingStore", Careless)
    with pytest.raises(CrashPointError, match="operation"):
        explore(
            lambda store: must_save(store, 2.0, ranks=1),
            before=lambda store: must_save(store, 1.0, ranks=1),
            check=_strict,
            states_per_point=24,
        )


def _strict(store: Any) -> str:
    found = outcome(store)
    assert found in ("1", "2"), found
    return found


def test_old_files_that_go_before_the_commit_are_found_out() -> None:
    def hasty(store: Any) -> None:
        for name in list(store.names("data")):
            store.delete(name)
        must_save(store, 2.0, ranks=1)

    with pytest.raises(CrashPointError):
        explore(hasty, before=lambda store: must_save(store, 1.0, ranks=1), check=_strict)


def test_errors_of_an_operation_that_was_not_crashed_are_its_caller_s() -> None:
    def fails(store: Any) -> None:
        store.prepare("")
        raise OSError(errno.EIO, "mine")

    with pytest.raises(OSError, match="mine"):
        explore(fails, check=lambda store: "")
    assert run_ranks(1, lambda group: group.size) == [1]
