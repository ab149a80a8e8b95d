"""`Saves`: the saves of a manager, from the agreement that a step may be saved to the record of what it took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from giantstep.async_saving import async_save
from giantstep.errors import BadArgumentError, DisagreementError, GiantstepError, PhaseTimeoutError
from giantstep.group.base import Group, consult
from giantstep.manager.chain import Chain
from giantstep.manager.choosing import check_may_save
from giantstep.manager.flights import Flight, gathered, owed, packed, record_of, told_of, unpacked
from giantstep.manager.metrics import Teller
from giantstep.manager.retention import Retention
from giantstep.manager.timing import Timing
from giantstep.options import SaveOptions
from giantstep.pending import PendingSave
from giantstep.reports import SaveReport
from giantstep.saving import save
from giantstep.steps import step_name
from giantstep.storage.base import Store


@dataclass(frozen=True, slots=True)
class Job:
    """Whose steps they are.

    Attributes:
        root: of the steps.
        group, process_group: the ranks, as this library and as the user knows them.
        retention, teller: who removes steps; who is told of all that happens.
    """

    root: Store
    group: Group
    process_group: Any
    retention: Retention
    teller: Teller


class Saves:
    """See the module. Methods that say so are collective.

    Args:
        job: whose they are.
        options: of all saves.
        chain: of incremental saves.
        timing: is told what saves cost.
        raw_bytes_per_sec: speed of the medium, or None.

    Attributes:
        stop_heard: whether some rank said, when a save was prepared, that the job is to end.
    """

    def __init__(self, job: Job, options: SaveOptions, chain: Chain, timing: Timing, raw_bytes_per_sec: float | None) -> None:
        self._job, self._options, self._chain, self._timing, self._raw = job, options, chain, timing, raw_bytes_per_sec
        self._flights: list[Flight] = []
        self._owed: GiantstepError | None = None
        self.stop_heard = False

    def save(
        self,
        step: int,
        state_dict: dict[Any, Any],
        arguments: Mapping[str, Any],
        *,
        background: bool,
        overwrite: bool,
        stop: bool,
        left_secs: float | None,
    ) -> SaveReport | PendingSave:
        """Collective. Save a step; see `CheckpointManager.save`.

        Args:
            arguments: further ones of `giantstep.save`.
            background: whether to use `giantstep.async_save`.
            stop: whether this rank has heard that the job is to end.
            left_secs: how long it may take altogether, as far as this rank knows; None: as long as it takes.
        """
        began = time.monotonic()
        background, answer = self._agree(step, overwrite, stop, background=background, left_secs=left_secs)
        previous: int | None = answer["previous"]
        options = self._options_for(previous, answer["left_secs"])
        # What is saved and what it is compared with must not be removed meanwhile.
        retention, used = self._job.retention, [number for number in (step, previous) if number is not None]
        for number in used:
            retention.take(number)
        self._timing.begin_save()
        place = self._job.root.folder(step_name(step))
        settings: dict[str, Any] = {**arguments, "process_group": self._job.process_group, "options": options}
        try:
            if background:
                pending = async_save(state_dict, place, **settings)
            else:
                report = save(state_dict, place, **settings)
        except BaseException as error:
            for number in used:
                retention.release(number)
            secs = time.monotonic() - began
            self._chain.failed(step)
            self._tell([told_of(step, None, error, secs, secs)], 0, asynchronous=background)
            raise
        blocked = time.monotonic() - began
        if background:
            self._flights.append(Flight(step, pending, began, blocked))
            if self._job.group.rank == 0:
                retention.ask(pending, used)
            return pending
        self._chain.saved(step)
        try:
            # Retention hears of it.
            self._share([told_of(step, report, None, blocked, blocked)], asynchronous=False, left_secs=answer["left_secs"])
        finally:
            for number in used:
                retention.release(number)
        if self._job.group.rank == 0:
            retention.ask()
        return report

    def _agree(
        self, step: int, overwrite: bool, stop: bool, *, background: bool, left_secs: float | None
    ) -> tuple[bool, dict[str, Any]]:
        """Whether the save is made in the background, and the answer of `_prepare`."""
        leave = self._options.max_pending - 1 if background else 0
        answer = self._prepare(step, overwrite, stop, leave=leave, left_secs=left_secs, background=background)
        if background and answer["stop"]:
            # A signal has come since ranks last talked. What would be begun now in the background might never be finished.
            background = False
            answer = self._prepare(step, overwrite, stop, leave=0, left_secs=answer["left_secs"])
        if answer["left_secs"] is None:
            self._pay(f"Step {step} was not saved: call save again")
        return background, answer

    def _prepare(
        self, step: int, overwrite: bool, stop: bool, *, leave: int, left_secs: float | None, background: bool = False
    ) -> dict[str, Any]:
        """Agree that the step may be saved, and on the one to compare it with; hear of saves that are through.

        Args:
            background: whether it will be an `async_save`, which raises by itself what earlier ones failed with.
        """
        began = time.monotonic()
        flights, late = self._finish(leave, left_secs)
        group = self._job.group

        def look() -> bytes:
            if late:
                raise PhaseTimeoutError(
                    f"the save of step {late.step} has not finished in the time that is left; step {step} is not saved"
                )
            if any(flight.step == step for flight in self._flights):
                raise BadArgumentError(f"step {step} is being saved already")
            left = None if left_secs is None else max(0.1, left_secs - (time.monotonic() - began))
            return packed({"step": step, "stop": stop, "left_secs": left, "told": [flight.told(group) for flight in flights]})

        def decide(reports: Sequence[bytes]) -> list[bytes]:
            told = [unpacked(report) for report in reports]
            other = next((rank for rank, own in enumerate(told) if own["step"] != step), None)
            if other is not None:
                raise DisagreementError(
                    f"save is called for step {step} on rank 0 and for {told[other]['step']} on rank {other}"
                )
            check_may_save(self._job.root, step, overwrite=overwrite)
            stops = any(own["stop"] for own in told)
            answer = {
                "previous": None if background and stops else self._previous_of(step),
                "stop": stops,
                # The rank that heard the signal first knows best.
                "left_secs": min((own["left_secs"] for own in told if own["left_secs"] is not None), default=None),
                "told": [own["told"] for own in told],
            }
            return [packed(answer)] * len(reports)

        try:
            answer: dict[str, Any] = unpacked(consult(group, "manage", self._patience_secs(left_secs), look, decide))
        except BaseException:
            # The next call hears of them.
            self._flights = flights + self._flights
            raise
        self._record(answer["told"], asynchronous=True)
        if not background:
            self._owed = self._owed or owed(flights, answer["told"])
        self.stop_heard = answer["stop"]
        return answer

    def _previous_of(self, step: int) -> int | None:
        """Which step an incremental save is compared with. Rank 0's."""
        return self._chain.previous(step, [flight.step for flight in self._flights if not flight.has_failed])

    def _options_for(self, previous: int | None, left_secs: float | None) -> SaveOptions:
        options = self._options
        if self._chain.on:
            place = None if previous is None else self._job.root.folder(step_name(previous))
            options = replace(options, digests=True, previous=place)
        if left_secs is not None:
            options = replace(options, timeout_secs=min(options.timeout_secs, left_secs))
        return options

    # What became of saves.

    def _finish(self, leave: int, left_secs: float | None = None) -> tuple[list[Flight], Flight | None]:
        """Wait for all saves in the background but the last `leave`, which stay in flight; and the first that is late."""
        deadline = None if left_secs is None else time.monotonic() + left_secs
        count = max(0, len(self._flights) - leave)
        flights, self._flights = self._flights[:count], self._flights[count:]
        late = None
        for flight in flights:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not flight.pending.wait(left):
                late = late or flight
            elif flight.has_failed:
                self._chain.failed(flight.step)
            else:
                self._chain.saved(flight.step)
        return flights, late

    def _share(self, told: list[dict[str, Any]], *, asynchronous: bool, left_secs: float | None) -> None:
        """Every rank tells what it knows of the same saves, in one small round."""
        self._record(gathered(self._job.group, told, self._patience_secs(left_secs)), asynchronous=asynchronous)

    def _patience_secs(self, left_secs: float | None) -> float:
        """How long ranks may keep each other waiting where so much is left of a deadline."""
        return self._options.timeout_secs if left_secs is None else min(self._options.timeout_secs, max(1.0, left_secs))

    def _record(self, by_rank: Sequence[Sequence[dict[str, Any]]], *, asynchronous: bool) -> None:
        """Of what every rank told of the same saves."""
        for ranks in zip(*by_rank, strict=True):
            if not ranks[0]["error"]:
                if not asynchronous:
                    self._job.retention.saved(ranks[0]["step"])
                # The slowest rank counts: so all ranks go by the same numbers.
                self._timing.cost(*(max(told[name] for told in ranks) for name in ("blocked_secs", "total_secs")))
            self._tell(ranks, self._job.group.rank, asynchronous=asynchronous)

    def _tell(self, ranks: Sequence[dict[str, Any]], rank: int, *, asynchronous: bool) -> None:
        place = self._job.root.folder(step_name(ranks[0]["step"])).location
        record = record_of(
            ranks,
            rank,
            place,
            asynchronous=asynchronous,
            raw_bytes_per_sec=self._raw,
            expected=self._timing.expectation(),
        )
        self._job.teller.tell(record)

    def wait(self) -> None:
        """Collective. Wait until nothing is in flight; raise what the first save failed with of which no call has told."""
        flights, _ = self._finish(0)
        if flights:
            by_rank = gathered(
                self._job.group, [flight.told(self._job.group) for flight in flights], self._options.timeout_secs
            )
            self._record(by_rank, asynchronous=True)
            self._owed = self._owed or owed(flights, by_rank)
        self._pay("")

    def _pay(self, note: str) -> None:
        """Raise what a save in the background failed with, if that was not told."""
        error, self._owed = self._owed, None
        if error is not None:
            if note:
                error.add_note(f"This is what an earlier asynchronous save of this manager failed with. {note}.")
            raise error

    def settle(self) -> None:
        """Before a restore: wait until nothing is in flight, and leave it to the next call to tell what became of it."""
        # What is there now may be damaged, which is why the job goes back.
        self._chain.begin_anew()
        for flight in self._flights:
            flight.pending.wait()

    def wait_alone(self) -> None:
        """Wait until nothing is in flight; other ranks need not be there."""
        self._finish(0)
