"""Starting the processes of a job and waiting for them, within a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from job import Job, Result

_LIMIT_SECS = 300.0
# Far above what any phase of a save takes here: a rank that is lost is noticed by its broken connection, long before.
_PHASE_TIMEOUT_SECS = 60


class RunError(Exception):
    """A process ended otherwise than it should have."""


@dataclass(frozen=True)
class Run:
    """A finished job: exit code and result by rank. A rank killed by a signal has minus its number as exit code."""

    job: Job
    exit_codes: list[int]
    results: list[Result]


class Started:
    """A job whose processes run; `finish` must be called."""

    def __init__(self, job: Job) -> None:
        self._job = job
        script, file = Path(__file__).parent / "train.py", job.write()
        self._processes = []
        for rank in range(job.world_size):
            with job.log(rank).open("wb") as log:
                command = [sys.executable, str(script), str(file), str(rank)]
                # Our own script with our own arguments.
                process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)  # noqa: S603
            self._processes.append(process)

    def finish(self, expected: Sequence[int] | None = None) -> Run:
        """Wait for all processes.

        Args:
            expected: exit codes by rank; default: 0 for all.

        Raises:
            RunError: other exit codes, or a process ran for too long; shows the end of its log.
        """
        deadline = time.monotonic() + _LIMIT_SECS
        try:
            codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in self._processes]
        except subprocess.TimeoutExpired as error:
            raise RunError(f"run {self._job.name!r} did not end within {_LIMIT_SECS:g} s") from error
        finally:
            self._stop()
        wanted = list(expected or [0] * self._job.world_size)
        if codes != wanted:
            rank = next(rank for rank, code in enumerate(codes) if code != wanted[rank])
            tail = "\n".join(self._job.log(rank).read_text(errors="replace").splitlines()[-30:])
            raise RunError(f"run {self._job.name!r} ended with {codes}, expected {wanted}; rank {rank} said:\n{tail}")
        return Run(self._job, codes, [Result.read(self._job.result(rank)) for rank in range(self._job.world_size)])

    def _stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def run(job: Job, expected: Sequence[int] | None = None) -> Run:
    """Start a job and wait for its end; see `Started.finish`."""
    return Started(job).finish(expected)


def command_line(work: Path, *arguments: str) -> tuple[int, list[str]]:
    """Run `giantstep ARGUMENTS` in `work`; return its exit code and the lines it printed."""
    command = [sys.executable, "-m", "giantstep.cli.main", *arguments]
    # Our own program with our own arguments.
    done = subprocess.run(  # noqa: S603
        command, cwd=work, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines()


def environment() -> dict[str, str]:
    """The environment of every process that the demo starts."""
    values = {**os.environ, "OMP_NUM_THREADS": "1", "GIANTSTEP_TIMEOUT_SECS": str(_PHASE_TIMEOUT_SECS)}
    values.update({"COLUMNS": "100", "NO_COLOR": "1"})
    if sys.platform == "linux":
        # All processes are on this machine, whatever its name resolves to.
        values.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return values
