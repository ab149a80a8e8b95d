"""How fast `giantstep` saves and loads, beside raw system calls, plain copies and other libraries, in one run.

All methods are used by the same ranks on the same state, in turn, several times; the tables show medians. Compare
figures of one run only: machines are noisy. See docs/performance.md for how to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from launch import run_job
from methods import installed
from peers import missing_packages
from plot import plot
from rank import Job
from rich.console import Console
from states import Shape
from tables import as_json, print_table, rows_of

_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - the file system that is measured
_COLUMNS = 4096
_LARGE, _SMALL, _MIXED = "large", "small", "mixed"
_STATES = (_LARGE, _SMALL, _MIXED)
_PLACES = ("disk", "shm")
_RANKS = (1, 2, 4)
_SMALL_RANKS = 2
_WIDTH = 200
_LEGEND = (
    "s, GiB/s, CPU s (all ranks together): medians, and GiB/s from least to most. / raw, / DCP: speed as a multiple of the "
    "best raw path and of torch.distributed.checkpoint, medians of the ratios within a round; loads into another layout are "
    "compared with plain raw loads, and what asynchronous saves take until they are staged with a plain copy (memcpy) by one "
    "thread per rank. extra MiB: peak resident memory of a rank beyond what it had at the start. read x: bytes read over "
    "bytes loaded. raw buffered: pwrite and fsync, pread; raw direct: posix_fallocate and O_DIRECT."
)


@dataclass(frozen=True, slots=True)
class Case:
    """A table: where it is measured, and with what state and ranks."""

    place: str
    state: str
    ranks: int
    shape: Shape

    @property
    def title(self) -> str:
        """For people, and the key in the JSON file."""
        size = f"{self.shape.bytes / (1 << 30):.2f} GiB in {self.shape.tensors:,} tensors"
        return f"{self.place}, {self.state}: {size}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", nargs="+", choices=_PLACES, default=_PLACES, help="disk, /dev/shm, or both (default)")
    parser.add_argument("--dir", type=Path, default=Path("build"), help="folder on the disk to measure (default: build)")
    parser.add_argument("--states", nargs="+", choices=_STATES, default=_STATES, help="default: all")
    parser.add_argument("--ranks", nargs="+", type=int, default=_RANKS, help=f"numbers of ranks (default: {_RANKS})")
    parser.add_argument("--methods", nargs="+", default=[], help="leave out all others but raw calls, as 'giantstep dcp'")
    parser.add_argument("--gib", type=float, default=0.5, help="size of the large state, all ranks together (default: 0.5)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--patience", type=float, default=10, help="no more rounds for what needs more seconds (default: 10)")
    parser.add_argument("--full", action="store_true", help="many tensors on all ranks and places, and resharded")
    parser.add_argument("--quick", action="store_true", help="small states, 2 ranks, one round: to see that it runs")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw the speeds to this SVG file (needs matplotlib)")
    arguments = parser.parse_args()
    if arguments.plot and not installed("matplotlib"):
        parser.error("--plot needs matplotlib: pip install '.[bench]'")
    if arguments.quick:
        arguments.gib, arguments.repeat, arguments.ranks = 0.125, 1, [_SMALL_RANKS]
    return arguments


def _shape(state: str, ranks: int, arguments: argparse.Namespace) -> Shape:
    """Rows can be divided by the number of ranks, so that raw calls and libraries move equal shares."""
    fewer = 16 if arguments.quick else 1
    if state == _SMALL:
        return Shape(tensors=8192 // fewer, rows=32, columns=1024)
    if state == _MIXED:
        return Shape(tensors=20_000 // fewer, rows=32, columns=4096, least_columns=64)
    tensors = 16
    return Shape(tensors, max(1, int(arguments.gib * (1 << 30)) // (tensors * _COLUMNS * 2 * ranks)) * ranks, _COLUMNS)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    return [
        Case(place, state, ranks, _shape(state, ranks, arguments))
        for place in arguments.places
        for state in arguments.states
        for ranks in arguments.ranks
        if state == _LARGE or arguments.full or _is_typical(place, ranks, arguments)
    ]


def _is_typical(place: str, ranks: int, arguments: argparse.Namespace) -> bool:
    """Many tensors take some libraries minutes: one number of ranks, and no disk, unless nothing else is asked for."""
    in_memory = place == _PLACES[1] or _PLACES[1] not in arguments.places
    return in_memory and (ranks == _SMALL_RANKS or _SMALL_RANKS not in arguments.ranks)


def _measure(case: Case, arguments: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    """Run a case and print its table."""
    print(case.title, file=sys.stderr, flush=True)
    on_disk = case.place == "disk"
    reshard = case.state == _LARGE or arguments.full
    methods, patience = arguments.methods, arguments.patience
    job = Job("", "", "", case.ranks, case.shape, arguments.repeat, reshard, on_disk, methods, patience)
    rows = rows_of(run_job(arguments.dir if on_disk else _MEMORY_FOLDER, job), case.shape.bytes)
    print_table(case.title, rows, console)
    return as_json(rows)


def main() -> None:
    """Measure all cases and print their tables."""
    arguments = _arguments()
    console = Console(width=_WIDTH)
    console.print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; {arguments.repeat} rounds, medians"
    )
    console.print(_LEGEND)
    if missing_packages():
        missing = ", ".join(missing_packages())
        console.print(f"not installed, and so not measured: {missing} (pip install '.[bench]')", markup=False)
    figures = {}
    for case in _cases(arguments):
        figures[case.title] = _measure(case, arguments, console)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1))
    if arguments.plot:
        plot(figures, arguments.plot)


if __name__ == "__main__":
    main()
