"""Calls that may never return are waited for only so long."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from giantstep.errors import PeerFailureError
from giantstep.group import notices
from giantstep.group.answering import NoAnswerError, PatientStore, within
from giantstep.group.faults import idle
from giantstep.group.notices import Board
from giantstep.group.rendezvous import meet


class SilentStore:
    """Gives no answer until it is let go on. It has no names."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.asked = 0

    def check(self, names: list[str]) -> bool:
        self.asked += 1
        self.go_on.wait()
        return False

    def set(self, name: str, value: str) -> None:
        self.check([name])

    def compare_set(self, name: str, expected: str, desired: str) -> bytes:
        self.check([name])
        return desired.encode()


@pytest.fixture
def silent() -> Any:
    store = SilentStore()
    yield store
    store.go_on.set()


def test_what_returns_in_time_is_returned_and_what_it_raises_is_raised() -> None:
    assert within(60, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(60, lambda: {}["x"])


def test_a_store_is_not_asked_again_before_it_has_answered(silent: SilentStore) -> None:
    store = PatientStore(silent, 0.01)
    for _ in range(3):
        with pytest.raises(NoAnswerError):
            store.check(["a"])
    assert silent.asked == 1


def test_a_store_that_answers_after_all_is_asked_as_before(silent: SilentStore) -> None:
    store = PatientStore(silent, 60)
    stuck = PatientStore(silent, 0.01)
    with pytest.raises(NoAnswerError):
        stuck.check(["a"])
    silent.go_on.set()
    assert store.check(["a"]) is False
    for thread in threading.enumerate():
        if thread.name == "giantstep-ask":
            thread.join(60)
    assert stuck.check(["a"]) is False


def test_a_board_that_does_not_answer_tells_of_no_fault_and_cannot_be_told_of_one(
    silent: SilentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "_ANSWER_SECS", 0.01)
    board = Board(silent, 1)
    board.check("copy")
    assert not board.roll_called()
    board.heard()
    with pytest.raises(PeerFailureError, match="the store does not answer") as caught:
        board.announce(idle([2], "copy", 3))
    assert (caught.value.rank, caught.value.phase) == (0, "copy")


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_do_not_wait_for_a_store_that_is_cut_off_when_they_meet(silent: SilentStore, rank: int) -> None:
    with pytest.raises(PeerFailureError, match="is gone"):
        meet(silent, rank, 2, 1, "write", 0.01)
