"""Removing a whole checkpoint, and what a save left that never committed. Foreign files are never touched."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable

from giantstep.commit.publish import current_record
from giantstep.format.names import DATA_DIR, RECORD_NAME, is_data_file, save_id_of
from giantstep.format.record import decode_record
from giantstep.storage.base import Store
from giantstep.storage.record_file import files_of_ours, record_seal


def remove_checkpoint(store: Store) -> list[str]:
    """Remove the checkpoint at a place, or what is left of one; return the names of the files that were deleted.

    The commit record goes first, durably: after a crash the checkpoint is there, whole, or it is not, and a further call
    removes the rest. Then go index and data files, then the directories, unless they hold foreign files.

    Must not be called while the place is being saved to. Several processes may do this at once.

    Raises:
        NotACheckpointError: a `checkpoint.json` is there that giantstep has not written. Nothing was deleted.
        OSError: a storage operation failed.
    """
    doomed = [name for name in files_of_ours(store) if save_id_of(name) is not None]
    doomed.sort(key=lambda name: (is_data_file(name), name))
    if current_record(store) is not None:
        store.delete(RECORD_NAME)
        # Invariant: nothing that a commit record names goes before the record is gone for good.
        _sync(store, "")
        doomed.insert(0, RECORD_NAME)
    for name in doomed:
        if name != RECORD_NAME:
            store.delete(name)
    if store.exists():
        for folder in (DATA_DIR, ""):
            _remove_folder(store, folder)
    return doomed


def remove_leftovers(store: Store, names: Iterable[str]) -> list[str]:
    """Delete those of the named files that the commit record in force does not name; return which they were.

    Foreign files and the record itself stay. Where there is no record, folders that hold nothing any more go too.

    Raises:
        NotACheckpointError, CorruptionError, VersionError: there is a record of which cannot be known what it names. Nothing
            was deleted.
        OSError: a storage operation failed.
    """
    seal, found = record_seal(store), current_record(store)
    needed = set[str]()
    if found is not None:
        record = decode_record(found, f"{store.location}/{RECORD_NAME}")
        # Invariant: nothing goes that a record in force names.
        needed = {record.index.name, *(file.name for file in record.files)}
    wanted = set(names) - needed
    doomed = [name for name in files_of_ours(store) if name in wanted and save_id_of(name) is not None]
    doomed.sort(key=lambda name: (is_data_file(name), name))
    for number, name in enumerate(doomed):
        # A save may have committed since: what its record names must stay, and that is for the next call to see.
        if record_seal(store) != seal:
            del doomed[number:]
            break
        store.delete(name)
    for folder in sorted({DATA_DIR if is_data_file(name) else "" for name in doomed}):
        _sync(store, folder)
    if found is None and store.exists():
        for folder in (DATA_DIR, ""):
            _remove_folder(store, folder)
    return doomed


def _remove_folder(store: Store, folder: str) -> None:
    try:
        store.remove_empty(folder)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        # Somebody keeps files of their own there.
        _sync(store, folder)


def _sync(store: Store, folder: str) -> None:
    """Make deletions durable; what another process has removed meanwhile needs no more."""
    with contextlib.suppress(FileNotFoundError):
        store.sync_names(folder)
