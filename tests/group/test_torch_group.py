"""Real processes: agreement, dead and late ranks, subgroups."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import giantstep as gs
from giantstep.group.base import consult
from giantstep.group.torch_group import group_of
from processes import DIED, results, run_processes


def _sum_of_reports(rank: int) -> bytes:
    group = group_of()

    def decide(reports: Any) -> list[bytes]:
        total = sum(int(report) for report in reports)
        return [str(total * 10 + other).encode() for other in range(len(reports))]

    return b",".join(consult(group, "sum", 20, lambda: str(rank).encode(), decide) for _ in range(3))


def test_rank_0_hears_all_and_answers_each() -> None:
    assert results(run_processes(4, _sum_of_reports)) == [b",".join([str(60 + rank).encode()] * 3) for rank in range(4)]


def _large_messages(rank: int) -> bool:
    report = bytes([rank]) * (5_000_000 + rank)
    answer = consult(group_of(), "large", 60, lambda: report, lambda reports: list(reversed(reports)))
    return answer == bytes([2 - rank]) * (5_000_000 + 2 - rank)


def test_messages_of_megabytes_of_unequal_length_arrive() -> None:
    assert results(run_processes(3, _large_messages)) == [True] * 3


def _one_raises(rank: int) -> tuple[str, str, bool]:
    def work() -> bytes:
        if rank == 2:
            raise OSError(28, "No space left on device")
        return b""

    try:
        consult(group_of(), "write", 20, work)
    except gs.StoreError as error:
        again = consult(group_of(), "next", 20, lambda: b"1", lambda reports: [b"".join(reports)] * 4)
        return str(error), error.remote_traceback or "", again == b"1111"
    return "", "", False


def test_an_error_on_one_rank_is_raised_on_all_and_the_group_goes_on() -> None:
    found = results(run_processes(4, _one_raises))
    assert {message for message, _, _ in found} == {"[rank 2, phase write] OSError: [Errno 28] No space left on device"}
    assert all("raise OSError" in trace and goes_on for _, trace, goes_on in found)


def _one_dies(rank: int, victim: int) -> tuple[str, str, float]:
    group = group_of()
    consult(group, "first", 30, lambda: b"")
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        consult(group, "second", 30, lambda: b"")
    except gs.GiantstepError as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", 0.0


def test_survivors_exit_as_python_does_after_an_exception() -> None:
    """No thread of ours is inside gloo when the interpreter ends: that would be a SIGABRT."""
    import subprocess
    import sys
    import tempfile

    program = """if True:
        import os, signal, sys, torch.distributed as dist
        from giantstep.group.base import consult
        from giantstep.group.torch_group import group_of
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=4)
        consult(group_of(), "first", 30, lambda: b"")
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        consult(group_of(), "write", 30, lambda: b"")
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen([sys.executable, "-c", program, str(rank), f"{folder}/store"], stderr=subprocess.PIPE, text=True)
            for rank in range(4)
        ]
        told = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1, -signal.SIGKILL, 1], told
    for rank in (0, 1, 3):
        assert "PeerFailureError: [rank 2, phase write] rank 2 is gone: its connection broke (" in told[rank]
        assert "pair.cc" not in told[rank].splitlines()[-1]


def test_a_killed_rank_is_named_on_all_others_long_before_the_timeout() -> None:
    for victim in (2, 0):
        found = run_processes(4, _one_dies, victim)
        assert found[victim] == (DIED, -signal.SIGKILL)
        for kind, value in (outcome for rank, outcome in enumerate(found) if rank != victim):
            assert kind == "ok", value
            name, message, secs = value
            assert name == "PeerFailureError"
            assert f"rank {victim}, phase second" in message
            assert secs < 15


def _one_sleeps(rank: int) -> tuple[str, str, float, str]:
    group = group_of()
    consult(group, "first", 30, lambda: b"")
    begin = time.monotonic()
    if rank == 1:
        time.sleep(6)
    try:
        consult(group, "second", 2, lambda: b"")
    except gs.PeerError as error:
        secs = time.monotonic() - begin
        # All are back and may go on: a fresh connection is made.
        dist.barrier()
        answer = consult(group, "third", 30, lambda: str(rank).encode(), lambda reports: [b"".join(reports)] * 3)
        return type(error).__name__, str(error), secs, answer.decode()
    return "", "", 0.0, ""


def test_a_late_rank_is_named_on_all_and_everybody_can_go_on_afterwards() -> None:
    found = results(run_processes(3, _one_sleeps))
    for name, message, secs, answer in found:
        assert name == "PhaseTimeoutError"
        assert "rank 1 did not report within 2 s" in message
        assert "phase second" in message
        assert secs < 12
        assert answer == "012"


def _subgroups(rank: int, folder: str) -> str:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    shard = gs.ShardedTensor.from_rank_offsets("w", torch.full((2,), float(rank)), (0, rank % 2, 2))
    path = Path(folder, str(rank // 2))
    gs.save({"w": shard}, path, process_group=mine)
    found = gs.load({"w": torch.zeros(4)}, path, process_group=mine)["w"]
    # The user's own collectives are not disturbed.
    total = torch.tensor([rank])
    dist.all_reduce(total)
    return f"{found.tolist()} {int(total)}"


def test_two_halves_of_the_ranks_save_and_load_at_once_each_on_its_own(tmp_path: Path) -> None:
    found = results(run_processes(4, _subgroups, str(tmp_path)))
    assert found == ["[0.0, 0.0, 1.0, 1.0] 6"] * 2 + ["[2.0, 2.0, 3.0, 3.0] 6"] * 2


def _different_calls(rank: int, folder: str) -> tuple[str, str]:
    try:
        if rank == 0:
            gs.save({"w": torch.zeros(1)}, Path(folder, "a"))
        else:
            gs.load({"w": torch.zeros(1)}, Path(folder, "a"))
    except gs.GiantstepError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_a_rank_that_loads_while_another_saves_is_told_so(tmp_path: Path) -> None:
    for name, message in results(run_processes(2, _different_calls, str(tmp_path))):
        assert name == "DisagreementError"
        assert "call is 'save' on rank 0 and 'load' on rank 1" in message
    assert not (tmp_path / "a").exists()
