"""`Timing`: when to save, when ranks must talk about it next, and what saves cost. Decisions are rank 0's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from giantstep.manager.policies import EverySecs, EverySteps, ForFailures, SaveWhen, best_interval_secs, goodput

# Where time or signals decide, ranks talk so often, or when a save is due, and after so many steps at most.
_TALK_SECS = 1.0
_MOST_STEPS = 10_000
# Weight of the newest measurement.
_NEWEST = 0.3


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is to be expected of the measured cost.

    Attributes:
        interval_secs: of training between two saves.
        cost_secs: for which a save keeps training from going on, on average.
        save_secs: from the call until the step is committed, on average.
        step_secs: of a training step, on average; NaN before two were seen.
        goodput: the part of all time that goes into steps that are not lost again; None unless the mean time between
            failures was given.
    """

    interval_secs: float
    cost_secs: float
    save_secs: float
    step_secs: float
    goodput: float | None

    def __str__(self) -> str:
        share = "" if self.goodput is None else f"; expected goodput {100 * self.goodput:.2f} %"
        return (
            f"a save blocks training for {self.cost_secs:.3g} s and takes {self.save_secs:.3g} s; one every "
            f"{self.interval_secs:.4g} s{share}"
        )


class Timing:
    """See the module. Used on rank 0; the others learn from it.

    Args:
        when: the policy.
        notices: whether ranks must talk for another reason too, such as signals.
        clock: seconds, monotonic.
    """

    def __init__(self, when: SaveWhen | None, *, notices: bool, clock: Callable[[], float]) -> None:
        self._when, self._notices, self._clock = when, notices, clock
        self._begun = clock()
        self._last_step: tuple[int, float] | None = None
        self._step_secs = math.nan
        self._cost_secs = self._save_secs = math.nan

    @property
    def talks(self) -> bool:
        """Whether ranks must talk at all to know when to save."""
        return self._notices or isinstance(self._when, EverySecs | ForFailures)

    def see(self, step: int) -> None:
        """Training is at this step now."""
        now = self._clock()
        if self._last_step is not None and step > self._last_step[0]:
            own = (now - self._last_step[1]) / (step - self._last_step[0])
            self._step_secs = own if math.isnan(self._step_secs) else (1 - _NEWEST) * self._step_secs + _NEWEST * own
        self._last_step = (step, now)

    def is_due(self) -> bool:
        """Whether time says that a save is due; steps say so on every rank by themselves."""
        return self._interval_secs() <= self._clock() - self._begun

    def talk_after(self) -> int:
        """After how many steps ranks are to talk again."""
        if math.isnan(self._step_secs):
            return 1
        left = self._interval_secs() - (self._clock() - self._begun)
        return max(1, min(_MOST_STEPS, int(min(_TALK_SECS, max(left, 0.0)) / max(self._step_secs, 1e-9))))

    def begin_save(self) -> None:
        """A save begins now: the next one is due an interval later. Time until the next step is no training."""
        self._begun = self._clock()
        self._last_step = None

    def cost(self, blocked_secs: float, total_secs: float) -> None:
        """A save was committed, and took so long."""
        for name, value in (("_cost_secs", blocked_secs), ("_save_secs", total_secs)):
            before = getattr(self, name)
            setattr(self, name, value if math.isnan(before) else (1 - _NEWEST) * before + _NEWEST * value)

    def _interval_secs(self) -> float:
        when = self._when
        if isinstance(when, EverySecs):
            return when.secs
        if not isinstance(when, ForFailures):
            return math.inf
        if math.isnan(self._cost_secs):
            return when.first_secs
        # A save that is not finished keeps the next one waiting.
        return max(best_interval_secs(self._cost_secs, when.mtbf_secs), self._save_secs)

    def expectation(self) -> Expectation | None:
        """What is to be expected; None before a save was measured."""
        if math.isnan(self._cost_secs):
            return None
        when, interval = self._when, self._interval_secs()
        if isinstance(when, EverySteps):
            interval = when.steps * self._step_secs
        share = None
        if isinstance(when, ForFailures):
            share = goodput(interval, self._cost_secs, when.mtbf_secs, when.restart_secs)
        return Expectation(interval, self._cost_secs, self._save_secs, self._step_secs, share)
