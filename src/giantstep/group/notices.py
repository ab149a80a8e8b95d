"""The notice board: names in a key-value store by which ranks that cannot reach each other agree on a fault.

Whoever finds a fault announces it, the first announcement stays, and everybody raises what stands there. Who is at fault
when somebody does not come is found by a roll call: all ranks that wait say for whom, and who is waited for and does
not answer is the one. Called by `watching.py` and `torch_group.py`; one board serves one set of connections.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any, NoReturn

from giantstep.errors import GiantstepError, PeerFailureError
from giantstep.group.answering import NoAnswerError, PatientStore
from giantstep.group.faults import from_text, to_text

_FAULT, _ROLL, _HEARD = "fault", "roll", "heard"
_POLL_SECS = 0.02
# The store's host may end in good order while last answers are still on their way.
_UNREACHABLE_SECS = 5.0
# A store that is asked by thousands of ranks at once may take long; one that is cut off never answers.
_ANSWER_SECS = 5.0


class Board:
    """One rank's view of the board.

    Args:
        store: a `torch.distributed.Store` that all ranks see, with names for these connections only.
    """

    def __init__(self, store: Any, rank: int) -> None:
        self._store = PatientStore(store, _ANSWER_SECS)
        self._rank = rank
        self._unreachable_since: float | None = None

    def tell(self, fault: GiantstepError) -> str:
        """Put up a fault; return what stands there, which is the first one.

        Raises:
            PeerFailureError: the store is gone.
        """
        try:
            standing: bytes = self._store.compare_set(_FAULT, "", to_text(fault))
        except RuntimeError as error:
            raise _no_store(error, fault.phase) from error
        return standing.decode()

    def announce(self, fault: GiantstepError) -> NoReturn:
        """Put up a fault and raise what stands there."""
        raise from_text(self.tell(fault))

    def check(self, phase: str) -> None:
        """Raise the fault that was announced, if one was, or that the board has been out of reach for some time."""
        try:
            notice = self._store.get(_FAULT) if self._store.check([_FAULT]) else None
            self._unreachable_since = None
        except NoAnswerError:
            # Perhaps it is slow. Who is waited for may be in reach, and the patience with him is bounded.
            return
        except RuntimeError as error:
            self._unreachable_since = self._unreachable_since or time.monotonic()
            if time.monotonic() - self._unreachable_since > _UNREACHABLE_SECS:
                raise _no_store(error, phase) from error
            return
        if notice is not None:
            raise from_text(notice)

    # After a fault.

    def heard(self) -> None:
        """Count this rank among those who know of the fault."""
        with contextlib.suppress(RuntimeError):
            self._store.add(_HEARD, 1)

    def until_heard(self, ranks: int, patience_secs: float) -> None:
        """Return when that many ranks know of the fault, or the patience ended: the board may end with this process."""
        deadline = time.monotonic() + patience_secs
        with contextlib.suppress(RuntimeError):
            while self._store.add(_HEARD, 0) < ranks and time.monotonic() < deadline:
                time.sleep(_POLL_SECS)

    # The roll call.

    def call_roll(self) -> None:
        """Ask all ranks that wait to say for whom."""
        self._set(_ROLL, "called")

    def roll_called(self) -> bool:
        """Whether somebody called the roll."""
        try:
            return bool(self._store.check([_ROLL]))
        except RuntimeError:
            # As in `_set`.
            return False

    def answer_roll(self, waits_for: list[int]) -> None:
        """Say for whom this rank waits."""
        self._set(f"waiting/{self._rank}", json.dumps(waits_for))

    def waits_for(self, rank: int) -> list[int]:
        """For whom a rank said that it waits; nobody if it did not answer."""
        name = f"waiting/{rank}"
        try:
            found: list[int] = json.loads(self._store.get(name)) if self._store.check([name]) else []
        except RuntimeError:
            return []
        return found

    def _set(self, name: str, value: str) -> None:
        # Whether the store is out of reach is for `check` to judge.
        with contextlib.suppress(RuntimeError):
            self._store.set(name, value)


def _no_store(error: Exception, phase: str | None) -> PeerFailureError:
    return PeerFailureError(
        "rank 0 is gone, or the node that hosts the store that started torch.distributed: the store does not answer "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})",
        rank=0,
        phase=phase,
    )
