"""How evenly ranks share the bytes of a save, as giantstep and as torch.distributed.checkpoint plan it.

Only plans: nothing is saved. The states are those of small transformers, with the layouts in which such models are
trained. "lowest rank": whoever is the first to hold a shard writes it, as where main replicas write everything; "DCP": its
default, which gives each shard to the holder with the least so far. The least possible is a bound that no plan can beat,
from what each rank alone holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from dcp_plans import local_plan
from planning_calls import decoded, gathered_alone, planned
from rich.console import Console
from rich.table import Table
from shard_layouts import flattened, hsdp, joined, replicated, sharded, tensor_parallel, with_objects
from tensors import Tensors, embedding_dominated, experts, small_transformer
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from giantstep.planning.description import IMPLICIT, Description
from giantstep.shards.dtypes import BY_TORCH_NAME, ITEM_BYTES

_WIDTH = 150
_STAGES, _EXPERT_PARALLEL, _EXPERTS = 8, 8, 64
_RANKS = (8, 64, 512)


def _full_state() -> Tensors:
    """Parameters, and Adam's moments with float32 copies."""
    model = small_transformer()
    moments = model.moments()
    return Tensors([*model.keys, *moments.keys], [*model.shapes, *moments.shapes], np.concatenate((model.dtype, moments.dtype)))


def _data_parallel(ranks: int) -> list[Description]:
    return replicated(_full_state(), ranks)


def _tensor_and_data_parallel(ranks: int) -> list[Description]:
    return tensor_parallel(_full_state(), ranks, parallel=min(8, ranks // 2))


def _hybrid(ranks: int) -> list[Description]:
    return hsdp(_full_state(), ranks, shards=min(8, ranks // 2))


def _with_replicated_norms(ranks: int) -> list[Description]:
    state = _full_state()
    norms = replicated(state.where(lambda key: "norm" in key), ranks)
    return [joined(*parts) for parts in zip(sharded(state.where(lambda key: "norm" not in key), ranks), norms, strict=True)]


def _zero_1(ranks: int) -> list[Description]:
    model = small_transformer()
    optimizer = flattened(model.moments(), ranks)
    return [joined(*parts) for parts in zip(replicated(model, ranks), optimizer, strict=True)]


def _embedding_dominated(ranks: int) -> list[Description]:
    return replicated(embedding_dominated(), ranks)


def _pipeline(ranks: int) -> list[Description]:
    """Stages times data parallel; the first and the last stage have the embedding, which is the output layer too."""
    state, stages = _full_state(), min(_STAGES, ranks // 2)
    held = []
    for stage in range(stages):

        def mine(key: str, stage: int = stage) -> bool:
            if "layers." in key:
                return int(key.partition("layers.")[2][:2]) * stages // 16 == stage
            return stage in (0, stages - 1) if "embed" in key else stage == stages - 1

        held.append(replicated(state.where(mine), 1)[0])
    return [held[rank * stages // ranks] for rank in range(ranks)]


def _expert_parallel(ranks: int) -> list[Description]:
    """Dense parameters on all ranks; experts divided over groups of ranks, the groups replicas of each other."""
    parallel = min(_EXPERT_PARALLEL, ranks // 2)
    dense = replicated(small_transformer(), ranks)[0]
    all_experts = experts(_EXPERTS)
    held = []
    for part in range(parallel):
        mine = all_experts.where(lambda key, part=part: int(key.split(".")[4]) * parallel // _EXPERTS == part)
        held.append(joined(dense, replicated(mine, 1)[0]))
    return with_objects([held[rank % parallel] for rank in range(ranks)], per_rank=False)


_LAYOUTS: dict[str, Callable[[int], list[Description]]] = {
    "data parallel": _data_parallel,
    "tp x dp": _tensor_and_data_parallel,
    "hsdp": _hybrid,
    "fsdp, norms replicated": _with_replicated_norms,
    "zero-1 flat": _zero_1,
    "embedding 60 %, dp": _embedding_dominated,
    "pipeline x dp": _pipeline,
    "experts x dp": _expert_parallel,
}


@dataclass(frozen=True, slots=True)
class Loads:
    """Bytes per rank, by whom: giantstep, lowest rank, DCP; and the least possible largest load over the mean."""

    planned: np.ndarray
    lowest: np.ndarray
    dcp: np.ndarray
    bound: float


def _item_bytes(item: WriteItem) -> int:
    if item.tensor_data is None:
        return 0
    name = str(item.tensor_data.properties.dtype).removeprefix("torch.")
    return item.tensor_data.chunk.sizes.numel() * BY_TORCH_NAME[name].item_bytes


def _dcp_loads(descriptions: Sequence[Description]) -> list[np.ndarray]:
    """Bytes per rank if the lowest holder writes, and as DCP does it by itself."""
    known: dict[int, SavePlan] = {}
    for found in descriptions:
        if id(found) not in known:
            # To that planner all replicas are alike, and a plain tensor is one only if it is said so.
            alike = replace(
                found, shard_role=np.full_like(found.shard_role, IMPLICIT), shard_mesh=np.ones_like(found.shard_mesh)
            )
            known[id(found)] = local_plan(alike)
    plans = [known[id(found)] for found in descriptions]
    return [
        np.array([sum(map(_item_bytes, plan.items)) for plan in dedup_save_plans(plans, lowest)], dtype=np.int64)
        for lowest in (True, False)
    ]


def _bound(descriptions: Sequence[Description], mean: float) -> float:
    """Bytes that only the ranks of a set hold must be written by them: the most per rank of any set of holders."""
    holders: dict[tuple[str, tuple[int, ...]], int] = {}
    size_of: dict[tuple[str, tuple[int, ...]], int] = {}
    known: dict[int, list[tuple[tuple[str, tuple[int, ...]], int]]] = {}
    for rank, found in enumerate(descriptions):
        if id(found) not in known:
            known[id(found)] = _regions(found)
        for region, size in known[id(found)]:
            holders[region] = holders.get(region, 0) | 1 << rank
            size_of[region] = size
    held: dict[int, int] = {}
    for region, ranks in holders.items():
        held[ranks] = held.get(ranks, 0) + size_of[region]
    least = max(sum(size for inner, size in held.items() if inner & ~ranks == 0) / ranks.bit_count() for ranks in held)
    return max(1.0, least / mean)


def _regions(description: Description) -> list[tuple[tuple[str, tuple[int, ...]], int]]:
    """Keys and regions that a rank holds, with their bytes."""
    dims = description.tensor_ndim[description.shard_tensor].tolist()
    offsets, sizes = description.shard_offset.tolist(), description.shard_size.tolist()
    found, first = [], 0
    for tensor, count in zip(description.shard_tensor.tolist(), dims, strict=True):
        offset, size = tuple(offsets[first : first + count]), tuple(sizes[first : first + count])
        length = int(np.prod(size, dtype=np.int64)) * ITEM_BYTES[description.dtype[tensor]]
        found.append(((description.keys[tensor], (*offset, *size)), length))
        first += count
    return found


def _loads(descriptions: Sequence[Description]) -> Loads:
    # One object per class of equal ranks, as after they were sent.
    plan = planned(decoded(gathered_alone([found.encode() for found in descriptions])))
    mine = np.bincount(plan.writer, weights=plan.bytes, minlength=len(descriptions))
    lowest, dcp = _dcp_loads(descriptions)
    return Loads(mine, lowest, dcp, _bound(descriptions, float(mine.mean())))


def _cells(loads: np.ndarray) -> list[str]:
    mean = loads.mean()
    return [f"{loads.max() / mean:.3f}", f"{loads.min() / mean:.3f}"]


def main() -> None:
    """Plan all layouts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(_RANKS), help=f"numbers of ranks (default: {_RANKS})")
    parser.add_argument("--layouts", nargs="+", choices=list(_LAYOUTS), default=list(_LAYOUTS), help="default: all")
    arguments = parser.parse_args()
    table = Table(title="bytes that ranks write, as multiples of the mean", title_justify="left")
    table.add_column("layout")
    for name in ("ranks", "MiB/rank", "least possible", "max", "min", "lowest rank: max", "min", "DCP: max", "min"):
        table.add_column(name, justify="right")
    for layout in arguments.layouts:
        for ranks in arguments.ranks:
            found = _loads(_LAYOUTS[layout](ranks))
            mean = f"{found.planned.mean() / (1 << 20):.1f}"
            rest = [*_cells(found.planned), *_cells(found.lowest), *_cells(found.dcp)]
            table.add_row(layout, f"{ranks}", mean, f"{found.bound:.3f}", *rest)
        table.add_section()
    Console(width=_WIDTH).print(table)


if __name__ == "__main__":
    main()
