"""`CheckpointManager`: steps under a root: when to save, what to keep, and how to go on."""

from __future__ import annotations

import datetime as dt
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from giantstep.errors import BadArgumentError, DisagreementError
from giantstep.format.names import new_save_id
from giantstep.format.record import Json
from giantstep.group.base import Parts, consult, consult_parts
from giantstep.group.torch_group import group_of
from giantstep.manager.arguments import Arguments, nothing_if_same
from giantstep.manager.chain import Chain
from giantstep.manager.choosing import newest_committed
from giantstep.manager.flights import packed, unpacked
from giantstep.manager.metrics import ManagerCallback, Teller
from giantstep.manager.pins import pin, unpin
from giantstep.manager.policies import EverySteps, Keep, SaveWhen
from giantstep.manager.restores import Restored, restore_step
from giantstep.manager.retention import Retention
from giantstep.manager.saves import Job, Saves
from giantstep.manager.signals import Notice
from giantstep.manager.speed import raw_bytes_per_sec
from giantstep.manager.timing import Expectation, Timing
from giantstep.options import LoadOptions, SaveOptions, StrictHandling
from giantstep.pending import PendingSave
from giantstep.phases import with_call
from giantstep.reports import SaveReport
from giantstep.steps import StepEntry, scan_steps, step_name
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, store_at


class CheckpointManager(AbstractContextManager["CheckpointManager"]):
    """Steps under a root. All ranks make one with the same arguments, and call its collective methods together.

        with gs.CheckpointManager("runs/7b", save_when=1000, keep=3) as manager:
            restored = manager.restore(state)
            for step in range(restored.step + 1 if restored else 1, 100_001):
                train(step)
                if manager.should_save(step):
                    manager.save(step, state)
                if manager.stopping:
                    break

    One job at a time may save under a root. Anybody may read. Making one is collective too.

    Args:
        root: a directory, URL or store; each step is a checkpoint in a directory `step_00000100` in it.
        save_when: what `should_save` goes by: a policy (`EverySteps`, `EverySecs`, `ForFailures`), or a number of steps;
            None: only signals and `stop`.
        keep: which steps stay: a `Keep`, or how many of the newest; None: all of them. The newest one always does.
        process_group: as for `save`.
        asynchronous: whether `save` goes on in the background.
        incremental: whether what has not changed since the step that this manager saved last is linked instead of written;
            see `SaveOptions.previous`.
        full_every: of incremental saves, every so many write everything, and so do the first one, the first one after a
            `restore` and one that replaces its step: damage of a shared file is damage of all steps that share it.
        save_options, load_options: of all saves and loads.
        signals: upon which `should_save` is true once more and `stopping` is set, on all ranks, though only one of them
            heard it; such as `signal.SIGTERM`. With any, the manager must be made in the main thread.
        deadline_secs: from the signal until everything must be saved.
        callbacks: are told of saves, loads and removals.
        measure_raw: measure the speed of the medium first (64 MiB per rank), to which that of saves is compared.
        clock: seconds, monotonic; for tests.

    Attributes:
        stopping: whether the job is to end: all ranks have agreed on it in `should_save`.

    Raises:
        BadArgumentError: a value that can never work.
        DisagreementError: ranks give different arguments.
        StoreError, PeerError: the speed could not be measured; a rank is lost or late.
    """

    def __init__(
        self,
        root: StoreLike,
        *,
        save_when: SaveWhen | int | None = None,
        keep: Keep | int | None = None,
        process_group: Any = None,
        asynchronous: bool = False,
        incremental: bool = False,
        full_every: int = 10,
        save_options: SaveOptions | None = None,
        load_options: LoadOptions | None = None,
        signals: Sequence[int] = (),
        deadline_secs: float = 30.0,
        callbacks: Sequence[ManagerCallback] = (),
        measure_raw: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        group, place = group_of(process_group), store_at(root)
        options = save_options if isinstance(save_options, SaveOptions) else SaveOptions()
        self._timeout_secs = options.timeout_secs

        self._notice = Notice((), clock)

        def begin() -> Parts:
            self._given = Arguments(
                save_when, keep, asynchronous, incremental, full_every, save_options, load_options, deadline_secs
            )
            call = self._given.call(place.location, signals=signals, measure_raw=measure_raw)
            self._notice = Notice(signals, clock)
            return with_call(call)

        try:
            consult_parts(group, "manage", self._timeout_secs, begin, nothing_if_same)
            raw = raw_bytes_per_sec(place, group, self._timeout_secs) if measure_raw else None
        except BaseException:
            self._notice.close()
            raise
        self._timing = Timing(self._given.when, notices=bool(signals), clock=clock)
        teller = Teller(tuple(callbacks), group.rank)
        began = new_save_id(dt.datetime.now(dt.UTC), secrets.token_hex(8))
        self._job = Job(place, group, process_group, Retention(place, self._given.rules, began, teller.tell), teller)
        self._saves = Saves(self._job, options, Chain(on=incremental, full_every=full_every), self._timing, raw)
        self._talk_at = self._asked_step = 0
        self._saved_step: int | None = None
        self._closed = False
        self.stopping = False

    # When to save.

    def stop(self) -> None:
        """The job is to end: as if a signal had come. One rank is enough; the others learn of it in `should_save`.

        They look about once in a second if the manager was given signals or goes by time, otherwise at the next save.
        """
        self._notice.note()

    def should_save(self, step: int) -> bool:
        """Whether this step is to be saved; the same on all ranks, which must all ask, with the same steps.

        By steps alone no rank talks to another. Where time or signals decide, rank 0 does; all learn of it in a tiny round
        about once in a second: after each step if steps are longer, and after a hundred of them at the latest. It carries some
        fifty bytes per rank and waits for the slowest rank, as a training step does.

        Raises (the same on all ranks):
            DisagreementError: ranks ask about different steps.
            PeerError: a rank died or did not ask in time.
        """
        self._check_open()
        if step < self._asked_step:
            # The job went back to an earlier step.
            self._forget_steps()
        self._asked_step = step
        when, was_stopping = self._given.when, self.stopping
        due = isinstance(when, EverySteps) and step % when.steps == 0
        self._timing.see(step)
        if self._timing.talks and not was_stopping and step >= self._talk_at:
            answer = self._talk(step)
            self._talk_at, self.stopping = answer["talk_at"], answer["stop"]
            due = due or answer["due"] or answer["stop"]
        return due and step != self._saved_step and not was_stopping

    def _forget_steps(self) -> None:
        """What was noted of steps says nothing of those to come."""
        self._talk_at = self._asked_step = 0
        self._saved_step = None

    def _talk(self, step: int) -> Any:
        def decide(reports: Sequence[bytes]) -> list[bytes]:
            told = [unpacked(report) for report in reports]
            other = next((rank for rank, own in enumerate(told) if own["step"] != step), None)
            if other is not None:
                raise DisagreementError(
                    f"should_save is asked about step {step} on rank 0 and {told[other]['step']} on rank {other}"
                )
            answer = {
                "stop": any(own["stop"] for own in told),
                "due": self._timing.is_due(),
                "talk_at": step + self._timing.talk_after(),
            }
            return [packed(answer)] * len(reports)

        report = packed({"step": step, "stop": self._notice.came})
        return unpacked(consult(self._job.group, "manage", self._timeout_secs, lambda: report, decide))

    # Saving and going on.

    def save(
        self,
        step: int,
        state_dict: dict[Any, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        content_metadata: Json = None,
        asynchronous: bool | None = None,
        overwrite: bool = False,
    ) -> SaveReport | PendingSave:
        """Save a step. Collective.

        Once the job is to end (`stopping`, or a signal that has come since) it blocks, whatever was asked for, after earlier
        saves have finished, and fails rather than let ranks wait for each other beyond the deadline.

        Args:
            step: its number.
            state_dict, content_metadata: as for `giantstep.save`.
            metrics: numbers by which `Keep.best` chooses; rank 0's are stored with the step.
            asynchronous: as for the manager, which is the default.
            overwrite: replace the step if it is there. It stays loadable until the new one is committed.

        Returns:
            The report; of an asynchronous save the handle.

        Raises (the same on all ranks):
            BadArgumentError: the step is there already, or is being saved.
            GiantstepError: an earlier save in the background failed, and no call has told so far; this one was not begun.
                Once the job is to end it is, and `close` tells of the other.
            Others: as `giantstep.save` and `giantstep.async_save`. Steps that were there before stay.
        """
        self._check_open()
        ending, hurried = self.stopping, self.stopping or self._notice.came
        result = self._saves.save(
            step,
            state_dict,
            {"content_metadata": content_metadata, "metrics": metrics},
            background=(self._given.asynchronous if asynchronous is None else asynchronous) and not ending,
            overwrite=overwrite,
            stop=self._notice.came,
            left_secs=max(0.1, self._notice.left_secs(self._given.deadline_secs)) if hurried else None,
        )
        self._saved_step = step
        self.stopping = ending or self._saves.stop_heard
        return result

    def restore(
        self,
        state_dict: dict[Any, Any],
        step: int | None = None,
        *,
        strict: StrictHandling = StrictHandling.RAISE_ALL,
    ) -> Restored | None:
        """Load a step, on any number of ranks. Collective.

        Args:
            state_dict, strict: as for `giantstep.load`.
            step: which; None: the newest that loads, once saves in the background are through. Newer ones that are damaged or
                lack files are passed over, on all ranks alike, with a warning.

        Returns:
            What was loaded; None if there is no step to load, and none was passed over.

        Raises (the same on all ranks):
            CorruptionError, IncompleteError: the step that was asked for is damaged; or all are.
            VersionError, StoreError: it, or one newer than all that load, is of a newer major version, or cannot be read.
            Others: as `giantstep.load`.
        """
        self._check_open()
        # Their copies are of the tensors that are filled now, and what they commit may be the newest step.
        self._saves.settle()
        restored = restore_step(self._job, state_dict, step, strict, self._given.load_options or LoadOptions())
        self._forget_steps()
        self._timing.resume()
        return restored

    @property
    def expectation(self) -> Expectation | None:
        """What saves cost, and the goodput to be expected, by this rank's clock; None before one was measured."""
        return self._timing.expectation()

    # Looking.

    def steps(self) -> list[StepEntry]:
        """All directories of steps under the root, by step. Not collective: only looks."""
        return scan_steps(self._job.root)

    def latest(self) -> int | None:
        """The newest committed step, or None. Not collective: only looks."""
        return newest_committed(self._job.root)

    # Steps that are committed by other means than `save`: by `Tiers`. Not collective.

    def place_of(self, step: int) -> Store:
        """Where a step is."""
        return self._job.root.folder(step_name(step))

    def keeping(self, step: int) -> AbstractContextManager[None]:
        """Inside, the step is not removed."""
        return self._job.retention.using(step)

    def committed_elsewhere(self, step: int) -> None:
        """A step was committed to its place: rules look at it from now on."""
        if self._job.group.rank == 0:
            self._job.retention.saved(step)
            self._job.retention.ask()

    # What stays.

    def pin(self, step: int) -> None:
        """Keep a step, whatever the rules say, also when other jobs manage the root. Collective."""

        def keep() -> None:
            # It may be about to be removed.
            with self._job.retention.using(step):
                pin(self._job.root, step)

        self._on_root(keep)

    def unpin(self, step: int) -> None:
        """Undo `pin`. Collective."""
        self._on_root(lambda: unpin(self._job.root, step))

    def _on_root(self, action: Callable[[], None]) -> None:
        self._check_open()

        def decide(reports: Sequence[bytes]) -> list[bytes]:
            action()
            return [b""] * len(reports)

        consult(self._job.group, "manage", self._timeout_secs, lambda: b"", decide)

    # The end.

    def wait(self) -> None:
        """Wait until all saves in the background are through. Collective.

        Raises (the same on all ranks):
            GiantstepError: what the first of them failed with of which no call has told, if `SaveOptions.on_error` is "raise".
        """
        self._check_open()
        self._saves.wait()

    def close(self) -> None:
        """Wait for saves and for removals; nothing can be done afterwards. Collective; a second call does nothing."""
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._end()

    def _end(self) -> None:
        self._closed = True
        self._notice.close()
        self._job.retention.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BadArgumentError(f"the manager of {self._job.root.location} is closed: make another one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif not self._closed:
            # Other ranks may not be here: nothing that needs them.
            self._saves.wait_alone()
            self._end()
