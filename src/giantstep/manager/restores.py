"""`restore_step`: the newest step that loads, on all ranks alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from giantstep.errors import CorruptionError, DisagreementError, GiantstepError
from giantstep.group.base import consult
from giantstep.loading import load
from giantstep.manager.choosing import Skipped, choose
from giantstep.manager.flights import gathered, packed, unpacked
from giantstep.manager.metrics import LoadRecord
from giantstep.manager.saves import Job
from giantstep.older_steps import PASSED_OVER
from giantstep.options import LoadOptions, StrictHandling
from giantstep.reports import LoadedState
from giantstep.steps import step_name

_LOG = logging.getLogger("giantstep")


@dataclass(frozen=True, slots=True)
class Restored:
    """What `CheckpointManager.restore` has loaded.

    Attributes:
        step: that was loaded.
        state: see `giantstep.load`.
        skipped: newer steps that could not be loaded, newest first, and why.
    """

    step: int
    state: LoadedState
    skipped: tuple[Skipped, ...]


def restore_step(
    job: Job, state_dict: dict[Any, Any], wanted: int | None, strict: StrictHandling, options: LoadOptions
) -> Restored | None:
    """Collective. See `CheckpointManager.restore`."""
    began = time.monotonic()
    skipped: list[Skipped] = []
    failure: GiantstepError | None = None
    if not strict.raises_unexpected:
        # A step that need not fill everything must not come after one that has filled some of it before it was seen to be bad.
        options = replace(options, verify="before")
    while True:
        step, passed = _choose(job, wanted, [one.step for one in skipped], options.timeout_secs)
        if step is None:
            if failure is not None:
                raise failure
            if passed:
                raise CorruptionError(f"no step of {job.root.location} can be loaded: {passed[0].reason}")
            return None
        try:
            with job.retention.using(step):
                place = job.root.folder(step_name(step))
                state = load(state_dict, place, strict=strict, process_group=job.process_group, options=options)
        except PASSED_OVER as error:
            if wanted is not None:
                raise
            failure = failure or error
            skipped.append(Skipped(step, error.message))
            job.retention.found_bad(step)
            continue
        newer = sorted({*skipped, *(one for one in passed if one.step > step)}, key=lambda one: -one.step)
        if newer and job.group.rank == 0:
            reasons = "; ".join(f"step {one.step}: {one.reason}" for one in newer)
            _LOG.warning("%s: step %d is restored, since newer ones do not load: %s", job.root.location, step, reasons)
        _tell(job, step, state, time.monotonic() - began, options.timeout_secs)
        return Restored(step, state, tuple(newer))


def _choose(job: Job, wanted: int | None, tried: Sequence[int], timeout_secs: float) -> tuple[int | None, list[Skipped]]:
    def decide(reports: Sequence[bytes]) -> list[bytes]:
        if len(set(reports)) != 1:
            raise DisagreementError(f"ranks restore different steps: {', '.join(sorted({one.decode() for one in reports}))}")
        found, passed = choose(job.root, wanted, tried)
        return [packed([found, [[one.step, one.reason] for one in passed]])] * len(reports)

    found, passed = unpacked(consult(job.group, "open", timeout_secs, lambda: packed(wanted), decide))
    return found, [Skipped(*one) for one in passed]


def _tell(job: Job, step: int, state: LoadedState, total_secs: float, timeout_secs: float) -> None:
    report = state.report
    told = gathered(job.group, {"seconds": report.seconds, "filled": report.bytes_filled}, timeout_secs)
    secs = max(own["seconds"].get("read", 0.0) for own in told)
    record = LoadRecord(
        step=step,
        location=report.location,
        total_secs=total_secs,
        bytes_filled=report.bytes_filled,
        bytes_read=report.bytes_read,
        bytes_per_sec=sum(own["filled"] for own in told) / secs if secs > 0 else 0.0,
        seconds=tuple(own["seconds"] for own in told),
    )
    job.teller.tell(record)
