"""Pins: an empty file in a step's directory keeps the step, and dies with it. Called on rank 0."""

from __future__ import annotations

from giantstep.errors import CheckpointNotFoundError, StoreError
from giantstep.steps import PIN_NAME, look_at_step, step_name
from giantstep.storage.base import NotAFileError, Store


def is_pinned(root: Store, step: int) -> bool:
    """Whether the step is."""
    try:
        root.folder(step_name(step)).size(PIN_NAME)
    except FileNotFoundError:
        return False
    except NotAFileError:
        # Whatever it is, somebody has pinned the step.
        return True
    return True


def pin(root: Store, step: int) -> None:
    """Durably; succeeds where it is already.

    Raises:
        CheckpointNotFoundError: the step is not committed.
        StoreError: it cannot be read.
    """
    entry, place = look_at_step(root, step), root.folder(step_name(step))
    if entry.error is not None:
        raise StoreError(f"step {step} cannot be pinned: {entry.problem}") from entry.error
    if entry.record is None:
        raise CheckpointNotFoundError(f"step {step} of {root.location} is not committed ({entry.state.value}): nothing to pin")
    try:
        handle = place.create(PIN_NAME, 0, direct=False)
    except FileExistsError:
        return
    try:
        handle.sync()
    finally:
        handle.close()
    place.sync_names("")


def unpin(root: Store, step: int) -> None:
    """Durably; succeeds where it is not."""
    place = root.folder(step_name(step))
    place.delete(PIN_NAME)
    if place.exists():
        place.sync_names("")
