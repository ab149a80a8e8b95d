"""How long removing old steps keeps the trainer waiting: pauses of a thread that wakes every millisecond.

Beside it the same loop without removal, and with removal in the caller's thread. Prints a table; states are files of the given
size on the given directory.

    python benchmarks/retention.py --dir /var/tmp/retention --mib 512 --steps 6
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Self

import torch

import giantstep as gs
from giantstep.commit.remove import remove_checkpoint
from giantstep.storage.local import LocalStore


class Ticker:
    """Wakes every millisecond and notes by how much it is late."""

    def __init__(self) -> None:
        self.late: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            begin = time.perf_counter()
            time.sleep(0.001)
            self.late.append(time.perf_counter() - begin - 0.001)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def saved(root: Path, mib: int, steps: int) -> None:
    """Steps of a tensor of so many MiB."""
    shutil.rmtree(root, ignore_errors=True)
    state = {"w": torch.zeros(mib << 18)}
    with gs.CheckpointManager(root) as manager:
        for step in range(1, steps + 1):
            manager.save(step, state)


def measure(root: Path, mib: int, steps: int, how: str) -> tuple[float, float, float]:
    """Worst pause, the call's seconds, and seconds until the steps are gone."""
    saved(root, mib, steps)
    with Ticker() as ticker:
        time.sleep(0.3)
        start = time.perf_counter()
        if how == "caller's thread":
            for step in range(1, steps):
                remove_checkpoint(LocalStore(root / f"step_{step:08d}"))
        elif how == "manager":
            manager = gs.CheckpointManager(root, keep=1)
            manager._job.retention.ask()
        call = time.perf_counter() - start
        if how == "manager":
            manager.close()
        gone = time.perf_counter() - start
        time.sleep(0.3)
    return max(ticker.late), call, gone


def main() -> None:
    """Run all ways in turn, several times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dir", type=Path, default=Path("build/retention"))
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ways = ("nothing", "manager", "caller's thread")
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way in ways:
            found[way].append(measure(arguments.dir, arguments.mib, arguments.steps, way))
    shutil.rmtree(arguments.dir, ignore_errors=True)
    steps = f"{arguments.steps - 1} steps of {arguments.mib} MiB"
    print(f"removing {steps}, medians of {arguments.rounds} (worst pause: the worst of all)")
    print(f"{'removal by':<18}{'call':>12}{'until gone':>14}{'worst pause':>14}")
    for way in ways:
        pauses, calls, gone = zip(*found[way], strict=True)
        call, until = statistics.median(calls) * 1000, statistics.median(gone) * 1000
        print(f"{way:<18}{call:>9.2f} ms{until:>11.1f} ms{max(pauses) * 1000:>11.2f} ms")


if __name__ == "__main__":
    main()
