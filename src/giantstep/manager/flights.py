"""Saves in the background, until all ranks have told what became of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from giantstep.group.base import Group, consult
from giantstep.manager.metrics import SaveRecord
from giantstep.pending import PendingSave
from giantstep.reports import SaveReport


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

    def told(self) -> dict[str, Any]:
        """What this rank knows of it, now that it is finished; tells nobody of a failure."""
        report, error, finished = self.pending.outcome()
        return told_of(self.step, report, error, finished - self.began, self.blocked_secs)


def told_of(
    step: int, report: SaveReport | None, error: BaseException | None, total_secs: float, blocked_secs: float
) -> dict[str, Any]:
    """What one rank tells the others of a save that is finished, as JSON values."""
    return {
        "step": step,
        "error": "" if error is None else str(error),
        "total_secs": total_secs,
        "blocked_secs": blocked_secs,
        "seconds": {} if report is None else report.seconds,
        "bytes": 0 if report is None else report.bytes,
        "bytes_written": 0 if report is None else report.bytes_written,
        "bytes_reused": 0 if report is None else report.bytes_reused,
    }


def record_of(
    ranks: Sequence[dict[str, Any]], rank: int, location: str, *, asynchronous: bool, raw_bytes_per_sec: float | None
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
