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


def forget() -> None:
    """In a forked child: blocks that other threads of the parent were in do not end here."""
    global _LOCK, _inside  # noqa: PLW0603 - the collector is the process's
    _LOCK = threading.Lock()
    if _inside and _was_enabled:
        gc.enable()
    _inside = 0


@contextmanager
def collected() -> Iterator[None]:
    """A block that waits, within `uncollected`: the collector works meanwhile."""
    rests = _inside and _was_enabled
    if rests:
        gc.enable()
    try:
        yield
    finally:
        if rests and _inside:
            gc.disable()


@contextmanager
def uncollected() -> Iterator[None]:
    """A block in which the collector rests, in all threads; blocks may overlap. Afterwards it is as it was."""
    global _inside, _was_enabled  # noqa: PLW0603 - the collector is the process's
    entered = False
    try:
        with _LOCK:
            if not _inside:
                _was_enabled = gc.isenabled()
                gc.disable()
            _inside, entered = _inside + 1, True
        yield
    finally:
        if entered:
            with _LOCK:
                _inside -= 1
                if not _inside and _was_enabled:
                    gc.enable()
