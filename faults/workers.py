"""Starting workers, hearing what they say, and killing them with all that they started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "worker.py"
LIMIT_SECS = 90.0


@dataclass(frozen=True, slots=True)
class Said:
    """What a worker said and how it ended: exit code, None if it had to be killed since it did not end."""

    lines: list[dict[str, Any]]
    code: int | None
    stderr: str

    def last_committed(self) -> int | None:
        """The last value that it said to be committed."""
        return max((line["value"] for line in self.lines if line["word"] == "committed"), default=None)


@contextlib.contextmanager
def worker(library: str, *arguments: str, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A worker in a session of its own; in the end all that is left of it is killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*prefix, sys.executable, str(WORKER), library, *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    try:
        yield process
    finally:
        kill(process)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the worker and all processes of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def lines_of(text: str) -> list[dict[str, Any]]:
    """What a worker said; the last line may be cut, and libraries may print too."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict) and "word" in said:
                found.append(said)
    return found


def run(library: str, *arguments: str, prefix: Sequence[str] = (), limit_secs: float = LIMIT_SECS) -> Said:
    """Let a worker do its work to the end."""
    with worker(library, *arguments, prefix=prefix) as process:
        try:
            out, err = process.communicate(timeout=limit_secs)
        except subprocess.TimeoutExpired:
            kill(process)
            out, err = process.communicate()
            return Said(lines_of(out), None, err)
        return Said(lines_of(out), process.returncode, err)


def run_and_kill(library: str, *arguments: str, after_secs: float) -> Said:
    """Kill a worker so many seconds after it has committed for the first time."""
    with worker(library, *arguments) as process:
        if process.stdout is None or process.stderr is None:
            raise RuntimeError("a worker without pipes")
        first = []
        deadline = time.monotonic() + LIMIT_SECS
        for line in process.stdout:
            first.append(line)
            if any(said["word"] == "committed" for said in lines_of(line)) or time.monotonic() > deadline:
                break
        time.sleep(after_secs)
        kill(process)
        rest = process.stdout.read()
        return Said(lines_of("".join(first) + rest), process.returncode, process.stderr.read())
