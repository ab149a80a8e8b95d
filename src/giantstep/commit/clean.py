"""Deleting what no committed checkpoint needs. Foreign files are never touched.

Called by `saving` and `removal`, after a commit or for a save that was given up.
"""

from __future__ import annotations

from collections.abc import Callable

from giantstep.commit.publish import current_record, temporary_record_name
from giantstep.errors import CorruptionError, VersionError
from giantstep.format.names import DATA_DIR, RECORD_NAME, is_data_file, save_id_of
from giantstep.format.record import CommitRecord, decode_record, save_id_in
from giantstep.storage.base import Store
from giantstep.storage.record_file import files_of_ours


def remove_superseded(store: Store, record: CommitRecord, before: bytes | None) -> list[str]:
    """Delete the files of the superseded checkpoint and of all saves that began before the committed one; return their names.

    Args:
        store: the place.
        record: the commit record that is in force now.
        before: bytes of the commit record that was in force before.

    Called after a commit. Files of earlier checkpoints in this place and of crashed saves go, index before
    data, in the inverse order of their making. Files of a save that began later stay: it may be running.
    """
    # Invariant: nothing goes that the record in force names, however old: a removal keeps data files of earlier saves.
    needed = {record.index.name, *(file.name for file in record.files)}
    superseded_id = save_id_in(before) if before is not None else None
    superseded = _named_by(before) if before is not None else frozenset()

    def unwanted(name: str, save_id: str) -> bool:
        old = save_id < record.save_id or save_id == superseded_id or name in superseded
        return old and name not in needed

    return _remove(store, unwanted)


def _named_by(record_bytes: bytes) -> frozenset[str]:
    """Data files that a commit record names; they may carry ids of saves other than its own, later ones if clocks ran back."""
    try:
        record = decode_record(record_bytes, RECORD_NAME)
    except (CorruptionError, VersionError):
        # Nothing that such a record names can be known; what carries its id or an older one goes all the same.
        return frozenset()
    return frozenset(file.name for file in record.files)


def discard(store: Store, save_id: str, rank: int) -> list[str]:
    """Delete what this rank wrote for a save that all ranks agreed to give up before it was published."""
    return _remove(store, lambda _, found: found == save_id, f"{DATA_DIR}/{save_id}-r{rank:05d}-")


def discard_save(store: Store, save_id: str) -> list[str]:
    """Delete what all ranks of a host wrote and received for a save that was given up before it was published."""
    return _remove(store, lambda _, found: found == save_id)


def discard_unless_published(store: Store, save_id: str) -> bool:
    """Delete everything that a failed save of one process wrote, unless it is in force; return whether it is not.

    A `publish` that raised may have taken effect, or on a slow network still be on its way. Once the temporary name
    is gone it can no longer take effect; what is in force then stays in force.
    """
    store.delete(temporary_record_name(save_id))
    store.sync_names("")
    found = current_record(store)
    if found is not None and save_id_in(found) == save_id:
        return False
    _remove(store, lambda _, found_id: found_id == save_id)
    return True


def _remove(store: Store, unwanted: Callable[[str, str], bool], prefix: str = "") -> list[str]:
    """Delete the files of ours that begin with `prefix` and of which `unwanted(name, save id)` is true."""
    doomed = []
    for name in files_of_ours(store):
        save_id = save_id_of(name)
        if save_id is not None and name.startswith(prefix) and unwanted(name, save_id):
            doomed.append(name)
    doomed.sort(key=lambda name: (is_data_file(name), name))
    for name in doomed:
        store.delete(name)
    if doomed:
        for folder in ("", DATA_DIR):
            store.sync_names(folder)
    return doomed
