"""Real processes: agreement, dead and late ranks, subgroups."""

from __future__ import annotations

import contextlib
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
    except gs.errors.StoreError as error:
        again = consult(group_of(), "next", 20, lambda: b"1", lambda reports: [b"".join(reports)] * 4)
        return str(error), error.remote_traceback or "", again == b"1111"
    return "", "", False


def test_an_error_on_one_rank_is_raised_on_all_and_the_group_goes_on() -> None:
    found = results(run_processes(4, _one_raises))
    assert {message for message, _, _ in found} == {"[rank 2, phase write] OSError: [Errno 28] No space left on device"}
    assert all("raise OSError" in trace and goes_on for _, trace, goes_on in found)


def _one_dies(rank: int, victim: int) -> tuple[str, str, float]:
    group = group_of()
    consult(group, "first", 90, lambda: b"")
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        consult(group, "second", 90, lambda: b"")
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
        consult(group_of(), "first", 90, lambda: b"")
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        consult(group_of(), "write", 90, lambda: b"")
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
            assert secs < 30


def _one_sleeps(rank: int) -> tuple[str, str, float, str]:
    group = group_of()
    consult(group, "first", 30, lambda: b"")
    begin = time.monotonic()
    if rank == 1:
        time.sleep(6)
    try:
        consult(group, "second", 2, lambda: b"")
    except gs.errors.PeerError as error:
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
        assert secs < 20
        assert answer == "012"


def _late_for_the_first_call(rank: int, folder: str) -> list[str]:
    told = []
    if rank == 1:
        time.sleep(5)
    for attempt in range(3):
        begin = time.monotonic()
        try:
            options = gs.SaveOptions(timeout_secs=2)
            gs.save({"w": torch.full((2,), float(attempt))}, Path(folder, "c"), options=options)
            told.append("saved")
        except gs.errors.PeerError as error:
            told.append(f"{type(error).__name__} {error} {time.monotonic() - begin < 15}")
        dist.barrier()
    return told


def test_a_rank_that_is_late_for_the_first_call_is_named_and_later_calls_work(tmp_path: Path) -> None:
    found = results(run_processes(3, _late_for_the_first_call, str(tmp_path)))
    for rank in (0, 2):
        assert found[rank][0].startswith("PhaseTimeoutError [rank 1, phase describe] rank 1 did not report within 2 s")
        assert found[rank][0].endswith("True")
    assert found[1][0].startswith("PhaseTimeoutError [rank 0")
    assert [told[1:] for told in found] == [["saved", "saved"]] * 3


def _many_failures(rank: int) -> list[int]:
    """One rank is late again and again; returns open descriptors and threads after each time."""
    import threading

    counts = []
    for _ in range(4):
        if rank == 1:
            time.sleep(1.5)
        try:
            consult(group_of(), "x", 0.5, lambda: b"")
        except gs.errors.PeerError:
            pass
        else:
            raise AssertionError("nobody was late")
        dist.barrier()
        consult(group_of(), "y", 20, lambda: b"")
        counts.append(len(list(Path("/proc/self/fd").iterdir())) + threading.active_count())
    return counts


def test_failures_leak_neither_descriptors_nor_threads() -> None:
    for counts in results(run_processes(3, _many_failures)):
        assert max(counts[1:]) <= counts[0] + 2, counts


def _interrupted(rank: int, where: str) -> list[str]:
    told = []

    if where != "first":
        consult(group_of(), "start", 90, lambda: b"")
    for step in range(2):
        begin = time.monotonic()
        try:
            if rank == 1 and step == 0 and where in ("first", "work"):
                consult(group_of(), "x", 90, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            else:
                consult(group_of(), "x", 90, lambda: b"")
            told.append("ok")
        except KeyboardInterrupt:
            told.append("interrupted")
        except gs.errors.PeerError as error:
            told.append(f"{error} {time.monotonic() - begin < 30}")
        dist.barrier()
    return told


def test_an_interrupted_rank_is_named_at_once_and_later_calls_work() -> None:
    for where in ("first", "work"):
        found = results(run_processes(3, _interrupted, where))
        assert found[1] == ["interrupted", "ok"]
        for rank in (0, 2):
            assert found[rank] == ["[rank 1, phase x] KeyboardInterrupt ended the call True", "ok"]


def _faults_stay_with_their_group(rank: int) -> str:
    if rank == 1:
        time.sleep(2)
    with contextlib.suppress(gs.errors.PeerError):
        consult(group_of(), "x", 0.5, lambda: b"")
    dist.barrier()
    other = dist.new_group([0, 1])
    for pause in (0, 2):
        if rank == 0:
            time.sleep(pause)
        consult(group_of(other), "y", 20, lambda: b"")
    return "ok"


def test_a_fault_of_one_group_is_no_fault_of_another_over_the_same_ranks() -> None:
    assert results(run_processes(2, _faults_stay_with_their_group)) == ["ok", "ok"]


def _default_device(rank: int, folder: str) -> list[float]:
    torch.set_default_device("meta")
    value = torch.arange(4.0, device="cpu")
    gs.save({"w": value, "n": 1}, Path(folder, "c"))
    return gs.load({"w": torch.zeros(4, device="cpu")}, Path(folder, "c"))["w"].tolist()


def test_a_default_device_of_the_users_changes_nothing(tmp_path: Path) -> None:
    assert results(run_processes(2, _default_device, str(tmp_path))) == [[0.0, 1.0, 2.0, 3.0]] * 2


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
