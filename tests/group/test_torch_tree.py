"""Eight processes as a tree of several levels: messages, and faults at a leaf, in the middle and at the root."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch.distributed as dist

import giantstep as gs
from giantstep.group import torch_group
from giantstep.group.base import consult, consult_parts
from giantstep.group.torch_group import TorchGroup, group_of
from processes import DIED, results, run_processes

# With a fanout of 2: 0 - 1; 0 - 2 - 3; 0 - 4 - 5; 0 - 4 - 6 - 7.
LEAF, MIDDLE, ROOT = 7, 4, 0


def _group() -> Any:
    TorchGroup.fanout = 2
    return group_of()


def _messages(rank: int) -> list[bool]:
    group = _group()
    found = []
    for size in (1, 700, 300_000):

        def decide(reports: Any, size: int = size) -> Any:
            assert [report[0] for report in reports] == [bytes([other]) * (size + other) for other in range(8)]
            assert len({id(report[1]) for report in reports}) == 1
            return [(report[0][::-1], report[1], b"") for report in reversed(reports)]

        answer = consult_parts(group, "x", 60, lambda size=size: (bytes([rank]) * (size + rank), b"same" * size), decide)
        found.append(answer == (bytes([7 - rank]) * (size + 7 - rank), b"same" * size, b""))
    return found


def test_rank_0_hears_all_and_answers_each_over_several_levels() -> None:
    assert results(run_processes(8, _messages)) == [[True] * 3] * 8


def _one_dies(rank: int, victim: int) -> tuple[str, Any, Any, bool]:
    group = _group()
    consult(group, "first", 60, lambda: b"")
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        consult(group, "second", 60, lambda: b"")
    except gs.GiantstepError as error:
        return type(error).__name__, error.rank, error.phase, time.monotonic() - begin < 30
    return "", None, None, False


@pytest.mark.parametrize(("victim", "tcp"), [(LEAF, False), (MIDDLE, False), (ROOT, False), (MIDDLE, True), (ROOT, True)])
def test_a_killed_rank_is_named_on_all_others_wherever_it_was_and_also_with_the_store(victim: int, tcp: bool) -> None:
    found = run_processes(8, _one_dies, victim, tcp=tcp)
    assert found.pop(victim) == (DIED, -signal.SIGKILL)
    assert results(found) == [("PeerFailureError", victim, "second", True)] * 7


def _one_sleeps(rank: int, sleeper: int, sleep_secs: float) -> tuple[str, bool, bytes]:
    # Others wait for rank 0 so much longer than twice the timeout: less, so that on a busy machine it sleeps longer still.
    torch_group._EXTRA_SECS = 2.0
    group = _group()
    consult(group, "first", 60, lambda: b"")
    begin = time.monotonic()
    if rank == sleeper:
        time.sleep(sleep_secs)
    try:
        consult(group, "second", 2, lambda: b"")
    except gs.errors.PhaseTimeoutError as error:
        secs = time.monotonic() - begin
        dist.barrier()
        answer = consult(group, "third", 60, lambda: bytes([rank]), lambda reports: [b"".join(reports)] * 8)
        return str(error), secs < 25, answer
    return "", False, b""


@pytest.mark.parametrize(("sleeper", "sleep_secs"), [(LEAF, 6), (MIDDLE, 6), (ROOT, 20)])
def test_a_late_rank_is_named_on_all_wherever_it_is_and_everybody_can_go_on(sleeper: int, sleep_secs: float) -> None:
    ((message, soon, answer),) = set(results(run_processes(8, _one_sleeps, sleeper, sleep_secs)))
    assert message.startswith(f"[rank {sleeper}, phase second] rank {sleeper} did not report within ")
    assert soon
    assert answer == bytes(range(8))


def _interrupted(rank: int, victim: int) -> tuple[str, bytes]:
    def work() -> bytes:
        if rank == victim:
            raise KeyboardInterrupt
        return b""

    told = "nothing"
    try:
        # The very first call: the ranks have not met yet.
        consult(_group(), "x", 60, work)
    except KeyboardInterrupt:
        told = "interrupted"
    except gs.errors.PeerError as error:
        told = str(error)
    return told, consult(group_of(), "y", 60, lambda: bytes([rank]), lambda reports: [b"".join(reports)] * 4)


@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_that_is_interrupted_before_the_ranks_met_is_named_and_later_calls_work(victim: int) -> None:
    found = results(run_processes(4, _interrupted, victim))
    answer = bytes(range(4))
    assert found.pop(victim) == ("interrupted", answer)
    assert found == [(f"[rank {victim}, phase x] KeyboardInterrupt ended the call", answer)] * 3
