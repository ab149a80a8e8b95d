"""`Saver`: carries out the saves of one group in the background, one after another, and remembers which failed.

Every rank of the group has one. A thread runs while there is something to do, and talks over a group of its own, so that
the caller's thread never has to. `finish_saves` and the end of the interpreter wait for all of them. Called by
`async_saving`, which makes the jobs.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from giantstep.collection import forget
from giantstep.ending import after_fork, before_the_end, end_as_failed
from giantstep.errors import BadArgumentError, CancelledError, GiantstepError, PeerFailureError, PhaseTimeoutError, located
from giantstep.group.base import Group, consult
from giantstep.group.faults import ended
from giantstep.mapping.outline import Outline
from giantstep.pending import PendingSave
from giantstep.reports import SaveReport
from giantstep.staging.snapshot import Layout, StagingMemory

_LOG = logging.getLogger("giantstep")

Work = Callable[[Group], SaveReport]
"""Carries a save out, over the group that it is given."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A save that failed and of which no call has told yet."""

    number: int
    location: str
    error: GiantstepError


@dataclass(frozen=True, slots=True)
class _Job:
    """Something to be done in the background, or to be dropped instead. The number is 0 if it is no save."""

    number: int
    pending: PendingSave
    work: Work
    drop: Callable[[], None]
    fail: Callable[[GiantstepError], Work]
    warns: bool


class Saver:
    """See the module.

    Args:
        group: of the caller's thread.

    Attributes:
        memory: of snapshots.
        number: on rank 0, that of the last save.
    """

    def __init__(self, group: Group) -> None:
        self.memory = StagingMemory()
        self.number = 0
        self._rank = group.rank
        self._layouts: weakref.WeakKeyDictionary[Outline, Layout] = weakref.WeakKeyDictionary()
        self._group = group.beside()
        # Taken by itself, not by way of the condition, whose methods are Python's: an interrupt in them would leave it held.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._jobs: deque[_Job] = deque()
        self._thread: threading.Thread | None = None
        # Failures by number; and numbers of unfinished saves of whose failure a call has told already.
        self._failures: dict[int, Failure] = {}
        self._told: set[int] = set()
        with _REGISTRY_LOCK:
            _watch_the_end()
            _SAVERS.append(weakref.ref(self, _SAVERS.remove))

    def layout_of(self, outline: Outline | None, make: Callable[[], Layout]) -> Layout:
        """Where copies lie: as in the last save of a state that looks so, or made now."""
        if outline is None:
            return make()
        found = self._layouts.get(outline)
        if found is None:
            found = self._layouts[outline] = make()
        return found

    def wait_for(self, ready: Callable[[int], bool]) -> None:
        """Wait until `ready(number of unfinished saves)`, or none is unfinished."""
        with self._lock:
            self._changed.wait_for(lambda: not self._jobs or ready(len(self._jobs)))

    def submit(
        self,
        number: int,
        location: str,
        make: Callable[[PendingSave], tuple[Work, Callable[[], None]]],
        fail: Callable[[GiantstepError], Work],
        *,
        warns: bool,
    ) -> PendingSave:
        """Queue a save.

        Args:
            number: the same on all ranks, and larger than that of any save before.
            location: where the checkpoint will be.
            make: makes the work, once there is a handle; and what is to be called if it is not carried out.
            fail: makes the work of telling the other ranks, which will wait for this one, that `make` failed here. Of
                that the handle tells; an interrupt is raised too.
            warns: a failure is logged and then forgotten.
        """
        pending = PendingSave(location, lambda: self._tell(number))
        interrupt: BaseException | None = None
        drop: Callable[[], None] = _nothing
        try:
            work, drop = make(pending)
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks must hear of it
            work = fail(located(error, self._rank, "stage"))
        except BaseException as error:  # noqa: BLE001 - raised below, once the others can hear of it
            interrupt = error
            work = fail(ended(error, self._rank, "stage"))
        self._queue(_Job(number, pending, work, drop, fail, warns))
        if interrupt is not None:
            raise interrupt
        return pending

    def give_up(self, error: GiantstepError) -> None:
        """This rank has no part in the save that others may have queued now: tell them when it is that save's turn."""

        def work(group: Group) -> SaveReport:
            group.withdraw(error)
            raise error

        # Nobody has a handle of it, and the call tells of the error.
        self._queue(_Job(0, PendingSave("", _nothing), work, _nothing, lambda _error: work, warns=False))

    def _queue(self, job: _Job) -> None:
        with self._lock:
            self._jobs.append(job)
            if self._thread is not None:
                return
            # A daemon, so that nothing but `_at_end` decides how long the end of the interpreter waits.
            thread = self._thread = threading.Thread(target=self._run, name="giantstep-save", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                # None can be had. The others are in the background, so this thread joins them, to tell them.
                self._thread = None
                job.drop()
                self._jobs[-1] = replace(job, work=job.fail(located(error, self._rank, "stage")))
            else:
                return
        self._run()

    def first_failure(self) -> Failure | None:
        """The earliest of which no call has told."""
        with self._lock:
            return min(self._failures.values(), key=lambda failure: failure.number, default=None)

    def owes(self, location: str) -> bool:
        """Whether a save to this place failed and no call has told of it."""
        with self._lock:
            return any(failure.location == location for failure in self._failures.values())

    def tell_until(self, number: int) -> None:
        """A call has told of a failure, here or on another rank: it and those before need not be told of."""
        with self._lock:
            for known in [*self._failures, *(job.number for job in self._jobs)]:
                if known <= number:
                    self._tell(known)

    def _tell(self, number: int) -> None:
        with self._lock:
            self._failures.pop(number, None)
            if any(job.number == number for job in self._jobs):
                self._told.add(number)

    def wait(self, timeout_secs: float | None) -> bool:
        """Wait until nothing is to be done and the thread has ended; False if that takes longer."""
        with self._lock:
            thread = self._thread
            if not self._changed.wait_for(lambda: self._thread is None, timeout_secs):
                return False
        if thread is not None:
            # The interpreter must not end while it is on its way out.
            thread.join()
        return True

    # In the background.

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    self._changed.notify_all()
                    return
                job = self._jobs[0]
            self._carry_out(job)
            del job

    def _outcome_of(self, job: _Job) -> SaveReport | GiantstepError:
        try:
            return job.work(self._group)
        except GiantstepError as error:
            return error
        except BaseException as error:  # noqa: BLE001 - whatever it is, the handle must tell of it
            return located(error if isinstance(error, Exception) else RuntimeError(repr(error)), self._rank, "save")

    def _carry_out(self, job: _Job) -> None:
        outcome = self._outcome_of(job)
        if isinstance(outcome, BaseException):
            _let_go(outcome)
        with self._lock:
            untold = isinstance(outcome, GiantstepError) and not isinstance(outcome, CancelledError)
            if isinstance(outcome, GiantstepError) and untold and job.number and job.number not in self._told and not job.warns:
                self._failures[job.number] = Failure(job.number, job.pending.location, outcome)
            self._told.discard(job.number)
            self._jobs.popleft()
            job.pending.finish(outcome)
            self._changed.notify_all()
        if job.warns and untold:
            _LOG.warning("%s: the save failed, the checkpoint before it stays the latest: %s", job.pending.location, outcome)


def _nothing() -> None:
    """What there is to be done where there is nothing to be done."""


def _let_go(error: BaseException) -> None:
    """Frames that an error came through hold copies of the whole state; who keeps the error must not keep these."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            left += [found.__cause__, found.__context__]


def line_up(group: Group, number: int, timeout_secs: float) -> None:
    """Begin a save in the background together with all ranks.

    A rank that was interrupted when it was to queue a save has none of that number. The others must not put their part of it
    together with its part of the next one: who has the lower number gives up, and the rest line up again.

    Raises:
        PeerFailureError: some rank is at a later save; the same error on all that are not.
    """

    def compare(reports: Sequence[bytes]) -> list[bytes]:
        numbers = [int(report) for report in reports]
        return [f"{max(numbers)} {numbers.index(max(numbers))} {min(numbers)}".encode("ascii")] * len(reports)

    while True:
        answer = consult(group, "describe", timeout_secs, lambda: str(number).encode("ascii"), compare)
        latest, rank, earliest = map(int, answer.split())
        if number < latest:
            raise PeerFailureError(
                f"rank {rank} has no part in this save, since it was interrupted when it began. Its next save is not affected.",
                rank=rank,
                phase="describe",
            )
        if earliest == latest:
            return


# One saver for each group, forgotten with it. All savers, for the end of the interpreter.
_OF_GROUP: weakref.WeakKeyDictionary[Group, Saver] = weakref.WeakKeyDictionary()
_SAVERS: list[weakref.ref[Saver]] = []
_REGISTRY_LOCK = threading.RLock()
_watched = _ending = False


def saver_of(group: Group) -> Saver:
    """The saver of a group."""
    with _REGISTRY_LOCK:
        found = _OF_GROUP.get(group)
        if found is None:
            found = _OF_GROUP[group] = Saver(group)
        return found


def finish_saves(timeout: float | None = None) -> None:
    """Wait until all asynchronous saves of this process are finished, and give their memory back.

    To be called before ranks end, best before process groups are destroyed; the end of the interpreter does it too, but can
    only log failures, and end with exit code 1.

    Args:
        timeout: seconds to wait; None: as long as it takes.

    Raises:
        PhaseTimeoutError: not finished within `timeout`. The saves go on.
        GiantstepError: what the first save failed with of which no call has told.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    savers = _all_savers()
    for saver in savers:
        if not saver.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
            raise PhaseTimeoutError(f"asynchronous saves have not finished within {timeout:g} s; they go on")
        saver.memory.clear()
    for saver in savers:
        failure = saver.first_failure()
        if failure is not None:
            saver.tell_until(failure.number)
            raise failure.error


def _all_savers() -> list[Saver]:
    """In the order in which they were made, which is the same on all ranks."""
    with _REGISTRY_LOCK:
        found = [reference() for reference in _SAVERS]
    return [saver for saver in found if saver is not None]


def _watch_the_end() -> None:
    global _watched  # noqa: PLW0603 - once per process, whatever the number of savers
    if not _watched:
        before_the_end(_at_end)
        after_fork(_in_child)
        _watched = True


def _in_child() -> None:
    """A forked child has none of the threads that carry saves out, and nothing to tell of them."""
    global _REGISTRY_LOCK, _OF_GROUP  # noqa: PLW0603 - of the process
    _REGISTRY_LOCK = threading.RLock()
    _OF_GROUP = weakref.WeakKeyDictionary()
    _SAVERS.clear()
    forget()


def check_not_ending() -> None:
    """Raise `BadArgumentError` once the interpreter waits for no more saves."""
    if _ending:
        raise BadArgumentError("the interpreter is ending: nothing can be begun in the background. Call save, or call earlier.")


def _at_end() -> None:
    global _ending  # noqa: PLW0603 - of the process
    savers = _all_savers()
    try:
        for saver in savers:
            saver.wait(None)
    except KeyboardInterrupt:
        _LOG.warning("interrupted while asynchronous saves were unfinished: they are not committed")
        end_as_failed()
    _ending = True
    for saver in savers:
        while (failure := saver.first_failure()) is not None:
            saver.tell_until(failure.number)
            _LOG.error("%s: an asynchronous save failed: %s", failure.location, failure.error, exc_info=failure.error)
            # A run whose last save failed must not look as if all were well.
            end_as_failed()
