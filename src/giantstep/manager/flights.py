"""Saves in the background, until all ranks have told what became of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from giantstep.errors import GiantstepError
from giantstep.group.base import Group, consult
from giantstep.manager.metrics import SaveRecord
from giantstep.manager.timing import Expectation
from giantstep.pending import PendingSave
from giantstep.reports import SaveReport
from giantstep.saver import saver_of


@dataclass(frozen=True, slots=True)
class Flight:
    """A save in the background.

    Attributes:
        step: that it saves.
        pending: its handle.
        began: when the manager was called.
        blocked_secs: for how long that kept the caller.
    """

    step: int
    pending: PendingSave
    began: float
    blocked_secs: float

    @property
    def has_failed(self) -> bool:
        """Whether it is known by now that it came to nothing; tells nobody of it."""
        return self.pending.done() and self.pending.outcome()[1] is not None

    def told(self, group: Group) -> dict[str, Any]:
        """What this rank of the group knows of it, now that it is finished; tells nobody of a failure."""
        report, error, finished = self.pending.outcome()
        told = told_of(self.step, report, error, finished - self.began, self.blocked_secs)
        return {**told, "owed": error is not None and saver_of(group).owes(self.pending.location)}


def told_of(
    step: int, report: SaveReport | None, error: BaseException | None, total_secs: float, blocked_secs: float
) -> dict[str, Any]:
    """What one rank tells the others of a save that is finished, as JSON values.

    It is owed if it failed and that is to be raised: the caller was not told, and did not ask for warnings only.
    """
    return {
        "step": step,
        "owed": False,
        "error": "" if error is None else str(error),
        "total_secs": total_secs,
        "blocked_secs": blocked_secs,
        "seconds": {} if report is None else report.seconds,
        "bytes": 0 if report is None else report.bytes,
        "bytes_written": 0 if report is None else report.bytes_written,
        "bytes_reused": 0 if report is None else report.bytes_reused,
    }


def owed(flights: Sequence[Flight], by_rank: Sequence[Sequence[dict[str, Any]]]) -> GiantstepError | None:
    """What the first of the saves failed with of which some rank was not told; this counts as telling of all of them.

    Args:
        flights: this rank's, all finished.
        by_rank: what every rank told of them.
    """
    lost = [flight for flight, *ranks in zip(flights, *by_rank, strict=True) if any(told["owed"] for told in ranks)]
    errors = [error for flight in lost if (error := flight.pending.exception()) is not None]
    return errors[0] if errors else None


def record_of(
    ranks: Sequence[dict[str, Any]],
    rank: int,
    location: str,
    *,
    asynchronous: bool,
    raw_bytes_per_sec: float | None,
    expected: Expectation | None,
) -> SaveRecord:
    """The record of a save, of what all ranks told."""
    own = ranks[rank]
    secs = max(told["seconds"].get("write", 0.0) for told in ranks)
    speed = own["bytes"] / secs if secs > 0 else 0.0
    return SaveRecord(
        step=own["step"],
        location=location,
        asynchronous=asynchronous,
        committed=not own["error"],
        error=own["error"],
        blocked_secs=own["blocked_secs"],
        total_secs=own["total_secs"],
        bytes=own["bytes"],
        bytes_written=own["bytes_written"],
        bytes_reused=own["bytes_reused"],
        bytes_per_sec=speed,
        raw_fraction=speed / raw_bytes_per_sec if raw_bytes_per_sec and speed else None,
        seconds=tuple(told["seconds"] for told in ranks),
        expected=expected,
    )


def packed(value: Any) -> bytes:
    """JSON values as a message."""
    return json.dumps(value).encode("ascii")


def unpacked(message: bytes) -> Any:
    """Inverse of `packed`."""
    return json.loads(message)


def gathered(group: Group, told: Any, timeout_secs: float) -> list[Any]:
    """What every rank tells, by rank, on all of them; one small round."""

    def gather(reports: Sequence[bytes]) -> list[bytes]:
        return [packed([unpacked(report) for report in reports])] * len(reports)

    found: list[Any] = unpacked(consult(group, "manage", timeout_secs, lambda: packed(told), gather))
    return found
