"""Measuring one operation on one rank: time, CPU time, peak memory."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PROC = Path("/proc/self")
_RESET_PEAK = "5"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One operation on one rank.

    Attributes:
        operation: what is done, as "save".
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


def _resident(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def _cpu_secs() -> float:
    spent = os.times()
    return spent.user + spent.system


def measure(work: Callable[[], Any], barrier: Callable[[], None], operation: str, method: str, repetition: int) -> Measurement:
    """Run `work` on all ranks at once. If it returns a report of giantstep's, its figures are kept."""
    gc.collect()
    # Memory that an earlier operation left in the heap would hide what this one needs.
    ctypes.CDLL(None).malloc_trim(0)
    (_PROC / "clear_refs").write_text(_RESET_PEAK)
    before = _resident("VmRSS")
    barrier()
    cpu_secs, begin = _cpu_secs(), time.monotonic()
    report = work()
    end, cpu_secs = time.monotonic(), _cpu_secs() - cpu_secs
    extra = max(0, _resident("VmHWM") - before)
    phases = dict(getattr(report, "seconds", {}))
    read = int(getattr(report, "bytes_read", 0))
    return Measurement(operation, method, repetition, begin, end, cpu_secs, extra, phases, read)
