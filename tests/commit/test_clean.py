"""What is deleted after a commit, and what never is."""

from __future__ import annotations

import dataclasses

import torch

import giantstep as gs
from giantstep.commit.clean import discard_unless_published, remove_superseded
from giantstep.format.names import data_file_name, index_file_name
from giantstep.format.record import CommitRecord, FileEntry, encode_record
from giantstep.storage.base import Store
from giantstep.storage.memory import MemoryHandle, MemoryStore
from giantstep.storage.record_file import files_of_ours, read_record, read_record_bytes

OLDEST, OLD, LATER = (f"{year}0101T000000-0123456789abcdef" for year in (2001, 2002, 2999))


def saved(name: str) -> tuple[Store, CommitRecord]:
    """A committed checkpoint with a data file."""
    store = MemoryStore(name)
    store.clear()
    gs.save({"w": torch.ones(4)}, store)
    return store, read_record(store)


def add(store: Store, *names: str) -> None:
    for name in names:
        store.create(name, 1, direct=False).close()


def test_files_of_earlier_saves_go_unless_the_record_names_them() -> None:
    store, record = saved("clean-named")
    kept, left, later = data_file_name(OLD, 0, 0), data_file_name(OLD, 0, 1), data_file_name(LATER, 0, 0)
    add(store, kept, left, later, index_file_name(OLDEST), "data/notes.safetensors")
    record = dataclasses.replace(record, files=(*record.files, FileEntry(kept, 1, 0)))
    assert remove_superseded(store, record, None) == [index_file_name(OLDEST), left]
    names = {record.index.name, *(file.name for file in record.files), later, "checkpoint.json", "data/notes.safetensors"}
    assert set(files_of_ours(store)) == names


def test_files_that_the_record_before_named_go_however_late_their_save() -> None:
    store, record = saved("clean-before")
    late, running = data_file_name(LATER, 0, 0), data_file_name(LATER, 1, 0)
    add(store, late, running)
    before = encode_record(dataclasses.replace(record, save_id=OLD, files=(FileEntry(late, 1, 0),)))
    assert remove_superseded(store, record, before) == [late]
    assert running in files_of_ours(store)


def test_a_damaged_record_before_still_says_which_save_it_was() -> None:
    store, record = saved("clean-damaged")
    named, own = data_file_name("29980101T000000-0123456789abcdef", 0, 0), data_file_name(LATER, 0, 0)
    add(store, named, own)
    before = encode_record(dataclasses.replace(record, save_id=LATER, files=(FileEntry(named, 1, 0),)))
    assert remove_superseded(store, record, before.replace(b'"rank": 0', b'"rank": 1')) == [own]


def test_what_is_in_force_is_not_discarded() -> None:
    store, record = saved("clean-in-force")
    old = set(files_of_ours(store))
    assert not discard_unless_published(store, record.save_id)
    assert set(files_of_ours(store)) == old


def test_what_is_not_in_force_is_discarded_whole() -> None:
    store, _ = saved("clean-failed")
    old, data = set(files_of_ours(store)), read_record_bytes(store)
    add(store, f"checkpoint.json.{LATER}.tmp", index_file_name(LATER), data_file_name(LATER, 3, 0))
    assert discard_unless_published(store, LATER)
    assert set(files_of_ours(store)) == old
    assert read_record_bytes(store) == data


class LateStore(MemoryStore):
    """A network file system on which a rename that was reported as failed still takes place, right after the next look."""

    pending = ""

    def open_read(self, name: str, *, direct: bool = False) -> MemoryHandle:
        found = super().open_read(name)
        if name == "checkpoint.json" and self.pending in self._files():
            self._files()[name] = self._files().pop(self.pending)
        return found


def test_a_publish_that_is_still_on_its_way_loses_no_checkpoint() -> None:
    plain, record = saved("clean-late")
    store = LateStore("clean-late")
    late = dataclasses.replace(record, save_id=LATER, files=(FileEntry(data_file_name(LATER, 0, 0), 1, 0),))
    add(store, data_file_name(LATER, 0, 0))
    store.pending = f"checkpoint.json.{LATER}.tmp"
    store._files()[store.pending] = bytearray(encode_record(late))
    assert discard_unless_published(store, LATER)
    read_record_bytes(store)
    assert read_record(plain) == record
