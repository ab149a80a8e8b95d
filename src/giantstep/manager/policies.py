"""When to save and what to keep, as functions of frozen values: no clock, no storage, no ranks.

Source of the interval: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future
Generation Computer Systems 22 (2006), which refines J. W. Young, "A first order approximation to the optimum checkpoint
interval", CACM 17 (1974).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from giantstep.errors import BadArgumentError


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise BadArgumentError(f"{name}={value!r} cannot be: expected {expected}")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_secs(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


# When.


@dataclass(frozen=True, slots=True)
class EverySteps:
    """Save at steps that `steps` divides; ranks need not talk to know."""

    steps: int

    def __post_init__(self) -> None:
        _require(_is_count(self.steps, 1), "steps", self.steps, "an int of at least 1")


@dataclass(frozen=True, slots=True)
class EverySecs:
    """Save when so many seconds have gone by since the last save began."""

    secs: float

    def __post_init__(self) -> None:
        _require(_is_secs(self.secs), "secs", self.secs, "a positive number of seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class ForFailures:
    """Save as often as loses the least time, where the job fails once in `mtbf_secs` on average.

    The cost of a save is measured: the time that it keeps training from going on. The interval follows from both, see
    `best_interval_secs`; it is never shorter than a save takes altogether.

    Attributes:
        mtbf_secs: mean time between failures of the whole job (of one node, divided by the number of nodes).
        restart_secs: from a failure until training goes on; for the expected goodput alone.
        first_secs: when to save first, so that there is a cost to go by.
    """

    mtbf_secs: float
    restart_secs: float = 300.0
    first_secs: float = 60.0

    def __post_init__(self) -> None:
        for name in ("mtbf_secs", "restart_secs", "first_secs"):
            _require(_is_secs(getattr(self, name)), name, getattr(self, name), "a positive number of seconds")


SaveWhen: TypeAlias = EverySteps | EverySecs | ForFailures


def best_interval_secs(cost_secs: float, mtbf_secs: float) -> float:
    """Seconds of training between two saves that lose the least time: Daly's estimate of higher order.

    Args:
        cost_secs: for which a save keeps training from going on.
        mtbf_secs: mean time between failures.
    """
    if cost_secs >= 2 * mtbf_secs:
        return mtbf_secs
    part = cost_secs / (2 * mtbf_secs)
    return math.sqrt(2 * cost_secs * mtbf_secs) * (1 + math.sqrt(part) / 3 + part / 9) - cost_secs


def goodput(interval_secs: float, cost_secs: float, mtbf_secs: float, restart_secs: float) -> float:
    """The part of all time that goes into steps that are not lost again, by Daly's model of exponential failures.

    Args:
        interval_secs: of training between two saves.
        cost_secs, mtbf_secs: as for `best_interval_secs`.
        restart_secs: from a failure until training goes on.
    """
    # Expected time for one interval and its save, restarts and what is done again included.
    spent = (
        mtbf_secs
        * math.exp(min(restart_secs / mtbf_secs, 500.0))
        * math.expm1(min((interval_secs + cost_secs) / mtbf_secs, 500.0))
    )
    return interval_secs / spent if spent > 0 else 1.0


# What.


@dataclass(frozen=True, slots=True)
class SavedStep:
    """What rules go by: a committed step, when it was committed (seconds since 1970), and its metrics."""

    step: int
    committed: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """Which committed steps stay: those that any of the rules wants. The newest one always does, and what is pinned.

    Attributes:
        last: the newest so many.
        every: steps that this number divides.
        best: so many with the best value of `metric`; steps without it, or with NaN, are not among them.
        metric, mode: which metric, and whether the least or the greatest is best.
        secs: those committed within so many seconds.
    """

    last: int | None = None
    every: int | None = None
    best: int | None = None
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    secs: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("last", 0), ("every", 1), ("best", 1)):
            value = getattr(self, name)
            _require(value is None or _is_count(value, least), name, value, f"an int of at least {least}, or None")
        _require(self.secs is None or _is_secs(self.secs), "secs", self.secs, "a positive number of seconds, or None")
        _require(self.mode in ("min", "max"), "mode", self.mode, "'min' or 'max'")
        named = isinstance(self.metric, str) and self.metric != ""
        _require(named if self.best is not None else self.metric is None, "metric", self.metric, "a name, together with best")
        rules = (self.last, self.every, self.best, self.secs)
        _require(any(rule is not None for rule in rules), "Keep", rules, "at least one rule; keep=None keeps everything")

    def kept(self, steps: Sequence[SavedStep], now: float, pinned: Collection[int] = ()) -> set[int]:
        """The steps that stay.

        Args:
            steps: all committed ones, in any order.
            now: seconds since 1970.
            pinned: steps that stay whatever the rules say.
        """
        ordered = sorted(steps, key=lambda one: one.step)
        found = {one.step for one in ordered if one.step in pinned} | {one.step for one in ordered[-max(1, self.last or 0) :]}
        if self.every is not None:
            found |= {one.step for one in ordered if one.step % self.every == 0}
        if self.secs is not None:
            found |= {one.step for one in ordered if one.committed >= now - self.secs}
        return found | self._best(ordered)

    def _best(self, ordered: Sequence[SavedStep]) -> set[int]:
        if self.best is None or self.metric is None:
            return set()
        values = {one.step: one.metrics.get(self.metric, math.nan) for one in ordered}
        sign = 1 if self.mode == "min" else -1
        # Of equal ones the newer.
        ranked = sorted((sign * value, -step) for step, value in values.items() if not math.isnan(value))
        return {-step for _, step in ranked[: self.best]}
