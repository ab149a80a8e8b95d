"""For `recovery`: what there is to find under a root, and judging whether it is certainly of no use."""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from giantstep.format.names import DATA_DIR, RECORD_NAME, is_index_file, save_id_of
from giantstep.steps import PIN_NAME, StepEntry, StepState, step_of
from giantstep.storage.base import NotAFileError, Store
from giantstep.storage.locate import lies_elsewhere
from giantstep.storage.record_file import files_of_ours

_NAMED = 5


class FindingKind(enum.Enum):
    """What was found."""

    LEFTOVER = "leftover"
    """Data files, index or temporary record of a save that never committed."""
    SUPERSEDED = "superseded"
    """Files of a checkpoint that another one replaced in the same place."""
    PARTLY_REMOVED = "partly removed"
    """Index and data files without a commit record: a removal stopped half-way, or a save at its very end."""
    EMPTY = "empty"
    """A step's directory that holds nothing."""
    DAMAGED = "damaged record"
    """A commit record that is not what was written, and the files beside it."""
    NEWER = "newer version"
    """A checkpoint of a newer major version of the format."""
    FOREIGN = "foreign"
    """Files or directories that giantstep has not written."""
    UNREADABLE = "unreadable"
    """What the system does not let this process look at: it may be anything, also a good checkpoint."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is no part of a good checkpoint.

    Attributes:
        path: the directory where it lies.
        kind: see `FindingKind`.
        save_id: of the save that wrote it, the newest one if there are several; "" if none did.
        begun: when that save began, by its id, in UTC; None if unknown.
        bytes: sizes of the files together. Those that other steps share take no room of their own.
        words: what it is.
        removable: whether `clean` removes it.
        why: it is, or is not.
        files: names in the directory.
        in_force: save id of the commit record in force there; "" if there is none.
        store: the directory.
    """

    path: str
    kind: FindingKind
    save_id: str
    begun: dt.datetime | None
    bytes: int
    words: str
    removable: bool
    why: str
    files: tuple[str, ...]
    in_force: str = ""
    store: Store | None = field(default=None, repr=False, compare=False)


def begun_at(save_id: str) -> dt.datetime | None:
    """When a save began, by its id; None if the id says no time."""
    try:
        return dt.datetime.strptime(save_id[:15], "%Y%m%dT%H%M%S").replace(tzinfo=dt.UTC)
    except ValueError:
        return None


class Look:
    """Judges places under one root.

    Args:
        now, older_than_secs: see `inspect`.
        steps: of the root; empty if it is not known.
    """

    def __init__(self, now: dt.datetime, older_than_secs: float, steps: Sequence[StepEntry]) -> None:
        self._now, self._secs = now, older_than_secs
        committed = [entry for entry in steps if entry.record is not None]
        self._newest = max((entry.step for entry in committed), default=None)
        records = [entry.record for entry in committed if entry.record is not None]
        self._newest_id = max((record.save_id for record in records), default="")
        self._named = {file.name for record in records for file in record.files}
        self._unreadable = [entry.name for entry in steps if entry.state is StepState.UNREADABLE]

    def at(self, store: Store, entry: StepEntry, step: int | None) -> list[Finding]:
        """What is found in one place."""
        try:
            return [_unreadable(store, entry.error)] if entry.error is not None else self._at(store, entry, step)
        except OSError as error:
            return [_unreadable(store, error)]

    def _at(self, store: Store, entry: StepEntry, step: int | None) -> list[Finding]:
        names = files_of_ours(store)
        ours = [name for name in names if save_id_of(name) is not None]
        found: list[Finding] = []
        if entry.state is StepState.COMMITTED:
            found += self._in_committed(store, entry, ours)
        elif entry.state is StepState.UNFINISHED and ours:
            found.append(self._unfinished(store, ours, step, pinned=PIN_NAME in names))
        elif entry.state in (StepState.DAMAGED, StepState.NEWER):
            found.append(self._kept(store, entry, [RECORD_NAME, *ours]))
        known = {RECORD_NAME, PIN_NAME, *ours} if entry.state is not StepState.FOREIGN else set(ours)
        foreign = sorted(set(names) - known)
        # Under a root, directories beside the files of a checkpoint are its steps.
        folders = sorted(name for name in store.folders() if name != DATA_DIR and step_of(name) is None)
        if foreign or folders:
            found.append(_foreign(store, foreign, folders))
        elif entry.state is StepState.UNFINISHED and not ours and PIN_NAME not in names and store.exists():
            found.append(self._empty(store, step))
        return found

    def _in_committed(self, store: Store, entry: StepEntry, ours: list[str]) -> list[Finding]:
        """Files that the record in force does not name, by save."""
        record = entry.record
        if record is None:
            return []
        needed = {record.index.name, *(file.name for file in record.files)}
        by_save: dict[str, list[str]] = {}
        for name in ours:
            if name not in needed:
                by_save.setdefault(save_id_of(name) or "", []).append(name)
        running = self._may_run(max(by_save, default=""))
        found = []
        for save_id, files in sorted(by_save.items()):
            replaced = save_id < record.save_id and any(map(is_index_file, files))
            kind = FindingKind.SUPERSEDED if replaced else FindingKind.LEFTOVER
            words = "files of a checkpoint that was replaced here" if replaced else "files of a save that never committed"
            if save_id == record.save_id:
                words = "what a loss of power left of the commit of this checkpoint"
            why = running
            if not why and set(files) <= self._named:
                why = "they are files of another step, linked and without room of their own: an incremental save may have begun"
            why = why or self._unknown_links()
            words += f"; the checkpoint here, of save {record.save_id}, does not need them"
            found.append(self._finding(store, kind, files, words, why, in_force=record.save_id))
        return found

    def _unfinished(self, store: Store, ours: list[str], step: int | None, *, pinned: bool) -> Finding:
        kind, words = FindingKind.LEFTOVER, "a save that never committed: it crashed, or is running"
        whole = any(map(is_index_file, ours))
        if whole:
            kind = FindingKind.PARTLY_REMOVED
            words = (
                "index and data files without a commit record: a removal that stopped half-way, or a save that did at its end"
            )
        overtaken = step is not None and self._newest is not None and step < self._newest
        save_ids = {save_id_of(name) or "" for name in ours}
        why = self._may_run(max(save_ids))
        if not why and pinned:
            why = f"the step is pinned: delete the file {PIN_NAME!r} first"
        if not why and whole and not overtaken:
            why = "no newer step is committed: if its commit record was lost, this may be the only checkpoint"
        if not why and self._newest is not None and not overtaken and max(save_ids) <= self._newest_id:
            # An incremental save first links files of earlier saves, and only then writes some of its own.
            why = (
                "it holds only files of earlier saves and is newer than all committed steps: an incremental save may have begun"
            )
        if not why and not overtaken:
            why = self._unknown_links()
        return self._finding(store, kind, ours, words, why)

    def _unknown_links(self) -> str:
        """Why files must be taken for links of an incremental save that begins; "" if all records are known."""
        some = ", ".join(self._unreadable[:_NAMED])
        return f"{some} cannot be read: these may be links to its files, and an incremental save may have begun" if some else ""

    def _kept(self, store: Store, entry: StepEntry, files: list[str]) -> Finding:
        if entry.state is StepState.NEWER:
            return self._finding(
                store, FindingKind.NEWER, files, entry.problem, "this version cannot judge it: upgrade giantstep"
            )
        why = f"it may be repaired: restore {RECORD_NAME} from a copy, or delete the directory yourself"
        return self._finding(store, FindingKind.DAMAGED, files, entry.problem, why)

    def _empty(self, store: Store, step: int | None) -> Finding:
        why = ""
        if step is None or self._newest is None or step > self._newest:
            why = "no newer step is committed: a save may be about to begin here"
        return self._finding(store, FindingKind.EMPTY, [], "an empty directory", why, good="a newer step is committed")

    def _may_run(self, save_id: str) -> str:
        """Why a save must be taken for one that runs; "" if it need not."""
        begun = begun_at(save_id) if save_id else None
        if begun is None:
            return "when the save began cannot be told" if save_id else ""
        if (self._now - begun).total_seconds() < self._secs:
            return f"the save began at {begun:%Y-%m-%d %H:%M:%S} UTC, less than {self._secs:g} seconds ago: it may be running"
        return ""

    def _finding(
        self, store: Store, kind: FindingKind, files: list[str], words: str, why: str, *, good: str = "", in_force: str = ""
    ) -> Finding:
        """A finding that is removable unless `why` says why not."""
        if not why and lies_elsewhere(store):
            why = "it is a link to a directory elsewhere, which may be in use there: name that directory"
        save_id = max((save_id_of(name) or "" for name in files), default="")
        good = good or f"no commit record needs it, and the save began more than {self._secs:g} seconds ago"
        return Finding(
            path=store.location,
            kind=kind,
            save_id=save_id,
            begun=begun_at(save_id) if save_id else None,
            bytes=sum(_size(store, name) for name in files),
            words=words,
            removable=not why,
            why=why or good,
            files=tuple(files),
            in_force=in_force,
            store=store,
        )


def _unreadable(store: Store, error: OSError) -> Finding:
    return Finding(
        path=store.location,
        kind=FindingKind.UNREADABLE,
        save_id="",
        begun=None,
        bytes=0,
        words=f"it cannot be read: {type(error).__name__}: {error}",
        removable=False,
        why="it may be a good checkpoint",
        files=(),
        store=store,
    )


def _foreign(store: Store, files: list[str], folders: list[str]) -> Finding:
    names = [*files, *(f"{name}/" for name in folders)]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    size = sum(_size(store, name) for name in files)
    return Finding(
        path=store.location,
        kind=FindingKind.FOREIGN,
        save_id="",
        begun=None,
        bytes=size,
        words=f"not written by giantstep: {', '.join(names[:_NAMED])}{more}",
        removable=False,
        why="giantstep deletes only what it has written",
        files=tuple(files),
        store=store,
    )


def _size(store: Store, name: str) -> int:
    try:
        return store.size(name)
    except (FileNotFoundError, NotAFileError):
        # Deleted since it was listed, a link to nowhere, or a pipe.
        return 0
