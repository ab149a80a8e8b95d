"""For `diagnosis`: what it reports, and how a committed checkpoint is looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import CorruptionError, GiantstepError, OpenError
from giantstep.format.codec import Unregistered
from giantstep.format.index import Index
from giantstep.format.names import is_save_id, save_id_of
from giantstep.format.record import CommitRecord
from giantstep.reading.checkpoint import Checkpoint
from giantstep.reading.data_files import check_data_files
from giantstep.reading.verify import Damage, look_at_files, verify_files
from giantstep.storage.base import NotAFileError, Store, reading
from giantstep.storage.record_file import files_of_ours

RESTORE_A_COPY = "Restore the file from a copy, or load another step."
_NAMED = 5
# What stands before the columns of an index.
_HEAD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Problem:
    """Something worth knowing: what it is, why it is said, and what to do about it ("" if nothing)."""

    what: str
    why: str
    remedy: str


@dataclass(slots=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        location: what was looked at: of a root, its newest committed step.
        looked_at: what it is, and how closely it was looked at.
        problems: what keeps it from being loaded, or a newer step from being the newest.
        notes: what does not.
        loads_instead: path of another step of the same root whose files are all there, and that shares none that is damaged; ""
            if none is needed, or there is none.
        damaged_files: names of data files that are there and not what was written.
    """

    location: str
    looked_at: str = ""
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    loads_instead: str = ""
    damaged_files: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def problem(self, what: str, why: str, remedy: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(what, why, remedy))

    def note(self, what: str, why: str, remedy: str = "") -> None:
        """Add a note."""
        self.notes.append(Problem(what, why, remedy))


def examine(store: Store, record: CommitRecord, found: Diagnosis, full: bool) -> None:
    """Add to `found` what is wrong with a committed checkpoint; `full`: read every byte."""
    depth = "every byte was read" if full else "index and sizes of files were looked at"
    totals = record.totals
    found.looked_at = f"a checkpoint of {totals.tensors} tensors in {len(record.files)} data files, {depth}"
    unneeded = {name for name in files_of_ours(store) if save_id_of(name)} - {record.index.name}
    unneeded -= {file.name for file in record.files}
    if unneeded:
        why = "they are of a save that runs or crashed, or of a replaced checkpoint"
        remedy = "giantstep recover says of which, and removes them."
        found.note(f"{len(unneeded)} files that this checkpoint does not need lie beside it", why, remedy)
    before = len(found.problems)
    index: Index | None = None
    try:
        checkpoint = Checkpoint(store, record, OBJECT_CODEC, unknown="keep")
        index = checkpoint.index_tables().load_all()
    except (CorruptionError, OpenError) as error:
        found.problem(
            f"the index of {store.location} is missing or damaged", _index_words(store, record, error), RESTORE_A_COPY
        )
    if index is None or not full:
        damages = look_at_files(store, record, index)
    else:
        damages = verify_files(store, record, checkpoint.index_tables(), None).damages
    for damage in damages:
        _damaged(damage, found)
        if damage.rank is not None and damage.file not in found.damaged_files and _is_there(store, damage.file):
            found.damaged_files.append(damage.file)
    if len(found.problems) == before:
        _common(checkpoint, found)


def _index_words(store: Store, record: CommitRecord, error: GiantstepError) -> str:
    """The error, or that the file is another save's index."""
    try:
        with reading(store, record.index.name) as handle:
            head = bytearray(min(_HEAD_BYTES, handle.size))
            handle.read_into(0, memoryview(head))
    except (FileNotFoundError, NotAFileError):
        return error.message
    match = re.search(rb'"save_id": ?"([^"]*)"', head)
    save_id = match[1].decode("ascii", "replace") if match else ""
    if is_save_id(save_id) and save_id != record.save_id:
        return f"{record.index.name} says it is the index of save {save_id}, the commit record is of save {record.save_id}"
    return error.message


def _damaged(damage: Damage, found: Diagnosis) -> None:
    by = "" if damage.rank is None else f", written by rank {damage.rank},"
    affected = f"it holds {some_of(damage.tensors)}" if damage.tensors else "it holds nothing that is named"
    found.problem(f"file {damage.file}{by} is not what was written", f"{damage.problem}; {affected}", RESTORE_A_COPY)


def _is_there(store: Store, name: str) -> bool:
    try:
        store.size(name)
    except FileNotFoundError:
        return False
    return True


def _common(checkpoint: Checkpoint, found: Diagnosis) -> None:
    """Whether the common state is made of types that are known here."""
    try:
        common = checkpoint.common
    except CorruptionError as error:
        found.problem(f"the common state of {checkpoint.location} is damaged", error.message, RESTORE_A_COPY)
        return
    except GiantstepError as error:
        remedy = "Mend the class or its registration in this process."
        found.problem(f"the common state of {checkpoint.location} cannot be decoded", error.message, remedy)
        return
    places: dict[tuple[str, bool], list[str]] = {}
    for where, value in _unregistered(common, ()):
        places.setdefault((value.name, value.members is not None), []).append(where)
    for (name, is_enum), keys in sorted(places.items()):
        remedy = f"Before loading, giantstep.register_type(..., name={name!r}); or load with unknown_types='keep'."
        if is_enum:
            remedy = f"Before loading, import the module {name.partition(':')[0]!r}; or load with unknown_types='keep'."
        why = f"the common state holds values of it at {some_of(keys)}"
        found.note(f"type {name!r} is not registered in this process", why, remedy)


def _unregistered(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Unregistered]]:
    if isinstance(value, Unregistered):
        yield ".".join(path), value
        yield from _unregistered(value.value, path)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _unregistered(part, (*path, str(key)))
    elif isinstance(value, list | tuple | set | frozenset):
        for number, part in enumerate(value):
            yield from _unregistered(part, (*path, str(number)))


def seems_whole(store: Store, record: CommitRecord) -> bool:
    """Whether the index is what was written, and data files have their sizes."""
    try:
        Checkpoint(store, record, OBJECT_CODEC, unknown="keep").index_tables().load_all()
        check_data_files(store, record)
    except (GiantstepError, OSError):
        return False
    return True


def some_of(values: Sequence[object]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(values) - _NAMED} more" if len(values) > _NAMED else ""
    return ", ".join(map(str, values[:_NAMED])) + more
