"""`Notice`: a signal that tells the job to end soon, taken note of."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from giantstep.errors import BadArgumentError


class Notice:
    """Takes note of signals; the handlers that were there before are called too, and put back by `close`.

    Args:
        signals: which; none needs no main thread.
        clock: seconds, monotonic.

    Raises:
        BadArgumentError: this is not the main thread, or a signal cannot be handled.
    """

    def __init__(self, signals: Sequence[int], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._came: float | None = None
        self._before: dict[int, Any] = {}
        if signals and threading.current_thread() is not threading.main_thread():
            raise BadArgumentError(
                "signals can be handled in the main thread only: make the manager there, or give signals=() and call "
                "manager.stop() where you hear that the job is to end"
            )
        try:
            for number in signals:
                self._before[number] = signal.signal(number, self._handle)
        except (OSError, ValueError, TypeError) as error:
            self.close()
            raise BadArgumentError(f"signal {number!r} cannot be handled: {error}") from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.note()
        before = self._before.get(number)
        # The system's own way with a signal is mostly to end the process, which is what the notice is there to put off.
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    def note(self) -> None:
        """The job is to end soon. The first time counts."""
        if self._came is None:
            self._came = self._clock()

    @property
    def came(self) -> bool:
        """Whether it is to end."""
        return self._came is not None

    def left_secs(self, deadline_secs: float) -> float:
        """What is left of the deadline; all of it if nothing came."""
        return deadline_secs if self._came is None else deadline_secs - (self._clock() - self._came)

    def close(self) -> None:
        """Put the handlers back."""
        for number, before in self._before.items():
            # Handlers that were not made by Python cannot be put back from it.
            if before is not None and signal.getsignal(number) == self._handle:
                signal.signal(number, before)
        self._before = {}
