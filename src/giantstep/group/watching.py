"""Waiting for links with an eye on the clock and on the notice board. Called by `torch_group.py`, one watch per call."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import NoReturn

from giantstep.collection import collected
from giantstep.errors import GiantstepError, PeerFailureError, located
from giantstep.group.connections import Connections, Link, cause
from giantstep.group.faults import culprits, listed
from giantstep.group.notices import Board

_FIRST_LOOK_SECS = 0.5
_LOOK_EVERY_SECS = 1.0
# With more ranks each looks less often, so that the store is not asked more often.
_RANKS_PER_LOOK = 1024
_ROLL_EXTRA_SECS = 1.0

Overdue = Callable[[Collection[int], str, float], GiantstepError]


class Watch:
    """One call's waiting.

    Args:
        overdue: makes the error for ranks that are waited for in vain, as in `faults.py`.
    """

    def __init__(self, rank: int, size: int, connections: Connections, board: Board, phase: str, overdue: Overdue) -> None:
        self._rank = rank
        self._connections = connections
        self._board = board
        self._phase = phase
        self._overdue = overdue
        self._every_secs = _LOOK_EVERY_SECS * max(1.0, size / _RANKS_PER_LOOK)
        self._next_look = time.monotonic() + _FIRST_LOOK_SECS
        # Whether a look found no roll call, so that one found later was called after this rank began to wait.
        self._waited_before = False

    def until(self, links: Sequence[Link], patience_secs: float) -> None:
        """Return when all links have ended well.

        Raises:
            GiantstepError: a link broke, nothing went through any of them for `patience_secs`, or somebody else
                announced a fault. All ranks raise it.
        """
        began = time.monotonic()
        while pending := self._pending(links):
            deadline = max(began, *(link.moved_at for link in pending)) + patience_secs
            if time.monotonic() >= deadline:
                self._find_culprits(pending, patience_secs)
            self._pause(pending, deadline)

    def until_ended(self, link: Link, patience_secs: float) -> None:
        """Return when the link has ended, well or not, or the patience did."""
        deadline = time.monotonic() + patience_secs
        while not link.finished and time.monotonic() < deadline:
            self._connections.changed.wait(max(0.0, deadline - time.monotonic()))
            self._connections.changed.clear()

    def _pending(self, links: Sequence[Link]) -> list[Link]:
        broken = {link.peer: link.error for link in links if link.error is not None}
        if broken:
            self._announce_broken(broken)
        return [link for link in links if not link.finished]

    def _announce_broken(self, broken: Mapping[int, Exception]) -> NoReturn:
        # A rank that closed its connections because of a fault has announced it before.
        self._board.check(self._phase)
        first = broken[min(broken)]
        # What is no matter of gloo's went wrong on this rank.
        self._board.announce(self._gone(broken) if isinstance(first, RuntimeError) else located(first, self._rank, self._phase))

    def _gone(self, broken: Mapping[int, Exception]) -> PeerFailureError:
        rank = min(broken)
        return PeerFailureError(
            f"rank {listed(broken)} is gone: its connection broke ({cause(str(broken[rank]))}). "
            "Look for its own error, or for a kill by the system (out of memory).",
            rank=rank,
            phase=self._phase,
        )

    def _pause(self, pending: Sequence[Link], deadline: float) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + self._every_secs
            self._board.check(self._phase)
            self._hear_roll(pending)
            self._connections.part()
        # Who is waited for that long may be for long: the collector, which rests while a call works, must not.
        with collected() if self._waited_before else nullcontext():
            self._connections.changed.wait(max(0.0, min(self._next_look, deadline) - time.monotonic()))
        self._connections.changed.clear()

    def _hear_roll(self, pending: Sequence[Link]) -> None:
        if not self._board.roll_called():
            self._waited_before = True
        elif self._waited_before:
            self._board.answer_roll([link.peer for link in pending])

    def _find_culprits(self, pending: Sequence[Link], patience_secs: float) -> None:
        """Call the roll, and announce who is waited for and does not answer."""
        peers = [link.peer for link in pending]
        self._board.call_roll()
        # Others may be calling it at this moment, and must not take this rank for one that does not answer.
        self._board.answer_roll(peers)
        end = time.monotonic() + self._every_secs + _ROLL_EXTRA_SECS
        while time.monotonic() < end:
            # Somebody may be quicker.
            self._board.check(self._phase)
            time.sleep(min(0.25, self._every_secs))
        answers = {self._rank: peers}

        def waits_for(rank: int) -> list[int]:
            if rank not in answers:
                answers[rank] = self._board.waits_for(rank)
            return answers[rank]

        found = culprits(peers, waits_for)
        self._board.announce(self._overdue(found, self._phase, patience_secs))
