"""The process that `killing` kills: it saves one step after another, and says so, until it is killed.

It prints `saving N` before a save begins and `committed N` once it is committed. All changing tensors of step N are full of
N, in the common state stands N, and one tensor never changes. Started by `killing`, also as further ranks.
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from giantstep.async_saving import async_save
from giantstep.manager import CheckpointManager
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.options import SaveOptions
from giantstep.pending import PendingSave
from giantstep.saving import save

MODES = ("blocking", "overwrite", "async", "in_flight", "incremental")
"""New steps, one path again and again, that in the background, new steps of which three are in flight, and new steps that
share files with the one before."""
ONE_PATH = ("overwrite", "async")
"""Modes that save to the folder itself; the others save steps under it."""
CHANGING = tuple(f"weights.{number}" for number in range(4))
FIXED, FIXED_VALUE = "frozen", 7
ROWS, COLUMNS, FIXED_ROWS = 64, 1024, 512
KEEP = 2

_OPTIONS = SaveOptions(timeout_secs=60.0)

Say = Callable[[str], None]


def state_of(step: int, rank: int, size: int) -> dict[str, Any]:
    """One rank's part of 3 MiB in all."""
    shape = (ROWS // size, COLUMNS)
    found: dict[str, Any] = {
        key: ShardedTensor.from_rank_offsets(key, torch.full(shape, float(step)), (0, rank, size)) for key in CHANGING
    }
    return {**found, FIXED: torch.full((FIXED_ROWS, COLUMNS), float(FIXED_VALUE)), "step": step}


def save_steps(mode: str, folder: Path, first: int, count: int | None, say: Say, *, rank: int = 0, size: int = 1) -> None:
    """Save `count` steps, or without end, the way that `mode` says.

    Args:
        mode: one of `MODES`.
        folder: of the checkpoint, or of the steps.
        first: number of the first step.
        count: None: until the process is killed.
        say: is told of saves, as the process prints them.
        rank, size: of this process.
    """
    last = None if count is None else first + count
    if mode in ONE_PATH:
        _save_to_one_path(mode == "async", folder, _numbers(first, last), say, rank, size)
        return
    background = mode == "in_flight"
    options = SaveOptions(timeout_secs=60.0, max_pending=3)
    with CheckpointManager(
        folder, keep=KEEP, asynchronous=background, incremental=mode == "incremental", save_options=options
    ) as manager:
        pending: deque[tuple[int, PendingSave]] = deque()
        for step in _numbers(first, last):
            say(f"saving {step}")
            result = manager.save(step, state_of(step, rank, size))
            if isinstance(result, PendingSave):
                pending.append((step, result))
                while pending and pending[0][1].done():
                    _say_committed(pending, say)
            else:
                say(f"committed {step}")
        while pending:
            _say_committed(pending, say)


def _save_to_one_path(background: bool, folder: Path, steps: Iterator[int], say: Say, rank: int, size: int) -> None:
    pending: deque[tuple[int, PendingSave]] = deque()
    for step in steps:
        say(f"saving {step}")
        if background:
            # Waits until the one before is finished.
            handle = async_save(state_of(step, rank, size), folder, options=_OPTIONS)
            if pending:
                _say_committed(pending, say)
            pending.append((step, handle))
        else:
            save(state_of(step, rank, size), folder, options=_OPTIONS)
            say(f"committed {step}")
    while pending:
        _say_committed(pending, say)


def _say_committed(pending: deque[tuple[int, PendingSave]], say: Say) -> None:
    step, handle = pending.popleft()
    handle.result()
    say(f"committed {step}")


def _numbers(first: int, last: int | None) -> Iterator[int]:
    step = first
    while last is None or step < last:
        yield step
        step += 1


@contextmanager
def _group(rank: int, size: int, meeting: Path) -> Iterator[None]:
    if size == 1:
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def serve(mode: str, folder: Path, rank: int, size: int, meeting: Path) -> None:
    """What the process does once it reads the number of the first step from its standard input.

    Rank 0 starts the others, which are in its process group and so are killed with it. They hold the pipe open too: whoever
    reads it to its end knows that all of them are dead.
    """

    def say(line: str) -> None:
        if rank == 0:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    torch.set_num_threads(1)
    if rank == 0:
        for other in range(1, size):
            subprocess.Popen(command_of(mode, folder, other, size, meeting))  # noqa: S603 - this very program
    with _group(rank, size, meeting):
        first = torch.zeros(1, dtype=torch.int64)
        if rank == 0:
            first += int(sys.stdin.readline())
        if size > 1:
            dist.broadcast(first, 0)
        save_steps(mode, folder, int(first), None, say, rank=rank, size=size)


def command_of(mode: str, folder: Path, rank: int, size: int, meeting: Path) -> list[str]:
    """The command line of one rank."""
    return [sys.executable, "-m", "giantstep.testing.killing", "child", mode, str(folder), str(rank), str(size), str(meeting)]
