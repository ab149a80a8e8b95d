"""`Retention`: removes steps that no rule wants, in a thread of its own, on rank 0.

Never removed: the newest good step, and the one that this manager saved last; what is pinned; what is being saved or read
here; a link to a directory elsewhere; anything that is not a step of giantstep's, or of a newer version, or has a damaged
commit record; leftovers of saves that began after this manager did. A step that cannot be read is neither removed nor
counted as a good one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from giantstep.collection import uncollected
from giantstep.commit.remove import remove_checkpoint
from giantstep.errors import CorruptionError, GiantstepError, OpenError
from giantstep.manager.ledger import Known, Ledger
from giantstep.manager.metrics import DeleteRecord
from giantstep.manager.pins import is_pinned
from giantstep.manager.policies import Keep, SavedStep
from giantstep.pending import PendingSave
from giantstep.reading.data_files import check_data_files
from giantstep.steps import StepState, step_name
from giantstep.storage.base import Store
from giantstep.storage.locate import lies_elsewhere
from giantstep.storage.record_file import read_record

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
        self._ledger = Ledger(root)
        self._root, self._keep, self._began, self._tell, self._wall = root, keep, began, tell, wall
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._used: Counter[int] = Counter()
        self._held = 0
        self._bad: set[int] = set()
        self._own: set[int] = set()
        self._told_unreadable: set[int] = set()
        self._last_saved: int | None = None
        self._doomed: int | None = None
        self._asked = self._missed = self._warned = self._closed = False
        self._awaited: list[tuple[PendingSave, Sequence[int]]] = []
        self._thread: threading.Thread | None = None

    # Called by the manager; none of these waits for storage, but `using` and `held` for the removal of one step.

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

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, nothing is removed: while a good step is looked for, the one that is taken for it may turn out to be bad."""
        with self._lock:
            self._wake.wait_for(lambda: self._doomed is None)
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1
                missed, self._missed = self._missed, False
            if missed:
                self.ask()

    def found_bad(self, step: int) -> None:
        """The step does not load: it is not the one that must be kept as the newest."""
        with self._lock:
            self._bad.add(step)

    def saved(self, step: int) -> None:
        """The step was committed now, whatever it was before."""
        with self._lock:
            self._bad.discard(step)
            self._own.add(step)
            self._last_saved = step

    def ask(self, after: PendingSave | None = None, used: Sequence[int] = ()) -> None:
        """Look what can go, soon.

        Args:
            after: once this save is finished.
            used: steps that were taken for it, and are to be released then; the first is the one that it saves.
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
                if pending.outcome()[0] is not None:
                    self.saved(used[0])
                for step in used:
                    self.release(step)
            try:
                self.run_once()
            except Exception:  # noqa: BLE001 - of a store's, perhaps; the job must not lose all later removals to it
                _LOG.exception("%s: old steps could not be removed", self._root.location)

    def run_once(self) -> DeleteRecord | None:
        """Remove what can go now. Failures are logged, and do not keep other steps; the next time tries again."""
        begin = time.monotonic()
        steps: list[int] = []
        leftovers: list[int] = []
        problems: list[str] = []
        try:
            newest, doomed = self._removable(self._ledger.look())
        except (OSError, GiantstepError) as error:
            newest, doomed, problems = None, [], [str(error)]
        for one in doomed:
            try:
                if newest is not None and self._remove(one, newest):
                    (steps if one.state is StepState.COMMITTED else leftovers).append(one.step)
            except (OSError, GiantstepError) as error:
                problems.append(f"step {one.step}: {error}")
        if problems:
            _LOG.warning(
                "%s: old steps could not be removed, which is tried again after the next save: %s",
                self._root.location,
                "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""),
            )
        if not steps and not leftovers:
            return None
        record = DeleteRecord(tuple(steps), tuple(leftovers), time.monotonic() - begin)
        self._tell(record)
        return record

    def _removable(self, steps: list[Known]) -> tuple[Known | None, list[Known]]:
        """The newest good step, and what can go while it is there, oldest first."""
        committed = {one.step: one for one in steps if one.state is StepState.COMMITTED}
        with self._lock:
            bad, last_saved = set(self._bad), self._last_saved
        self._warn_of_unreadable([one for one in steps if one.state is StepState.UNREADABLE])
        newest = self._newest_good(committed, bad)
        if newest is None:
            return None, []
        self._warn_of_newer(newest.step, last_saved)
        found = [one for one in steps if self._is_leftover(one, newest.step)]
        if self._keep is not None:
            rated = [SavedStep(one.step, one.committed, one.metrics) for one in committed.values() if one.step not in bad]
            pinned = {step for step in committed if self._may_be_pinned(step)}
            kept = self._keep.kept(rated, self._wall()) | pinned | {newest.step, last_saved}
            # A bad step newer than the newest good one may be somebody's last hope.
            found += [one for one in committed.values() if one.step not in kept and one.step < newest.step]
        return newest, sorted(found, key=lambda one: one.step)

    def _newest_good(self, committed: dict[int, Known], bad: set[int]) -> Known | None:
        """The newest that is not known to be bad, and has all its files; those that have not join the bad."""
        for step in sorted(set(committed) - bad, reverse=True):
            if self._is_whole(step):
                return committed[step]
            bad.add(step)
        return None

    def _is_whole(self, step: int) -> bool:
        place = self._root.folder(step_name(step))
        try:
            with uncollected():
                check_data_files(place, read_record(place))
        except (OpenError, CorruptionError, OSError) as error:
            _LOG.warning("%s: step %d is not taken for a good one: %s", self._root.location, step, error)
            return False
        return True

    def _may_be_pinned(self, step: int) -> bool:
        try:
            return is_pinned(self._root, step)
        except OSError as error:
            _LOG.warning("%s: step %d stays, since nobody knows whether it is pinned: %s", self._root.location, step, error)
            return True

    def _warn_of_unreadable(self, found: list[Known]) -> None:
        """Say so once of each."""
        for one in found:
            if one.step not in self._told_unreadable:
                _LOG.warning("%s: step %d stays, and is not counted: %s", self._root.location, one.step, one.problem)
        self._told_unreadable = {one.step for one in found}

    def _warn_of_newer(self, newest: int, last_saved: int | None) -> None:
        """Say so once if somebody else's step is newer than the one that was saved last."""
        with self._lock:
            # One that is in use may have been committed a moment ago, and not be noted yet.
            own = newest in self._own or self._used[newest] > 0
            told, self._warned = self._warned, self._warned or not (own or last_saved is None or last_saved > newest)
        if self._warned and not told:
            _LOG.warning(
                "%s: step %d was saved, but the newest step is %d, and restore(step=None) goes on from there. If the job went "
                "back to an earlier step for good, remove the newer ones.",
                self._root.location,
                last_saved,
                newest,
            )

    def _is_leftover(self, one: Known, newest: int) -> bool:
        """Of a save that crashed: began before this manager did, or left nothing but a directory, and was overtaken since."""
        dead = max(one.save_ids, default="") < self._began
        return one.state is StepState.UNFINISHED and dead and one.step < newest

    def _remove(self, one: Known, newest: Known) -> bool:
        with self._lock:
            if self._held:
                self._missed = True
            if self._held or self._used[one.step] > 0 or newest.step in self._bad:
                return False
            self._doomed = one.step
        store = self._root.folder(step_name(one.step))
        try:
            if lies_elsewhere(store):
                return False
            # Since the scan the step may have been pinned or saved anew, and the newest may be gone.
            if is_pinned(self._root, one.step) and one.state is StepState.COMMITTED:
                return False
            if not (self._ledger.is_as_before(one) and self._ledger.is_as_before(newest)):
                return False
            # A directory with foreign ones in it stays, and is nothing to tell of.
            return bool(remove_checkpoint(store)) or not store.exists()
        finally:
            with self._lock:
                self._doomed = None
                self._wake.notify_all()
