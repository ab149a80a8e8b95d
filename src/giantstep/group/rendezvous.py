"""Ranks meeting on a key-value store before they connect: everybody is there, or everybody hears who is not.

Every attempt to meet uses a token of its own, so that what an earlier attempt left in the store means nothing to a
later one. Rank 0 invites those who have arrived to a place (a prefix in the store that nobody used before).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from giantstep.errors import GiantstepError, PeerFailureError, PhaseTimeoutError, error_from_wire, error_to_wire

_POLL_SECS = 0.02
_POLL_AT_MOST_SECS = 0.5


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
        raise PeerFailureError(f"the store that started torch.distributed is gone: {error}", phase=phase) from error


def withdraw(store: Any, rank: int, error: GiantstepError) -> None:
    """Tell rank 0, which may be waiting for this rank, that it will not come."""
    with contextlib.suppress(RuntimeError):
        store.set(f"arrived/{rank}", "!" + json.dumps(error_to_wire(error)))


def _wait(condition: Callable[[], bool], deadline: float) -> bool:
    pause = _POLL_SECS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(_POLL_AT_MOST_SECS, pause * 1.5)
    return True


def _invite(store: Any, size: int, phase: str, timeout_secs: float) -> str:
    absent = list(range(1, size))
    tokens: dict[int, str] = {}

    def all_there() -> bool:
        for rank in list(absent):
            if store.check([f"arrived/{rank}"]):
                tokens[rank] = store.get(f"arrived/{rank}").decode()
                store.delete_key(f"arrived/{rank}")
                absent.remove(rank)
        return not absent

    _wait(all_there, time.monotonic() + timeout_secs)
    place = secrets.token_hex(8)
    fault = _fault(absent, tokens, phase, timeout_secs)
    message = place if fault is None else "!" + json.dumps(error_to_wire(fault))
    for token in tokens.values():
        if not token.startswith("!"):
            store.set(f"invited/{token}", message)
    if fault is not None:
        raise fault
    return place


def _fault(absent: list[int], tokens: dict[int, str], phase: str, timeout_secs: float) -> GiantstepError | None:
    """Why there is no meeting; None if there is one."""
    for token in tokens.values():
        if token.startswith("!"):
            return error_from_wire(json.loads(token[1:]))
    if not absent:
        return None
    shown = ", ".join(map(str, absent[:20])) + (f" and {len(absent) - 20} more" if len(absent) > 20 else "")
    return PhaseTimeoutError(
        f"rank {shown} did not report within {timeout_secs:g} s. Look at what it does, or raise timeout_secs.",
        rank=absent[0],
        phase=phase,
    )


def _arrive(store: Any, rank: int, phase: str, timeout_secs: float) -> str:
    token = secrets.token_hex(8)
    store.set(f"arrived/{rank}", token)
    answered = _wait(lambda: bool(store.check([f"invited/{token}"])), time.monotonic() + 2 * timeout_secs)
    if not answered:
        # Whoever comes later must not count on this attempt.
        store.delete_key(f"arrived/{rank}")
        raise PhaseTimeoutError(f"rank 0 did not report within {2 * timeout_secs:g} s", rank=0, phase=phase)
    message = store.get(f"invited/{token}").decode()
    store.delete_key(f"invited/{token}")
    if message.startswith("!"):
        error = error_from_wire(json.loads(message[1:]))
        error.__notes__ = []
        raise error
    return str(message)
