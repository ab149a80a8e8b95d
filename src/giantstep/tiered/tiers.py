"""`Tiers`: steps in the hosts' own places often, and now and then in a durable one."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from giantstep.errors import (
    BadArgumentError,
    CheckpointNotFoundError,
    CorruptionError,
    GiantstepError,
    IncompleteError,
    located,
)
from giantstep.format.record import Json
from giantstep.group.base import consult
from giantstep.manager.manager import CheckpointManager
from giantstep.options import StrictHandling
from giantstep.pending import PendingSave
from giantstep.reports import SaveReport
from giantstep.tiered.draining import Drained, drain
from giantstep.tiered.local_tier import LocalTier, RestoredStep

_LOG = logging.getLogger("giantstep")


class Tiers(AbstractContextManager["Tiers"]):
    """A `LocalTier` and a durable `CheckpointManager` as one. Methods are collective.

        local = gs.LocalTier("/dev/shm/run7", every=50, keep=2, replicas=1)
        durable = gs.CheckpointManager("/shared/run7", save_when=1000, keep=3)
        with gs.Tiers([local, durable]) as tiers:
            restored = tiers.restore(state)
            ...
                if tiers.should_save(step):
                    tiers.save(step, state)

    A step for both is saved to the hosts' places, and copied from there to the durable one in the background; the trainer
    waits for neither. A step for the durable one alone is saved there.

    Args:
        tiers: a `LocalTier` and a `CheckpointManager` of the same ranks, in this order. They belong to this object, which
            closes them.
    """

    def __init__(self, tiers: Sequence[LocalTier | CheckpointManager]) -> None:
        if len(tiers) != 2 or not isinstance(tiers[0], LocalTier) or not isinstance(tiers[1], CheckpointManager):
            raise BadArgumentError(
                "tiers must be a LocalTier and a CheckpointManager, in this order, not "
                f"[{', '.join(type(one).__name__ for one in tiers)}]"
            )
        self.local: LocalTier = tiers[0]
        self.durable: CheckpointManager = tiers[1]
        self._drains = _Drains(self.local, self.durable)
        self._closed = False

    @property
    def stopping(self) -> bool:
        """As `CheckpointManager.stopping`."""
        return self.durable.stopping

    def should_save(self, step: int) -> bool:
        """Whether a tier is to get this step; the same on all ranks, which must all ask."""
        self._due = (step, self.durable.should_save(step))
        return self._due[1] or self.local.should_save(step)

    def save(
        self,
        step: int,
        state_dict: dict[Any, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        content_metadata: Json = None,
    ) -> SaveReport | PendingSave:
        """Save a step to those tiers that are due; if `should_save` was not asked about it, to both.

        A step that is there already is replaced, in either tier: the run has gone back, and comes by it again.

        Args and raises as the tiers' `save`. What a copy to the durable tier failed with is raised by the next call or by
        `wait`: the step stays in the hosts' places.

        Returns:
            What the first tier that saves it returns.
        """
        self._drains.check()
        asked, due = getattr(self, "_due", (None, True))
        durable = due if asked == step else True
        local = self.local.should_save(step) or asked != step
        arguments: dict[str, Any] = {"metrics": metrics, "content_metadata": content_metadata}
        if not local or self.durable.stopping:
            # Before the job ends, what is saved must be durable when the call returns.
            return self.durable.save(step, state_dict, overwrite=True, **arguments)
        result = self.local.save(step, state_dict, **arguments)
        if durable:
            self._drains.begin(step, result if isinstance(result, PendingSave) else None)
        return result

    def restore(
        self, state_dict: dict[Any, Any], step: int | None = None, *, strict: StrictHandling = StrictHandling.RAISE_ALL
    ) -> RestoredStep | None:
        """Load a step: the newest that loads from either tier, from the hosts' places if both have it.

        Args, returns and raises as the tiers' `restore`.
        """
        self._drains.settle()
        newest = self._durable_step()
        skipped: list[str] = []
        wanted = [one for one in self.local.steps() if step is None or one == step]
        # What hosts have that is older than the newest durable step is not worth a try before it.
        behind = [one for one in wanted if step is None and newest is not None and one < newest]
        found = self._from_hosts(state_dict, [one for one in wanted if one not in behind], strict, skipped)
        if found is None and behind:
            found = self._from_durable(state_dict, newest, strict, skipped, raises=False)
            found = found or self._from_hosts(state_dict, behind, strict, skipped)
        found = found or self._from_durable(state_dict, step, strict, skipped, raises=True)
        if found is None and skipped:
            raise IncompleteError(f"no tier has a step that loads: {'; '.join(skipped)}")
        return found

    def _from_hosts(
        self, state_dict: dict[Any, Any], steps: Sequence[int], strict: StrictHandling, skipped: list[str]
    ) -> RestoredStep | None:
        """The first of the steps that loads; the others are added to `skipped`."""
        for one in steps:
            try:
                found = self.local.restore(state_dict, one, strict=strict)
            except (IncompleteError, CorruptionError) as error:
                skipped.append(f"step {one} in the hosts' places: {error.message}")
                continue
            return None if found is None else RestoredStep(found.step, found.state, found.tier, (*skipped, *found.skipped))
        return None

    def _from_durable(
        self, state_dict: dict[Any, Any], step: int | None, strict: StrictHandling, skipped: list[str], *, raises: bool
    ) -> RestoredStep | None:
        """This step, or the newest that loads; unless it `raises` what it fails with, that is added to `skipped`."""
        try:
            found = self.durable.restore(state_dict, step, strict=strict)
        except (CheckpointNotFoundError, CorruptionError, IncompleteError) as error:
            if not raises:
                skipped.append(f"step {step} in the durable place: {error.message}")
                return None
            error.__notes__ = [*getattr(error, "__notes__", []), *skipped]
            raise
        if found is None:
            return None
        # What hosts have of later steps is of another course of the run from now on.
        self.local.go_on()
        told = [f"step {one.step} in the durable place: {one.reason}" for one in found.skipped]
        return RestoredStep(found.step, found.state, "durable", (*skipped, *told))

    def _durable_step(self) -> int | None:
        """The newest committed step of the durable tier, as rank 0 sees it."""

        def decide(reports: Sequence[bytes]) -> list[bytes]:
            latest = self.durable.latest()
            return [b"" if latest is None else str(latest).encode("ascii")] * len(reports)

        group, secs = self.local.group, self.local.timeout_secs
        latest = consult(group, "gather", secs, lambda: b"", decide)
        return int(latest) if latest else None

    def wait(self) -> None:
        """Wait until all saves and copies are through; raise what one failed with of which no call has told."""
        self.local.settle()
        self._drains.settle()
        self._drains.check()
        self.durable.wait()

    def close(self) -> None:
        """Wait, then close the tiers; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._end()
            self.durable.close()

    def _end(self) -> None:
        self._drains.close()
        self.local.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            # Other ranks may not be here: nothing that needs them.
            self._end()
            self.durable.__exit__(kind, error, trace)


class _Drains:
    """Copies to the durable tier, one after another, in a thread of each rank's, over a group of their own."""

    def __init__(self, local: LocalTier, durable: CheckpointManager) -> None:
        self._local, self._durable = local, durable
        self._group = local.group.beside()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._jobs: deque[tuple[int, PendingSave | None]] = deque()
        self._thread: threading.Thread | None = None
        # Copies that are through, and of these the numbers of those that failed, of which no call has told.
        self._through = 0
        self._failures: dict[int, GiantstepError] = {}

    def begin(self, step: int, pending: PendingSave | None) -> None:
        """Copy a step, once it is saved. It stays in the hosts' places until then."""
        self._local.hold(step)
        with self._lock:
            self._jobs.append((step, pending))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="giantstep-drain", daemon=True)
                self._thread.start()

    def settle(self) -> None:
        """Wait until nothing is left to do."""
        with self._lock:
            self._changed.wait_for(lambda: self._thread is None)

    close = settle

    def check(self) -> None:
        """Raise what the first copy failed with of which no call has told. All ranks ask at the same time, and all raise."""

        def count() -> bytes:
            with self._lock:
                return str(self._through).encode("ascii")

        def fewest(reports: Sequence[bytes]) -> list[bytes]:
            return [min(reports, key=int)] * len(reports)

        # Only of copies that are through on all ranks: what one has not heard yet would be told again by the next call.
        group, secs = self._local.group, self._local.timeout_secs
        through = int(consult(group, "drain", secs, count, fewest))

        def tell() -> bytes:
            with self._lock:
                told = [self._failures.pop(number) for number in sorted(self._failures) if number < through]
            if told:
                raise told[0]
            return b""

        consult(group, "drain", secs, tell)

    # In the thread.

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    self._changed.notify_all()
                    return
                step, pending = self._jobs[0]
            try:
                self._drain(step, pending)
            except Exception as error:  # noqa: BLE001 - whatever it is, the copies after it must not be lost to it
                ours = error if isinstance(error, GiantstepError) else located(error, self._group.rank, "drain")
                with self._lock:
                    self._failures[self._through] = ours
                _LOG.warning("step %d could not be copied to the durable place: %s", step, error)
            finally:
                self._local.release(step)
                with self._lock:
                    self._jobs.popleft()
                    self._through += 1

    def _drain(self, step: int, pending: PendingSave | None) -> Drained | None:
        if pending is not None:
            pending.wait()
            if pending.outcome()[0] is None:
                # On all ranks alike; the save's own handle tells of it.
                return None
        target = self._durable.place_of(step)
        with self._durable.keeping(step):
            done = drain(self._group, self._local.place_of(step), target, self._local.timeout_secs)
        self._durable.committed_elsewhere(step)
        return done
