"""`uncollected`: no collection of cyclic garbage while many objects are made that live for a moment.

Thousands of tensors are thousands of small objects, which would have the interpreter walk over everything that the
program holds, for a large model some hundred milliseconds, in which no thread runs. Called by `async_saving` and `loading`.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_inside = 0
_was_enabled = False


@contextmanager
def uncollected() -> Iterator[None]:
    """A block in which the collector rests, in all threads; blocks may overlap. Afterwards it is as it was."""
    global _inside, _was_enabled  # noqa: PLW0603 - the collector is the process's
    with _LOCK:
        if not _inside:
            _was_enabled = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside and _was_enabled:
                gc.enable()
