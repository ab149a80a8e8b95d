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
    """A finished job and what its ranks have to tell, by rank."""

    job: Job
    results: list[Result]


class Started:
    """A job whose processes run; `stop` must be called at the end."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._processes: list[subprocess.Popen[bytes]] = []
        script, file = Path(__file__).parent / "train.py", job.write()
        for rank in range(job.world_size):
            with job.log(rank).open("wb") as log:
                command = [sys.executable, str(script), str(file), str(rank)]
                self._processes.append(subprocess.Popen(command, env=environment(), stdout=log, stderr=log))

    def finish(self, expected: Sequence[int]) -> Run:
        """Wait for all processes.

        Args:
            expected: exit codes by rank.

        Raises:
            RunError: other exit codes, or a process ran for too long; shows the end of its log.
        """
        deadline = time.monotonic() + _LIMIT_SECS
        try:
            codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in self._processes]
        except subprocess.TimeoutExpired as error:
            raise RunError(f"run {self._job.name!r} did not end within {_LIMIT_SECS:g} s") from error
        if codes != list(expected):
            rank = next(rank for rank, code in enumerate(codes) if code != expected[rank])
            tail = "\n".join(self._job.log(rank).read_text(errors="replace").splitlines()[-30:])
            raise RunError(f"run {self._job.name!r} ended with {codes}, expected {expected}; rank {rank} said:\n{tail}")
        return Run(self._job, [Result.read(self._job.result(rank)) for rank in range(self._job.world_size)])

    def stop(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def run(job: Job, expected: Sequence[int] | None = None) -> Run:
    """Run a job to its end; see `Started.finish`. Without `expected` all exit codes must be 0."""
    started = Started(job)
    try:
        return started.finish(expected or [0] * job.world_size)
    finally:
        started.stop()


def run_side_by_side(jobs: Sequence[Job]) -> list[Run]:
    """Run several jobs at once to their ends."""
    started = [Started(job) for job in jobs]
    try:
        return [each.finish([0] * job.world_size) for each, job in zip(started, jobs, strict=True)]
    finally:
        for each in started:
            each.stop()


def command_line(work: Path, *arguments: str) -> tuple[int, list[str]]:
    """Run `giantstep ARGUMENTS` in `work`; return its exit code and the lines it printed."""
    command = [sys.executable, "-m", "giantstep.cli.main", *arguments]
    done = subprocess.run(
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
