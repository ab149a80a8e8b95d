"""What ranks tell each other of a fault: who is at fault, in which words, and how an error becomes every rank's own.

Pure. Called by the groups and by `rendezvous.py`; who finds faults, and how the others hear of them, is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable

from giantstep.errors import GiantstepError, PeerError, PeerFailureError, PhaseTimeoutError, error_from_wire, error_to_wire

_SHOWN = 20


def listed(ranks: Iterable[int]) -> str:
    """Ranks for a message; at most some of them."""
    found = sorted(ranks)
    return ", ".join(map(str, found[:_SHOWN])) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def late(ranks: Collection[int], phase: str, timeout_secs: float) -> PhaseTimeoutError:
    """The error for ranks that did not come to an exchange in time."""
    return PhaseTimeoutError(
        f"rank {listed(ranks)} did not report within {timeout_secs:g} s. Look at what it does, or raise timeout_secs.",
        rank=min(ranks),
        phase=phase,
    )


def idle(ranks: Collection[int], phase: str, timeout_secs: float) -> PhaseTimeoutError:
    """The error for ranks that did not send or take their parcels in time."""
    return PhaseTimeoutError(
        f"rank {listed(ranks)} sent and took nothing for {timeout_secs:g} s. Look at what it does, or raise timeout_secs.",
        rank=min(ranks),
        phase=phase,
    )


def culprits(start: Iterable[int], waits_for: Callable[[int], Collection[int]]) -> list[int]:
    """Those for whom everybody waits: ranks reached from `start` by who waits for whom that wait for nobody.

    Of ranks that only wait for each other it is the lowest.
    """
    reached = _reached(start, waits_for)
    idlers = sorted(rank for rank in reached if not waits_for(rank))
    return idlers or [next(rank for rank in sorted(reached) if rank in _reached(waits_for(rank), waits_for))]


def _reached(start: Iterable[int], waits_for: Callable[[int], Collection[int]]) -> set[int]:
    reached: set[int] = set()
    to_see = list(start)
    while to_see:
        rank = to_see.pop()
        if rank not in reached:
            reached.add(rank)
            to_see += waits_for(rank)
    return reached


def ended(error: BaseException, rank: int, phase: str) -> PeerFailureError:
    """What the others are told when an interrupt takes a rank out of a call."""
    return PeerFailureError(f"{type(error).__name__} ended the call", rank=rank, phase=phase)


def mark_told(error: BaseException) -> None:
    """Note on an interrupt that the others know of it: to withdraw because of it would end their next call too."""
    error.__dict__["giantstep_told"] = True


def was_told(error: BaseException) -> bool:
    """Whether `mark_told` was called."""
    return "giantstep_told" in error.__dict__


def to_text(error: GiantstepError) -> str:
    """The error for other ranks."""
    return json.dumps(error_to_wire(error))


def standing(error: GiantstepError, told: str | None) -> GiantstepError:
    """What a rank raises that put up `error` and found `told` standing: its own error if that is it, or if nothing is."""
    found = error if told is None or told == to_text(error) else from_text(told)
    found.agreed = True
    return found


def from_text(text: str | bytes) -> GiantstepError:
    """Inverse of `to_text`: a copy to be raised, marked as one of which all ranks hear."""
    error = error_from_wire(json.loads(text))
    error.agreed = True
    if isinstance(error, PeerError):
        # Whoever found it has no traceback that would help here.
        error.__notes__ = []
        error.remote_traceback = None
    return error
