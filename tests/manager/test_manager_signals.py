"""A signal to one process lets all of them save the same step, and end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError
from giantstep.manager import CheckpointManager
from giantstep.manager.signals import Notice
from processes import results, run_processes


def train(rank: int, path: str, asynchronous: bool) -> tuple[int, list[int], bool]:
    """The second of two processes gets a signal in its seventh step."""
    saved = []
    state: dict[str, Any] = {"w": gs.ShardedTensor.from_rank_offsets("w", torch.zeros(4), (0, rank, 2)), "step": 0}
    signals = (signal.SIGTERM, signal.SIGUSR1)
    with CheckpointManager(path, save_when=1000, signals=signals, deadline_secs=20, asynchronous=asynchronous) as manager:
        for step in range(1, 500):
            time.sleep(0.02)
            state["step"] = step
            if step == 7 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if manager.should_save(step):
                manager.save(step, state)
                saved.append(step)
            if manager.stopping:
                break
    return step, saved, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_to_one_process_is_agreed_upon_by_all_and_saved(tmp_path: Path, asynchronous: bool) -> None:
    first, second = results(run_processes(2, train, str(tmp_path), asynchronous))
    assert first == second
    last, saved, put_back = first
    assert saved == [last]
    assert 7 <= last < 200
    assert put_back
    assert gs.open_checkpoint(tmp_path / f"step_{last:08d}").common["step"] == last


def test_handlers_that_were_there_are_called_too_and_put_back() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        mine = signal.getsignal(signal.SIGUSR1)
        now = [100.0]
        notice = Notice([signal.SIGUSR1], lambda: now[0])
        assert (notice.came, notice.left_secs(30)) == (False, 30)
        os.kill(os.getpid(), signal.SIGUSR1)
        now[0] = 110.0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert notice.came
        assert notice.left_secs(30) == 20, "the first one counts"
        notice.close()
        notice.close()
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert heard == [signal.SIGUSR1] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_signals_that_cannot_be_handled_are_refused_and_others_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with pytest.raises(BadArgumentError, match="cannot be handled"):
        Notice([signal.SIGUSR2, signal.SIGKILL])
    assert signal.getsignal(signal.SIGUSR2) is before
    errors: list[Exception] = []

    def make() -> None:
        try:
            Notice([signal.SIGUSR2])
        except BadArgumentError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
