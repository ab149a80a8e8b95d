"""Rank 0's answers about steps: may one be saved, which is to be restored."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from giantstep.errors import (
    BadArgumentError,
    CheckpointNotFoundError,
    CorruptionError,
    NotACheckpointError,
    StoreError,
    VersionError,
)
from giantstep.steps import StepEntry, StepState, look_at_step, newest_first, scan_steps, step_name
from giantstep.storage.base import Store


@dataclass(frozen=True, slots=True)
class Skipped:
    """A step that was passed over, and why."""

    step: int
    reason: str


def check_may_save(root: Store, step: int, *, overwrite: bool) -> None:
    """Raise unless a save may be made in the directory of a step.

    Raises:
        BadArgumentError: the step is there, or is damaged, and is not to be overwritten.
        NotACheckpointError, VersionError: it is somebody else's.
        StoreError: it cannot be read, so that nobody knows what it is.
    """
    entry = look_at_step(root, step)
    place = f"{root.location}/{entry.name}"
    if entry.state is StepState.FOREIGN:
        raise NotACheckpointError(f"{place} holds files of somebody else: {entry.problem} Save to another root.")
    if entry.state is StepState.NEWER:
        raise VersionError(f"{place} is not overwritten: {entry.problem}")
    if entry.state is StepState.UNREADABLE:
        raise StoreError(f"step {step} is not overwritten: {entry.problem}") from entry.error
    if entry.state in (StepState.COMMITTED, StepState.DAMAGED) and not overwrite:
        raise BadArgumentError(
            f"step {step} is in {root.location} already ({entry.state.value}): save(..., overwrite=True) replaces it"
        )


def newest_committed(root: Store, *, but: Collection[int] = ()) -> int | None:
    """The newest committed step that is none of `but`. No older one is read."""
    return next((entry.step for entry in newest_first(root) if entry.record is not None and entry.step not in but), None)


def choose(root: Store, wanted: int | None, skipped: Collection[int]) -> tuple[int | None, list[Skipped]]:
    """The step to restore, and those newer ones that cannot be.

    Args:
        root: of the steps.
        wanted: the one that is asked for; None: the newest.
        skipped: steps that were tried before.

    Raises:
        CheckpointNotFoundError: the one that is asked for is not there.
        CorruptionError, NotACheckpointError: it is there, damaged or somebody else's.
        StoreError, VersionError: the one that is asked for, or one newer than all that can be restored, cannot be read for
            now, or is of a newer version. To go on from an older one would be to lose what it holds.
    """
    if wanted is not None:
        entry = look_at_step(root, wanted)
        _check(entry, root)
        return wanted, []
    passed: list[Skipped] = []
    for entry in newest_first(root):
        if entry.state is StepState.NEWER:
            raise VersionError(f"the newest step of {root.location} is {entry.step}: {entry.problem}")
        if entry.state is StepState.UNREADABLE:
            raise StoreError(
                f"no step of {root.location} is restored, for step {entry.step} may be the newest good one: {entry.problem}. "
                "Have it read, restore an older one by its number, or move the directory elsewhere"
            ) from entry.error
        if entry.state is StepState.DAMAGED:
            passed.append(Skipped(entry.step, entry.problem))
        if entry.record is not None and entry.step not in skipped:
            return entry.step, passed
    return None, passed


def _check(entry: StepEntry, root: Store) -> None:
    place = f"step {entry.step} of {root.location}"
    if entry.state is StepState.NEWER:
        raise VersionError(f"{place}: {entry.problem}")
    if entry.state is StepState.UNREADABLE:
        raise StoreError(f"{place}: {entry.problem}") from entry.error
    if entry.state is StepState.DAMAGED:
        raise CorruptionError(f"{place}: {entry.problem}")
    if entry.state is StepState.FOREIGN:
        raise NotACheckpointError(f"{place}: {entry.problem}")
    if entry.state is StepState.UNFINISHED:
        there = [str(found.step) for found in scan_steps(root) if found.record is not None]
        raise CheckpointNotFoundError(
            f"{place} does not exist. Committed steps: {', '.join(there[-20:]) or 'none'}. "
            f"({step_name(entry.step)}: {entry.problem})"
        )
