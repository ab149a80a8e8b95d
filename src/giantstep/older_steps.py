"""`older_step`: the step to load where one turned out to be damaged. Called by `loading`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from giantstep.errors import (
    BadArgumentError,
    CheckpointNotFoundError,
    CorruptionError,
    GiantstepError,
    IncompleteError,
    NotACheckpointError,
    StoreError,
)
from giantstep.group.base import Group, consult
from giantstep.steps import newest_first, step_name, step_of
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, parent_at

PASSED_OVER = (CorruptionError, IncompleteError, NotACheckpointError, CheckpointNotFoundError)
"""What is wrong with a step that another step may make good: it is damaged, or is not all there."""


def root_of(path: StoreLike) -> tuple[Store, int]:
    """The root that a step lies under, and its number.

    Raises:
        BadArgumentError: the path is no step's.
    """
    found = parent_at(path)
    step = None if found is None else step_of(found[1])
    if found is None or step is None:
        raise BadArgumentError(
            f"on_corrupt='fallback' needs the path of a step, such as runs/7b/{step_name(100)}, so that older ones can be "
            f"found beside it; {path} is none"
        )
    return found[0], step


def older_step(group: Group, root: Store, below: int, tried: Collection[int], timeout_secs: float) -> int | None:
    """Collective. The newest committed step older than `below` that was not tried yet, as rank 0 sees it, or None.

    Raises (the same on all ranks):
        StoreError: one that may be it cannot be read. What cannot be read for now is not passed over.
    """

    def decide(reports: Sequence[bytes]) -> list[bytes]:
        found = None
        for entry in newest_first(root):
            if entry.step >= below or entry.step in tried:
                continue
            if entry.error is not None:
                raise StoreError(
                    f"step {entry.step} may be the newest older one that loads: {entry.problem}. Have it read, load another "
                    "step by its path, or move the directory elsewhere"
                ) from entry.error
            if entry.record is not None:
                found = entry.step
                break
        return [json.dumps(found).encode("ascii")] * len(reports)

    found: int | None = json.loads(consult(group, "open", timeout_secs, lambda: b"", decide))
    return found


def reason_of(step: int, error: GiantstepError) -> str:
    """Why a step was passed over, for the report."""
    return f"{step_name(step)}: {error.message}"
