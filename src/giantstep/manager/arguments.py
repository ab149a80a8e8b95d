"""What a manager is made with: checked, and the same on all ranks. Called by `manager`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from giantstep.errors import BadArgumentError
from giantstep.group.base import Parts
from giantstep.manager.policies import EverySteps, Keep, SaveWhen
from giantstep.options import LoadOptions, SaveOptions
from giantstep.phases import same_call, settings


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of `CheckpointManager` that all ranks must give alike; see there.

    Raises:
        BadArgumentError: a value that can never work.
    """

    save_when: Any
    keep: Any
    asynchronous: Any
    incremental: Any
    full_every: Any
    save_options: Any
    load_options: Any
    deadline_secs: Any

    def __post_init__(self) -> None:
        _require(isinstance(self.when, SaveWhen | None), "save_when", self.save_when, "a policy, a number of steps, or None")
        _require(isinstance(self.rules, Keep | None), "keep", self.keep, "a Keep, a number of steps, or None")
        count, secs = self.full_every, self.deadline_secs
        _require(isinstance(count, int) and count >= 1, "full_every", count, "an int of at least 1")
        _require(isinstance(secs, int | float) and 0 < secs < 1e9, "deadline_secs", secs, "a positive number of seconds")
        for name, kind in (("save_options", SaveOptions), ("load_options", LoadOptions)):
            value = getattr(self, name)
            _require(isinstance(value, kind | None), name, value, f"{kind.__name__} or None")
        for name in ("asynchronous", "incremental"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "a bool")

    @property
    def when(self) -> SaveWhen | None:
        """When to save."""
        given: SaveWhen | None = EverySteps(self.save_when) if isinstance(self.save_when, int) else self.save_when
        return given

    @property
    def rules(self) -> Keep | None:
        """What to keep."""
        given: Keep | None = Keep(last=self.keep) if isinstance(self.keep, int) else self.keep
        return given

    def call(self, location: str, *, signals: Sequence[int], measure_raw: bool) -> dict[str, Any]:
        """What must be equal on all ranks, as JSON values."""
        return {
            "call": "CheckpointManager",
            "root": location,
            "save_when": repr(self.when),
            "keep": repr(self.rules),
            "asynchronous": self.asynchronous,
            "incremental": [self.incremental, self.full_every],
            "save_options": settings(self.save_options or SaveOptions()),
            # The group of an exchange is each rank's own.
            "load_options": {**settings(self.load_options or LoadOptions()), "exchange": ""},
            # Which signals they are, and until when, each rank knows best; whether there are any decides who talks.
            "signals": bool(signals),
            "measure_raw": bool(measure_raw),
        }


def nothing_if_same(reports: Sequence[Parts]) -> list[Parts]:
    """Rank 0's answer to all of them, once they are seen to make the same call."""
    same_call(reports)
    return [()] * len(reports)


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise BadArgumentError(f"{name}={value!r} cannot be: expected {expected}")
