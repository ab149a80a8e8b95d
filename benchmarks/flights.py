"""Saves in flight beside a loop: who saves, and what the loop and a ticker see of it. Used by `interference.py`."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from measure import Started
from methods import DCP, Dcp, Giantstep, Method, Part, Waits
from raw_io import copy_memory, knows_direct, write_file
from states import Shape, Share, aligned_memory
from torch.distributed.device_mesh import DeviceMesh

from training import Ticker

QUIET, RAW, _OURS = "no save", "raw", "giantstep"
_QUIET_SECS = 1.0


@dataclass(frozen=True, slots=True)
class Flight:
    """One save, and the loop beside it.

    Attributes:
        contender: who saved.
        repetition: number of the round.
        blocked_secs: until the call was back.
        flight_secs: from then on until the checkpoint existed.
        iterations: of the loop in that time.
        stall_secs: longest delay of the ticker in all of it.
        collection_secs: longest collection of garbage by the interpreter in all of it.
    """

    contender: str
    repetition: int
    blocked_secs: float
    flight_secs: float
    iterations: int
    stall_secs: float
    collection_secs: float


class RawInBackground:
    """What an asynchronous save takes at the least: a copy, then system calls from a few threads."""

    def __init__(self, size: int, *, direct: bool) -> None:
        self._copy = aligned_memory(size)
        self._direct = direct
        self._pool = ThreadPoolExecutor(1)

    def start(self, part: Part, place: Path) -> Started:
        """As `Method.start`."""
        copy_memory(part.memory, self._copy)
        writing = self._pool.submit(write_file, place, self._copy, direct=self._direct)
        return Waits(lambda: None, writing.result)

    def close(self) -> None:
        """As `Method.close`."""
        self._pool.shutdown()


class Setting:
    """All contenders, one state, one folder."""

    def __init__(self, folder: Path, shape: Shape, mesh: DeviceMesh) -> None:
        share = Share(shape, "rows", 0, 1)
        memory = aligned_memory(share.bytes)
        share.fill(memory)
        self._part = Part(memory, share, mesh)
        self._folder = folder
        self._raw = RawInBackground(share.bytes, direct=knows_direct(folder, "direct"))
        self._methods: dict[str, Method] = {}
        for name, method in ((_OURS, Giantstep(keeps_plans=True)), (DCP, Dcp())):
            if method.asynchronous:
                self._methods[name] = method

    @property
    def contenders(self) -> list[str]:
        """Names, in the order of the table."""
        return [QUIET, RAW, *self._methods]

    def start(self, contender: str) -> Started:
        """Begin to save."""
        if contender == QUIET:
            return Waits(lambda: None, partial(time.sleep, _QUIET_SECS))
        start = self._raw.start if contender == RAW else self._methods[contender].start
        return start(self._part, self._folder / "checkpoint")

    def clear(self) -> None:
        """Delete what was saved, and let the disk come to rest."""
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        os.sync()

    def close(self) -> None:
        """Nothing is asked for any more."""
        self._raw.close()
        for method in self._methods.values():
            method.close()


def observe(setting: Setting, contender: str, iterate: Callable[[], None], ticker: Ticker, repetition: int) -> Flight:
    """Save once, and go on with the loop until the checkpoint exists."""
    # Nobody pays for the garbage of others.
    gc.collect()
    with ticker.watching() as longest:
        begin = time.perf_counter()
        started = setting.start(contender)
        back = time.perf_counter()
        ended = threading.Event()
        with ThreadPoolExecutor(1) as waiter:
            outcome = waiter.submit(_wait, started, ended)
            iterations = 0
            while not ended.is_set():
                iterate()
                iterations += 1
            flight_secs, (stall_secs, collection_secs) = time.perf_counter() - back, longest()
            outcome.result()
    setting.clear()
    return Flight(contender, repetition, back - begin, flight_secs, iterations, stall_secs, collection_secs)


def _wait(started: Started, ended: threading.Event) -> None:
    try:
        started.wait_committed()
    finally:
        ended.set()
