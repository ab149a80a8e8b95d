"""The explorer of crash points finds the mistakes that a store or an order of steps can make, each by itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import giantstep as gs
import giantstep.saving
from giantstep.commit.clean import _named_by
from giantstep.commit.remove import remove_checkpoint
from giantstep.errors import BadArgumentError
from giantstep.format.names import DATA_DIR, RECORD_NAME, save_id_of
from giantstep.format.record import save_id_in
from giantstep.storage.base import read_all
from giantstep.storage.record_file import files_of_ours
from giantstep.testing.crash_points import CrashPointError, contents, explore, unneeded_files
from giantstep.testing.journal_store import Journal, JournalStore
from giantstep.testing.power_loss import Disk, decisions

OPTIONS = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096, writer_threads=1, timeout_secs=20)


def save(value: float) -> Callable[[Any], None]:
    def operation(store: Any) -> None:
        gs.save({"w": torch.full((2000,), value), "value": value}, store, options=OPTIONS)

    return operation


def check_next_save(store: Any) -> None:
    save(5.0)(store)
    assert unneeded_files(store) == []


# Stores that make one mistake each.


class NoFileSync(JournalStore):
    """Does not flush files of one kind."""

    kind = "data/"

    def sync_file(self, name: str, number: int) -> None:
        if self.kind not in name:
            super().sync_file(name, number)


class NoIndexSync(NoFileSync):
    kind = ".index."


class NoRecordSync(NoFileSync):
    kind = "checkpoint.json"


class NoDataNames(JournalStore):
    def sync_names(self, folder: str) -> None:
        if folder != DATA_DIR:
            super().sync_names(folder)


class NoOwnNames(JournalStore):
    def sync_names(self, folder: str) -> None:
        if folder:
            super().sync_names(folder)


class NoNamesBeforeTheRecord(JournalStore):
    """Flushes names of the place when it publishes, and not before."""

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        super().publish(name, data, temporary)
        super().sync_names("")

    def sync_names(self, folder: str) -> None:
        if folder:
            super().sync_names(folder)


class NoNamesAfterTheRename(JournalStore):
    def publish(self, name: str, data: bytes, temporary: str) -> None:
        handle = self.create(temporary, len(data), direct=False)
        handle.write_at(0, data)
        handle.sync()
        self.rename(temporary, name)


class NoParents(JournalStore):
    def flush_parent(self, path: str) -> None:
        """The folder's own name is forgotten."""


class DeletesBeforeItRenames(JournalStore):
    def rename(self, name: str, new: str) -> None:
        self.delete(new)
        super().rename(name, new)


class OverwritesInPlace(JournalStore):
    def publish(self, name: str, data: bytes, temporary: str) -> None:
        if name not in self.names(""):
            super().publish(name, data, temporary)
            return
        handle = self.open_read(name)
        self._call("resize", self.journal.disk.file_at(self._path(name)), len(data), about=name)
        handle.write_at(0, data)
        handle.sync()


class PublishesInPlace(JournalStore):
    """Writes a new record under its final name."""

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        self.delete(name)
        handle = self.create(name, len(data), direct=False)
        handle.write_at(0, data)
        handle.sync()
        self.sync_names("")


FIRST_SAVE = {NoFileSync, NoIndexSync, NoRecordSync, NoDataNames, NoOwnNames, NoNamesBeforeTheRecord, NoParents}
FIRST_SAVE |= {NoNamesAfterTheRename, PublishesInPlace}
OVERWRITE = {
    NoFileSync,
    NoIndexSync,
    NoRecordSync,
    NoDataNames,
    NoOwnNames,
    NoNamesBeforeTheRecord,
    NoNamesAfterTheRename,
    DeletesBeforeItRenames,
    OverwritesInPlace,
    PublishesInPlace,
}


def test_a_store_without_mistakes_passes() -> None:
    report = explore(save(1.0), again=check_next_save)
    assert report.points == len(report.operations) + 1
    assert report.states > report.points
    assert set(report.outcomes) == {None, *[found for found in report.outcomes if isinstance(found, str)]}
    assert len(report.outcomes) == 2
    assert sum(report.outcomes.values()) == report.distinct
    report = explore(save(2.0), before=save(1.0), again=check_next_save)
    assert len(report.outcomes) == 2
    assert None not in report.outcomes


@pytest.mark.parametrize("mistake", sorted(FIRST_SAVE, key=lambda kind: kind.__name__))
def test_a_mistake_of_the_store_is_found_in_a_first_save(mistake: type[JournalStore]) -> None:
    with pytest.raises(CrashPointError) as caught:
        explore(save(1.0), store_type=mistake, states_per_point=1)
    # A process that is killed loses nothing that it wrote; to rename in the last moment helps in that case alone.
    assert caught.value.lost or mistake is PublishesInPlace


@pytest.mark.parametrize("mistake", sorted(OVERWRITE, key=lambda kind: kind.__name__))
def test_a_mistake_of_the_store_is_found_in_an_overwrite(mistake: type[JournalStore]) -> None:
    with pytest.raises(CrashPointError):
        # Fewer states than one thing alone may lose are never looked at, so more only find more.
        explore(save(2.0), before=save(1.0), store_type=mistake, states_per_point=1)


# Orders of steps that make one mistake each, on a store without any.


def test_deleting_the_old_files_before_the_commit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = giantstep.saving.publish

    def publish(store: Any, save_id: str, *arguments: Any, before: bytes | None, **named: Any) -> Any:
        for name in _named_by(before) if before is not None else ():
            store.delete(name)
        return real(store, save_id, *arguments, before=before, **named)

    monkeypatch.setattr(giantstep.saving, "publish", publish)
    with pytest.raises(CrashPointError, match="does not verify"):
        explore(save(2.0), before=save(1.0))


def test_leaving_files_of_a_crashed_save_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_of_the_record_before(store: Any, record: Any, before: bytes | None) -> list[str]:
        old = save_id_in(before) if before is not None else None
        found = [name for name in files_of_ours(store) if save_id_of(name) == old is not None]
        for name in found:
            store.delete(name)
        for folder in ("", DATA_DIR):
            store.sync_names(folder)
        return found

    monkeypatch.setattr(giantstep.saving, "remove_superseded", only_of_the_record_before)
    explore(save(2.0), before=save(1.0))
    with pytest.raises(CrashPointError, match="AssertionError"):
        explore(save(2.0), before=save(1.0), again=check_next_save)


def test_removing_files_before_the_record_is_found() -> None:
    def careless(store: Any) -> None:
        for name in sorted(files_of_ours(store), reverse=True):
            store.delete(name)
        store.sync_names("")
        store.sync_names(DATA_DIR)

    with pytest.raises(CrashPointError, match="does not verify"):
        explore(careless, before=save(1.0))
    explore(remove_checkpoint, before=save(1.0))


def test_removing_files_before_the_removal_of_the_record_is_durable_is_found() -> None:
    class Hasty(JournalStore):
        def sync_names(self, folder: str) -> None:
            """Names are durable when the folders go."""

    with pytest.raises(CrashPointError, match="IncompleteError"):
        explore(remove_checkpoint, before=save(1.0), store_type=Hasty)


# A tiny protocol, to see one thing at a time.


def put(store: Any, name: str, value: int) -> None:
    store.publish(name, bytes([value]), f"{name}.tmp")


def values(store: Any) -> tuple[int, ...]:
    return tuple(read_all(store, name, 9)[0] for name in ("a", "b"))


def both(value: int) -> Callable[[Any], None]:
    def operation(store: Any) -> None:
        store.prepare("")
        put(store, "a", value)
        put(store, "b", value)

    return operation


def test_a_mix_of_old_and_new_is_found_and_the_message_says_when() -> None:
    with pytest.raises(
        CrashPointError, match=r"(?s)found \(2, 1\), expected \(1, 1\) or \(2, 2\).*last calls: .*rename"
    ) as caught:
        explore(both(2), before=both(1), check=values)
    assert caught.value.point > 0
    report = explore(both(2), before=both(1), check=values, also=[(2, 1)])
    assert set(report.outcomes) == {(1, 1), (2, 1), (2, 2)}


def test_what_an_earlier_operation_did_must_stay_and_each_may_only_follow_the_one_before() -> None:
    def first(store: Any) -> None:
        put(store, "a", 2)

    def second(store: Any) -> None:
        put(store, "b", 2)

    report = explore(first, second, before=both(1), check=values)
    assert set(report.outcomes) == {(1, 1), (2, 1), (2, 2)}

    class Late(JournalStore):
        """The first name is durable with the second."""

        def sync_names(self, folder: str) -> None:
            if "b" in self.names("") and values(self)[1] != 1:
                super().sync_names(folder)

    with pytest.raises(CrashPointError, match=r"found \(1, 1\), expected \(2, 1\)"):
        explore(first, second, before=both(1), check=values, store_type=Late)


def test_a_mistake_in_what_comes_next_is_found() -> None:
    def next_one(store: Any) -> None:
        assert list(store.names("")) == ["a", "b"], "a temporary file stays"

    with pytest.raises(CrashPointError, match="a temporary file stays"):
        explore(lambda store: put(store, "a", 2), before=both(1), check=values, again=next_one)


def test_an_operation_that_fails_by_itself_is_no_finding() -> None:
    def fail(store: Any) -> None:
        raise RuntimeError("the operation's own")

    with pytest.raises(RuntimeError, match="the operation's own"):
        explore(fail)


# The model.


def names_found(disk: Disk) -> set[tuple[str, ...]]:
    choices = disk.choices()
    ways, complete = decisions(choices, 1000, random.Random(0))
    assert complete
    return {tuple(sorted(disk.left(choices, way).folder_at("").names)) for way in ways}


def test_any_part_of_unflushed_names_survives() -> None:
    disk = Disk()
    for name in ("a", "b"):
        disk.create(name)
    assert names_found(disk) == {(), ("a",), ("b",), ("a", "b")}
    disk.sync_names("")
    assert names_found(disk) == {("a", "b")}
    disk.unlink("a")
    assert names_found(disk) == {("b",), ("a", "b")}
    disk.settle()
    disk.rename("b", "c")
    assert names_found(disk) == {(), ("b",), ("c",), ("b", "c")}
    disk.sync_names("")
    assert names_found(disk) == {("c",)}


def test_a_folder_that_was_not_flushed_is_lost_with_all_that_is_durable_in_it() -> None:
    disk = Disk()
    disk.mkdir("d")
    number = disk.create("d/a")
    disk.write(number, 0, b"x")
    disk.sync(number)
    disk.sync_names("d")
    assert names_found(disk) == {(), ("d",)}
    disk.sync_names("")
    assert names_found(disk) == {("d",)}


def contents_found(disk: Disk, name: str) -> set[bytes]:
    choices = disk.choices()
    ways, _ = decisions(choices, 1000, random.Random(0))
    found = [disk.left(choices, way) for way in ways]
    return {bytes(left.file(left.file_at(name)).data) for left in found}


def test_unflushed_bytes_are_lost_torn_zero_or_reordered_and_flushed_ones_stay() -> None:
    disk = Disk()
    number = disk.create("a")
    disk.write(number, 0, b"o" * 1024)
    disk.settle()
    disk.write(number, 0, b"n" * 1024)
    disk.write(number, 1024, b"n" * 1024)
    old, new, zero = b"o" * 512, b"n" * 512, bytes(512)
    assert contents_found(disk, "a") == {
        old * 2,
        new * 4,
        new * 2,
        old * 2 + new * 2,
        new + old + new + zero,
        old + new + zero + new,
        old * 2 + zero * 2,
    }
    disk.sync(number)
    assert contents_found(disk, "a") == {new * 4}
    disk.resize(number, 512)
    assert contents_found(disk, "a") == {new, new[:256], new * 4}


def test_names_of_one_file_lose_and_keep_its_bytes_together() -> None:
    disk = Disk()
    number = disk.create("a")
    disk.settle()
    disk.write(number, 0, b"new")
    disk.link("a", "b")
    disk.sync_names("")
    choices = disk.choices()
    ways, _ = decisions(choices, 100, random.Random(0))
    for way in ways:
        left = disk.left(choices, way)
        assert left.file_at("a") == left.file_at("b")


def test_where_not_all_states_are_looked_at_the_extremes_and_all_single_losses_are() -> None:
    disk = Disk()
    names = [f"n{row}" for row in range(12)]
    for name in names:
        disk.create(name)
    choices = disk.choices()
    ways, complete = decisions(choices, 40, random.Random(0))
    assert not complete
    assert len(ways) == len(set(ways)) == 40
    found = {tuple(sorted(disk.left(choices, way).folder_at("").names)) for way in ways}
    assert {(), tuple(sorted(names))} <= found
    assert {tuple(sorted(set(names) - {lost})) for lost in names} <= found


def test_contents_tells_bits_apart_and_leftovers_names_what_nobody_needs() -> None:
    store = JournalStore(Journal())
    assert contents(store) is None
    assert unneeded_files(store) == []
    save(1.0)(store)
    first = contents(store)
    save(1.0)(store)
    assert contents(store) == first
    gs.save({"w": torch.full((2000,), 1.0).neg().neg(), "value": 1.0}, store)
    assert contents(store) == first
    gs.save({"w": torch.full((2000,), 1.0), "value": 1}, store)
    assert contents(store) != first
    number = store.journal.disk.create("place/data/20200101T000000-0123456789abcdef-r00000-0.safetensors")
    store.journal.disk.write(number, 0, b"left")
    assert len(unneeded_files(store)) == 1
    store.delete(RECORD_NAME)
    assert len(unneeded_files(store)) == 3


def test_an_exploration_of_nothing_is_refused() -> None:
    """It would find no mistake, whatever there is."""
    elsewhere = JournalStore(Journal())
    for operations in ((), (lambda _: None,), (lambda _: save(1.0)(elsewhere),)):
        with pytest.raises(BadArgumentError, match="nothing can crash"):
            explore(*operations)
    for bad in (0, -1, True, 1.5, "3"):
        with pytest.raises(BadArgumentError, match="states_per_point="):
            explore(save(1.0), states_per_point=bad)  # type: ignore[arg-type]
