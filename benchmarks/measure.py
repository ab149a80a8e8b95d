"""Measuring one operation on one rank: time, CPU time, peak memory. Used by `rank.py`."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from operations import BLOCKED, COMMITTED, STAGED

_PROC = Path("/proc/self")
_RESET_PEAK = "5"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One operation on one rank.

    Attributes:
        operation: what is done, of `operations.py`.
        method: who does it, as "giantstep".
        repetition: from 0.
        begin, end: seconds on the machine's monotonic clock, the same for all processes.
        cpu_secs: user and system time of the process.
        extra_bytes: peak resident memory beyond that at the start.
        phases: seconds per phase, from giantstep's report.
        read_bytes: bytes read from the store, from giantstep's report.
    """

    operation: str
    method: str
    repetition: int
    begin: float
    end: float
    cpu_secs: float
    extra_bytes: int
    phases: dict[str, float] = field(default_factory=dict)
    read_bytes: int = 0


class Started(Protocol):
    """An asynchronous save."""

    def wait_staged(self) -> None:
        """Until the source tensors may change."""

    def wait_committed(self) -> Any:
        """Until the checkpoint exists and is durable; a report, if there is one."""


def resident_bytes(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def cpu_secs() -> float:
    """User and system time of this process so far."""
    spent = os.times()
    return spent.user + spent.system


class Meter:
    """What one operation spends: made before the barrier, started after it, read as often as wanted."""

    def __init__(self, method: str, repetition: int) -> None:
        gc.collect()
        # Memory that an earlier operation left in the heap would hide what this one needs.
        ctypes.CDLL(None).malloc_trim(0)
        (_PROC / "clear_refs").write_text(_RESET_PEAK)
        self._before = resident_bytes("VmRSS")
        self._method, self._repetition = method, repetition
        self._cpu_secs = self._begin = 0.0

    def start(self) -> None:
        """From here on everything counts."""
        self._cpu_secs, self._begin = cpu_secs(), time.monotonic()

    def read(self, operation: str, report: Any = None) -> Measurement:
        """What was spent until now. If there is a report of giantstep's, its figures are kept."""
        end, spent = time.monotonic(), cpu_secs() - self._cpu_secs
        extra = max(0, resident_bytes("VmHWM") - self._before)
        phases = dict(getattr(report, "seconds", {}))
        read = int(getattr(report, "bytes_read", 0))
        return Measurement(operation, self._method, self._repetition, self._begin, end, spent, extra, phases, read)


def measure(work: Callable[[], Any], barrier: Callable[[], None], operation: str, method: str, repetition: int) -> Measurement:
    """Run `work` on all ranks at once."""
    meter = Meter(method, repetition)
    barrier()
    meter.start()
    return meter.read(operation, work())


def measure_async(start: Callable[[], Started], barrier: Callable[[], None], method: str, repetition: int) -> list[Measurement]:
    """Start an asynchronous save on all ranks at once: until the call is back, until staged, until committed."""
    meter = Meter(method, repetition)
    barrier()
    meter.start()
    started = start()
    blocked = meter.read(BLOCKED)
    started.wait_staged()
    staged = meter.read(STAGED)
    report = started.wait_committed()
    return [blocked, staged, meter.read(COMMITTED, report)]
