"""Runs `rank.py` as several processes, and collects what they measured. Used by `throughput.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from measure import Measurement
from rank import Job


def run_job(parent: Path, job: Job) -> list[list[Measurement]]:
    """What each rank measured. Folders of the job are made under `parent`, and deleted."""
    parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=parent.absolute(), prefix="giantstep-bench-") as place,
        tempfile.TemporaryDirectory() as notes,
    ):
        data, job_file = Path(place) / "data", Path(notes) / "job.json"
        data.mkdir()
        replace(job, folder=str(data), meeting=str(Path(notes) / "meeting"), results=notes).write(job_file)
        _run_ranks(job_file, job.ranks)
        found = [json.loads((Path(notes) / f"{rank}.json").read_text()) for rank in range(job.ranks)]
    return [[Measurement(**fields) for fields in rank] for rank in found]


def _run_ranks(job_file: Path, ranks: int) -> None:
    """Start the ranks and wait for them; if one fails, end the others and raise."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "rank.py"), str(job_file)]
    running = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(ranks)]
    try:
        while any(process.poll() is None for process in running):
            _check(running)
            time.sleep(0.2)
        _check(running)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()


def _check(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank, process in enumerate(running):
        if process.poll():
            raise RuntimeError(f"rank {rank} ended with status {process.returncode}")
