"""`materialize`: a step whose data files are its own, and hold nothing but its own.

commit record, index -plan_copy-> plan -Rewrite-> checkpoint that shares no file with any other
"""

from __future__ import annotations

from dataclasses import dataclass

from giantstep.errors import GiantstepError, StoreError
from giantstep.planning.removal_plan import plan_copy
from giantstep.reports import size_text
from giantstep.rewriting import Rewrite
from giantstep.storage.locate import StoreLike, store_at


@dataclass(frozen=True, slots=True)
class MaterializeReport:
    """A step that was made self-contained.

    Attributes:
        location: path or URL of it.
        save_id: its new id.
        bytes_copied: bytes of its new data files.
        bytes_before: of the data files that it had.
        deleted: files deleted after the commit; other steps keep theirs.
    """

    location: str
    save_id: str
    bytes_copied: int
    bytes_before: int
    deleted: tuple[str, ...]

    def __str__(self) -> str:
        dropped = max(0, self.bytes_before - self.bytes_copied)
        return f"{self.location} shares no files any more: {size_text(self.bytes_copied)} copied, {size_text(dropped)} dropped"


def materialize(path: StoreLike, out: StoreLike | None = None) -> MaterializeReport:
    """Make a step self-contained: all that it holds is copied into files of its own, every byte verified on the way.

    After incremental saves (`SaveOptions.previous`) a step shares files with others, by hard links. Each is complete, and may
    be deleted or copied elsewhere by itself; but damage to a shared file is damage to all steps that have it, and a file may
    hold bytes that only an earlier step needs. A materialised step has neither. It can be the `previous` of further saves.

    Not collective: one process calls it, while nobody saves to the path. The step of before stays loadable until the new one
    is committed.

    Args:
        path: a directory, a `file://` or `memory://` URL, or a `Store`.
        out: where the self-contained step is to be; the one at `path` stays as it is. None: in its place.

    Raises:
        BadArgumentError: `out` holds a checkpoint already.
        OpenError: there is no committed checkpoint at the path, or it lacks files.
        CorruptionError: commit record, index or some bytes are damaged.
        StoreError: a storage operation failed; the message says whether it may have taken effect.
    """
    store = store_at(path)
    target = store if out is None else store_at(out)
    task = f"materialising {store.location}"
    rewrite = Rewrite(store, target, task=task, verb="materialise", undone="Nothing was changed.")
    try:
        rewrite.open()
    except GiantstepError:
        raise
    except OSError as error:
        raise StoreError(f"{store.location} cannot be read: {error}. Nothing was changed.") from error
    before = rewrite.record
    after = rewrite.copy_and_commit(plan_copy(rewrite.index, len(before.files)))
    deleted = rewrite.clean()
    copied, held = (sum(file.bytes for file in record.files) for record in (after, before))
    return MaterializeReport(target.location, after.save_id, copied, held, tuple(deleted))
