"""Starts examples as their users do; lets them end, or kills them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 8
HOLDING = Path(__file__).parent / "held.py"
MARK = "EXAMPLE_RUN"


@dataclass(frozen=True)
class Way:
    """How an example is started: its arguments, and the number of processes that torchrun starts, if it is used."""

    arguments: tuple[str, ...] = ()
    processes: int = 0


@dataclass(frozen=True)
class Hold:
    """A moment in the middle of a save: an operation of its store that never ends."""

    step: int
    operation: str


@dataclass(frozen=True)
class Run:
    """What an example printed."""

    lines: tuple[str, ...]

    @property
    def losses(self) -> dict[int, float]:
        """By step."""
        found = (re.fullmatch(r"step (\d+) loss \S+ (\S+)", line) for line in self.lines)
        return {int(match[1]): float.fromhex(match[2]) for match in found if match}

    @property
    def ended(self) -> list[str]:
        """What Lightning's counters were then."""
        return [line for line in self.lines if line.startswith("ended")]

    @property
    def first(self) -> int:
        """The step that it went on from."""
        return next(int(match[1]) for line in self.lines if (match := re.fullmatch(r".*, from step (\d+)", line)))


@contextmanager
def started(name: str, way: Way, folder: Path, hold: Hold | None = None) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A running example, in a session of its own, and the file of its stderr. Nothing runs afterwards."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(way.processes)]
    command = torchrun if way.processes else [sys.executable]
    if hold is not None:
        command = [*command, str(HOLDING), str(folder / f"step_{hold.step:08d}"), hold.operation]
    command += [str(EXAMPLES / f"{name}.py"), *way.arguments, "--steps", str(STEPS), "--dir", str(folder)]
    run_id = uuid.uuid4().hex
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", MARK: run_id}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            yield process, errors
        finally:
            kill(process, run_id)


def kill(process: subprocess.Popen[str], run_id: str) -> None:
    """Kill the session, and whatever else has been started in it: torchrun gives its workers sessions of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    wanted = f"{MARK}={run_id}".encode()
    left = True
    while left:
        left = False
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    left = True
                    os.kill(int(entry.name), signal.SIGKILL)


def run(name: str, way: Way, folder: Path) -> Run:
    """To the end."""
    with started(name, way, folder) as (process, errors):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output + printed(errors)
    return Run(tuple(output.splitlines()))


def run_and_kill(name: str, way: Way, folder: Path, moment: str, hold: Hold | None = None) -> Run:
    """Until a line that begins as said is printed."""
    lines: list[str] = []
    with started(name, way, folder, hold) as (process, errors):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith(moment):
                return Run(tuple(lines))
        raise AssertionError("\n".join([f"ended without {moment!r}", *lines, printed(errors)]))


def printed(errors: IO[str]) -> str:
    errors.seek(0)
    return errors.read()
