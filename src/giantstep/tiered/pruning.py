"""`Pruning`: removes a host's older steps, in a thread of its own, on the host's lead."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque

from giantstep.commit.remove import remove_checkpoint
from giantstep.errors import GiantstepError
from giantstep.pending import PendingSave
from giantstep.steps import StepState, look_at_place, step_name, step_of
from giantstep.tiered.step_lists import own_steps
from giantstep.tiers.node_store import NodeStore

_LOG = logging.getLogger("giantstep")


class Pruning:
    """Keeps the newest steps of the run, and those that are held or being saved; the others go, and what failed saves left.

    Never removed: steps of other runs, and whatever giantstep has not written there.

    Args:
        root: the place.
        keep: how many steps stay.
    """

    def __init__(self, root: NodeStore, keep: int) -> None:
        self._root, self._keep = root, keep
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._awaited: deque[tuple[PendingSave, int]] = deque()
        self._held: Counter[int] = Counter()
        # Held since the last look began: what was seen of them then may hold no longer.
        self._touched: set[int] = set()
        self._removing: int | None = None
        self._asked = self._busy = self._closed = False
        self._thread: threading.Thread | None = None

    def hold(self, step: int) -> None:
        """Keep a step until `release`; if it is just being removed, return when it is gone."""
        with self._lock:
            self._held[step] += 1
            self._touched.add(step)
            self._changed.wait_for(lambda: self._removing != step)

    def release(self, step: int, *, look: bool = True) -> None:
        """Undo one `hold`; and look what can go, unless told otherwise."""
        with self._lock:
            self._held[step] -= 1
            if look:
                self._ask()

    def after(self, pending: PendingSave, step: int) -> None:
        """Look once this save is finished; its step stays until then."""
        with self._lock:
            self._held[step] += 1
            self._touched.add(step)
            self._awaited.append((pending, step))
            self._ask()

    def _ask(self) -> None:
        if self._closed:
            return
        self._asked = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="giantstep-prune", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def settle(self) -> None:
        """Wait until everything that was asked for is done."""
        with self._lock:
            self._changed.wait_for(lambda: self._thread is None or not (self._asked or self._awaited or self._busy))

    def close(self) -> None:
        """Do what was asked for, and end."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    # In the thread.

    def _run(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._asked or self._awaited or self._closed)
                if self._closed and not (self._asked or self._awaited):
                    return
                self._busy, self._asked = True, False
                awaited = self._awaited.popleft() if self._awaited else None
            if awaited is not None:
                awaited[0].wait()
            try:
                if awaited is not None:
                    with self._lock:
                        self._held[awaited[1]] -= 1
                self._prune()
            except Exception:  # noqa: BLE001 - of a store's, perhaps; later removals must not be lost to it
                _LOG.exception("%s: old steps could not be removed", self._root.location)
            with self._lock:
                self._busy = False
                self._changed.notify_all()

    def _prune(self) -> None:
        with self._lock:
            self._touched = {step for step, count in self._held.items() if count > 0}
        run = self._root.protection.run
        ours = [one for one in own_steps(self._root).entries if one.run == run]
        ours.sort(key=lambda one: (one.generation, one.step), reverse=True)
        kept = {one.step for one in ours[: self._keep]}
        newest = max((one.save_id for one in ours[: self._keep]), default="")
        doomed = [one.step for one in ours[self._keep :]] + self._leftovers(newest)
        for step in doomed:
            with self._lock:
                if step in self._touched or step in kept:
                    continue
                self._removing = step
            try:
                remove_checkpoint(self._root.folder(step_name(step)))
            except (OSError, GiantstepError) as error:
                _LOG.warning("%s: step %d could not be removed: %s", self._root.location, step, error)
            finally:
                with self._lock:
                    self._removing = None
                    self._changed.notify_all()

    def _leftovers(self, newest: str) -> list[int]:
        """Steps of saves that never committed, and began before the newest step's did."""
        found = []
        for name in self._root.folders():
            step = step_of(name)
            if step is None:
                continue
            entry = look_at_place(self._root.folder(name), step)
            if entry.state is StepState.UNFINISHED and max(entry.save_ids, default="") < newest:
                found.append(step)
        return found
