"""One rank of a benchmark: `python rank.py JOB RANK`, where JOB is a JSON file that `save_load.py` wrote.

Everything is measured on all ranks at once, between barriers. Values are checked after every load, outside the
measured time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import Measurement, measure
from raw_io import drop_cached_pages, knows_direct, read_file, write_file
from states import Layout, Memory, Shape, aligned_memory, fill, state_over, wrong_tensors
from torch.distributed.checkpoint.state_dict_loader import load as load_with_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_with_dcp
from torch.distributed.device_mesh import DeviceMesh

import giantstep as gs

SAVE, LOAD, COLUMNS, FEWER = "save", "load", "load columns", "load on half"
_WARM_UP = Shape(2, 64, 64)


@dataclass(frozen=True, slots=True)
class Job:
    """What the ranks are to do.

    Attributes:
        folder: where checkpoints are written.
        meeting: file by which the ranks find each other.
        results: folder for what each rank measured.
        ranks: number of ranks.
        shape: the state.
        repetitions: how often everything is measured.
        reshard: also load into other layouts.
        cold: drop cached pages before each load.
    """

    folder: str
    meeting: str
    results: str
    ranks: int
    shape: Shape
    repetitions: int
    reshard: bool
    cold: bool

    @classmethod
    def read(cls, path: Path) -> Job:
        """Inverse of `write`."""
        fields = json.loads(path.read_text())
        return cls(**{**fields, "shape": Shape(**fields["shape"])})

    def write(self, path: Path) -> None:
        """As a JSON file."""
        path.write_text(json.dumps(asdict(self)))


class Target:
    """Memory that is loaded into, in one layout over some of the ranks. Only those ranks make one."""

    def __init__(self, memory: Memory, shape: Shape, layout: Layout, mesh: DeviceMesh) -> None:
        self.share = shape.share(layout, mesh.get_local_rank(), mesh.size())
        self.memory = memory[: self.share.bytes * shape.tensors]
        self.shape = shape
        self.group = mesh.get_group()
        self.state = state_over(self.memory, shape, layout, mesh)

    def check(self, what: str) -> None:
        """Raise unless the memory holds the right values; then forget them."""
        wrong = wrong_tensors(self.memory, self.shape, self.share)
        if wrong:
            raise ValueError(f"{what}: {len(wrong)} tensors have wrong values, tensor {wrong[0]} among them")
        self.memory[:] = 0


class Rank:
    """All measurements of one rank."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job = job
        self._rank = rank
        self._folder = Path(job.folder)
        self._mesh = DeviceMesh("cpu", list(range(job.ranks)))
        self._direct = knows_direct(self._folder, f"{rank}.direct")
        self._results: list[Measurement] = []
        self._repetition = 0

    def run(self) -> list[Measurement]:
        """Warm up, then measure all methods in turn, as often as asked."""
        self._prepare(_WARM_UP, reshard=False)
        for method in (self._giantstep, self._dcp):
            method()
        self._results.clear()
        self._prepare(self._job.shape, reshard=self._job.reshard)
        methods = [self._raw, self._giantstep, self._dcp]
        for repetition in range(self._job.repetitions):
            self._repetition = repetition
            for turn in range(len(methods)):
                methods[(repetition + turn) % len(methods)]()
        return self._results

    def _prepare(self, shape: Shape, *, reshard: bool) -> None:
        """The state to save, and targets: None where this rank takes no part."""
        ranks, half = self._job.ranks, max(1, self._job.ranks // 2)
        share = shape.share("rows", self._rank, ranks)
        self._source = aligned_memory(share.bytes * shape.tensors)
        fill(self._source, shape, share)
        self._state = state_over(self._source, shape, "rows", self._mesh)
        takes_part = reshard and half < ranks and self._rank < half
        memory = aligned_memory(share.bytes * shape.tensors * (ranks // half if takes_part else 1))
        self._same = Target(memory, shape, "rows", self._mesh)
        self._targets: dict[str, Target | None] = {LOAD: self._same}
        if reshard:
            self._targets[COLUMNS] = Target(memory, shape, "columns", self._mesh)
        if reshard and half < ranks:
            group = dist.new_group(list(range(half)))
            mesh = DeviceMesh.from_group(group, "cpu") if takes_part else None
            self._targets[FEWER] = Target(memory, shape, "rows", mesh) if mesh else None

    # One method after another: save, load in all layouts, delete.

    def _raw(self) -> None:
        paths = [False, True] if self._direct else [False]
        # Whoever comes first may find memory and disk in another state: take turns.
        for direct in paths if self._repetition % 2 else reversed(paths):
            how = "raw direct" if direct else "raw buffered"
            path = self._folder / f"{self._rank}.raw"
            self._measure(SAVE, how, partial(write_file, path, self._source, direct=direct))
            self._cool_down()
            self._measure(LOAD, how, partial(read_file, path, self._same.memory, direct=direct))
            self._same.check(f"{how} {LOAD}")
            self._clear()

    def _giantstep(self) -> None:
        place = self._folder / "giantstep"
        self._measure(SAVE, "giantstep", partial(gs.save, self._state, place))
        self._loads("giantstep", lambda target: gs.load(target.state, place, process_group=target.group).report)

    def _dcp(self) -> None:
        place = self._folder / "dcp"
        self._measure(SAVE, "dcp", partial(save_with_dcp, self._state, checkpoint_id=place))
        self._loads("dcp", lambda target: load_with_dcp(target.state, checkpoint_id=place, process_group=target.group))

    def _loads(self, method: str, load: Callable[[Target], Any]) -> None:
        for operation, target in self._targets.items():
            self._cool_down()
            if target is None:
                dist.barrier()
            else:
                self._measure(operation, method, partial(load, target))
                target.check(f"{method} {operation}")
        self._clear()

    def _measure(self, operation: str, method: str, work: Callable[[], Any]) -> None:
        found = measure(work, dist.barrier, operation, method, self._repetition)
        self._results.append(found)
        if self._rank == 0:
            print(f"  {self._repetition} {operation} {method}: {found.end - found.begin:.2f} s", file=sys.stderr, flush=True)

    def _cool_down(self) -> None:
        """Let the disk come to rest; drop cached pages."""
        dist.barrier()
        if self._rank == 0 and self._job.cold:
            drop_cached_pages(self._folder)
        dist.barrier()

    def _clear(self) -> None:
        """Delete everything that was saved."""
        dist.barrier()
        if self._rank == 0:
            shutil.rmtree(self._folder)
            self._folder.mkdir()
            if self._job.cold:
                os.sync()
        dist.barrier()


def main() -> None:
    """Run one rank and write down what it measured."""
    job, rank = Job.read(Path(sys.argv[1])), int(sys.argv[2])
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{job.meeting}", rank=rank, world_size=job.ranks)
    found = Rank(job, rank).run()
    (Path(job.results) / f"{rank}.json").write_text(json.dumps([asdict(measurement) for measurement in found]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
