"""Parcels between real processes: bits, and ranks that die, sleep or withdraw in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import giantstep as gs
from giantstep.errors import StoreError
from giantstep.group.base import Parcel, consult
from giantstep.group.connections import Connections
from giantstep.group.torch_group import group_of
from processes import DIED, results, run_processes

_SIZES = (0, 1, 70_000, 1_000_001, 5, 300_000, 4 << 20)


def _data(source: int, target: int, number: int) -> Any:
    size = _SIZES[(3 * source + 5 * target + number) % len(_SIZES)]
    return np.random.default_rng([source, target, number]).integers(0, 256, size, dtype=np.uint8)


def _all_to_all(group: Any, rounds: int, size: int) -> bool:
    others = [rank for rank in range(size) if rank != group.rank]
    for number in range(rounds):
        wanted = [_data(other, group.rank, n) for n in (number, number + 1) for other in others]
        rooms = [np.empty_like(array) for array in wanted]
        sends = [Parcel(other, _data(group.rank, other, n)) for n in (number, number + 1) for other in others]
        for parcel in sends[::2]:
            # What is only sent need not be writable.
            parcel.data.flags.writeable = False
        receives = [Parcel(other, room) for other, room in zip(others * 2, rooms, strict=True)]
        group.transfer(sends, receives, "move", 60)
        if not all(np.array_equal(room, array) for room, array in zip(rooms, wanted, strict=True)):
            return False
    return True


def _exact(rank: int) -> list[bool]:
    group = group_of()
    first = _all_to_all(group, 3, 4)
    consult(group, "between", 60, lambda: b"")
    return [first, _all_to_all(group, 4, 4)]


def test_all_to_all_of_unequal_sizes_in_several_rounds_is_exact_to_the_bit() -> None:
    assert results(run_processes(4, _exact)) == [[True, True]] * 4


def _uneven_calls(rank: int) -> int:
    group = group_of()
    room = np.zeros(100_000, np.uint8)
    if rank == 0:
        for part in np.split(np.arange(100_000, dtype=np.int64).astype(np.uint8), 4):
            group.transfer([Parcel(1, part)], [], "x", 60)
    elif rank == 1:
        group.transfer([], [Parcel(0, part) for part in np.split(room, 4)], "x", 60)
    consult(group, "after", 60, lambda: b"")
    return int(np.array_equal(room, np.arange(100_000, dtype=np.int64).astype(np.uint8)))


def test_receives_meet_sends_of_whichever_call_and_ranks_may_stay_out() -> None:
    assert results(run_processes(3, _uneven_calls)) == [0, 1, 0]


def _in_rounds(rank: int, size: int, timeout_secs: float, trouble: Any) -> tuple[str, bytes]:
    """Move parcels round about until somebody has `trouble`; then a fresh call."""
    group = group_of()
    consult(group, "start", 60, lambda: b"")

    def work() -> bytes:
        for number in range(50):
            trouble(group, rank, number)
            sends = [Parcel((rank + 1) % size, np.zeros(2 << 20, np.uint8))]
            group.transfer(sends, [Parcel((rank - 1) % size, np.empty(2 << 20, np.uint8))], "move", timeout_secs)
        return b""

    begin = time.monotonic()
    with pytest.raises(gs.GiantstepError) as caught:
        consult(group, "read", 60, work)
    assert caught.value.agreed
    assert time.monotonic() - begin < 30
    told = f"{type(caught.value).__name__} {caught.value}"
    if "is gone" in told:
        return told, b""
    return told, consult(group, "next", 60, lambda: bytes([rank]), lambda reports: [b"".join(reports)] * size)


def _kill(group: Any, rank: int, number: int) -> None:
    if rank == 2 and number == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def _kill_soon(group: Any, rank: int, number: int) -> None:
    if rank == 2 and number == 1:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()


def _sleep(group: Any, rank: int, number: int) -> None:
    if rank == 2 and number == 3:
        time.sleep(14)


def _withdraw(group: Any, rank: int, number: int) -> None:
    if rank == 2 and number == 3:
        error = StoreError("the disk broke", phase="read")
        group.withdraw(error)
        error.agreed = True
        raise error


def _fail(group: Any, rank: int, number: int) -> None:
    if rank == 2 and number == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize("trouble", [_kill, _kill_soon])
def test_a_rank_killed_between_transfers_or_in_the_middle_of_one_is_named_on_all_others(trouble: Any) -> None:
    found = run_processes(5, _in_rounds, 5, 60, trouble)
    assert found.pop(2) == (DIED, -signal.SIGKILL)
    ((message, _),) = set(results(found))
    assert message.startswith("PeerFailureError [rank 2, phase move] rank 2 is gone: its connection broke (")


def test_a_rank_that_sleeps_is_named_on_all_also_on_those_who_wait_for_it_through_others() -> None:
    ((message, answer),) = set(results(run_processes(5, _in_rounds, 5, 5, _sleep)))
    assert message.startswith("PhaseTimeoutError [rank 2, phase move] rank 2 sent and took nothing for 5 s. ")
    assert answer == bytes(range(5))


def test_all_raise_the_error_of_a_rank_that_withdraws_and_the_next_call_works() -> None:
    ((message, answer),) = set(results(run_processes(5, _in_rounds, 5, 60, _withdraw)))
    assert message == "StoreError [rank 2, phase read] the disk broke"
    assert answer == bytes(range(5))


def _break_move(kind: str) -> None:
    """The next transfer of this process ends half-way."""
    real = Connections.move
    # Whoever started the tests may have signals of this kind ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        dist.distributed_c10d._get_default_store().set("interrupted", "yes")

    def move(self: Connections, *arguments: Any) -> Any:
        Connections.move = real
        if kind == "error":
            raise RuntimeError("can't start new thread")
        # While this rank waits for what rank 1 sends after it.
        threading.Timer(0.3, interrupt).start()
        return real(self, *arguments)

    Connections.move = move


def _pass_on(group: Any, rank: int) -> bytes:
    data = np.full(100_000, rank, np.uint8)
    room = np.empty_like(data)
    group.transfer([Parcel((rank + 1) % 4, data)], [Parcel((rank - 1) % 4, room)], "move", 30)
    return bytes([room[-1]])


def _half_way(rank: int, kind: str) -> list[str]:
    """Transfers of which one ends half-way on rank 2, each within a call of all; what each raised or came to."""
    group, found = group_of(), []
    consult(group, "start", 30, lambda: b"")
    if rank == 2:
        _break_move(kind)
    for attempt in range(3):

        def work(attempt: int = attempt) -> bytes:
            if (rank, attempt, kind) == (1, 0, "interrupt"):
                dist.distributed_c10d._get_default_store().wait(["interrupted"])
            return _pass_on(group, rank)

        try:
            answer = consult(group, "read", 30, work, lambda reports: [b"".join(reports)] * 4)
        except KeyboardInterrupt:
            found.append("interrupted")
        except gs.GiantstepError as error:
            found.append(f"{type(error).__name__} {error}")
        else:
            found.append(answer.hex())
    return found


@pytest.mark.parametrize("kind", ["interrupt", "error"])
def test_a_transfer_that_ends_half_way_on_one_rank_ends_one_call_on_all_and_not_the_next(kind: str) -> None:
    found = results(run_processes(4, _half_way, kind))
    assert [after for _, *after in found] == [["03000102"] * 2] * 4
    first = [first for first, *_ in found]
    if kind == "interrupt":
        assert first.pop(2) == "interrupted"
        assert set(first) == {"PeerFailureError [rank 2, phase move] KeyboardInterrupt ended the call"}
    else:
        assert len(set(first)) == 1
        assert "[rank 2, phase move]" in first[0]
        assert "can't start new thread" in first[0]


def _wrong_size(rank: int) -> str:
    group = group_of()
    try:
        if rank == 0:
            group.transfer([Parcel(1, np.ones(5, np.uint8))], [], "x", 2)
        else:
            group.transfer([], [Parcel(0, np.zeros(6, np.uint8))], "x", 2)
    except gs.errors.PeerError as error:
        return type(error).__name__
    return "went through"


def test_a_parcel_of_another_size_than_its_room_never_goes_through() -> None:
    assert results(run_processes(2, _wrong_size)) == ["PhaseTimeoutError"] * 2


@pytest.mark.parametrize("victim", [0, 2])
def test_after_a_fault_in_a_transfer_survivors_exit_as_python_does_after_an_exception(victim: int, tmp_path: Path) -> None:
    """No thread of ours is inside gloo when the interpreter ends: that would be a SIGABRT."""
    program = """if True:
        import os, signal, sys, numpy as np, torch.distributed as dist
        from giantstep.group.base import Parcel, consult
        from giantstep.group.torch_group import group_of
        rank, victim = int(sys.argv[1]), int(sys.argv[3])
        dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=4)
        group = group_of()
        consult(group, "first", 90, lambda: b"")
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        others = [other for other in range(4) if other != rank]
        group.transfer(
            [Parcel(other, np.zeros(8 << 20, np.uint8)) for other in others],
            [Parcel(other, np.zeros(8 << 20, np.uint8)) for other in others], "move", 90)
        group.transfer([], [Parcel(other, np.zeros(1, np.uint8)) for other in others], "move", 90)
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(tmp_path / "store"), str(victim)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(4)
    ]
    told = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [-signal.SIGKILL if rank == victim else 1 for rank in range(4)], told
    assert all(f"rank {victim} is gone" in told[rank] for rank in range(4) if rank != victim), told


def _others_go_on(rank: int) -> int:
    """The user's own collectives run beside ours."""
    group = group_of()
    for number in range(5):
        group.transfer(
            [Parcel(1 - rank, _data(rank, 1 - rank, number))], [Parcel(1 - rank, _data(1 - rank, rank, number))], "x", 60
        )
        dist.barrier()
    return rank


def test_transfers_and_the_users_collectives_do_not_meet() -> None:
    assert results(run_processes(2, _others_go_on)) == [0, 1]
