"""`Retention`: removes steps that no rule wants, in a thread of its own, on rank 0.

Never removed: the newest good step; what is pinned; what is being saved or read here; anything that is not a step of
giantstep's, or of a newer version, or has a damaged commit record; leftovers of saves that began after this manager did.
"""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from giantstep.commit.remove import remove_checkpoint
from giantstep.errors import GiantstepError
from giantstep.format.record import CommitRecord
from giantstep.manager.metrics import DeleteRecord
from giantstep.manager.policies import Keep, SavedStep
from giantstep.pending import PendingSave
from giantstep.steps import PIN_NAME, StepEntry, StepState, scan_steps, step_name
from giantstep.storage.base import Store

_LOG = logging.getLogger("giantstep")


class Retention:
    """See the module.

    Args:
        root: of the steps.
        keep: the rules; None keeps every step, and only leftovers are removed.
        began: a save id of the time when the manager was made.
        tell: is told of what was removed.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        root: Store,
        keep: Keep | None,
        began: str,
        tell: Callable[[DeleteRecord], None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._root, self._keep, self._began, self._tell, self._wall = root, keep, began, tell, wall
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._used: Counter[int] = Counter()
        self._bad: set[int] = set()
        self._doomed: int | None = None
        self._asked = self._closed = False
        self._awaited: list[tuple[PendingSave, Sequence[int]]] = []
        self._thread: threading.Thread | None = None

    # Called by the manager; none of these waits for storage, but `using` for the removal of that very step.

    @contextmanager
    def using(self, step: int) -> Iterator[None]:
        """Inside, the step is not removed."""
        self.take(step)
        try:
            yield
        finally:
            self.release(step)

    def take(self, step: int) -> None:
        """Until `release`, the step is not removed."""
        with self._lock:
            self._wake.wait_for(lambda: self._doomed != step)
            self._used[step] += 1

    def release(self, step: int) -> None:
        """Undo one `take`."""
        with self._lock:
            self._used[step] -= 1

    def found_bad(self, step: int) -> None:
        """The step does not load: it is not the one that must be kept as the newest."""
        with self._lock:
            self._bad.add(step)

    def saved(self, step: int) -> None:
        """The step was committed now, whatever it was before."""
        with self._lock:
            self._bad.discard(step)

    def ask(self, after: PendingSave | None = None, used: Sequence[int] = ()) -> None:
        """Look what can go, soon.

        Args:
            after: once this save is finished.
            used: steps that were taken for it, and are to be released then.
        """
        with self._lock:
            self._asked = self._asked or after is None
            if after is not None:
                self._awaited.append((after, used))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="giantstep-retention", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def close(self) -> None:
        """Finish what was asked for; a removal that is under way ends first."""
        with self._lock:
            self._closed = True
            self._wake.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    # In the thread.

    def _run(self) -> None:
        while True:
            with self._lock:
                self._wake.wait_for(lambda: self._asked or self._awaited or self._closed)
                awaited, self._awaited = self._awaited, []
                asked, self._asked = self._asked, False
                if not (awaited or asked):
                    return
            for pending, used in awaited:
                pending.wait()
                for step in used:
                    self.release(step)
            self.run_once()

    def run_once(self) -> DeleteRecord | None:
        """Remove what can go now. Failures are logged; the next time tries again."""
        begin = time.monotonic()
        steps: list[int] = []
        leftovers: list[int] = []
        try:
            for entry in self._removable(scan_steps(self._root)):
                if self._remove(entry.step):
                    (steps if entry.state is StepState.COMMITTED else leftovers).append(entry.step)
        except (OSError, GiantstepError) as error:
            _LOG.warning(
                "%s: old steps could not be removed, which is tried again after the next save: %s", self._root.location, error
            )
        if not steps and not leftovers:
            return None
        record = DeleteRecord(tuple(steps), tuple(leftovers), time.monotonic() - begin)
        self._tell(record)
        return record

    def _removable(self, entries: list[StepEntry]) -> list[StepEntry]:
        """Oldest first."""
        committed = {entry.step: entry.record for entry in entries if entry.record is not None}
        with self._lock:
            bad = set(self._bad)
        good = set(committed) - bad
        newest = max(good, default=None)
        if newest is None:
            return []
        found = [entry for entry in entries if self._is_leftover(entry, newest)]
        if self._keep is not None:
            steps = [
                SavedStep(step, _committed_at(record), record.metrics) for step, record in committed.items() if step in good
            ]
            kept = self._keep.kept(steps, self._wall(), self._pinned(committed)) | {newest}
            # A bad step newer than the newest good one may be somebody's last hope.
            found += [entry for entry in entries if entry.step in committed and entry.step not in kept and entry.step < newest]
        return sorted(found, key=lambda entry: entry.step)

    def _is_leftover(self, entry: StepEntry, newest: int) -> bool:
        """Of a save that crashed: began before this manager did, or left nothing but a directory, and was overtaken since."""
        dead = max(entry.save_ids, default="") < self._began
        return entry.state is StepState.UNFINISHED and dead and entry.step < newest

    def _pinned(self, committed: dict[int, CommitRecord]) -> set[int]:
        found = set()
        for step in committed:
            try:
                self._root.folder(step_name(step)).size(PIN_NAME)
            except FileNotFoundError:
                continue
            found.add(step)
        return found

    def _remove(self, step: int) -> bool:
        with self._lock:
            if self._used[step] > 0:
                return False
            self._doomed = step
        store = self._root.folder(step_name(step))
        try:
            # A directory with foreign ones in it stays, and is nothing to tell of.
            return bool(remove_checkpoint(store)) or not store.exists()
        finally:
            with self._lock:
                self._doomed = None
                self._wake.notify_all()


def _committed_at(record: CommitRecord) -> float:
    try:
        return dt.datetime.fromisoformat(record.created).timestamp()
    except ValueError:
        # For people, the format says: a writer may have put anything there. Such a step counts as old.
        return 0.0
