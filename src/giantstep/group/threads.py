"""Ranks as threads of one process, for tests: many ranks, no start-up, exact knowledge of who is late.

Rounds, parcels and faults are kept per *generation*, which is to threads what one set of connections is to processes.
The first fault ends its generation: everybody who is in it or still comes to it raises that fault and goes on to the
next generation.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import GiantstepError, PeerFailureError, located
from giantstep.group.base import Answer, Parcel, Parts, check_parcels
from giantstep.group.faults import culprits, ended, from_text, idle, late, listed, mark_told, standing, to_text


@dataclass(slots=True)
class _Round:
    """One exchange: reports by rank, then answers for everybody."""

    reports: dict[int, Parts] = field(default_factory=dict)
    answers: list[Parts] | None = None
    answered: int = 0


@dataclass(slots=True)
class _Letter:
    """A parcel on its way. The array is the sender's until the receiver has taken it."""

    data: NDArray[np.uint8]
    receiver: int
    taken: bool = False


class _Generation:
    """Everything that ranks tell each other until the next fault."""

    def __init__(self) -> None:
        self.rounds: defaultdict[int, _Round] = defaultdict(_Round)
        self.mail: defaultdict[tuple[int, int], deque[_Letter]] = defaultdict(deque)
        self.waiting: dict[int, Collection[int]] = {}
        self.fault: str | None = None

    def end(self, fault: GiantstepError) -> None:
        """Make it the fault of the generation; the first one stays."""
        if self.fault is None:
            self.fault = to_text(fault)

    def check(self) -> None:
        """Raise a copy of the fault, if there is one."""
        if self.fault is not None:
            raise from_text(self.fault)


class ThreadGroups:
    """What `size` threads share; `rank(i)` is the group as thread i sees it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.generations: defaultdict[int, _Generation] = defaultdict(_Generation)
        self.gone: set[int] = set()
        self._beside: dict[int, ThreadGroups] = {}

    def beside(self, number: int) -> ThreadGroups:
        """The groups beside these that each rank makes as its `number`-th."""
        with self.changed:
            return self._beside.setdefault(number, ThreadGroups(self.size))

    def rank(self, rank: int) -> ThreadGroup:
        """The group of one thread."""
        return ThreadGroup(self, rank)

    def leave(self, rank: int) -> None:
        """The thread of this rank has ended: whoever waits for it stops waiting."""
        with self.changed:
            self.gone.add(rank)
            self.changed.notify_all()


class ThreadGroup:
    """A `Group` for one thread among several."""

    def __init__(self, shared: ThreadGroups, rank: int) -> None:
        self._shared = shared
        self._rank = rank
        self._generation = 0
        self._number = 0
        self._made_beside = 0

    def beside(self) -> ThreadGroup:
        self._made_beside += 1
        return self._shared.beside(self._made_beside).rank(self._rank)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._shared.size

    def exchange(self, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        self._number += 1
        ours = self._ours()
        try:
            if self._rank == 0:
                return self._ask_all(ours, report, answer, phase, timeout_secs)
            return self._report(ours, report, phase, timeout_secs)
        except BaseException as error:
            self._leave(ours, error, phase)
            raise

    def transfer(self, sends: Sequence[Parcel], receives: Sequence[Parcel], phase: str, timeout_secs: float) -> None:
        check_parcels(self, sends, receives)
        ours = self._ours()
        try:
            self._move(ours, sends, receives, phase, timeout_secs)
        except GiantstepError:
            self._next_generation()
            raise
        except Exception as error:
            raise self.withdraw(located(error, self._rank, phase)) from error
        except BaseException as error:
            self._leave(ours, error, phase)
            raise

    def withdraw(self, error: GiantstepError) -> GiantstepError:
        if error.rank is None:
            error.rank = self._rank
        ours = self._ours()
        self._end(ours, error)
        self._next_generation()
        return standing(error, ours.fault)

    def _ours(self) -> _Generation:
        with self._shared.changed:
            return self._shared.generations[self._generation]

    def _end(self, ours: _Generation, fault: GiantstepError) -> None:
        with self._shared.changed:
            ours.end(fault)
            self._shared.changed.notify_all()

    def _leave(self, ours: _Generation, error: BaseException, phase: str) -> None:
        """Go on to the next generation, after a fault or an interrupt, which must be a fault to the others."""
        if not isinstance(error, GiantstepError):
            self._end(ours, ended(error, self._rank, phase))
            mark_told(error)
        self._next_generation()

    def _next_generation(self) -> None:
        self._generation += 1
        self._number = 0

    # Exchange.

    def _ask_all(self, ours: _Generation, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        deadline = time.monotonic() + timeout_secs
        with self._shared.changed:
            this = ours.rounds[self._number]
            this.reports[0] = report
            while absent := [rank for rank in range(self.size) if rank not in this.reports]:
                self._pause(ours, absent, deadline, late, phase, timeout_secs)
            ours.check()
        kept: dict[bytes, bytes] = {}
        answers = list(answer([tuple(kept.setdefault(part, part) for part in this.reports[rank]) for rank in range(self.size)]))
        with self._shared.changed:
            # Somebody may have lost patience meanwhile; then nobody gets an answer.
            ours.check()
            this.answers = answers
            self._shared.changed.notify_all()
            return self._take_answer(ours, this)

    def _report(self, ours: _Generation, report: Parts, phase: str, timeout_secs: float) -> Parts:
        # Rank 0 waits up to the timeout for the last report; it may not have begun before.
        deadline = time.monotonic() + 2 * timeout_secs
        with self._shared.changed:
            this = ours.rounds[self._number]
            this.reports[self._rank] = report
            self._shared.changed.notify_all()
            while this.answers is None:
                try:
                    self._pause(ours, [0], deadline, late, phase, timeout_secs)
                except GiantstepError:
                    # What was answered before the fault holds.
                    if this.answers is None:
                        raise
            return self._take_answer(ours, this)

    def _take_answer(self, ours: _Generation, this: _Round) -> Parts:
        if this.answers is None:
            raise PeerFailureError("rank 0 gave no answer", rank=0)
        this.answered += 1
        if this.answered == self.size:
            del ours.rounds[self._number]
        return this.answers[self._rank]

    # Transfer.

    def _move(
        self, ours: _Generation, sends: Sequence[Parcel], receives: Sequence[Parcel], phase: str, timeout_secs: float
    ) -> None:
        rooms: defaultdict[int, deque[NDArray[np.uint8]]] = defaultdict(deque)
        for parcel in receives:
            if parcel.data.size:
                rooms[parcel.peer].append(parcel.data)
        letters = [_Letter(parcel.data, parcel.peer) for parcel in sends if parcel.data.size]
        with self._shared.changed:
            ours.check()
            for letter in letters:
                ours.mail[self._rank, letter.receiver].append(letter)
            self._shared.changed.notify_all()
        deadline = time.monotonic() + timeout_secs
        while True:
            with self._shared.changed:
                ours.check()
                left = [letter for letter in letters if not letter.taken]
                if len(left) < len(letters):
                    letters, deadline = left, time.monotonic() + timeout_secs
                source = next((peer for peer, room in rooms.items() if room and ours.mail[peer, self._rank]), None)
                if source is None:
                    peers = {letter.receiver for letter in letters} | {peer for peer, room in rooms.items() if room}
                    if not peers:
                        return
                    self._pause(ours, peers, deadline, idle, phase, timeout_secs)
                    continue
                letter, room = ours.mail[source, self._rank].popleft(), rooms[source].popleft()
            self._take(ours, letter, room, source, phase)
            deadline = time.monotonic() + timeout_secs

    def _take(self, ours: _Generation, letter: _Letter, room: NDArray[np.uint8], source: int, phase: str) -> None:
        if letter.data.size != room.size:
            fault = PeerFailureError(
                f"rank {source} sent {letter.data.size} bytes to rank {self._rank}, which has room for {room.size}. "
                "Their plans differ: make sure that both run the same version of giantstep.",
                rank=source,
                phase=phase,
            )
            self._end(ours, fault)
            ours.check()
        # Outside the lock, so that ranks copy at the same time.
        np.copyto(room, letter.data.reshape(room.shape))
        with self._shared.changed:
            letter.taken = True
            self._shared.changed.notify_all()

    # Waiting.

    def _pause(
        self,
        ours: _Generation,
        peers: Collection[int],
        deadline: float,
        overdue: Callable[[Collection[int], str, float], GiantstepError],
        phase: str,
        timeout_secs: float,
    ) -> None:
        """Wait for the next change; raise if there is a fault, or if `peers` are gone or overdue. The lock is held."""
        ours.waiting[self._rank] = peers
        gone = self._shared.gone.intersection(peers)
        left_secs = deadline - time.monotonic()
        if gone:
            ours.end(PeerFailureError(f"rank {listed(gone)} is gone", rank=min(gone), phase=phase))
        elif left_secs <= 0:
            ours.end(overdue(culprits(peers, lambda rank: ours.waiting.get(rank, ())), phase, timeout_secs))
        if ours.fault is None:
            self._shared.changed.wait(left_secs)
            del ours.waiting[self._rank]
        else:
            self._shared.changed.notify_all()
        ours.check()
