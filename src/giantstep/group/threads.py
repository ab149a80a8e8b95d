"""Ranks as threads of one process, for tests: many ranks, no start-up, exact knowledge of who is late."""

from __future__ import annotations

import threading
import time

from giantstep.errors import GiantstepError, PeerFailureError, PhaseTimeoutError
from giantstep.group.base import Answer, Parts


class _Round:
    """One exchange: reports by rank, then answers or an error for everybody."""

    def __init__(self) -> None:
        self.reports: dict[int, Parts] = {}
        self.answers: list[Parts] | None = None
        self.failure: GiantstepError | None = None


class ThreadGroups:
    """What `size` threads share; `rank(i)` is the group as thread i sees it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._rounds: dict[int, _Round] = {}
        self._gone: set[int] = set()

    def rank(self, rank: int) -> ThreadGroup:
        """The group of one thread."""
        return ThreadGroup(self, rank)

    def leave(self, rank: int) -> None:
        """The thread of this rank has ended: whoever waits for it stops waiting."""
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()

    def meet(self, number: int, rank: int, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        """Exchange `number` as seen by `rank`."""
        deadline = time.monotonic() + timeout_secs
        with self._changed:
            meeting = self._rounds.setdefault(number, _Round())
            meeting.reports[rank] = report
            self._changed.notify_all()
            if rank == 0:
                self._wait_for_reports(meeting, phase, deadline, timeout_secs)
        if rank == 0 and meeting.failure is None:
            kept: dict[bytes, bytes] = {}
            reports = [tuple(kept.setdefault(part, part) for part in meeting.reports[other]) for other in range(self.size)]
            answers = list(answer(reports))
            with self._changed:
                meeting.answers = answers
                self._changed.notify_all()
        with self._changed:
            while meeting.answers is None and meeting.failure is None:
                if 0 in self._gone:
                    meeting.failure = PeerFailureError("rank 0 is gone", rank=0, phase=phase)
                elif time.monotonic() > deadline + timeout_secs:
                    meeting.failure = _late([0], phase, timeout_secs)
                else:
                    self._changed.wait(0.05)
            if meeting.failure is not None:
                error = type(meeting.failure)(meeting.failure.message, rank=meeting.failure.rank, phase=meeting.failure.phase)
                raise error
            if meeting.answers is None:
                raise PeerFailureError("no answer", rank=0, phase=phase)
            return meeting.answers[rank]

    def withdraw(self, number: int, error: GiantstepError) -> None:
        """End exchange `number` with an error for all who are or will be in it."""
        with self._changed:
            self._rounds.setdefault(number, _Round()).failure = error
            self._changed.notify_all()

    def _wait_for_reports(self, meeting: _Round, phase: str, deadline: float, timeout_secs: float) -> None:
        while meeting.failure is None and len(meeting.reports) < self.size:
            absent = [rank for rank in range(self.size) if rank not in meeting.reports]
            gone = [rank for rank in absent if rank in self._gone]
            if gone:
                meeting.failure = PeerFailureError(f"rank {', '.join(map(str, gone))} is gone", rank=gone[0], phase=phase)
            elif time.monotonic() > deadline:
                meeting.failure = _late(absent, phase, timeout_secs)
            else:
                self._changed.wait(0.05)
        self._changed.notify_all()


def _late(ranks: list[int], phase: str, timeout_secs: float) -> PhaseTimeoutError:
    shown = ", ".join(map(str, ranks[:20]))
    return PhaseTimeoutError(f"rank {shown} did not report within {timeout_secs:g} s", rank=ranks[0], phase=phase)


class ThreadGroup:
    """A `Group` for one thread among several."""

    def __init__(self, shared: ThreadGroups, rank: int) -> None:
        self._shared = shared
        self._rank = rank
        self._number = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._shared.size

    def exchange(self, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        self._number += 1
        return self._shared.meet(self._number, self._rank, report, answer, phase, timeout_secs)

    def withdraw(self, error: GiantstepError) -> None:
        self._number += 1
        self._shared.withdraw(self._number, error)
