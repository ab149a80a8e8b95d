"""Calls that may never return, and how long they are waited for: `within` for one, `PatientStore` for those of a store.

torch's store waits for ever for the answer of a host that went away without a word (power, network): nothing comes through
its connection, not even an end. Called by `notices.py`, `rendezvous.py` and `torch_group.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class NoAnswerError(RuntimeError):
    """The call goes on and may yet return; nobody waits for it any more."""


class _Call(threading.Thread, Generic[T]):
    """A call in a thread of its own, which ends with the process if not before."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(name="giantstep-ask", daemon=True)
        self._function = function
        self._results: list[T] = []
        self._errors: list[Exception] = []

    def run(self) -> None:
        try:
            self._results.append(self._function())
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller raises it
            self._errors.append(error)
        del self._function

    def result(self, secs: float) -> T:
        """What it returns or raises within so long."""
        self.join(secs)
        if self.is_alive():
            raise NoAnswerError(f"no answer for {secs:g} s")
        if self._errors:
            # Kept here it would hold its traceback, and that this.
            raise self._errors.pop()
        return self._results[0]


def within(secs: float, function: Callable[[], T]) -> T:
    """Call a function that may never return; it is given so long.

    Raises:
        NoAnswerError: it took longer.
    """
    call = _Call(function)
    call.start()
    return call.result(secs)


class PatientStore:
    """A store of torch's whose answers are waited for only so long.

    While an answer is awaited in vain, whatever else is asked fails at once: one connection serves all, in turn. When the
    answer comes after all, the store is as before.

    Args:
        store: a `torch.distributed.Store`.
        patience_secs: for one answer.
    """

    def __init__(self, store: Any, patience_secs: float) -> None:
        self._store, self._patience_secs = store, patience_secs
        self._stuck: _Call[Any] | None = None

    def get(self, name: str) -> bytes:
        """As the store's."""
        found: bytes = self._ask(lambda: self._store.get(name))
        return found

    def set(self, name: str, value: str) -> None:
        """As the store's."""
        self._ask(lambda: self._store.set(name, value))

    def check(self, names: list[str]) -> bool:
        """As the store's."""
        return bool(self._ask(lambda: self._store.check(names)))

    def add(self, name: str, amount: int) -> int:
        """As the store's."""
        found: int = self._ask(lambda: self._store.add(name, amount))
        return found

    def compare_set(self, name: str, expected: str, desired: str) -> bytes:
        """As the store's."""
        found: bytes = self._ask(lambda: self._store.compare_set(name, expected, desired))
        return found

    def delete_key(self, name: str) -> bool:
        """As the store's."""
        return bool(self._ask(lambda: self._store.delete_key(name)))

    def _ask(self, question: Callable[[], T]) -> T:
        if self._stuck is not None:
            if self._stuck.is_alive():
                raise NoAnswerError("no answer to what was asked before")
            self._stuck = None
        call = _Call(question)
        call.start()
        try:
            return call.result(self._patience_secs)
        except NoAnswerError:
            self._stuck = call
            raise
