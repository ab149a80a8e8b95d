"""The one way in which ranks talk: everybody reports to rank 0, which answers everybody.

`consult` is agreement, gather and scatter at once. Because each report is followed by an answer, an error on
any rank reaches all of them in the same call, and no rank can run ahead into the next phase. Messages are
bytes, in parts; what they mean is the caller's. Parts that are equal on many ranks travel and are kept once. Bulk data
go directly from rank to rank (`Group.transfer`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import BadArgumentError, GiantstepError, PeerFailureError, error_from_wire, error_to_wire, located
from giantstep.group.faults import ended, was_told

Parts = tuple[bytes, ...]
"""A message: one rank's report or answer."""

Answer = Callable[[Sequence[Parts]], Sequence[Parts]]
"""On rank 0: everybody's reports, in order of rank, to everybody's answers."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Bytes for another rank, or room for bytes from one.

    Attributes:
        peer: the other rank.
        data: contiguous; owned by the caller, and in use until `Group.transfer` returns.
    """

    peer: int
    data: NDArray[np.uint8]


class Group(Protocol):
    """Ranks that call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def beside(self) -> Group:
        """A group of the same ranks whose calls never meet those of this one: for a thread in the background.

        Each call makes one; the first that a rank makes of a group meets the first of the others.
        """
        ...

    def exchange(self, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        """Send `report` to rank 0; return what `answer`, run there, gives for this rank.

        Equal parts of several ranks' reports are one object in what `answer` gets, and equal parts of answers travel
        once where they go the same way.

        Raises the same `PeerFailureError` or `PhaseTimeoutError` on all ranks that are still there if one is
        lost or has not reported `timeout_secs` after rank 0 began to wait. `answer` must not raise.
        """
        ...

    def transfer(self, sends: Sequence[Parcel], receives: Sequence[Parcel], phase: str, timeout_secs: float) -> None:
        """Send and receive all parcels at once, directly between ranks; return when all of this rank's are through.

        Between two ranks, parcels arrive in the order in which they were sent; each must be received into room of its
        size. Ranks need not call this together or equally often: a rank's receives meet other ranks' sends of whichever
        call.

        Raises the same `PeerFailureError` or `PhaseTimeoutError` on all ranks that are still there if one is lost, or
        if one on which this rank waits, directly or through others, does nothing for `timeout_secs`; and the error of a
        rank that withdraws. What else ends a call on one rank, an interrupt too, the others are told by this rank's group.
        """
        ...

    def withdraw(self, error: GiantstepError) -> GiantstepError:
        """This rank gives up instead of calling `exchange` or `transfer`; the others raise `error` from theirs.

        An error of no rank becomes one of this rank. Returns the error that all of them raise, marked as agreed: `error`
        itself, or what another rank put up before.
        """
        ...


def check_parcels(group: Group, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
    """Raise `BadArgumentError` unless all are contiguous bytes for or from other ranks of the group."""
    for parcel in (*sends, *receives):
        if not 0 <= parcel.peer < group.size or parcel.peer == group.rank:
            raise BadArgumentError(
                f"a parcel for or from rank {parcel.peer}: rank {group.rank} of {group.size} has no such peer"
            )
        if parcel.data.dtype != np.uint8 or not parcel.data.flags.c_contiguous:
            raise BadArgumentError(f"a parcel for or from rank {parcel.peer} must be contiguous bytes, not {parcel.data.dtype}")


_OK, _ERROR = b"\x00", b"\x01"


def consult(
    group: Group,
    phase: str,
    timeout_secs: float,
    work: Callable[[], bytes],
    decide: Callable[[Sequence[bytes]], Sequence[bytes]] | None = None,
    decide_phase: str | None = None,
) -> bytes:
    """`consult_parts` for messages of one part."""

    def parted(reports: Sequence[Parts]) -> Sequence[Parts]:
        return [(part,) for part in decide([report[0] for report in reports])] if decide else [()] * group.size

    answer = consult_parts(group, phase, timeout_secs, lambda: (work(),), parted, decide_phase)
    return answer[0] if answer else b""


def consult_parts(
    group: Group,
    phase: str,
    timeout_secs: float,
    work: Callable[[], Parts],
    decide: Callable[[Sequence[Parts]], Sequence[Parts]] | None = None,
    decide_phase: str | None = None,
) -> Parts:
    """Run `work` on every rank and `decide` on rank 0 over all results; return this rank's part of the decision.

    If `work` raises on some rank (in `phase`), or `decide` raises (in `decide_phase`), every rank raises the
    same error, which says rank and phase; of several failing ranks the lowest is named and the others are
    counted. Without `decide` the answer is empty: an agreement that all succeeded.

    An error with `agreed` set that comes out of `work` is known to all ranks already, from a transfer or because this
    rank has withdrawn: it is raised as it is, without an exchange.
    """
    failure: GiantstepError | None = None
    undecided: GiantstepError | None = None
    try:
        report: Parts = (_OK, *work())
    except Exception as error:
        if isinstance(error, GiantstepError) and error.agreed:
            error.phase = error.phase or phase
            raise
        # Whatever it is, all ranks must hear of it.
        failure = located(error, group.rank, phase)
        report = (_ERROR, _pack(failure))
    except BaseException as error:
        _interrupted(group, error, phase)
        raise

    def answer(reports: Sequence[Parts]) -> Sequence[Parts]:
        nonlocal undecided
        verdict = _first_failure(reports)
        if verdict is None:
            try:
                decided = decide([report[1:] for report in reports]) if decide else [()] * group.size
                return [(_OK, *parts) for parts in decided]
            except Exception as error:  # noqa: BLE001 - whatever it is, all ranks must hear of it
                verdict = undecided = located(error, None, decide_phase or phase)
        return [(_ERROR, _pack(verdict))] * group.size

    try:
        received = group.exchange(report, answer, phase, timeout_secs)
    except GiantstepError as fault:
        # All hear of the fault, but it may have come after rank 0 decided: callers must not take it for a refusal.
        fault.agreed = False
        raise
    if received[0] == _OK:
        return received[1:]
    agreed = _unpack(received[1])
    agreed.agreed = True
    mine = undecided or (failure if failure is not None and failure.rank == agreed.rank else None)
    if mine is not None:
        # This rank's own error: the message agreed upon, with the local traceback instead of its copy.
        agreed.__notes__ = []
        raise agreed from mine
    raise agreed


def _interrupted(group: Group, error: BaseException, phase: str) -> None:
    """An interrupt goes its way, but the others must not wait for this rank. To tell them twice would end their next call."""
    if not was_told(error):
        group.withdraw(ended(error, group.rank, phase))


def _first_failure(reports: Sequence[Parts]) -> GiantstepError | None:
    failures = [_unpack(report[1]) for report in reports if report[0] == _ERROR]
    if not failures:
        return None
    first = failures[0]
    same = [str(error.rank) for error in failures[1:] if type(error) is type(first)]
    others = [f"rank {error.rank}: {error.message}" for error in failures[1:] if type(error) is not type(first)]
    if same:
        first.message += (
            f" (ranks {', '.join(same[:20])} failed likewise)"
            if len(same) <= 20
            else f" ({len(same)} more ranks failed likewise)"
        )
    if others:
        first.message += " Also: " + "; ".join(others[:3])
    return first


def _pack(error: GiantstepError) -> bytes:
    return json.dumps(error_to_wire(error)).encode("ascii")


def _unpack(data: bytes) -> GiantstepError:
    wire: Any = json.loads(data)
    return error_from_wire(wire) if isinstance(wire, dict) else PeerFailureError("an unreadable error was reported")
