"""The layouts of `scale.py`, planned by torch.distributed.checkpoint's default planner on its coordinator.

Local plans are what `create_default_local_save_plan` makes of the same shards. Measured is what rank 0 does with them:
unpickle what it gathered, remove duplicates, make the global plan, validate it, pickle what it scatters. pickle is used
here and nowhere else, because that planner sends its plans so.
"""

from __future__ import annotations

import argparse
import gc
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import measure
from rich.console import Console
from rich.table import Table
from shard_layouts import LAYOUTS
from tensors import large_transformer
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from giantstep.planning.description import IMPLICIT, Description
from giantstep.shards.dtypes import BY_CODE

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DcpFigures:
    """What was measured; seconds are CPU time of rank 0.

    Attributes:
        layout, ranks: the case.
        gathered_bytes, scattered_bytes: pickled plans of all ranks, before and after.
        unpickle_secs, plan_secs, pickle_secs: the parts of its work.
        extra_bytes: memory that they need beyond the pickled plans.
        items: that are written.
    """

    layout: str
    ranks: int
    gathered_bytes: int
    scattered_bytes: int
    unpickle_secs: float
    plan_secs: float
    pickle_secs: float
    extra_bytes: int
    items: int

    @property
    def secs(self) -> float:
        """All of its work."""
        return self.unpickle_secs + self.plan_secs + self.pickle_secs


def local_plan(description: Description) -> SavePlan:
    """The plan that a rank holding these shards sends: an item for each of them and one for other values."""
    items = [*_items(description), WriteItem(MetadataIndex("common_state"), WriteItemType.BYTE_IO)]
    return SavePlan(items, planner_data={key: tuple(key.split(".")) for key in description.keys})


def _items(description: Description) -> Iterator[WriteItem]:
    dims_ends, dims = description.dims_ends.tolist(), description.dims.tolist()
    offsets, sizes = description.shard_offset.tolist(), description.shard_size.tolist()
    plain = ((description.shard_role == IMPLICIT) & (description.shard_mesh == 0)).tolist()
    codes, end = description.dtype.tolist(), 0
    for tensor, is_plain in zip(description.shard_tensor.tolist(), plain, strict=True):
        shape = torch.Size(dims[dims_ends[tensor] : dims_ends[tensor + 1]])
        first, end = end, end + len(shape)
        offset, size = torch.Size(offsets[first:end]), torch.Size(sizes[first:end])
        properties = TensorProperties(dtype=getattr(torch, BY_CODE[codes[tensor]].torch_name))
        data = TensorWriteData(ChunkStorageMetadata(offset, size), properties, shape)
        kind = WriteItemType.TENSOR if is_plain else WriteItemType.SHARD
        yield WriteItem(MetadataIndex(description.keys[tensor], offset), kind, tensor_data=data)


def measure_case(layout: str, ranks: int, tensors: int) -> DcpFigures:
    """All figures of one case."""
    gathered = [pickle.dumps(local_plan(found)) for found in LAYOUTS[layout](large_transformer(tensors), ranks)]
    secs: list[float] = []
    kept: dict[str, Any] = {}

    def timed(work: Callable[[], Any]) -> Any:
        begin = time.process_time()
        result = work()
        secs.append(time.process_time() - begin)
        return result

    def coordinate() -> None:
        plans = timed(lambda: [pickle.loads(data) for data in gathered])  # noqa: S301 - written above
        final, _ = timed(lambda: DefaultSavePlanner().create_global_plan(plans))
        kept["sent"] = timed(lambda: [pickle.dumps(plan) for plan in final])
        kept["items"] = sum(len(plan.items) for plan in final)

    gc.collect()
    took = measure(coordinate, lambda: None, "plan", "dcp", 0)
    sent = kept["sent"]
    return DcpFigures(layout, ranks, sum(map(len, gathered)), sum(map(len, sent)), *secs, took.extra_bytes, kept["items"])


def measured(layout: str, ranks: int, tensors: int, limit_secs: float) -> DcpFigures | None:
    """The figures of a case, measured in a process of its own; None if that takes longer than the limit."""
    command = [sys.executable, str(Path(__file__)), "--one", layout, str(ranks), "--tensors", str(tensors)]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit_secs)
    except subprocess.TimeoutExpired:
        return None
    return DcpFigures(**json.loads(found.stdout))


def measured_up_to(layout: str, ranks: Sequence[int], tensors: int, limit_secs: float) -> dict[int, DcpFigures]:
    """The figures for all numbers of ranks until one takes, or can be seen to take, longer than the limit."""
    found: dict[int, DcpFigures] = {}
    for count in ranks:
        # Never less than proportional to the number of ranks.
        if any(figures.secs * count / smaller > limit_secs for smaller, figures in found.items()):
            break
        print(f"  DCP: {layout}, {count} ranks", file=sys.stderr, flush=True)
        figures = measured(layout, count, tensors, limit_secs)
        if figures is None:
            break
        found[count] = figures
    return found


def print_table(rows: Sequence[DcpFigures], console: Console) -> None:
    """Print all figures."""
    table = Table(title="torch.distributed.checkpoint: planning a save, coordinator", title_justify="left")
    table.add_column("layout")
    names = ("ranks", "items", "gathered MiB", "KiB/rank", "scattered MiB")
    for name in (*names, "unpickle s", "plan s", "pickle s", "all CPU s", "extra MiB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.layout,
            f"{row.ranks:,}",
            f"{row.items:,}",
            f"{row.gathered_bytes / _MIB:.1f}",
            f"{row.gathered_bytes / row.ranks / 1024:.0f}",
            f"{row.scattered_bytes / _MIB:.1f}",
            f"{row.unpickle_secs:.2f}",
            f"{row.plan_secs:.2f}",
            f"{row.pickle_secs:.2f}",
            f"{row.secs:.2f}",
            f"{row.extra_bytes / _MIB:.0f}",
        )
    console.print(table)


def main() -> None:
    """Measure all layouts, each up to as many ranks as end within the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256], help="numbers of ranks (default: 64 256)")
    parser.add_argument("--tensors", type=int, default=1000, help="number of tensors (default: 1000)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a case may take (default: 60)")
    parser.add_argument("--one", nargs=2, metavar=("LAYOUT", "RANKS"), help="measure one case here; print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(asdict(measure_case(arguments.one[0], int(arguments.one[1]), arguments.tensors))))
        return
    found = [measured_up_to(layout, arguments.ranks, arguments.tensors, arguments.limit) for layout in LAYOUTS]
    print_table([row for rows in found for row in rows.values()], Console(width=180))


if __name__ == "__main__":
    main()
