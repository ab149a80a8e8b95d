"""What `save` and `load` say about what they did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _secs(seconds: dict[str, float]) -> str:
    return ", ".join(f"{phase} {secs:.2f} s" for phase, secs in seconds.items())


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def size_text(count: int) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


@dataclass(frozen=True, slots=True)
class SaveReport:
    """A committed save.

    Attributes:
        location: path or URL.
        save_id: id of the save.
        tensors, objects: stored by all ranks together.
        bytes: payload stored by all ranks together, each byte once.
        bytes_written: payload that this rank wrote.
        seconds: per phase, on this rank.
        removed: files of superseded saves that rank 0 deleted after the commit; empty on other ranks.
        plan_reused: whether the plan of an earlier save was used (see `PlanCache`).
        bytes_reused: of `bytes`, what lies in data files of the previous step and was not written (`SaveOptions.previous`).
        bytes_dead: in these files, bytes that belong to earlier steps alone.
        not_reused: why not all that is unchanged was used again, if something stood against it; else "".
        bytes_sent: of files, by this rank to other hosts (node-local saves).
        bytes_spared: by all ranks together: copies that were not sent, because ranks of other hosts held the same and wrote
            it themselves.
    """

    location: str
    save_id: str
    tensors: int
    objects: int
    bytes: int
    bytes_written: int
    seconds: dict[str, float]
    removed: tuple[str, ...] = ()
    plan_reused: bool = False
    bytes_reused: int = 0
    bytes_dead: int = 0
    not_reused: str = ""
    bytes_sent: int = 0
    bytes_spared: int = 0

    def __str__(self) -> str:
        what = f"{_counted(self.tensors, 'tensor')} and {_counted(self.objects, 'object')}"
        again = f", {size_text(self.bytes_reused)} of it unchanged" if self.bytes_reused else ""
        wrote = f"wrote {size_text(self.bytes_written)}"
        if self.bytes_sent or self.bytes_spared:
            wrote += f" and sent {size_text(self.bytes_sent)}; sending {size_text(self.bytes_spared)} was spared all ranks"
        return f"saved {what}, {size_text(self.bytes)}{again}, to {self.location} (this rank {wrote}; {_secs(self.seconds)})"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A finished load.

    Attributes:
        location: path or URL.
        save_id: id of the save that was loaded.
        tensors, objects: distinct tensors and sharded objects that this rank loaded.
        missing: keys in the checkpoint that no rank requested.
        unexpected: keys that some rank requested and the checkpoint has not; their tensors are unchanged.
        cast: keys that this rank loaded into another dtype, as "key: stored -> loaded".
        dequantised: keys that this rank loaded from quantised tensors into floating-point ones.
        skipped: keys that this rank requested and `LoadOptions.rename` left out; and state that may be missing from a
            checkpoint, and was: it stays as it is.
        passed_over: newer steps that were to be loaded and are damaged or not all there, each with the reason
            (`load(on_corrupt="fallback")`).
        dropped: keys of sharded objects that are stored for another number of positions and were dropped.
        bytes_filled: bytes of this rank's tensors that were filled.
        bytes_read: bytes of tensors that this rank read from the store, whole blocks.
        exchange: "none" if every rank read for itself; "all" if all ranks read each block once and sent it to those
            that want it; "group" if the ranks of a group did.
        bytes_sent, bytes_received: bytes of tensors to and from other ranks.
        seconds: per phase, on this rank.
        plan_reused: whether the plan of an earlier load was used (see `PlanCache`).
        bytes_fetched: of files that this rank received for its host (node-local loads).
        notes: of a node-local load: which hosts had nothing, what was rebuilt, and what was not used, with the reasons.
    """

    location: str
    save_id: str
    tensors: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    cast: tuple[str, ...]
    bytes_filled: int
    bytes_read: int
    seconds: dict[str, float] = field(default_factory=dict)
    objects: int = 0
    dequantised: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    exchange: str = "none"
    bytes_sent: int = 0
    bytes_received: int = 0
    plan_reused: bool = False
    passed_over: tuple[str, ...] = ()
    bytes_fetched: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        filled, read = size_text(self.bytes_filled), size_text(self.bytes_read)
        if self.exchange != "none":
            whom = "all ranks" if self.exchange == "all" else "its group"
            sent, received = size_text(self.bytes_sent), size_text(self.bytes_received)
            read += f", exchanged with {whom}: sent {sent}, received {received}"
        what = _counted(self.tensors, "tensor") + (f" and {_counted(self.objects, 'object')}" if self.objects else "")
        lines = [f"loaded {what}, {filled}, from {self.location} (read {read}; {_secs(self.seconds)})"]
        for title, names in (
            ("not requested", self.missing),
            ("not in the checkpoint", self.unexpected),
            ("cast", self.cast),
            ("dequantised", self.dequantised),
            ("left out", self.skipped),
            ("passed over", self.passed_over),
            ("notes", self.notes),
            ("dropped for another number of positions", self.dropped),
        ):
            if names:
                lines.append(f"  {title}: {len(names)}: " + ", ".join(names[:5]) + (" ..." if len(names) > 5 else ""))
        return "\n".join(lines)


class LoadedState(dict[Any, Any]):
    """The loaded state: the stored common state, with the loaded tensors where the dict given to `load` has them.

    Attributes:
        report: what was loaded and what was not.
    """

    def __init__(self, values: dict[Any, Any], report: LoadReport) -> None:
        super().__init__(values)
        self.report = report
