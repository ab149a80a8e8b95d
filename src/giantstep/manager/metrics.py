"""What the manager measures: plain records, a line of the log for each, and callbacks.

Exporters are callbacks like others: `tensorboard` and `opentelemetry` make one of an object that their library gives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from giantstep.reports import size_text

_LOG = logging.getLogger("giantstep")


@dataclass(frozen=True, slots=True)
class SaveRecord:
    """A save that is committed, or has failed.

    Attributes:
        step, location: what was saved where.
        asynchronous: whether it went on in the background.
        committed: whether the step exists.
        error: what it failed with, in words; "" if it is committed.
        blocked_secs: for how long this rank's call of `save` kept it, waiting for earlier saves included.
        total_secs: from the call until the step was committed, on this rank.
        bytes: payload of all ranks together.
        bytes_written, bytes_reused: of it, what this rank wrote, and what all found unchanged in the step before.
        bytes_per_sec: `bytes` by the time that the ranks wrote, the slowest counted.
        raw_fraction: that by the speed of the medium, as it was measured when the manager began; None if it was not.
        seconds: per phase, by rank.
    """

    step: int
    location: str
    asynchronous: bool
    committed: bool
    error: str
    blocked_secs: float
    total_secs: float
    bytes: int = 0
    bytes_written: int = 0
    bytes_reused: int = 0
    bytes_per_sec: float = 0.0
    raw_fraction: float | None = None
    seconds: tuple[Mapping[str, float], ...] = ()

    def __str__(self) -> str:
        if not self.committed:
            return f"step {self.step} was not saved: {self.error}"
        slowest = _slowest(self.seconds)
        speed = f"{size_text(int(self.bytes_per_sec))}/s"
        fraction = "" if self.raw_fraction is None else f", {self.raw_fraction:.2f} of raw"
        return (
            f"step {self.step}: saved {size_text(self.bytes)} in {self.total_secs:.2f} s ({speed}{fraction}); "
            f"training was blocked {self.blocked_secs:.3f} s{slowest}"
        )


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """A step that was restored.

    Attributes:
        step, location: which, and where.
        total_secs: of the call, on this rank.
        bytes_filled, bytes_read: as in `LoadReport`.
        bytes_per_sec: what all ranks filled by the time that they read, the slowest counted.
        raw_fraction: None; the speed at which the medium is read is not measured.
        seconds: per phase, by rank.
    """

    step: int
    location: str
    total_secs: float
    bytes_filled: int
    bytes_read: int
    bytes_per_sec: float = 0.0
    raw_fraction: float | None = None
    seconds: tuple[Mapping[str, float], ...] = ()

    def __str__(self) -> str:
        filled, rate = size_text(self.bytes_filled), f"{size_text(int(self.bytes_per_sec))}/s of all ranks"
        return f"step {self.step}: restored {filled} in {self.total_secs:.2f} s ({rate}){_slowest(self.seconds)}"


@dataclass(frozen=True, slots=True)
class DeleteRecord:
    """Steps that were removed, on rank 0.

    Attributes:
        steps: committed ones that no rule wants any more.
        leftovers: of saves that never committed.
        secs: for all of them, in the background.
    """

    steps: tuple[int, ...]
    leftovers: tuple[int, ...]
    secs: float

    def __str__(self) -> str:
        parts = [f"{len(self.steps)} steps" if self.steps else "", f"{len(self.leftovers)} leftovers" if self.leftovers else ""]
        return f"removed {' and '.join(part for part in parts if part)} in {self.secs:.2f} s"


Record = SaveRecord | LoadRecord | DeleteRecord


def _slowest(seconds: tuple[Mapping[str, float], ...]) -> str:
    """The slowest rank of each phase, in words."""
    if not seconds:
        return ""
    phases = list(dict.fromkeys(phase for own in seconds for phase in own))
    parts = []
    for phase in phases:
        secs, rank = max((own.get(phase, 0.0), -rank) for rank, own in enumerate(seconds))
        parts.append(f"{phase} {secs:.2f} s" + (f" (rank {-rank})" if len(seconds) > 1 else ""))
    return "; slowest: " + ", ".join(parts)


class ManagerCallback:
    """What may be told of a manager's work. Derive from it and override; an error in a method is logged and harms nothing.

    Methods may be called from the manager's own threads; `on_delete` is called on rank 0 only, the others on every rank.
    """

    def on_save(self, record: SaveRecord) -> None:
        """A save is committed, or has failed."""

    def on_load(self, record: LoadRecord) -> None:
        """A step was restored."""

    def on_delete(self, record: DeleteRecord) -> None:
        """Steps were removed."""


@dataclass(slots=True)
class Teller:
    """Tells the log and all callbacks."""

    callbacks: Iterable[ManagerCallback] = ()
    rank: int = 0

    def tell(self, record: Record) -> None:
        """Of one record."""
        if self.rank == 0:
            _LOG.log(logging.WARNING if isinstance(record, SaveRecord) and not record.committed else logging.INFO, "%s", record)
        for callback in self.callbacks:
            try:
                _method_for(callback, record)(record)
            except Exception:  # noqa: BLE001 - of the user's, and no reason to stop training
                _LOG.exception("callback %s failed; training goes on", type(callback).__name__)


def _method_for(callback: ManagerCallback, record: Record) -> Callable[[Any], None]:
    if isinstance(record, SaveRecord):
        return callback.on_save
    return callback.on_load if isinstance(record, LoadRecord) else callback.on_delete


def _numbers(record: SaveRecord | LoadRecord) -> dict[str, float]:
    """Names and values of a record for exporters."""
    names = (
        "blocked_secs",
        "total_secs",
        "bytes",
        "bytes_written",
        "bytes_reused",
        "bytes_filled",
        "bytes_read",
        "bytes_per_sec",
    )
    found = {name: float(getattr(record, name)) for name in names if hasattr(record, name)}
    if record.raw_fraction is not None:
        found["raw_fraction"] = record.raw_fraction
    for phase in dict.fromkeys(phase for own in record.seconds for phase in own):
        found[f"secs/{phase}"] = max(own.get(phase, 0.0) for own in record.seconds)
    return found


@dataclass(slots=True)
class _TensorBoard(ManagerCallback):
    writer: Any
    prefix: str

    def on_save(self, record: SaveRecord) -> None:
        self._write("save", record)

    def on_load(self, record: LoadRecord) -> None:
        self._write("load", record)

    def _write(self, kind: str, record: SaveRecord | LoadRecord) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(f"{self.prefix}/{kind}/{name}", value, record.step)


def tensorboard(writer: Any, prefix: str = "checkpoint") -> ManagerCallback:
    """A callback that writes the numbers of each record with `writer.add_scalar(name, value, step)`.

    Args:
        writer: a `SummaryWriter` of `torch.utils.tensorboard`, or what else has that method. Give the callback to one rank.
        prefix: that all names begin with.
    """
    return _TensorBoard(writer, prefix)


@dataclass(slots=True)
class _OpenTelemetry(ManagerCallback):
    meter: Any
    made: dict[str, Any] = field(default_factory=dict)

    def on_save(self, record: SaveRecord) -> None:
        self._record("save", record, {"asynchronous": record.asynchronous, "committed": record.committed})

    def on_load(self, record: LoadRecord) -> None:
        self._record("load", record, {})

    def _record(self, kind: str, record: SaveRecord | LoadRecord, attributes: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            text = f"giantstep.{kind}.{name.replace('/', '.')}"
            if text not in self.made:
                self.made[text] = self.meter.create_histogram(text, unit=_unit(name))
            self.made[text].record(value, attributes={**attributes, "location": record.location})


def _unit(name: str) -> str:
    if name == "bytes_per_sec":
        return "By/s"
    return "s" if "secs" in name else "1" if name == "raw_fraction" else "By"


def opentelemetry(meter: Any) -> ManagerCallback:
    """A callback that records the numbers of each record in histograms `giantstep.save.*` and `giantstep.load.*`.

    Args:
        meter: an OpenTelemetry `Meter`, as `opentelemetry.metrics.get_meter(name)` gives it.
    """
    return _OpenTelemetry(meter)
