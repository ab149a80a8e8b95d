"""How fast `giantstep` saves and loads, beside raw system calls and torch.distributed.checkpoint, in one run.

All methods are used by the same ranks on the same state, in turn, several times; the table shows medians. Compare
figures of one run only: machines are noisy. A ratio of 1 to raw means as fast as the best raw path of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Measurement
from rank import Job
from rich.console import Console
from states import Shape
from tables import Row, as_json, print_table, rows_of

_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - the file system that is measured
_COLUMNS = 4096
_TENSORS = 16
_SMALL = Shape(tensors=8192, rows=32, columns=1024)
_SMALL_RANKS = 2
_WIDTH = 180
_LEGEND = (
    "s, GiB/s, CPU s (all ranks together): medians. / raw, / DCP: speed as a multiple of the best raw path and of "
    "torch.distributed.checkpoint, medians of the ratios within a repetition; loads into another layout are compared with "
    "plain raw loads. extra MiB: peak resident memory of a rank beyond what it had at the start. read x: bytes read over "
    "bytes loaded. raw buffered: pwrite and fsync, pread; raw direct: posix_fallocate and O_DIRECT."
)


@dataclass(frozen=True, slots=True)
class Case:
    """A table: its title, where it is measured, and with what state and ranks."""

    title: str
    parent: Path
    ranks: int
    shape: Shape
    reshard: bool
    cold: bool


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where", choices=("disk", "shm", "both"), default="both", help="on disk, in /dev/shm, or both")
    parser.add_argument("--dir", type=Path, default=Path("build"), help="folder on the disk to measure (default: build)")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the state, all ranks together (default: 2)")
    parser.add_argument("--ranks", type=int, choices=(1, 2, 4, 8, 16), default=4, help="number of ranks (default: 4)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default: 5)")
    parser.add_argument("--no-small", action="store_true", help="leave out the state of many small tensors")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def _cases(arguments: argparse.Namespace) -> list[Case]:
    ranks = arguments.ranks
    rows = max(1, int(arguments.gib * (1 << 30)) // (_TENSORS * _COLUMNS * 2 * ranks)) * ranks
    shape = Shape(_TENSORS, rows, _COLUMNS)
    what = f"{shape.bytes / (1 << 30):.2f} GiB in {shape.tensors} tensors, {ranks} ranks"
    cases = []
    if arguments.where in ("disk", "both"):
        cases.append(Case(f"disk, cold loads: {what}", arguments.dir, ranks, shape, reshard=True, cold=True))
    if arguments.where in ("shm", "both"):
        cases.append(Case(f"{_MEMORY_FOLDER}: {what}", _MEMORY_FOLDER, ranks, shape, reshard=True, cold=False))
        if not arguments.no_small:
            small = f"{_MEMORY_FOLDER}: {_SMALL.tensors} tensors of {_SMALL.bytes // _SMALL.tensors >> 10} KiB"
            title = f"{small}, {_SMALL_RANKS} ranks"
            cases.append(Case(title, _MEMORY_FOLDER, _SMALL_RANKS, _SMALL, reshard=False, cold=False))
    return cases


def _run(case: Case, repetitions: int) -> list[Row]:
    """Run the ranks of one case in a folder of its own, which is deleted."""
    case.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=case.parent, prefix="giantstep-bench-") as place,
        tempfile.TemporaryDirectory() as notes,
    ):
        data, meeting, results = Path(place) / "data", Path(notes) / "meeting", Path(notes)
        data.mkdir()
        job = Job(str(data), str(meeting), str(results), case.ranks, case.shape, repetitions, case.reshard, case.cold)
        job_file = Path(notes) / "job.json"
        job.write(job_file)
        _run_ranks(job_file, case.ranks)
        found = [json.loads((results / f"{rank}.json").read_text()) for rank in range(case.ranks)]
    return rows_of([[Measurement(**fields) for fields in rank] for rank in found], case.shape.bytes)


def _run_ranks(job_file: Path, ranks: int) -> None:
    """Start the ranks and wait for them; if one fails, end the others and raise."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "rank.py"), str(job_file)]
    running = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(ranks)]
    try:
        while any(process.poll() is None for process in running):
            for rank, process in enumerate(running):
                if process.poll():
                    raise RuntimeError(f"rank {rank} ended with status {process.returncode}")
            time.sleep(0.2)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()


def main() -> None:
    """Measure all cases and print their tables."""
    arguments = _arguments()
    console = Console(width=_WIDTH)
    load = os.getloadavg()[0]
    console.print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}, "
        f"{os.cpu_count()} cores, load {load:.1f} at the start; {arguments.repeat} repetitions, medians"
    )
    console.print(_LEGEND)
    figures = {}
    for case in _cases(arguments):
        print(case.title, file=sys.stderr, flush=True)
        rows = _run(case, arguments.repeat)
        print_table(case.title, rows, console)
        figures[case.title] = as_json(rows)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
