"""Stores in memory whose writes wait: for a moment, or until they are let go on."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

from giantstep.storage.memory import MemoryStore

_NAMES = itertools.count()


class SlowStore(MemoryStore):
    """Every write of a data file takes so long.

    Attributes:
        fail: called with the name of a file before it is made; what it raises fails the save.
    """

    def __init__(self, secs: float = 0.0) -> None:
        super().__init__(f"slow-{next(_NAMES)}")
        self._secs = secs
        self.fail: Any = lambda name: None

    def before(self, name: str) -> None:
        """What happens before a data file is made."""
        time.sleep(self._secs)

    def create(self, name: str, size: int, *, direct: bool) -> Any:
        if name.startswith("data/"):
            self.fail(name)
            self.before(name)
        return super().create(name, size, direct=direct)


class GatedStore(SlowStore):
    """Data files are not made until the gate is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.waiting = threading.Event()

    def before(self, name: str) -> None:
        self.waiting.set()
        if not self.gate.wait(60):
            raise TimeoutError(f"nobody opened the gate for {name}")
