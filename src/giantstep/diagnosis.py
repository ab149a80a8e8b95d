"""`diagnose`: what is wrong with a path, why, and what to do, in plain words. Changes nothing.

Not here: looking for leftovers of crashed saves (`recovery`). Called by users and the command `doctor`.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Sequence

from giantstep.examining import RESTORE_A_COPY, Diagnosis, Problem, examine, seems_whole, some_of
from giantstep.foreign_formats import foreign_file, foreign_format
from giantstep.format.names import DATA_DIR, RECORD_NAME, save_id_of
from giantstep.recovery import begun_at
from giantstep.steps import StepEntry, StepState, look_at_place, scan_steps, step_name, step_of
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, is_file_at, parent_at, store_at
from giantstep.storage.record_file import files_of_ours

__all__ = ["Diagnosis", "Problem", "diagnose"]

# While a job saves and removes steps, a look may come too late this often.
_MOST_LOOKS = 4


def diagnose(path: StoreLike, *, full: bool = False) -> Diagnosis:
    """Say what is wrong with a checkpoint, a root of steps, or whatever is at a path.

    Reads commit record, index, common state and the sizes of data files. Damage and failures of storage are reported, not
    raised.

    Args:
        path: as for `load`; or the root of steps, whose newest committed step is then looked at.
        full: read every byte, and compare it with its checksum.

    Raises:
        BadArgumentError: the path can never be one.
    """
    store = store_at(path)
    for _ in range(_MOST_LOOKS):
        found = Diagnosis(store.location)
        try:
            _look(path, store, found, full)
            break
        except _ChangedError as changed:
            # Saved anew or removed while its files were looked at: what they seemed to lack says nothing.
            found = changed.found
        except OSError as error:
            _unreadable(found.location, error, found)
            break
    if found.problems and not found.loads_instead:
        # Help, if there is any; what is wrong has been said.
        with contextlib.suppress(OSError):
            found.loads_instead = _beside(path, found.damaged_files)
    found.looked_at = found.looked_at or "it could not be read"
    return found


class _ChangedError(Exception):
    """A checkpoint is not the one any more that was found broken.

    Attributes:
        found: what was found all the same.
    """

    def __init__(self, found: Diagnosis) -> None:
        super().__init__(found.location)
        self.found = found


def _unreadable(location: str, error: OSError, found: Diagnosis) -> None:
    if isinstance(error, PermissionError):
        remedy = "Run as the user who saved it, or have the rights to read given (files: r, directories: r and x)."
        found.problem(f"permission to read all of {location} is denied", str(error), remedy)
    else:
        remedy = "Look at the disk or the network, and try again: this says nothing about the bytes that are stored."
        found.problem(f"{location} cannot be read", f"{type(error).__name__}: {error}", remedy)


def _beside(path: StoreLike, damaged: Collection[str]) -> str:
    """Path of another step beside a step; "" if there is none, or the path is no step's."""
    parent = parent_at(path)
    step = None if parent is None else step_of(parent[1])
    return "" if parent is None or step is None else _another(parent[0], scan_steps(parent[0]), step, damaged)


def _look(path: StoreLike, store: Store, found: Diagnosis, full: bool) -> None:
    if is_file_at(path):
        _file(path, found)
        return
    if not store.exists() and not any(store.folders()):
        _missing(store, found)
        return
    inside, entry = scan_steps(store), look_at_place(store)
    if inside and not entry.save_ids and entry.record is None:
        _root(store, inside, found, full)
        return
    _place(store, entry, found, full)


def _file(path: StoreLike, found: Diagnosis) -> None:
    found.looked_at = "a file"
    parent = parent_at(path)
    format_found, name = "", ""
    if parent is not None:
        name, format_found = parent[1], foreign_file(*parent)
    if parent is not None and (name == RECORD_NAME or save_id_of(name) or save_id_of(f"{DATA_DIR}/{name}")):
        folder = parent[0].location
        place = folder.removesuffix(f"/{DATA_DIR}") if save_id_of(f"{DATA_DIR}/{name}") else folder
        found.problem(
            f"{found.location} is a file of a checkpoint", "a checkpoint is a directory", f"Name the directory: {place}"
        )
    elif format_found:
        found.problem(f"{found.location} is {format_found}", "giantstep does not open it", _convert())
    else:
        found.problem(
            f"{found.location} is a file", f"a checkpoint is a directory that holds {RECORD_NAME}", "Name a directory."
        )


def _convert() -> str:
    return "Load it with the library that wrote it, into a state dict, and save that with giantstep.save."


def _missing(store: Store, found: Diagnosis) -> None:
    found.looked_at = "nothing"
    above, missing = parent_at(store), ""
    while above is not None:
        place, missing = above
        if place.exists() or any(place.folders()):
            break
        above = parent_at(place)
    if above is None:
        found.problem(f"{found.location} does not exist", "nothing is there", "Look at the path.")
        return
    there = sorted({*place.folders(), *(name.rpartition("/")[2] for name in place.names(""))})
    near = difflib.get_close_matches(missing, there, n=3)
    remedy = f"Did you mean {' or '.join(f'{place.location}/{name}' for name in near)}?" if near else "Look at the path."
    why = f"{place.location} holds no {missing!r}, but {some_of(there)}" if there else f"{place.location} is empty"
    why = f"{place.location} is a file" if is_file_at(place) else why
    found.problem(f"{found.location} does not exist", why, remedy)
    found.loads_instead = _another(place, scan_steps(place), step_of(missing), [])


def _root(store: Store, entries: Sequence[StepEntry], found: Diagnosis, full: bool) -> None:
    states = {state: [entry.step for entry in entries if entry.state is state] for state in StepState}
    listed = "; ".join(f"{state.value}: {some_of(steps)}" for state, steps in states.items() if steps)
    newest = max((entry for entry in entries if entry.record is not None), key=lambda entry: entry.step, default=None)
    root = store.location
    if newest is None:
        found.looked_at = "a root of steps"
        found.problem(
            f"{root} holds no committed step", f"its steps are {listed}", "Look at each of them with giantstep doctor."
        )
    for entry in entries:
        if newest is not None and entry.step < newest.step:
            continue
        if entry.error is not None:
            _unreadable(store.folder(entry.name).location, entry.error, found)
        elif entry.state in (StepState.DAMAGED, StepState.NEWER):
            _place(store.folder(entry.name), entry, found, full)
        elif entry.state is StepState.UNFINISHED and newest is not None:
            found.note(f"step {entry.step} is newer and not committed", entry.problem)
    if newest is not None:
        place = store.folder(newest.name)
        remedy = f"Name the step to load it: {place.location}"
        found.note(f"{root} is a root of steps, of which the newest committed one was looked at", f"steps: {listed}", remedy)
        found.location = place.location
        newer = bool(found.problems)
        try:
            _place(place, newest, found, full)
        except OSError as error:
            _unreadable(place.location, error, found)
        if found.problems:
            broken = len(found.problems) > newer
            found.loads_instead = _another(store, entries, newest.step if broken else None, found.damaged_files)


def _place(store: Store, entry: StepEntry, found: Diagnosis, full: bool) -> None:
    """One directory that is no root."""
    location = store.location
    if entry.record is not None:
        before = len(found.problems)
        examine(store, entry.record, found, full)
        if len(found.problems) > before and look_at_place(store).record != entry.record:
            raise _ChangedError(found)
        return
    if entry.error is not None:
        _unreadable(location, entry.error, found)
        return
    found.looked_at = found.looked_at or f"no checkpoint: {entry.state.value}"
    if entry.state is StepState.DAMAGED:
        found.problem(f"the commit record of {location} is damaged", entry.problem, RESTORE_A_COPY)
    elif entry.state is StepState.NEWER:
        found.problem(f"{location} is written in a newer version of the format", entry.problem, "Upgrade giantstep.")
    elif entry.save_ids:
        begun = begun_at(entry.save_ids[-1])
        since = "" if begun is None else f", the newest of a save that began at {begun:%Y-%m-%d %H:%M:%S} UTC"
        why = f"it holds no {RECORD_NAME}, which is written last, only files of saves{since}"
        remedy = "Wait if the save is running. If it crashed, load another step; giantstep recover removes what it left."
        found.problem(f"{location} holds a save that never committed", why, remedy)
    else:
        _foreign(store, found)


def _foreign(store: Store, found: Diagnosis) -> None:
    location, names = store.location, files_of_ours(store)
    parent = parent_at(store)
    if parent is not None and parent[1] == DATA_DIR and look_at_place(parent[0]).save_ids:
        remedy = f"Name the directory above: {parent[0].location}"
        found.problem(f"{location} holds data files of a checkpoint", "it is a part of one", remedy)
        return
    kind = foreign_format(store, [name for name in names if not name.startswith(f"{DATA_DIR}/")])
    if kind:
        found.problem(f"{location} is {kind}", "giantstep does not open it", _convert())
        return
    held = sorted([*names, *(f"{name}/" for name in store.folders())])
    why = f"it holds no {RECORD_NAME} of giantstep's, but {some_of(held)}" if held else "it is empty"
    found.problem(f"{location} is no checkpoint", why, "Look at the path.")


def _another(root: Store, entries: Sequence[StepEntry], step: int | None, damaged: Collection[str]) -> str:
    """Path of the newest step before `step` whose files are all there, else of the newest after it; "" if there is none.

    Args:
        damaged: names of data files. Steps that share them, as incremental saves do, are as damaged.
    """
    committed = [entry for entry in entries if entry.record is not None and entry.step != step]
    committed.sort(key=lambda entry: (step is None or entry.step < step, entry.step), reverse=True)
    for entry in committed:
        store = root.folder(step_name(entry.step))
        if entry.record is None or not {file.name for file in entry.record.files}.isdisjoint(damaged):
            continue
        if seems_whole(store, entry.record):
            return store.location
    return ""
