"""What incremental saves write, and how long they take, against full saves of the same states.

One process and one rank; every case is a run of steps whose full, digested and incremental saves take turns, in another
order in every round. "digests" is a full save that keeps digests: what the first incremental save costs beyond a plain one.

    python benchmarks/incremental.py [--folder /dev/shm] [--mib 512] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import giantstep as gs

State = dict[str, torch.Tensor]

_MIB = 1 << 20
_MEMORY_FOLDER = "/dev/shm"  # noqa: S108 - the file system that is measured
_MODES = ("full", "digests", "incremental")


def _tensors(prefix: str, mib: float, count: int) -> State:
    elements = max(1, int(mib * _MIB) // 4 // count)
    return {f"{prefix}.{number}": torch.randn(elements) for number in range(count)}


def _touch(state: State, prefix: str) -> None:
    """One step of training for some of the tensors."""
    for key, value in state.items():
        if key.startswith(prefix):
            value.add_(1)


def adapter(mib: int) -> tuple[State, Callable[[State, int], None]]:
    """A frozen base of 98 %, and an adapter with its optimizer."""
    state = _tensors("base", mib * 0.98, 32) | _tensors("adapter", mib * 0.02, 64)
    return state, lambda held, _step: _touch(held, "adapter")


def paused_average(mib: int) -> tuple[State, Callable[[State, int], None]]:
    """Weights, two moments and an average that is paused: a quarter does not change."""
    state = {}
    for name in ("average", "weight", "first_moment", "second_moment"):
        state |= _tensors(name, mib / 4, 16)

    def train(held: State, _step: int) -> None:
        for name in ("weight", "first_moment", "second_moment"):
            _touch(held, name)

    return state, train


def experts(mib: int) -> tuple[State, Callable[[State, int], None]]:
    """Eight experts, of which one is trained at a time."""
    state: State = {}
    for number in range(8):
        state |= _tensors(f"expert{number}", mib / 8, 8)
    return state, lambda held, step: _touch(held, f"expert{step % 8}")


def all_changed(mib: int) -> tuple[State, Callable[[State, int], None]]:
    """Everything changes: what it costs to look."""
    return _tensors("weight", mib, 64), lambda held, _step: _touch(held, "weight")


def small_tensors(mib: int) -> tuple[State, Callable[[State, int], None]]:
    """Tensors of 64 KiB, none of which changes."""
    return _tensors("weight", mib, mib * 16), lambda _held, _step: None


CASES = {
    "98 % frozen": adapter,
    "average paused": paused_average,
    "1 of 8 experts": experts,
    "all changes": all_changed,
    "64 KiB, none changes": small_tensors,
}


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one case and mode; of incremental saves from the third step on, when what is settled has found its place."""

    case: str
    mode: str
    seconds: float
    compare_seconds: float
    written_mib: float
    written_second_mib: float
    of_full: float


def measure(name: str, mib: int, rounds: int, folder: Path) -> list[Row]:
    """All modes of one case, interleaved."""
    state, train = CASES[name](mib)
    seconds: dict[str, list[float]] = {mode: [] for mode in _MODES}
    compared: dict[str, list[float]] = {mode: [] for mode in _MODES}
    written: dict[str, list[int]] = {mode: [] for mode in _MODES}
    cache = gs.PlanCache()
    for step in range(rounds + 2):
        train(state, step)
        order = list(_MODES)
        random.Random(step).shuffle(order)  # noqa: S311 - an order, not a secret
        for mode in order:
            previous = folder / mode / str(step - 1)
            options = gs.SaveOptions(
                digests=mode != "full",
                previous=previous if mode == "incremental" and step else None,
                plan_cache=cache,
            )
            begin = time.perf_counter()
            report = gs.save(dict(state), folder / mode / str(step), options=options)
            seconds[mode].append(time.perf_counter() - begin)
            compared[mode].append(report.seconds.get("compare", 0.0))
            written[mode].append(report.bytes_written)
            if previous.exists():
                shutil.rmtree(previous)
    full = median(seconds["full"][2:])
    return [
        Row(
            name,
            mode,
            median(seconds[mode][2:]),
            median(compared[mode][2:]),
            median(written[mode][2:]) / _MIB,
            written[mode][1] / _MIB,
            median(seconds[mode][2:]) / full,
        )
        for mode in _MODES
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=_MEMORY_FOLDER)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in CASES:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows += measure(name, arguments.mib, arguments.rounds, Path(folder))
    table = Table("case", "save", "s", "of full", "compare s", "MiB written", "at the second step")
    for row in rows:
        numbers = (f"{row.seconds:.3f}", f"{row.of_full:.2f}", f"{row.compare_seconds:.3f}")
        table.add_row(row.case, row.mode, *numbers, f"{row.written_mib:.1f}", f"{row.written_second_mib:.1f}")
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
