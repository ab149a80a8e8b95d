"""The one way in which ranks talk: everybody reports to rank 0, which answers everybody.

`consult` is agreement, gather and scatter at once. Because each report is followed by an answer, an error on
any rank reaches all of them in the same call, and no rank can run ahead into the next phase. Messages are
bytes; what they mean is the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from giantstep.errors import GiantstepError, PeerFailureError, error_from_wire, error_to_wire, located

Answer = Callable[[Sequence[bytes]], Sequence[bytes]]
"""On rank 0: everybody's reports, in order of rank, to everybody's answers."""


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

    def exchange(self, report: bytes, answer: Answer, phase: str, timeout_secs: float) -> bytes:
        """Send `report` to rank 0; return what `answer`, run there, gives for this rank.

        Raises the same `PeerFailureError` or `PhaseTimeoutError` on all ranks that are still there if one is
        lost or has not reported `timeout_secs` after rank 0 began to wait. `answer` must not raise.
        """
        ...

    def withdraw(self, error: GiantstepError) -> None:
        """This rank gives up instead of calling `exchange`; the others raise `error` from theirs."""
        ...


_OK, _ERROR = b"\x00", b"\x01"


def consult(
    group: Group,
    phase: str,
    timeout_secs: float,
    work: Callable[[], bytes],
    decide: Callable[[Sequence[bytes]], Sequence[bytes]] | None = None,
    decide_phase: str | None = None,
) -> bytes:
    """Run `work` on every rank and `decide` on rank 0 over all results; return this rank's part of the decision.

    If `work` raises on some rank (in `phase`), or `decide` raises (in `decide_phase`), every rank raises the
    same error, which says rank and phase; of several failing ranks the lowest is named and the others are
    counted. Without `decide` the answer is empty: an agreement that all succeeded.
    """
    failure: GiantstepError | None = None
    undecided: GiantstepError | None = None
    try:
        report = _OK + work()
    except Exception as error:  # noqa: BLE001 - whatever it is, all ranks must hear of it
        failure = located(error, group.rank, phase)
        report = _ERROR + _pack(failure)
    except BaseException as error:
        # An interrupt goes its way, but the others must not wait for this rank.
        group.withdraw(PeerFailureError(f"{type(error).__name__} ended the call", rank=group.rank, phase=phase))
        raise

    def answer(reports: Sequence[bytes]) -> Sequence[bytes]:
        nonlocal undecided
        verdict = _first_failure(reports)
        if verdict is None:
            try:
                decided = decide([report[1:] for report in reports]) if decide else [b""] * group.size
                return [_OK + part for part in decided]
            except Exception as error:  # noqa: BLE001 - as above
                verdict = undecided = located(error, None, decide_phase or phase)
        return [_ERROR + _pack(verdict)] * group.size

    received = group.exchange(report, answer, phase, timeout_secs)
    if received[:1] == _OK:
        return received[1:]
    agreed = _unpack(received[1:])
    agreed.agreed = True
    mine = undecided or (failure if failure is not None and failure.rank == agreed.rank else None)
    if mine is not None:
        # This rank's own error: the message agreed upon, with the local traceback instead of its copy.
        agreed.__notes__ = []
        raise agreed from mine
    raise agreed


def _first_failure(reports: Sequence[bytes]) -> GiantstepError | None:
    failures = [_unpack(report[1:]) for report in reports if report[:1] == _ERROR]
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
