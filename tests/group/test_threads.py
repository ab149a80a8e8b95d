"""Ranks as threads."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from giantstep.errors import (
    BadArgumentError,
    CoverageError,
    GiantstepError,
    PeerFailureError,
    PhaseTimeoutError,
    StoreError,
)
from giantstep.group.base import Parcel, consult
from giantstep.group.faults import culprits
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
    assert {str(error) for error in errors} == {
        "[rank 2, phase write] rank 2 did not report within 0.3 s. Look at what it does, or raise timeout_secs."
    }


def test_run_ranks_says_what_each_rank_raised() -> None:
    def rank(group: Any) -> None:
        if group.rank == 1:
            raise ValueError("one")

    with pytest.raises(RanksFailedError, match="rank 1: ValueError: one"):
        run_ranks(2, rank)


def _bytes(source: int, target: int, number: int) -> np.ndarray:
    """What `source` sends to `target` in a round: any size, also none."""
    size = (7 * source + 3 * target + 5 * number) % 11 * 1000
    return np.random.default_rng([source, target, number]).integers(0, 256, size, dtype=np.uint8)


def _all_to_all(group: Any, number: int) -> bool:
    others = [rank for rank in range(group.size) if rank != group.rank]
    sends = [Parcel(other, _bytes(group.rank, other, n)) for n in (number, number + 1) for other in others]
    rooms = [Parcel(other, np.empty_like(_bytes(other, group.rank, n))) for n in (number, number + 1) for other in others]
    group.transfer(sends, rooms, "move", 10)
    wanted = [_bytes(other, group.rank, n) for n in (number, number + 1) for other in others]
    return all(np.array_equal(room.data, found) for room, found in zip(rooms, wanted, strict=True))


def test_parcels_arrive_in_order_and_whole_in_several_rounds() -> None:
    assert run_ranks(5, lambda group: [_all_to_all(group, number) for number in range(4)]) == [[True] * 4] * 5


def test_receives_meet_sends_of_whichever_call() -> None:
    def rank(group: Any) -> list[int]:
        first, second = np.array([1, 2], np.uint8), np.array([3], np.uint8)
        if group.rank == 0:
            group.transfer([Parcel(1, first)], [], "x", 10)
            group.transfer([Parcel(1, second)], [], "x", 10)
            return []
        rooms = [np.zeros(2, np.uint8), np.zeros(1, np.uint8)]
        group.transfer([], [Parcel(0, room) for room in rooms], "x", 10)
        return np.concatenate(rooms).tolist()

    assert run_ranks(2, rank) == [[], [1, 2, 3]]


def test_a_parcel_of_another_size_than_its_room_names_both_ranks_on_all() -> None:
    def rank(group: Any) -> str:
        sends = [Parcel(1, np.zeros(5, np.uint8))] if group.rank == 0 else []
        receives = [Parcel(0, np.zeros(4, np.uint8))] if group.rank == 1 else []
        with pytest.raises(PeerFailureError) as caught:
            group.transfer(sends, receives or [Parcel(1, np.zeros(1, np.uint8))] * (group.rank == 2), "x", 10)
        return str(caught.value)

    (message,) = set(run_ranks(3, rank))
    assert message.startswith("[rank 0, phase x] rank 0 sent 5 bytes to rank 1, which has room for 4. ")


def test_parcels_for_nobody_are_refused() -> None:
    def rank(group: Any) -> None:
        for peer in (group.rank, group.size, -1):
            with pytest.raises(BadArgumentError, match="no such peer"):
                group.transfer([Parcel(peer, np.zeros(1, np.uint8))], [], "x", 10)
        with pytest.raises(BadArgumentError, match="contiguous bytes"):
            group.transfer([], [Parcel(1 - group.rank, np.zeros(8, np.uint8)[::2])], "x", 10)

    run_ranks(2, rank)


def _then_goes_on(group: Any, error: GiantstepError) -> tuple[str, bytes]:
    """The message, and what a fresh call gives."""
    assert error.agreed
    ranks = [bytes([rank]) for rank in range(group.size)]
    answer = consult(group, "next", 10, lambda: ranks[group.rank], lambda reports: [b"".join(reports)] * group.size)
    assert answer == b"".join(ranks)
    assert _all_to_all(group, 1)
    return f"{type(error).__name__} {error}", answer


def test_an_idle_rank_is_named_by_those_who_wait_for_it_through_others() -> None:
    """0 waits for 1, 1 for 2, 2 for 3, which does nothing; 4 is in an exchange."""

    def rank(group: Any) -> tuple[str, bytes]:
        def call() -> None:
            if group.rank == 4:
                group.exchange((), list, "x", 10)
            group.transfer([], [Parcel(group.rank + 1, np.zeros(1, np.uint8))], "x", 0.3 if group.rank == 0 else 10)

        if group.rank == 3:
            time.sleep(1)
        with pytest.raises(PhaseTimeoutError) as caught:
            call()
        return _then_goes_on(group, caught.value)

    ((message, _),) = set(run_ranks(5, rank))
    assert message.startswith("PhaseTimeoutError [rank 3, phase x] rank 3 sent and took nothing for 0.3 s. ")


def test_of_ranks_that_wait_for_each_other_the_lowest_is_named() -> None:
    def rank(group: Any) -> tuple[str, bytes]:
        other = {0: 2, 1: 2, 2: 1}[group.rank]
        with pytest.raises(PhaseTimeoutError) as caught:
            group.transfer([], [Parcel(other, np.zeros(1, np.uint8))], "x", 0.3)
        return _then_goes_on(group, caught.value)

    ((message, _),) = set(run_ranks(3, rank))
    assert message.startswith("PhaseTimeoutError [rank 1, phase x]")


def test_a_rank_that_ends_during_a_transfer_is_named_on_all_others() -> None:
    def rank(group: Any) -> None:
        if group.rank == 2:
            raise KeyboardInterrupt
        group.transfer([], [Parcel(group.rank + 1, np.zeros(1, np.uint8))], "x", 10)

    _, errors = run_ranks_collecting(3, rank)
    assert [str(errors[rank]) for rank in (0, 1)] == ["[rank 2, phase x] rank 2 is gone"] * 2


def test_all_raise_the_error_of_a_rank_that_withdraws_from_a_transfer_and_can_go_on() -> None:
    def rank(group: Any) -> tuple[str, bytes]:
        def work() -> bytes:
            if group.rank == 1:
                error = StoreError("disk broken")
                group.withdraw(error)
                error.agreed = True
                raise error
            if group.rank == 2:
                time.sleep(0.3)
            group.transfer([], [Parcel(1, np.zeros(1, np.uint8))], "read", 10)
            return b""

        with pytest.raises(StoreError) as caught:
            consult(group, "read", 10, work)
        assert caught.value.rank == 1
        return _then_goes_on(group, caught.value)

    ((message, _),) = {(message.replace(", phase read", ""), answer) for message, answer in run_ranks(3, rank)}
    assert message == "StoreError [rank 1] disk broken"


def test_a_fault_of_an_exchange_is_no_agreement_that_nobody_went_on() -> None:
    """A rank may be lost after rank 0 decided; whoever undoes its work must be able to tell."""

    def rank(group: Any) -> None:
        if group.rank == 1:
            raise KeyboardInterrupt
        consult(group, "write", 10, lambda: b"")

    _, errors = run_ranks_collecting(3, rank)
    assert [getattr(errors[rank], "agreed", None) for rank in (0, 2)] == [False, False]


def test_culprits_are_those_who_wait_for_nobody() -> None:
    waits = {0: [1, 2], 1: [3], 2: [1, 4], 3: []}
    assert culprits([0], lambda rank: waits.get(rank, [])) == [3, 4]
    circle = {0: [5], 5: [3], 3: [4], 4: [5]}
    assert culprits([0], lambda rank: circle[rank]) == [3]
