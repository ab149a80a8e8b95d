"""How much a training loop slows down while a save is in flight: giantstep's, DCP's, and one by raw calls alone.

One process, one thread for the loop, a ticker beside it. "Raw" is what the hardware takes: a copy of the same bytes in the
caller's thread, then pwrite from background threads that need the interpreter once per 8 MiB. What is beyond it is due to a
library. Everything is interleaved and compared within a round; see docs/performance.md for how to read the tables.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from flights import QUIET, RAW, Flight, Setting, observe
from rich.console import Console
from rich.table import Table
from states import Shape
from torch.distributed.device_mesh import DeviceMesh

from training import Ticker, python_loop, torch_loop

_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - the file system that is measured
_LOOPS: dict[str, Callable[[], Callable[[], None]]] = {"torch": torch_loop, "python": python_loop}
_STATES = {"large": Shape(16, 4096, 4096), "small": Shape(8192, 32, 1024)}
_QUICK_STATES = {"large": Shape(16, 1024, 4096), "small": Shape(512, 32, 1024)}
_STALL_TARGET_SECS, _SLOWDOWN_TARGET = 0.020, 0.05
_WIDTH = 150
_FIGURES = (
    *("blocked ms", "in flight ms", "loops/s", "slowdown", "beyond raw", "lost ms", "beyond raw"),
    *("stall ms", "longest", "beyond raw", "gc ms", "targets"),
)
_LEGEND = (
    "blocked: until the call is back; in flight: from then on until the checkpoint exists; loops/s and slowdown: in flight; "
    "lost: what one save costs the loop, the blocked time included; stall: how long a ticker of 1 ms was kept waiting during "
    "a save, the blocked time included, median and longest; gc: longest collection of garbage. Targets: slowdown at most 5 % "
    "beyond raw, longest stall at most 20 ms beyond raw."
)


def run(setting: Setting, loop: str, arguments: argparse.Namespace) -> list[Flight]:
    """All rounds with one loop; the contenders take turns, in another order in every round."""
    iterate, found = _LOOPS[loop](), []
    order = setting.contenders
    with Ticker() as ticker:
        for contender in order:
            # The first save allocates memory that later ones use again.
            observe(setting, contender, iterate, ticker, 0)
        for repetition in range(arguments.repeat):
            random.Random(repetition).shuffle(order)  # noqa: S311 - an order, not a secret
            for contender in list(order):
                for _ in range(arguments.saves):
                    found.append(observe(setting, contender, iterate, ticker, repetition))
                    if found[-1].blocked_secs + found[-1].flight_secs > arguments.patience:
                        order.remove(contender)
                        break
    return found


@dataclass(frozen=True, slots=True)
class Result:
    """What a contender did to the loop.

    Attributes:
        contender: who saved.
        blocked_secs, flight_secs: medians over saves.
        iterations_per_sec: median over rounds.
        slowdown: fraction of the speed without a save that is lost in flight: median over rounds.
        lost_secs: what one save costs the loop, the blocked time included: median over rounds.
        stall_secs, longest_stall_secs: longest delay of the ticker during a save: median over saves, and the most.
        longest_collection_secs: longest collection of garbage during a save.
    """

    contender: str
    blocked_secs: float
    flight_secs: float
    iterations_per_sec: float
    slowdown: float
    lost_secs: float
    stall_secs: float
    longest_stall_secs: float
    longest_collection_secs: float


def result_of(contender: str, flights: list[Flight]) -> Result:
    """From all flights of all contenders."""
    quiet = {number: _speed(group) for number, group in _rounds(QUIET, flights).items()}
    rounds = _rounds(contender, flights)
    mine = [flight for group in rounds.values() for flight in group]
    lost = [one.blocked_secs + one.flight_secs - one.iterations / quiet[one.repetition] for one in mine]
    return Result(
        contender,
        blocked_secs=median(flight.blocked_secs for flight in mine),
        flight_secs=median(flight.flight_secs for flight in mine),
        iterations_per_sec=median(_speed(group) for group in rounds.values()),
        slowdown=median(1 - _speed(group) / quiet[number] for number, group in rounds.items()),
        lost_secs=median(lost),
        stall_secs=median(flight.stall_secs for flight in mine),
        longest_stall_secs=max(flight.stall_secs for flight in mine),
        longest_collection_secs=max(flight.collection_secs for flight in mine),
    )


def _rounds(contender: str, flights: list[Flight]) -> dict[int, list[Flight]]:
    found: dict[int, list[Flight]] = {}
    for flight in flights:
        if flight.contender == contender:
            found.setdefault(flight.repetition, []).append(flight)
    return found


def _speed(flights: list[Flight]) -> float:
    return sum(flight.iterations for flight in flights) / sum(flight.flight_secs for flight in flights)


def _print(title: str, results: list[Result], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("save")
    for name in _FIGURES:
        table.add_column(name, justify="right")
    raw = next(result for result in results if result.contender == RAW)
    for result in results:
        library = result.contender not in (QUIET, RAW)
        slower, stall = result.slowdown - raw.slowdown, result.longest_stall_secs - raw.longest_stall_secs
        met = slower <= _SLOWDOWN_TARGET and stall <= _STALL_TARGET_SECS
        saves = result.contender != QUIET
        table.add_row(
            result.contender,
            f"{result.blocked_secs * 1e3:.1f}" if saves else "",
            f"{result.flight_secs * 1e3:.0f}" if saves else "",
            f"{result.iterations_per_sec:.0f}",
            f"{result.slowdown:.1%}" if saves else "",
            f"{slower:+.1%}" if library else "",
            f"{result.lost_secs * 1e3:.0f}" if saves else "",
            f"{(result.lost_secs - raw.lost_secs) * 1e3:+.0f}" if library else "",
            f"{result.stall_secs * 1e3:.1f}",
            f"{result.longest_stall_secs * 1e3:.1f}",
            f"{stall * 1e3:+.1f}" if library else "",
            f"{result.longest_collection_secs * 1e3:.1f}",
            ("met" if met else "missed") if library else "",
        )
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", choices=("disk", "shm"), default="disk", help="where it is saved (default: disk)")
    parser.add_argument("--dir", type=Path, default=Path("build"), help="folder on the disk (default: build)")
    parser.add_argument("--states", nargs="+", choices=list(_STATES), default=list(_STATES), help="default: all")
    parser.add_argument("--loops", nargs="+", choices=list(_LOOPS), default=list(_LOOPS), help="default: all")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--saves", type=int, default=2, help="saves of each contender per round (default: 2)")
    parser.add_argument("--patience", type=float, default=5, help="no more saves of who needs more seconds (default: 5)")
    parser.add_argument("--quick", action="store_true", help="small states, one round of one save: to see that it runs")
    parser.add_argument("--json", type=Path, help="also write all flights and results to this file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeat = arguments.saves = 1
    return arguments


def main() -> None:
    """Run all states and loops, and print a table for each."""
    arguments = _arguments()
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    console = Console(width=_WIDTH)
    parent = arguments.dir.absolute() if arguments.place == "disk" else _MEMORY_FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    console.print(_LEGEND)
    figures: dict[str, Any] = {}
    shapes = _QUICK_STATES if arguments.quick else _STATES
    with tempfile.TemporaryDirectory(dir=parent, prefix="giantstep-bench-") as place:
        dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=0, world_size=1)
        mesh = DeviceMesh("cpu", [0])
        for state in arguments.states:
            folder = Path(place) / "data"
            folder.mkdir()
            setting = Setting(folder, shapes[state], mesh)
            for loop in arguments.loops:
                flights = run(setting, loop, arguments)
                results = [result_of(contender, flights) for contender in setting.contenders]
                title = f"{loop} loop, {arguments.place}, {state}: {shapes[state].bytes >> 20} MiB"
                _print(title, results, console)
                figures[title] = {"results": [*map(asdict, results)], "flights": [*map(asdict, flights)]}
            setting.close()
            folder.rmdir()
        dist.destroy_process_group()
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
