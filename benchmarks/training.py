"""Stand-ins for a training loop, and a ticker that notices when nobody else gets to run. Used by `interference.py`."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch

_SIDE = 512
_NUMBERS = 20_000
_TICK_SECS = 0.001


def torch_loop() -> Callable[[], None]:
    """An iteration of a few milliseconds in torch, which needs the interpreter only between its operations."""
    left = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0)) / _SIDE**0.5
    state = [left.clone()]

    def iterate() -> None:
        state[0] = torch.tanh(state[0] @ left)

    return iterate


def python_loop() -> Callable[[], None]:
    """An iteration of about a millisecond that needs the interpreter all the time."""
    state = [1]

    def iterate() -> None:
        number = state[0]
        for step in range(_NUMBERS):
            number = (number * 31 + step) & 0xFFFF
        state[0] = number

    return iterate


class Ticker:
    """A thread that wants to run every millisecond, as one that feeds data or answers a heartbeat does.

    Times collections of garbage as well: these stop all threads, and come the sooner the more objects are made.
    """

    def __init__(self) -> None:
        self._ends = threading.Event()
        self._longest_secs = self._longest_collection_secs = self._collection_began = 0.0
        self._thread = threading.Thread(target=self._tick, name="ticker", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        gc.callbacks.append(self._collecting)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        gc.callbacks.remove(self._collecting)
        self._ends.set()
        self._thread.join()

    def _tick(self) -> None:
        before = time.perf_counter()
        while not self._ends.is_set():
            time.sleep(_TICK_SECS)
            now = time.perf_counter()
            self._longest_secs = max(self._longest_secs, now - before - _TICK_SECS)
            before = now

    def _collecting(self, phase: str, _information: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._collection_began = now
        else:
            self._longest_collection_secs = max(self._longest_collection_secs, now - self._collection_began)

    @contextmanager
    def watching(self) -> Iterator[Callable[[], tuple[float, float]]]:
        """Begins anew; yields a function for the longest delay since then and the longest collection, in seconds."""
        time.sleep(2 * _TICK_SECS)
        self._longest_secs = self._longest_collection_secs = 0.0
        yield lambda: (self._longest_secs, self._longest_collection_secs)
