"""Ranks meeting on a key-value store before they connect: everybody is there, or everybody hears who is not.

Every attempt to meet uses a token of its own, so that what an earlier attempt left in the store means nothing to a
later one. Rank 0 invites those who have arrived to a place (a prefix in the store that nobody used before).
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from typing import Any

from giantstep.errors import GiantstepError, PeerFailureError
from giantstep.group.faults import from_text, late, to_text

_POLL_SECS = 0.02
_POLL_AT_MOST_SECS = 0.5
# Begins an error where otherwise a token or a place would stand.
_REFUSED = "!"
_WITHDRAWN = "withdrawn"


def meet(store: Any, rank: int, size: int, phase: str, timeout_secs: float) -> str:
    """Wait for all ranks; return the place that all of them are told.

    Args:
        store: a `torch.distributed.Store` that all ranks see, with names for this group of ranks only.

    Raises:
        PhaseTimeoutError: some rank did not come in time; the same error on all that did.
        PeerFailureError: the store is gone.
    """
    try:
        return _invite(store, size, phase, timeout_secs) if rank == 0 else _arrive(store, rank, phase, timeout_secs)
    except RuntimeError as error:
        fault = PeerFailureError(f"the store that started torch.distributed is gone: {error}", rank=0, phase=phase)
        fault.agreed = True
        raise fault from error


def withdraw(store: Any, rank: int, size: int, error: GiantstepError) -> None:
    """Tell those who may be waiting for this rank that it will not come."""
    with contextlib.suppress(RuntimeError):
        if rank:
            store.set(f"arrived/{rank}", _REFUSED + to_text(error))
        else:
            # Rank 0 does not know who has arrived, so each of the others finds a note of its own.
            store.set(_WITHDRAWN, "rank 0")
            for other in range(1, size):
                store.set(f"refused/{other}", to_text(error))


def _wait(condition: Callable[[], bool], deadline: float) -> bool:
    pause = _POLL_SECS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(_POLL_AT_MOST_SECS, pause * 1.5)
    return True


def _invite(store: Any, size: int, phase: str, timeout_secs: float) -> str:
    deadline = time.monotonic() + timeout_secs
    absent = list(range(1, size))
    if store.check([_WITHDRAWN]):
        # Those who arrived for what rank 0 withdrew from must not be taken for arrivals now.
        _wait(lambda: not any(store.check([f"refused/{rank}"]) for rank in absent), deadline)
        store.delete_key(_WITHDRAWN)
    tokens: dict[int, str] = {}

    def all_there() -> bool:
        for rank in list(absent):
            if store.check([f"arrived/{rank}"]):
                tokens[rank] = store.get(f"arrived/{rank}").decode()
                store.delete_key(f"arrived/{rank}")
                absent.remove(rank)
        return not absent

    _wait(all_there, deadline)
    place = secrets.token_hex(8)
    fault = _fault(absent, tokens, phase, timeout_secs)
    message = place if fault is None else _REFUSED + to_text(fault)
    for token in tokens.values():
        if not token.startswith(_REFUSED):
            store.set(f"invited/{token}", message)
    if fault is not None:
        fault.agreed = True
        raise fault
    return place


def _fault(absent: list[int], tokens: dict[int, str], phase: str, timeout_secs: float) -> GiantstepError | None:
    """Why there is no meeting; None if there is one."""
    for token in tokens.values():
        if token.startswith(_REFUSED):
            return from_text(token.removeprefix(_REFUSED))
    return late(absent, phase, timeout_secs) if absent else None


def _arrive(store: Any, rank: int, phase: str, timeout_secs: float) -> str:
    deadline = time.monotonic() + 2 * timeout_secs
    mine, refused = f"arrived/{rank}", f"refused/{rank}"
    # What this rank withdrew from before is still to be heard of.
    _wait(lambda: not store.check([mine]) or not store.get(mine).decode().startswith(_REFUSED), deadline)
    token = secrets.token_hex(8)
    store.set(mine, token)
    answered = _wait(lambda: bool(store.check([f"invited/{token}"]) or store.check([refused])), deadline)
    if store.check([refused]):
        error = from_text(store.get(refused))
        store.delete_key(mine)
        store.delete_key(refused)
        raise error
    if not answered:
        # Whoever comes later must not count on this attempt.
        store.delete_key(mine)
        raise late([0], phase, 2 * timeout_secs)
    message = store.get(f"invited/{token}").decode()
    store.delete_key(f"invited/{token}")
    if message.startswith(_REFUSED):
        raise from_text(message.removeprefix(_REFUSED))
    return str(message)
