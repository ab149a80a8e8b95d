"""Steps: checkpoints named `step_00000100` under one root, and what else lies there.

The truth about which steps exist is the scan of the root: a step is there if its directory holds an intact commit record.
Not here: which of them to keep (`manager`), and removing one (`commit`).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from giantstep.errors import BadArgumentError, CorruptionError, OpenError, VersionError
from giantstep.format.names import save_id_of
from giantstep.format.record import CommitRecord, decode_record
from giantstep.storage.base import Store
from giantstep.storage.record_file import files_of_ours, read_record_bytes

_STEP = re.compile(r"step_([0-9]{8,18})")
_LARGEST = 10**18 - 1

PIN_NAME = "pinned"
"""A file of this name in a step's directory keeps the step, whatever the rules of a manager say."""


def step_name(step: int) -> str:
    """Name of a step's directory: at least eight digits, so that names sort as steps do."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= _LARGEST:
        raise BadArgumentError(f"step={step!r} cannot be: expected an int from 0 to {_LARGEST}")
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a directory of this name; None if it is no step's."""
    match = _STEP.fullmatch(name)
    # Other spellings of the same number are somebody else's directories.
    return int(match[1]) if match and step_name(int(match[1])) == name else None


class StepState(enum.Enum):
    """What a directory with the name of a step holds."""

    COMMITTED = "committed"
    """A checkpoint, by its intact commit record; files and bytes are not looked at."""
    UNFINISHED = "unfinished"
    """Files of a save without a commit record: the save runs, or it crashed; or a removal crashed. Or nothing at all."""
    DAMAGED = "damaged"
    """A commit record of ours that is not what was written."""
    NEWER = "newer"
    """A checkpoint of a newer major version of the format."""
    FOREIGN = "foreign"
    """Files, none of which giantstep has written."""
    UNREADABLE = "unreadable"
    """The system does not let this process look: it may be anything, also a good checkpoint."""


@dataclass(frozen=True, slots=True)
class StepEntry:
    """A directory with the name of a step.

    Attributes:
        step: its number.
        state: what it holds.
        record: the commit record, if `state` is COMMITTED.
        save_ids: of all files of saves in it, sorted; of an UNREADABLE one, as far as they are known.
        problem: in words why it is not committed; "" if it is.
        error: what the system said, if `state` is UNREADABLE.
    """

    step: int
    state: StepState
    record: CommitRecord | None
    save_ids: tuple[str, ...]
    problem: str = ""
    error: OSError | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Name of the directory."""
        return step_name(self.step)


def scan_steps(root: Store) -> list[StepEntry]:
    """All directories with names of steps under a root, by step; empty if there is no such root.

    Reads commit records, nothing else. Directories with other names are not looked into. Where a directory or record
    cannot be read, the step is UNREADABLE, and the others are looked at all the same.

    Raises:
        OSError: the root cannot be read.
    """
    steps = sorted(step for step in map(step_of, root.folders()) if step is not None)
    return [look_at_step(root, step) for step in steps]


def newest_first(root: Store) -> Iterator[StepEntry]:
    """As `scan_steps`, from the newest to the oldest; each is read when it is asked for."""
    for step in sorted((step for step in map(step_of, root.folders()) if step is not None), reverse=True):
        yield look_at_step(root, step)


def look_at_step(root: Store, step: int) -> StepEntry:
    """One of them; never raises `OSError`. A directory that is not there is UNFINISHED and holds nothing."""
    return look_at_place(root.folder(step_name(step)), step)


def look_at_place(store: Store, step: int = 0) -> StepEntry:
    """What a place holds, whatever its name is; never raises `OSError`."""
    names: list[str] = []
    save_ids: tuple[str, ...] = ()
    try:
        names = files_of_ours(store)
        save_ids = tuple(sorted({found for found in map(save_id_of, names) if found}))
        data = read_record_bytes(store)
        record = decode_record(data, f"{store.location}/checkpoint.json")
    except VersionError as error:
        return StepEntry(step, StepState.NEWER, None, save_ids, error.message)
    except CorruptionError as error:
        ours = bool(save_ids)
        return StepEntry(step, StepState.DAMAGED if ours else StepState.FOREIGN, None, save_ids, error.message)
    except OpenError as error:
        state = StepState.UNFINISHED if save_ids or not names else StepState.FOREIGN
        return StepEntry(step, state, None, save_ids, error.message)
    except OSError as error:
        problem = f"{store.location} cannot be read: {type(error).__name__}: {error}"
        return StepEntry(step, StepState.UNREADABLE, None, save_ids, problem, error)
    return StepEntry(step, StepState.COMMITTED, record, save_ids)
