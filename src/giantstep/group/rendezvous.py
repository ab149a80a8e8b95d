"""Ranks meeting on a key-value store before they connect: everybody is there, or everybody hears who is not.

Every attempt to meet uses a token of its own, so that what an earlier attempt left in the store means nothing to a
later one; and ranks number their attempts, so that one that is late by an attempt is told so and does not join in the
next, which belongs to another call. Rank 0 invites those who have arrived to a place (a prefix in the store that nobody
used before).
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from typing import Any

from giantstep.errors import GiantstepError, PeerFailureError
from giantstep.group.answering import PatientStore
from giantstep.group.faults import from_text, late, to_text

_POLL_SECS = 0.02
_POLL_AT_MOST_SECS = 0.5
# For each answer when the store is told of a fault.
_WITHDRAW_SECS = 5.0
# Begins an error where otherwise a token or a place would stand.
_REFUSED = "!"
_WITHDRAWN = "withdrawn"


def meet(store: Any, rank: int, size: int, attempt: int, phase: str, timeout_secs: float) -> str:
    """Wait for all ranks; return the place that all of them are told.

    Args:
        store: a `torch.distributed.Store` that all ranks see, with names for this group of ranks only.
        attempt: how often this rank has tried to meet or withdrawn from meeting, this time included.

    Raises:
        PhaseTimeoutError: some rank did not come in time; the same error on all that did. Also raised by a rank that comes
            when the others have given up waiting for it and try again: it must not join them in what is another call.
        PeerFailureError: the store is gone.
    """
    store = PatientStore(store, timeout_secs)
    try:
        if rank == 0:
            return _invite(store, size, attempt, phase, timeout_secs)
        return _arrive(store, rank, attempt, phase, timeout_secs)
    except RuntimeError as error:
        fault = PeerFailureError(f"the store that started torch.distributed is gone: {error}", rank=0, phase=phase)
        fault.agreed = True
        raise fault from error


def withdraw(store: Any, rank: int, size: int, attempt: int, error: GiantstepError) -> None:
    """Tell those who may be waiting for this rank that it will not come."""
    store = PatientStore(store, _WITHDRAW_SECS)
    with contextlib.suppress(RuntimeError):
        if rank:
            store.set(f"arrived/{rank}", _numbered(attempt, _REFUSED + to_text(error)))
        else:
            # Rank 0 does not know who has arrived, so each of the others finds a note of its own.
            store.set(_WITHDRAWN, "rank 0")
            for other in range(1, size):
                store.set(f"refused/{other}", _numbered(attempt, to_text(error)))


def _numbered(attempt: int, text: str) -> str:
    return f"{attempt} {text}"


def _read(store: Any, name: str) -> tuple[int, str]:
    """Attempt and text of a note."""
    attempt, _, text = store.get(name).decode().partition(" ")
    return int(attempt), text


def _wait(condition: Callable[[], bool], deadline: float) -> bool:
    pause = _POLL_SECS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(_POLL_AT_MOST_SECS, pause * 1.5)
    return True


def _invite(store: Any, size: int, attempt: int, phase: str, timeout_secs: float) -> str:
    deadline = time.monotonic() + timeout_secs
    absent = list(range(1, size))
    if store.check([_WITHDRAWN]):
        # Those who arrived for what rank 0 withdrew from must not be taken for arrivals now.
        _wait(lambda: not any(store.check([f"refused/{rank}"]) for rank in absent), deadline)
        store.delete_key(_WITHDRAWN)
    arrivals = _Arrivals(store, attempt, absent, late_now=lambda rank: late([rank], phase, timeout_secs))
    _wait(arrivals.complete, deadline)
    place = secrets.token_hex(8)
    tokens = arrivals.tokens
    fault = _fault(arrivals.absent, tokens, phase, timeout_secs)
    if arrivals.ahead:
        fault = late([0], phase, 2 * timeout_secs)
    message = place if fault is None else _REFUSED + to_text(fault)
    for token in tokens.values():
        if not token.startswith(_REFUSED):
            store.set(f"invited/{token}", message)
    if fault is not None:
        fault.agreed = True
        raise fault
    return place


class _Arrivals:
    """Who has arrived for rank 0's attempt.

    Args:
        store, attempt: as for `meet`.
        absent: who is to arrive.
        late_now: the error for a rank that arrives for an attempt before this one.

    Attributes:
        tokens: by rank; or why it withdrew.
        absent: who is still to arrive.
        ahead: whether some rank is at a later attempt: it and others gave up waiting for rank 0.
    """

    def __init__(self, store: Any, attempt: int, absent: list[int], late_now: Callable[[int], GiantstepError]) -> None:
        self.tokens: dict[int, str] = {}
        self.absent = absent
        self.ahead = False
        self._store = store
        self._attempt = attempt
        self._late_now = late_now

    def complete(self) -> bool:
        """Look who is there; whether nothing is to be waited for any more."""
        for rank in [rank for rank in self.absent if self._store.check([f"arrived/{rank}"])]:
            self._take(rank)
        return self.ahead or not self.absent

    def _take(self, rank: int) -> None:
        number, token = _read(self._store, f"arrived/{rank}")
        if number > self._attempt:
            # Its note is for rank 0's next attempt.
            self.ahead = True
            return
        self._store.delete_key(f"arrived/{rank}")
        if number == self._attempt:
            self.tokens[rank] = token
            self.absent.remove(rank)
        elif not token.startswith(_REFUSED):
            # Too late for its own attempt, and awaited for the present one.
            self._store.set(f"invited/{token}", _REFUSED + to_text(self._late_now(rank)))


def _fault(absent: list[int], tokens: dict[int, str], phase: str, timeout_secs: float) -> GiantstepError | None:
    """Why there is no meeting; None if there is one."""
    for token in tokens.values():
        if token.startswith(_REFUSED):
            return from_text(token.removeprefix(_REFUSED))
    return late(absent, phase, timeout_secs) if absent else None


def _arrive(store: Any, rank: int, attempt: int, phase: str, timeout_secs: float) -> str:
    deadline = time.monotonic() + 2 * timeout_secs
    mine, refused = f"arrived/{rank}", f"refused/{rank}"
    # What this rank withdrew from before is still to be heard of.
    _wait(lambda: not store.check([mine]) or not _read(store, mine)[1].startswith(_REFUSED), deadline)
    token = secrets.token_hex(8)
    store.set(mine, _numbered(attempt, token))

    def answered() -> bool:
        if store.check([refused]) and _read(store, refused)[0] < attempt:
            # Of an attempt that this rank gave up before.
            store.delete_key(refused)
        return bool(store.check([f"invited/{token}"]) or store.check([refused]))

    heard = _wait(answered, deadline)
    if store.check([refused]):
        error = from_text(_read(store, refused)[1])
        store.delete_key(mine)
        store.delete_key(refused)
        raise error
    if not heard:
        # Whoever comes later must not count on this attempt.
        store.delete_key(mine)
        raise late([0], phase, 2 * timeout_secs)
    message = store.get(f"invited/{token}").decode()
    store.delete_key(f"invited/{token}")
    if message.startswith(_REFUSED):
        raise from_text(message.removeprefix(_REFUSED))
    return str(message)
