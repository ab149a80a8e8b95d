"""Deleting what no committed checkpoint needs. Foreign files are never touched."""

from __future__ import annotations

from collections.abc import Callable

from giantstep.format.names import DATA_DIR, is_data_file, save_id_of
from giantstep.format.record import save_id_in
from giantstep.storage.base import Store
from giantstep.storage.record_file import files_of_ours


def remove_superseded(store: Store, committed: str, before: bytes | None) -> list[str]:
    """Delete the files of the superseded save and of all that began before the committed one; return their names.

    Args:
        store: the place.
        committed: id of the save that is in force now.
        before: bytes of the commit record that was in force before.

    Called after a commit. Files of earlier checkpoints in this place and of crashed saves go, index before
    data, in the inverse order of their making. Files of a save that began later stay: it may be running.
    """
    superseded = save_id_in(before) if before is not None else None
    return _remove(store, lambda save_id: save_id < committed or save_id == superseded)


def discard(store: Store, save_id: str, rank: int) -> list[str]:
    """Delete what this rank wrote for a save that all ranks agreed to give up before it was published."""
    return _remove(store, lambda found: found == save_id, f"{DATA_DIR}/{save_id}-r{rank:05d}-")


def _remove(store: Store, unwanted: Callable[[str], bool], prefix: str = "") -> list[str]:
    doomed = []
    for name in files_of_ours(store):
        save_id = save_id_of(name)
        if save_id is not None and name.startswith(prefix) and unwanted(save_id):
            doomed.append(name)
    doomed.sort(key=lambda name: (is_data_file(name), name))
    for name in doomed:
        store.delete(name)
    if doomed:
        for folder in ("", DATA_DIR):
            store.sync_names(folder)
    return doomed
