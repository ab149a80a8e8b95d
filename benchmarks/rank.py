"""One rank of a benchmark: `python rank.py JOB RANK`, where JOB is a JSON file that `throughput.py` wrote.

Everything is measured on all ranks at once, between barriers. Methods take turns, in another order in every round.
Values are checked after every load, outside the measured time.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import Measurement, measure, measure_async
from methods import Dcp, Giantstep, Method, Part, Raw
from operations import BLOCKED, COLD, COLUMNS, COPY, FIRST_BLOCKED, SAVE, WARM, on_ranks
from peers import peers
from raw_io import copy_memory, drop_cached_pages, knows_direct, warm_pages
from states import Memory, Shape, Share, aligned_memory
from torch.distributed.device_mesh import DeviceMesh

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
        on_disk: there is a difference between cold and warm loads.
        methods: names of those to measure; all if empty. Raw calls always are.
        patience_secs: a method that needs longer in one round gets no other.
    """

    folder: str
    meeting: str
    results: str
    ranks: int
    shape: Shape
    repetitions: int
    reshard: bool
    on_disk: bool
    methods: list[str]
    patience_secs: float

    @classmethod
    def read(cls, path: Path) -> Job:
        """Inverse of `write`."""
        fields = json.loads(path.read_text())
        return cls(**{**fields, "shape": Shape(**fields["shape"])})

    def write(self, path: Path) -> None:
        """As a JSON file."""
        path.write_text(json.dumps(asdict(self)))


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
        methods = self._methods()
        self._prepare(_WARM_UP, reshard=False)
        for method in methods:
            self._use(method)
        self._prepare(self._job.shape, reshard=self._job.reshard)
        for method in methods:
            if method.primed:
                self._use(method)
            elif method.asynchronous:
                self._save_asynchronously(method, first=True)
        patient = list(methods)
        for repetition in range(self._job.repetitions):
            self._repetition = repetition
            random.Random(repetition).shuffle(patient)  # noqa: S311 - an order, the same on all ranks
            self._copy()
            for method in list(patient):
                if self._round(method) > self._job.patience_secs and not isinstance(method, Raw):
                    patient.remove(method)
        for method in methods:
            method.close()
        return self._results

    def _methods(self) -> list[Method]:
        raw: list[Method] = [Raw(direct=direct) for direct in ((False, True) if self._direct else (False,))]
        ours: list[Method] = [Giantstep(), Giantstep(keeps_plans=True), Giantstep(keeps_plans=True, stages_later=True)]
        others: list[Method] = [*ours, Dcp(), *peers()]
        return raw + [method for method in others if not self._job.methods or method.name in self._job.methods]

    def _prepare(self, shape: Shape, *, reshard: bool) -> None:
        """What to save, and what to load into: None where this rank takes no part."""
        ranks = self._job.ranks
        share = Share(shape, "rows", self._rank, ranks)
        memory = aligned_memory(share.bytes)
        share.fill(memory)
        self._source = Part(memory, share, self._mesh)
        fewer = [number for number in (ranks - 1, ranks // 2) if reshard and 0 < number < ranks]
        widest = [Share(shape, "rows", self._rank, number) for number in fewer if self._rank < number]
        by_columns = Share(shape, "columns", self._rank, ranks)
        memory = aligned_memory(max(one.bytes for one in (share, *widest, by_columns)))
        self._same = Part(memory, share, self._mesh)
        self._others: dict[str, Part | None] = {}
        if reshard and ranks > 1:
            self._others[COLUMNS] = Part(memory, by_columns, self._mesh)
        self._others |= {on_ranks(number, ranks): self._on(number, memory, shape) for number in dict.fromkeys(fewer)}

    def _on(self, number: int, memory: Memory, shape: Shape) -> Part | None:
        """Targets on the first ranks only."""
        group = dist.new_group(list(range(number)))
        if self._rank >= number:
            return None
        return Part(memory, Share(shape, "rows", self._rank, number), DeviceMesh.from_group(group, "cpu"))

    def _use(self, method: Method) -> None:
        """Save and load without measuring, so that imports and connections are made, and plans kept."""
        place = self._folder / "checkpoint"
        method.save(self._source, place)
        self._load_unmeasured(method, place)
        self._clear()
        if method.asynchronous:
            method.start(self._source, place).wait_committed()
        self._clear()

    # One method: save, load in all layouts, delete, save asynchronously, delete.

    def _copy(self) -> None:
        self._measure(COPY, "raw memcpy", partial(copy_memory, self._source.memory, self._same.memory))
        self._same.memory[:] = 0

    def _round(self, method: Method) -> float:
        """One turn of a method. Returns the seconds that the slowest rank needed for it."""
        before = len(self._results)
        if method.blocking:
            self._save_and_load(method, self._others if method.reshards else {})
        if method.asynchronous:
            self._save_asynchronously(method, first=False)
        spent = torch.tensor(sum(one.end - one.begin for one in self._results[before:] if one.operation != BLOCKED))
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        return float(spent)

    def _save_and_load(self, method: Method, others: dict[str, Part | None]) -> None:
        place = self._folder / "checkpoint"
        self._measure(SAVE, method.name, partial(method.save, self._source, place))
        if self._job.on_disk:
            self._load(method, COLD, self._same, place)
        if method.cached:
            self._load(method, WARM, self._same, place)
        for operation, target in others.items():
            self._load(method, operation, target, place)
        self._clear()

    def _save_asynchronously(self, method: Method, *, first: bool) -> None:
        place = self._folder / "checkpoint"
        found = measure_async(partial(method.start, self._source, place), dist.barrier, method.name, self._repetition)
        if first:
            # It allocates memory that later ones use again. Peak memory is that of the whole save.
            found = [replace(found[0], operation=FIRST_BLOCKED, extra_bytes=found[-1].extra_bytes)]
        self._add(found)
        self._load_unmeasured(method, place)
        self._clear()

    def _load(self, method: Method, operation: str, target: Part | None, place: Path) -> None:
        dist.barrier()
        if self._rank == 0 and self._job.on_disk:
            if operation == WARM:
                warm_pages(self._folder)
            else:
                drop_cached_pages(self._folder)
        if target is None:
            dist.barrier()
            return
        # Ranks without a target wait for the others here, too.
        found = measure(partial(method.load, target, place), dist.barrier, operation, method.name, self._repetition)
        self._add([found])
        target.check(f"{method.name}, {operation}", self._source.memory if target is self._same else None)

    def _load_unmeasured(self, method: Method, place: Path) -> None:
        """What was saved is right."""
        dist.barrier()
        method.load(self._same, place)
        self._same.check(f"{method.name}, not measured", self._source.memory)

    def _measure(self, operation: str, method: str, work: Callable[[], Any]) -> None:
        self._add([measure(work, dist.barrier, operation, method, self._repetition)])

    def _add(self, found: list[Measurement]) -> None:
        self._results += found
        if self._rank == 0:
            for one in found:
                text = f"  {one.repetition} {one.operation} {one.method}: {one.end - one.begin:.3f} s"
                print(text, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        """Delete everything that was saved, and let the disk come to rest."""
        dist.barrier()
        if self._rank == 0:
            shutil.rmtree(self._folder)
            self._folder.mkdir()
            if self._job.on_disk:
                os.sync()
        dist.barrier()


def main() -> None:
    """Run one rank and write down what it measured."""
    job, rank = Job.read(Path(sys.argv[1])), int(sys.argv[2])
    warnings.filterwarnings("ignore", module="torch")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{job.meeting}", rank=rank, world_size=job.ranks)
    found = Rank(job, rank).run()
    (Path(job.results) / f"{rank}.json").write_text(json.dumps([asdict(measurement) for measurement in found]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
