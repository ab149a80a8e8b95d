"""What crashed saves and removals left under a root, and removing what is certainly of no use.

`inspect` looks, `clean` removes. No commit record is ever removed, nor what one names. Not here: whether checkpoints are
sound (`diagnosis`), and which good steps to keep (`manager`). Called by users and the command `recover`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from giantstep.commit.remove import remove_leftovers
from giantstep.errors import BadArgumentError, CheckpointNotFoundError, GiantstepError, NotACheckpointError, StoreError
from giantstep.findings import Finding, FindingKind, Look, begun_at
from giantstep.format.names import save_id_of
from giantstep.steps import StepState, look_at_place, scan_steps, step_of
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, is_file_at, lies_elsewhere, parent_at, store_at
from giantstep.storage.record_file import files_of_ours

__all__ = ["DEFAULT_OLDER_THAN_SECS", "Finding", "FindingKind", "begun_at", "clean", "inspect"]

DEFAULT_OLDER_THAN_SECS = 3600.0


def inspect(
    path: StoreLike, *, older_than_secs: float = DEFAULT_OLDER_THAN_SECS, now: dt.datetime | None = None
) -> list[Finding]:
    """Look for what is no part of a good checkpoint. Changes nothing.

    Args:
        path: a step's directory, or the root of steps.
        older_than_secs: what a save left that began later than so many seconds ago may be of a save that runs, and is
            not removable. Must be more than the longest save takes.
        now: the time, with its zone; None: that of the system's clock.

    Raises:
        CheckpointNotFoundError, NotACheckpointError: nothing is there, or a file.
        StoreError: the path itself cannot be looked through. A step under it that cannot is a finding.
    """
    if isinstance(older_than_secs, bool) or not isinstance(older_than_secs, int | float) or not older_than_secs >= 0:
        raise BadArgumentError(f"older_than_secs={older_than_secs!r} cannot be: expected a number of seconds, 0 or more")
    if now is not None and (not isinstance(now, dt.datetime) or now.utcoffset() is None):
        raise BadArgumentError(f"now={now!r} cannot be: expected a datetime with a time zone, or None")
    store = store_at(path)
    moment = dt.datetime.now(dt.UTC) if now is None else now
    with _storage(store):
        _check_directory(path, store)
        inside = scan_steps(store)
        here = look_at_place(store)
        if inside:
            look = Look(moment, older_than_secs, inside)
            # A root may hold a checkpoint of its own beside the steps.
            found = look.at(store, here, None) if here.save_ids or here.error is not None else []
            return found + [one for entry in inside for one in look.at(store.folder(entry.name), entry, entry.step)]
        parent = parent_at(path)
        if parent is not None and lies_elsewhere(store):
            # The link is followed: what is judged is the directory, by those beside it.
            store = parent[0].folder(parent[1])
        step = None if parent is None else step_of(parent[1])
        beside = scan_steps(parent[0]) if parent is not None and step is not None else []
        return Look(moment, older_than_secs, beside).at(store, here, step)


def clean(findings: Iterable[Finding]) -> list[str]:
    """Remove what is removable of what `inspect` found; return the paths of files and directories that are gone.

    Each place is looked at once more: where a commit or another save came between, nothing is removed.

    Raises:
        StoreError: a storage operation failed; the other places were cleaned all the same. A further `inspect` finds what is
            left.
    """
    removed: list[str] = []
    failures: list[GiantstepError] = []
    for finding in findings:
        if finding.removable and finding.store is not None:
            try:
                with _storage(finding.store):
                    removed += _remove(finding, finding.store)
            except GiantstepError as error:
                failures.append(error)
    if failures:
        first, others = failures[0], f"; so failed {len(failures) - 1} more" if len(failures) > 1 else ""
        first.add_note(f"{len(removed)} files and directories were removed{others}.")
        raise first
    return removed


def _remove(finding: Finding, store: Store) -> list[str]:
    entry = look_at_place(store)
    in_force = "" if entry.record is None else entry.record.save_id
    there = {name for name in files_of_ours(store) if save_id_of(name) is not None}
    expected = StepState.COMMITTED if finding.in_force else StepState.UNFINISHED
    arrived = not finding.in_force and not there <= set(finding.files)
    # Invariant: what `inspect` has judged is what is removed; a place that changed since is judged anew by the next call.
    if entry.state is not expected or in_force != finding.in_force or arrived or not store.exists():
        return []
    gone = [f"{finding.path}/{name}" for name in remove_leftovers(store, finding.files)]
    return gone if store.exists() else [*gone, finding.path]


@contextmanager
def _storage(store: Store) -> Iterator[None]:
    """What the system says against it, as an error of ours."""
    try:
        yield
    except GiantstepError:
        raise
    except OSError as error:
        raise StoreError(f"{store.location} cannot be looked through or cleaned: {error}") from error


def _check_directory(path: StoreLike, store: Store) -> None:
    if is_file_at(path):
        raise NotACheckpointError(f"{store.location} is a file: expected a step's directory, or the root of steps")
    if not store.exists() and not any(store.folders()):
        raise CheckpointNotFoundError(f"{store.location} does not exist")
