"""What the two forms of a distributed optimizer's state cost to save: making state dicts, describing, planning, and all of it.

    .venv/bin/python benchmarks/zero_forms.py --parameters 5000 --ranks 8

The model has fused weights that a factory stores as halves. First and later saves are told apart: later ones know how the
state looked (decision 0026). The last table is of whole saves by ranks as threads, the first of which is verified; with
so small tensors, and one interpreter, it says how much the forms differ, not how fast a disk is. Fewer ranks are used there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

import giantstep as gs
from giantstep.describing import description_of
from giantstep.mapping.describe import describe
from giantstep.mapping.outline import Outline
from giantstep.planning.save_plan import SavePlan, plan_save
from giantstep.testing import run_ranks
from giantstep.zero import BucketRules, FlatLayout, FlatParameter, empty_buffers, lay_out, reshardable_state, same_layout_state

Result = TypeVar("Result")

_STATES = ("exp_avg", "exp_avg_sq", "fp32_param")
_OPTIONS = gs.SaveOptions()
_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - the file system that is measured
_HIDDEN = 64
_LAYER = {
    "norm1": (_HIDDEN,),
    "qkv": (3 * _HIDDEN, _HIDDEN),
    "out": (_HIDDEN, _HIDDEN),
    "norm2": (_HIDDEN,),
    "mlp": (2 * _HIDDEN, _HIDDEN),
    "down": (_HIDDEN, _HIDDEN),
}


class Job:
    """A model and its layout.

    Args:
        parameters, ranks: how many.
        bucket_elements: most elements of a bucket.
    """

    def __init__(self, parameters: int, ranks: int, bucket_elements: int) -> None:
        kinds = itertools.islice(itertools.cycle(_LAYER.items()), parameters)
        shapes = {f"layers.{n // len(_LAYER)}.{name}": shape for n, (name, shape) in enumerate(kinds)}
        self.model = {name: _described(name, shape) for name, shape in shapes.items()}
        order = [FlatParameter(name, shape, "bfloat16") for name, shape in reversed(shapes.items())]
        self.layout: FlatLayout = lay_out(order, ranks, BucketRules(max_elements=bucket_elements, parameter_alignment=64))
        self.buffers = [{name: empty_buffers(self.layout, rank, torch.float32) for name in _STATES} for rank in range(ranks)]

    def reshardable(self, rank: int) -> dict[str, Any]:
        """A rank's state dict in one form."""
        return {"optimizer": reshardable_state(self.layout, rank, self.buffers[rank], self.model), "step": 1}

    def same_layout(self, rank: int) -> dict[str, Any]:
        """The same in the other."""
        return {"optimizer": same_layout_state(self.layout, rank, self.buffers[rank]), "step": 1}


def _described(name: str, shape: tuple[int, ...]) -> Any:
    data = torch.empty(shape, dtype=torch.bfloat16)
    if not name.endswith("mlp"):
        return gs.ShardedTensor.from_rank_offsets(name, data)

    def build(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
        parts = torch.chunk(data, 2)
        return [gs.ShardedTensor.from_rank_offsets(f"{key}.{n}", part, replica_id=replica_id) for n, part in enumerate(parts)]

    return gs.ShardedTensorFactory(name, data, build, torch.cat)


def _timed(call: Callable[[], Result]) -> tuple[float, Result]:
    begin = time.perf_counter()
    result = call()
    return 1000 * (time.perf_counter() - begin), result


def _planning(job: Job, form: Callable[[int], dict[str, Any]], repeat: int) -> list[str]:
    """Milliseconds of each part on one rank, and on rank 0 for all."""
    ranks = job.layout.ranks
    state = [_timed(lambda: form(0)) for _ in range(repeat)]
    first = [_timed(lambda: describe(form(0), for_load=False, known=())) for _ in range(repeat)]
    outline = first[0][1].outline
    known: list[Outline] = [] if outline is None else [outline]
    later = []
    for _ in range(repeat):
        again = form(0)
        later.append(_timed(lambda again=again: describe(again, for_load=False, known=known)))
    descriptions = [description_of(describe(form(rank), for_load=False), ranks, 1 << 23) for rank in range(ranks)]
    plans = [
        _timed(lambda: plan_save(descriptions, split_bytes=_OPTIONS.split_bytes, max_chunk_bytes=_OPTIONS.max_file_bytes))
        for _ in range(repeat)
    ]
    plan: SavePlan = plans[0][1]
    columns = (
        [milliseconds for milliseconds, _ in state],
        # The making of the state dict is in this measurement, and taken out again.
        [all_ - made for (all_, _), (made, _) in zip(first, state, strict=True)],
        [milliseconds for milliseconds, _ in later],
        [milliseconds for milliseconds, _ in plans],
    )
    return [str(len(plan.keys)), str(len(plan.bytes)), *(f"{statistics.median(column):.1f}" for column in columns)]


def _saving(job: Job, form: Callable[[int], dict[str, Any]], folder: Path, repeat: int) -> list[str]:
    """Milliseconds of whole saves: the first, and the median of later ones."""
    found = []

    def rank(group: Any) -> None:
        for number in range(repeat + 1):
            group.exchange((b"",), lambda reports: [()] * len(reports), "begin", 60)
            milliseconds, _ = _timed(lambda n=number: gs.save(form(group.rank), folder / str(n), process_group=group))
            if group.rank == 0:
                found.append(milliseconds)

    run_ranks(job.layout.ranks, rank)
    gs.open_checkpoint(folder / "0").verify()
    return [f"{found[0]:.0f}", f"{statistics.median(found[1:]):.0f}"]


def _table(title: str, *columns: str) -> Table:
    table = Table("form", *columns, title=title, title_justify="left", min_width=100)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=5000)
    parser.add_argument("--ranks", type=int, default=8, help="data-parallel ranks for planning")
    parser.add_argument("--saving-ranks", type=int, default=2, help="ranks, as threads, for whole saves")
    parser.add_argument("--bucket-elements", type=int, default=1 << 21)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=_MEMORY_FOLDER, help="where whole saves go")
    asked = parser.parse_args()
    console = Console(width=130)
    job = Job(asked.parameters, asked.ranks, asked.bucket_elements)
    forms = {"reshardable": Job.reshardable, "same layout": Job.same_layout}
    title = f"{asked.parameters} parameters in {len(job.layout.buckets)} buckets, {len(_STATES)} states; milliseconds"
    table = _table(
        f"{title}, one of {asked.ranks} ranks, and rank 0's plan for all",
        "tensors", "chunks", "state dict", "describe, first", "describe, later", "plan",
    )  # fmt: skip
    for name, form in forms.items():
        table.add_row(name, *_planning(job, lambda rank, form=form: form(job, rank), asked.repeat))
    console.print(table)
    job = Job(asked.parameters, asked.saving_ranks, asked.bucket_elements)
    total = sum(buffer.nbytes for held in job.buffers for buffers in held.values() for buffer in buffers)
    table = _table(
        f"{title}, whole saves of {total >> 20} MiB by {asked.saving_ranks} ranks as threads to {asked.dir}", "first", "later"
    )
    for name, form in forms.items():
        with tempfile.TemporaryDirectory(dir=asked.dir) as folder:
            table.add_row(name, *_saving(job, lambda rank, form=form: form(job, rank), Path(folder), asked.repeat))
    console.print(table)


if __name__ == "__main__":
    main()
