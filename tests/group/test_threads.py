"""Ranks as threads."""

from __future__ import annotations

import time
from typing import Any

import pytest

from giantstep.errors import CoverageError, PeerFailureError, PhaseTimeoutError, StoreError
from giantstep.group.base import consult
from giantstep.testing.ranks import RanksFailedError, run_ranks, run_ranks_collecting


def test_all_ranks_get_their_answers() -> None:
    def rank(group: Any) -> bytes:
        decide = lambda reports: [b"".join(reports) + bytes([n]) for n in range(5)]  # noqa: E731
        return consult(group, "x", 10, lambda: bytes([group.rank + 10]), decide)

    assert run_ranks(5, rank) == [bytes([10, 11, 12, 13, 14, n]) for n in range(5)]


def test_an_error_in_the_decision_reaches_all_ranks_with_the_decisions_phase() -> None:
    def decide(_reports: Any) -> list[bytes]:
        raise CoverageError("a gap")

    def rank(group: Any) -> None:
        with pytest.raises(CoverageError, match=r"\[phase plan\] a gap"):
            consult(group, "describe", 10, lambda: b"", decide, "plan")

    run_ranks(3, rank)


def test_of_several_errors_the_lowest_rank_is_named_and_the_others_counted() -> None:
    def rank(group: Any) -> str:
        def work() -> bytes:
            if group.rank:
                raise OSError(5, "broken disk")
            return b""

        with pytest.raises(StoreError) as caught:
            consult(group, "write", 10, work)
        return str(caught.value)

    assert set(run_ranks(4, rank)) == {"[rank 1, phase write] OSError: [Errno 5] broken disk (ranks 2, 3 failed likewise)"}


def test_a_rank_that_ends_is_named_on_all_others() -> None:
    def rank(group: Any) -> None:
        if group.rank == 1:
            raise KeyboardInterrupt
        consult(group, "write", 10, lambda: b"")

    _, errors = run_ranks_collecting(3, rank)
    assert isinstance(errors[1], KeyboardInterrupt)
    assert [str(errors[rank]) for rank in (0, 2)] == ["[rank 1, phase write] rank 1 is gone"] * 2
    assert isinstance(errors[0], PeerFailureError)


def test_a_late_rank_is_named_on_all() -> None:
    def rank(group: Any) -> None:
        if group.rank == 2:
            time.sleep(1.5)
        consult(group, "write", 0.3, lambda: b"")

    _, errors = run_ranks_collecting(3, rank)
    assert all(isinstance(error, PhaseTimeoutError) for error in errors)
    assert {str(error) for error in errors} == {"[rank 2, phase write] rank 2 did not report within 0.3 s"}


def test_run_ranks_says_what_each_rank_raised() -> None:
    def rank(group: Any) -> None:
        if group.rank == 1:
            raise ValueError("one")

    with pytest.raises(RanksFailedError, match="rank 1: ValueError: one"):
        run_ranks(2, rank)
