"""What saves and loads of tensors on a CUDA device cost one process, beside plain copies and torch.distributed.checkpoint.

Everything is done in turn, several times; the table shows medians. Needs a GPU; see docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from methods import DCP, GIANTSTEP, KEPT
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_with_dcp
from torch.distributed.checkpoint.state_dict_saver import async_save as async_save_with_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_with_dcp

import giantstep as gs

_COPY, _PAGEABLE = "one copy per tensor to page-locked memory", "likewise, to other memory"
BLOCKED, STAGED, COMMITTED, STEP = "async: blocked", "async: staged", "async: committed", "a step's kernels beside it"
SAVE, LOAD = "save", "load"
_METHODS = (GIANTSTEP, KEPT, DCP)


@dataclass(slots=True)
class Figures:
    """Seconds by operation and method, one per round."""

    secs: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, operation: str, method: str, secs: float) -> None:
        self.secs.setdefault((operation, method), []).append(secs)


class Bench:
    """One state, and everything that is done with it."""

    def __init__(self, tensors: int, size_bytes: int, folder: Path) -> None:
        self.bytes = tensors * size_bytes
        self.state = {f"w{n:05}": torch.randn(size_bytes // 2048, 1024, device="cuda").bfloat16() for n in range(tensors)}
        self.target = {key: torch.empty_like(tensor) for key, tensor in self.state.items()}
        self.locked = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in self.state.values()]
        self.plain = [torch.zeros_like(tensor, device="cpu") for tensor in self.state.values()]
        self.operand = torch.randn(4096, 4096, device="cuda").bfloat16()
        self.place = folder / "checkpoint"
        self.figures = Figures()
        self.cache = gs.PlanCache()

    def timed(self, work: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        begin = time.monotonic()
        work()
        torch.cuda.synchronize()
        return time.monotonic() - begin

    def step(self) -> None:
        """Kernels such as a training step's, and the wait for them."""
        for _ in range(40):
            torch.mm(self.operand, self.operand)
        done = torch.cuda.Event()
        done.record()
        done.synchronize()

    def copies(self) -> None:
        tensors = list(self.state.values())
        for name, targets in ((_COPY, self.locked), (_PAGEABLE, self.plain)):
            self.figures.add("copy", name, self.timed(lambda targets=targets: torch._foreach_copy_(targets, tensors, True)))
        self.figures.add(STEP, "no save", self.timed(self.step))

    def save_and_load(self, method: str) -> None:
        options = gs.SaveOptions(plan_cache=self.cache if method == KEPT else None)
        load_options = gs.LoadOptions(plan_cache=self.cache if method == KEPT else None)
        if method == DCP:
            save = self.timed(lambda: save_with_dcp(self.state, checkpoint_id=str(self.place)))
            load = self.timed(lambda: load_with_dcp(self.target, checkpoint_id=str(self.place)))
        else:
            save = self.timed(lambda: gs.save(self.state, self.place, options=options))
            load = self.timed(lambda: gs.load(self.target, self.place, options=load_options))
        self.check()
        self.figures.add(SAVE, method, save)
        self.figures.add(LOAD, method, load)

    def save_asynchronously(self, method: str, *, counted: bool) -> None:
        options = gs.SaveOptions(plan_cache=self.cache if method == KEPT else None)
        torch.cuda.synchronize()
        begin = time.monotonic()
        if method == DCP:
            # A stager that is kept cannot be used again in every version of torch: some close it after a save.
            stager = DefaultStager(StagingOptions())
            response: Any = async_save_with_dcp(self.state, checkpoint_id=str(self.place), async_stager=stager)
            waits: list[Callable[[], Any]] = [response.staging_completion.result, response.upload_completion.result]
        else:
            pending = gs.async_save(self.state, self.place, options=options)
            waits = [pending.wait_staged, pending.result]
        found = [(BLOCKED, time.monotonic() - begin)]
        before = time.monotonic()
        self.step()
        found.append((STEP, time.monotonic() - before))
        for name, wait in zip((STAGED, COMMITTED), waits, strict=True):
            wait()
            found.append((name, time.monotonic() - begin))
        if counted:
            for name, secs in found:
                self.figures.add(name, method, secs)
        shutil.rmtree(self.place)

    def check(self) -> None:
        for key, tensor in self.target.items():
            if not torch.equal(tensor, self.state[key]):
                raise ValueError(f"{key} has wrong values")
            tensor.zero_()
        shutil.rmtree(self.place)

    def run(self, rounds: int, methods: Sequence[str]) -> None:
        for number in range(-1, rounds):
            self.copies()
            for method in methods:
                self.save_and_load(method)
                self.save_asynchronously(method, counted=number >= 0)
            if number < 0:
                self.figures = Figures()


def _print(title: str, bench: Bench, console: Console) -> list[dict[str, Any]]:
    table = Table(title=title, title_justify="left")
    for name in ("operation", "method", "ms", "GiB/s", "/ copy"):
        table.add_column(name, justify="left" if name in ("operation", "method") else "right")
    copies = bench.figures.secs["copy", _COPY]
    rows = []
    for (operation, method), secs in sorted(bench.figures.secs.items()):
        ratio = median(copy / one for copy, one in zip(copies, secs, strict=True))
        rows.append({"operation": operation, "method": method, "secs": median(secs), "of_copy": ratio})
        rate = "" if operation == STEP else f"{bench.bytes / median(secs) / (1 << 30):.2f}"
        table.add_row(operation, method, f"{median(secs) * 1e3:.2f}", rate, "" if operation == STEP else f"{ratio:.2f}")
    console.print(table)
    return rows


def main() -> None:
    """Measure few large and many small tensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where it is saved (default: /dev/shm)")  # noqa: S108
    parser.add_argument("--gib", type=float, default=4, help="size of the large state (default: 4)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--states", nargs="+", choices=("large", "small"), default=("large", "small"), help="default: both")
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=_METHODS, help="default: all")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    console, figures = Console(width=120), {}
    console.print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; {arguments.repeat} rounds, medians")
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        shapes = {"large": (32, int(arguments.gib * (1 << 30)) // 32), "small": (8192, 65536)}
        for tensors, size in map(shapes.__getitem__, arguments.states):
            title = f"{tensors:,} tensors of {size / 1024:,.0f} KiB"
            bench = Bench(tensors, size, Path(folder))
            bench.run(arguments.repeat, arguments.methods)
            figures[title] = _print(title, bench, console)
            gs.finish_saves()
            del bench
            torch.cuda.empty_cache()
        dist.destroy_process_group()
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
