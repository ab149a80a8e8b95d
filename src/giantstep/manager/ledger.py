"""`Ledger`: what the rules of a manager need to know of each step, without reading every commit record again each time.

A record names all data files, so with thousands of ranks it is large, and to take hundreds of them apart would keep training
waiting. The directories are the truth all the same: a step is looked at anew where the end of its record, which holds its
digest, is not what it was. Called by `retention`, in its thread.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field

from giantstep.collection import uncollected
from giantstep.format.record import CommitRecord
from giantstep.steps import StepState, look_at_step, step_name, step_of
from giantstep.storage.base import Store
from giantstep.storage.record_file import record_seal


@dataclass(frozen=True, slots=True)
class Known:
    """A step.

    Attributes:
        step, state: as in `StepEntry`.
        seal: of its commit record, see `record_seal`.
        save_ids: of all files of saves in it; not asked for again where the step is committed.
        committed: when, in seconds since 1970.
        metrics: of the commit record.
        problem: in words why it is not committed.
    """

    step: int
    state: StepState
    seal: bytes | None
    save_ids: tuple[str, ...] = ()
    committed: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


class Ledger:
    """See the module.

    Args:
        root: of the steps.
    """

    def __init__(self, root: Store) -> None:
        self._root = root
        self._known: dict[int, Known] = {}

    def look(self) -> list[Known]:
        """All directories with names of steps, by step; those that cannot be read are UNREADABLE.

        Raises:
            OSError: the root cannot be read.
        """
        steps = sorted(step for step in map(step_of, self._root.folders()) if step is not None)
        found = [self.look_at(step) for step in steps]
        self._known = {one.step: one for one in found if one.state is StepState.COMMITTED}
        return found

    def look_at(self, step: int) -> Known:
        """One of them."""
        try:
            seal = record_seal(self._root.folder(step_name(step)))
        except OSError as error:
            return Known(step, StepState.UNREADABLE, None, problem=str(error))
        known = self._known.get(step)
        if known is not None and seal == known.seal:
            return known
        # Thousands of objects are made for each, and gone at once.
        with uncollected():
            entry = look_at_step(self._root, step)
            record = entry.record
            if record is None:
                return Known(step, entry.state, seal, entry.save_ids, problem=entry.problem)
            return Known(step, entry.state, seal, entry.save_ids, _committed_at(record), dict(record.metrics))

    def is_as_before(self, known: Known) -> bool:
        """Whether it was neither saved nor removed since."""
        if known.state is StepState.COMMITTED:
            return record_seal(self._root.folder(step_name(known.step))) == known.seal
        return self.look_at(known.step) == known


def _committed_at(record: CommitRecord) -> float:
    try:
        return dt.datetime.fromisoformat(record.created).timestamp()
    except ValueError:
        # For people, the format says: a writer may have put anything there. Such a step counts as old.
        return 0.0
