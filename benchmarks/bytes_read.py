"""How many bytes a load reads from the store, and how long it takes, when ranks exchange and when they do not.

First table: ranks are threads, the store is in memory; figures are multiples of the bytes that some rank wants.
Second table: ranks are processes that talk over gloo; seconds from the first rank's start to the last one's end, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from raw_io import drop_cached_pages
from rich.console import Console
from rich.table import Table

import giantstep as gs
from giantstep.group.threads import ThreadGroup
from giantstep.reports import LoadReport
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import run_ranks

_WIDTH = 150
_MIB = 1 << 20
_COLUMNS = 4096
_WAYS = ("none", "auto")
_PROCESSES = 4
# Saved as, by so many ranks; loaded as, by so many.
_CHANGES = [
    ("replicated", 8, "replicated", 8),
    ("rows", 8, "rows", 8),
    ("rows", 8, "rows", 5),
    ("rows", 8, "replicated", 2),
    ("rows", 8, "replicated", 16),
    ("rows", 4, "columns", 4),
    ("rows", 4, "columns", 3),
    ("columns", 4, "rows", 4),
    ("hsdp", 8, "hsdp", 16),
    ("hsdp", 8, "columns", 8),
]


@dataclass(frozen=True, slots=True)
class State:
    """Equal float32 matrices."""

    tensors: int
    rows: int

    @property
    def bytes(self) -> int:
        """Size of all tensors together."""
        return self.tensors * self.rows * _COLUMNS * 4

    def of_rank(self, layout: str, rank: int, ranks: int) -> dict[str, Any]:
        """The part of a rank, with values known by formula."""
        half = max(1, ranks // 2)
        rows = {"rows": (rank, ranks), "hsdp": (rank % half, half)}.get(layout, (0, 1))
        columns = (rank, ranks) if layout == "columns" else (0, 1)
        low, high = (self.rows * (rows[0] + end) // rows[1] for end in (0, 1))
        left, right = (_COLUMNS * (columns[0] + end) // columns[1] for end in (0, 1))
        state = {}
        for tensor in range(self.tensors):
            key, data = f"layers.{tensor}.weight", self.values(tensor)[low:high, left:right].clone()
            replica = {"replicated": rank, "hsdp": rank // half}.get(layout, 0)
            size, shape = (high - low, right - left), (self.rows, _COLUMNS)
            state[key] = gs.ShardedTensor(key, data, torch.float32, size, shape, (low, left), None, replica)
        return state

    def values(self, tensor: int) -> torch.Tensor:
        """All values of a tensor, without its memory."""
        return torch.arange(self.rows, dtype=torch.float32)[:, None] * 3 + torch.arange(_COLUMNS) + tensor


@dataclass(frozen=True, slots=True)
class Job:
    """What processes are to do: load `loaded` in both ways from what they saved as `saved`."""

    folder: str
    meeting: str
    results: str
    state: State
    saved: str
    loaded: str
    repetitions: int
    cold: bool


def _count(state: State) -> Table:
    table = Table(title=f"bytes read / bytes wanted, {state.bytes / _MIB:.0f} MiB, threads", title_justify="left")
    for name in ("saved", "loaded"):
        table.add_column(name)
    for name in ("wanted MiB", "none", "auto", "auto exchanges", "sent / wanted", "readers: max / mean"):
        table.add_column(name, justify="right")
    store = MemoryStore("bytes-read")
    for saved, before, loaded, after in _CHANGES:
        run_ranks(before, partial(_save, state, saved, store))
        reports = {way: run_ranks(after, partial(_load, state, loaded, store, way)) for way in _WAYS}
        read = {way: sum(report.bytes_read for report in found) for way, found in reports.items()}
        shares = [report.bytes_read for report in reports["auto"]]
        table.add_row(
            f"{saved}, {before}",
            f"{loaded}, {after}",
            f"{state.bytes / _MIB:.0f}",
            *(f"{read[way] / state.bytes:.3f}" for way in _WAYS),
            "yes" if reports["auto"][0].exchange == "all" else "no",
            f"{sum(report.bytes_sent for report in reports['auto']) / state.bytes:.2f}",
            f"{max(shares) * len(shares) / sum(shares):.3f}",
        )
        store.clear()
    return table


def _save(state: State, layout: str, store: MemoryStore, group: ThreadGroup) -> None:
    gs.save(state.of_rank(layout, group.rank, group.size), store, process_group=group)


def _load(state: State, layout: str, store: MemoryStore, way: str, group: ThreadGroup) -> LoadReport:
    target = state.of_rank(layout, group.rank, group.size)
    return gs.load(target, store, process_group=group, options=gs.LoadOptions(exchange=way)).report


def _time(parent: Path, state: State, repetitions: int, console: Console) -> None:
    title = f"{_PROCESSES} processes, {state.bytes / _MIB:.0f} MiB, under {parent}"
    cold = parent != Path("/dev/shm")  # noqa: S108 - the file system that is measured
    table = Table(title=title + (", cold" if cold else ""), title_justify="left")
    for name in ("saved", "loaded"):
        table.add_column(name)
    for name in ("none s", "auto s", "auto exchanges", "none / auto", "read: none", "read: auto"):
        table.add_column(name, justify="right")
    for saved, loaded in (("rows", "rows"), ("rows", "columns"), ("rows", "replicated"), ("hsdp", "hsdp")):
        found = _processes(parent, state, saved, loaded, repetitions, cold=cold)
        secs = {way: median(found[way]["secs"]) for way in _WAYS}
        table.add_row(
            saved,
            loaded,
            *(f"{secs[way]:.2f}" for way in _WAYS),
            found["auto"]["exchange"],
            f"{secs['none'] / secs['auto']:.2f}",
            *(f"{found[way]['read'] / state.bytes:.2f}" for way in _WAYS),
        )
    console.print(table)


def _processes(parent: Path, state: State, saved: str, loaded: str, repetitions: int, *, cold: bool) -> dict[str, Any]:
    """Seconds, bytes read and what was done, by way."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="giantstep-bench-") as place, tempfile.TemporaryDirectory() as notes:
        job = Job(str(Path(place, "step")), str(Path(notes, "meeting")), notes, state, saved, loaded, repetitions, cold)
        file = Path(notes, "job.json")
        file.write_text(json.dumps(asdict(job)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--job", str(file), "--rank"]
        running = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(_PROCESSES)]
        if any(process.wait() for process in running):
            raise RuntimeError("a rank failed")
        ranks = [json.loads(Path(notes, f"{rank}.json").read_text()) for rank in range(_PROCESSES)]
        shutil.rmtree(place)
        Path(place).mkdir()
    return {
        way: {
            "secs": [max(ends) - min(begins) for begins, ends in _by_repetition(ranks, way)],
            "read": sum(found[way]["read"] for found in ranks),
            "exchange": ranks[0][way]["exchange"],
        }
        for way in _WAYS
    }


def _by_repetition(ranks: Sequence[dict[str, Any]], way: str) -> list[tuple[list[float], list[float]]]:
    spans = [found[way]["spans"] for found in ranks]
    return [([span[0] for span in row], [span[1] for span in row]) for row in zip(*spans, strict=True)]


def _rank(job: Job, rank: int) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{job.meeting}", rank=rank, world_size=_PROCESSES)
    gs.save(job.state.of_rank(job.saved, rank, _PROCESSES), job.folder)
    found: dict[str, Any] = {way: {"spans": []} for way in _WAYS}
    target = job.state.of_rank(job.loaded, rank, _PROCESSES)
    for repetition in range(job.repetitions + 1):
        for way in _WAYS:
            for tensor in target.values():
                tensor.data.zero_()
            dist.barrier()
            if rank == 0 and job.cold:
                drop_cached_pages(Path(job.folder))
            dist.barrier()
            begin = time.monotonic()
            report = gs.load(target, job.folder, options=gs.LoadOptions(exchange=way)).report
            # The first load also makes connections.
            if repetition:
                found[way]["spans"].append((begin, time.monotonic()))
            found[way] |= {"read": report.bytes_read, "exchange": "yes" if report.exchange == "all" else "no"}
            expected = job.state.of_rank(job.loaded, rank, _PROCESSES)
            if not all(torch.equal(target[key].data, expected[key].data) for key in target):
                raise ValueError(f"{way}: rank {rank} has wrong values")
    Path(job.results, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print both tables; or, with --job, be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("build"), help="folder on the disk to measure (default: build)")
    parser.add_argument("--mib", type=int, default=512, help="size of the state that processes load (default: 512)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (default: 5)")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        fields = json.loads(arguments.job.read_text())
        _rank(Job(**{**fields, "state": State(**fields["state"])}), arguments.rank)
        return
    console = Console(width=_WIDTH)
    console.print(_count(State(tensors=4, rows=1024)))
    state = State(tensors=8, rows=arguments.mib * _MIB // (8 * _COLUMNS * 4))
    for parent in (Path("/dev/shm"), arguments.dir):  # noqa: S108 - the file system that is measured
        _time(parent, state, arguments.repeat, console)


if __name__ == "__main__":
    main()
