"""Trouble for one rank at one place of a save or a load: it raises, sleeps, or dies there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any, Self

import giantstep.loading
import giantstep.saving

SAVE, LOAD = giantstep.saving.Save, giantstep.loading._Load

# By name: the class and method in which a rank is, whether it is rank 0's alone, and the phase that errors name.
SAVE_PLACES: dict[str, tuple[Any, str, bool, str]] = {
    "describe": (SAVE, "describe", False, "describe"),
    "plan": (SAVE, "_prepare", True, "plan"),
    "write": (SAVE, "_write", False, "write"),
    "commit": (SAVE, "_decide_commit", True, "commit"),
}
LOAD_PLACES: dict[str, tuple[Any, str, bool, str]] = {
    "describe": (LOAD, "_describe", False, "describe"),
    "open": (LOAD, "_decide_record", True, "open"),
    "match": (LOAD, "_match", False, "match"),
    "judge": (LOAD, "_judge", True, "match"),
    "plan": (LOAD, "_prepare", False, "plan"),
    "verify": (LOAD, "_verify", False, "verify"),
    "read": (LOAD, "_fill", False, "read"),
    "restore": (LOAD, "_restore", False, "restore"),
}


class MineError(ValueError):
    """What the user's own code raises."""


def raise_mine() -> None:
    raise MineError("mine")


def raise_eio() -> None:
    raise OSError(5, "the disk is gone")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleeping(secs: float) -> Callable[[], None]:
    return lambda: time.sleep(secs)


def rank_of(run: Any, arguments: tuple[Any, ...]) -> int:
    """The rank on which a method runs; `Save.describe` is given the group, later the save has it."""
    group = getattr(run, "_group", None)
    return int((arguments[0] if group is None else group).rank)


class Trouble:
    """Once armed, a rank has it the next time that it gets to the place.

    Attributes:
        met: whether it has had it.
    """

    def __init__(self, place: tuple[Any, str, bool, str], victim: int, trouble: Callable[[], None]) -> None:
        self._kind, self._method, of_root, self.phase = place
        self.victim = 0 if of_root else victim
        self._trouble = trouble
        self._armed = False
        self.met = False

    def arm(self) -> None:
        """From now on."""
        self._armed = True

    def __enter__(self) -> Self:
        real = self._real = getattr(self._kind, self._method)

        def troubled(run: Any, *arguments: Any, **named: Any) -> Any:
            if self._armed and not self.met and rank_of(run, arguments) == self.victim:
                self.met = True
                self._trouble()
            return real(run, *arguments, **named)

        setattr(self._kind, self._method, troubled)
        return self

    def __exit__(self, *_exc: object) -> None:
        setattr(self._kind, self._method, self._real)
