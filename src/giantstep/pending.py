"""`PendingSave`: the handle of a save that goes on in the background; `staging_guard`. Made by `async_save`."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from giantstep.errors import BadArgumentError, GiantstepError, PhaseTimeoutError
from giantstep.reports import SaveReport


class _Gate:
    """Closed, and opened once; made of one lock, so that no interrupt finds it half open, as it may an `Event`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.is_open = False

    def open(self) -> None:
        """Let everybody pass."""
        # It is open already, or somebody passes at this moment.
        with suppress(RuntimeError):
            self._lock.release()
        self.is_open = True

    def wait(self, timeout: float | None) -> bool:
        """Pass when it is open; False if that takes longer than `timeout` seconds."""
        if not self.is_open:
            if not self._lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
                return self.is_open
            with suppress(RuntimeError):
                self._lock.release()
        return True


class PendingSave:
    """A save that was handed off. All methods may be called from any thread, and on some ranks only.

    Attributes:
        location: where the checkpoint will be.
    """

    def __init__(self, location: str, told: Callable[[], None]) -> None:
        self.location = location
        self._told = told
        self._staged = _Gate()
        self._finished = _Gate()
        self._cancelled = threading.Event()
        self._report: SaveReport | None = None
        self._finished_at = 0.0
        self._error: GiantstepError | None = None

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Wait until tensors and objects may change again; False if that takes longer than `timeout` seconds.

        They may when the copies of this rank are made, and also when the save has failed: `result` tells which.
        """
        return self._staged.wait(timeout)

    def staged(self) -> bool:
        """Whether tensors and objects may change again."""
        return self._staged.is_open

    def done(self) -> bool:
        """Whether the checkpoint is committed, or the save has failed."""
        return self._finished.is_open

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is committed or has failed, without asking which; False if that takes longer than `timeout` seconds."""
        return self._finished.wait(timeout)

    def result(self, timeout: float | None = None) -> SaveReport:
        """Wait until the checkpoint is committed and durable.

        Args:
            timeout: seconds to wait; None: as long as it takes.

        Raises:
            PhaseTimeoutError: not finished within `timeout`. The save goes on.
            GiantstepError: the save failed, with the same error on all ranks, and was not committed; see `save`.
            CancelledError: some rank cancelled it.
            ChangedTooSoonError: a tensor was changed before it was staged.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        if self._report is None:
            raise RuntimeError("a finished save has neither report nor error")
        return self._report

    def exception(self, timeout: float | None = None) -> GiantstepError | None:
        """As `result`, but the error of the save is returned; None if it is committed."""
        if not self._finished.wait(timeout):
            raise PhaseTimeoutError(f"the save to {self.location} has not finished within {timeout:g} s; it goes on")
        self._told()
        return self._error

    def cancel(self) -> bool:
        """Ask that the checkpoint be not committed; False if the save is finished already.

        One rank's wish is enough. `result` then raises `CancelledError` on all ranks, unless the commit was decided
        before the wish was noticed. Files that were written are deleted.
        """
        self._cancelled.set()
        return not self._finished.is_open

    def guard(self, *optimizers: Any) -> PendingSave:
        """Have the next step of each optimizer wait until the save is staged; later steps wait for nothing.

        Args:
            optimizers: `torch.optim.Optimizer`s, or what else has `register_step_pre_hook`.

        Returns:
            This handle, so that the call can follow `async_save` on its line.
        """
        for optimizer in optimizers:
            guard = _guard_of(optimizer)
            guard.add(self)
        return self

    # For the thread that carries the save out.

    @property
    def is_cancelled(self) -> bool:
        """Whether this rank wishes to cancel."""
        return self._cancelled.is_set()

    def outcome(self) -> tuple[SaveReport | None, GiantstepError | None, float]:
        """Report or error, and when it was finished, by `time.monotonic`; of a save that is. Counts as telling nobody."""
        return self._report, self._error, self._finished_at

    def mark_staged(self) -> None:
        """Tensors may change."""
        self._staged.open()

    def finish(self, outcome: SaveReport | GiantstepError) -> None:
        """The save is committed, or has failed."""
        if isinstance(outcome, SaveReport):
            self._report = outcome
        else:
            self._error = outcome
        self._finished_at = time.monotonic()
        self._staged.open()
        self._finished.open()

    def __repr__(self) -> str:
        state = "staged" if self.staged() else "staging"
        if self.done():
            state = "committed" if self._error is None else f"failed: {self._error}"
        return f"PendingSave({self.location!r}, {state})"


class _Guard:
    """Has steps of one optimizer wait. It stays with the optimizer: its hooks must not be taken away while they run."""

    def __init__(self) -> None:
        self._awaited: deque[PendingSave] = deque()

    def add(self, pending: PendingSave) -> None:
        """The next step waits for this one too."""
        while self._awaited and self._awaited[0].staged():
            self._awaited.popleft()
        self._awaited.append(pending)

    def __call__(self, *_arguments: Any) -> None:
        while self._awaited:
            self._awaited.popleft().wait_staged()


# By optimizer, and forgotten with it.
_GUARDS: weakref.WeakKeyDictionary[Any, _Guard] = weakref.WeakKeyDictionary()


def _guard_of(optimizer: Any) -> _Guard:
    """The guard that an optimizer calls before each step.

    Classes that wrap an optimizer, such as accelerate's, may inherit the method to register it without what that needs.
    """
    register = getattr(optimizer, "register_step_pre_hook", None)
    if callable(register):
        guard = _GUARDS.get(optimizer)
        if guard is not None:
            return guard
        guard = _Guard()
        with suppress(AttributeError):
            register(guard)
            _GUARDS[optimizer] = guard
            return guard
        if hasattr(optimizer, "optimizer"):
            return _guard_of(optimizer.optimizer)
    raise BadArgumentError(
        f"{type(optimizer).__name__} has no working register_step_pre_hook, so its steps cannot be made to wait: use "
        "`with staging_guard(pending):` around what changes tensors"
    )


@contextmanager
def staging_guard(pending: PendingSave) -> Iterator[None]:
    """A block that changes tensors of a save: it begins when they are staged.

    pending = gs.async_save(state, path)
    loss(batch).backward()
    with gs.staging_guard(pending):
        optimizer.step()
    """
    pending.wait_staged()
    yield
