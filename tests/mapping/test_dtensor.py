"""DTensors: any mesh, any placements; compared with what torch itself says is where."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard

import giantstep as gs
from giantstep.mapping.dtensor import splits_per_dimension
from giantstep.shards.splits import Split, runs_after
from processes import results, run_processes


def torch_parts(length: int, placements: list[Any], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...]) -> list[int]:
    """Indices of a dimension that a rank holds, by torch's own splitting of an index tensor.

    Where strided placements stand for plain ones in another order, as torch itself says, it is that order.
    """
    order = DTensorSpec._maybe_convert_StridedShard_to_shard_order(tuple(placements), FakeMesh(mesh_shape))
    normal, dims = placements, list(range(len(placements)))
    if order is not None:
        normal = [placement if placement.is_replicate() else Shard(0) for placement in placements]
        dims = [dim for entry in order for dim in entry.mesh_dims]
    held = torch.arange(length)
    for dim in dims:
        if not normal[dim].is_replicate():
            held = normal[dim]._split_tensor(held, mesh_shape[dim], with_padding=False)[0][coordinate[dim]]
    return held.tolist()


class FakeMesh:
    """As much of a mesh as splitting asks for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.ndim = len(shape)

    def size(self, dim: int) -> int:
        return self.shape[dim]


@pytest.mark.parametrize("mesh_shape", [(2, 2), (3, 2), (2, 4), (2, 2, 3)])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 7, 8, 12, 13, 24, 31])
def test_runs_are_what_torch_cuts_for_all_plain_and_strided_placements(mesh_shape: tuple[int, ...], length: int) -> None:
    choices = [Replicate(), Shard(0), _StridedShard(0, split_factor=2), _StridedShard(0, split_factor=3)]
    for placements in itertools.product(choices, repeat=len(mesh_shape)):
        for coordinate in itertools.product(*map(range, mesh_shape)):
            (splits,) = splits_per_dimension("w", 1, placements, mesh_shape, coordinate)
            runs = runs_after(length, splits)
            mine = [index for first, count in runs for index in range(first, first + count)]
            assert mine == torch_parts(length, list(placements), mesh_shape, coordinate)
            assert all(count > 0 for _, count in runs)


def test_strided_split_joins_its_runs() -> None:
    assert runs_after(8, [Split(2, 0, 2)]) == [(0, 2), (4, 2)]
    assert runs_after(8, [Split(2, 1, 2), Split(2, 1)]) == [(6, 2)]
    assert runs_after(8, [Split(1, 0, 4)]) == [(0, 8)]


PLACEMENTS: list[tuple[Any, Any]] = [
    (Shard(0), Shard(1)),
    (Shard(1), Shard(0)),
    (Shard(0), Shard(0)),
    (Shard(1), Shard(1)),
    (Replicate(), Shard(0)),
    (Shard(2), Replicate()),
    (Replicate(), Replicate()),
    (_StridedShard(0, split_factor=2), Shard(0)),
    (_StridedShard(1, split_factor=2), Shard(1)),
    (_StridedShard(0, split_factor=2), Replicate()),
    (_StridedShard(1, split_factor=3), Shard(0)),
]
SHAPES = [(8, 4, 2), (7, 5, 3), (1, 3, 1), (0, 4, 2), (3, 2, 9)]


def full(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def local_of(value: torch.Tensor, placements: tuple[Any, Any], mesh_shape: tuple[int, int], at: list[int]) -> torch.Tensor:
    """The local tensor of a rank by torch's own splitting."""
    for placement, parts, index in zip(placements, mesh_shape, at, strict=True):
        if not placement.is_replicate():
            value = placement._split_tensor(value, parts, with_padding=False)[0][index]
    return value.clone()


def distributed(value: torch.Tensor, mesh: DeviceMesh, placements: tuple[Any, Any]) -> DTensor:
    local = local_of(value, placements, tuple(mesh.shape), mesh.get_coordinate())
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


def save_and_load_all(rank: int, folder: str) -> int:
    mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2))
    state = {
        f"{n}.{m}": distributed(full(shape), mesh, placements)
        for n, placements in enumerate(PLACEMENTS)
        for m, shape in enumerate(SHAPES)
    }
    gs.save({"t": state, "odd": distribute_tensor(full((5, 3)), mesh, [Shard(0), Shard(0)])}, Path(folder, "c"))
    checked = 0
    for n, m in itertools.product(range(len(PLACEMENTS)), range(len(SHAPES))):
        # Every tensor is loaded under another placement, on another mesh, in place.
        shape, placements = SHAPES[m], PLACEMENTS[(n + 1 + m) % len(PLACEMENTS)]
        other = DeviceMesh("cpu", torch.tensor([[3, 1], [0, 2]]))
        target = distributed(torch.zeros(shape, dtype=torch.float64), other, placements)
        partial = gs.StrictHandling.RAISE_UNEXPECTED
        loaded = gs.load({"t": {f"{n}.{m}": target}}, Path(folder, "c"), strict=partial)["t"][f"{n}.{m}"]
        expected = local_of(full(shape), placements, (2, 2), other.get_coordinate())
        if loaded is not target or not torch.equal(loaded.to_local(), expected):
            raise AssertionError(f"{PLACEMENTS[n]} -> {placements} of {shape}: {loaded} is not {expected}")
        checked += 1
    return checked


def test_every_placement_saves_and_loads_as_another_one_and_on_one_process(tmp_path: Path) -> None:
    checked = results(run_processes(4, save_and_load_all, str(tmp_path)))
    assert checked == [len(PLACEMENTS) * len(SHAPES)] * 4
    checkpoint = gs.open_checkpoint(tmp_path / "c")
    for n, (m, shape) in itertools.product(range(len(PLACEMENTS)), enumerate(SHAPES)):
        assert (checkpoint[f"t.{n}.{m}"][...] == full(shape).numpy()).all()
    assert (checkpoint["odd"][...] == full((5, 3)).numpy()).all()


def replicas_and_refusals(rank: int, folder: str) -> list[str]:
    """DTensors on a mesh of half the ranks; Partial; a wrong local shape; replicas of other content."""
    halves = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    mine = halves[rank // 2]
    told = []
    # The same tensor on both halves: stored once.
    report = gs.save({"w": distribute_tensor(full((4, 2)), mine, [Shard(0)])}, Path(folder, "same"))
    told.append(str(report.bytes))
    # A stage-local name: one key, two tensors.
    for name, tensor in (
        ("other", distribute_tensor(full((4, 2)) + rank // 2, mine, [Shard(0)])),
        ("partial", DTensor.from_local(full((4, 2)), mine, [Partial()], run_check=False)),
        ("uneven", DTensor.from_local(full((3 + rank % 2, 2)), mine, [Shard(0)], run_check=False)),
        ("short", DTensor.from_local(full((2, 2)), mine, [Shard(0)], run_check=False, shape=(7, 2), stride=(2, 1))),
    ):
        try:
            gs.save({"w": tensor}, Path(folder, name))
            told.append("saved")
        except gs.GiantstepError as error:
            told.append(f"{type(error).__name__}: {error}")
    # A mesh of some ranks only: the others hold nothing of it, and may still load it as a plain tensor.
    everybody = {"w": distribute_tensor(full((4, 2)), halves[0], [Shard(0)])} if rank < 2 else {}
    gs.save(everybody, Path(folder, "half"))
    told.append(str(gs.load({"w": torch.zeros(4, 2, dtype=torch.float64)}, Path(folder, "half"))["w"].sum().item()))
    meta = DTensor.from_local(torch.empty(2, 2, device="meta", dtype=torch.float64), mine, [Shard(0)], run_check=False)
    told.append(str(gs.load({"w": meta}, Path(folder, "half"))["w"].to_local().tolist()))
    return told


def test_meshes_of_some_ranks_partial_and_wrong_shapes(tmp_path: Path) -> None:
    found = results(run_processes(4, replicas_and_refusals, str(tmp_path)))
    for rank, (size, other, partial, uneven, short, half, meta) in enumerate(found):
        assert size == str(4 * 2 * 8)
        assert other.startswith("DisagreementError")
        assert "rank 0 and rank 2 hold different values" in other
        assert partial.startswith("BadArgumentError: [rank 0, phase describe] tensor 'w' is Partial over mesh dimension 0")
        assert "Redistribute it" in partial
        assert uneven.startswith("DisagreementError")
        assert "F64 (6, 2) on rank 0 but F64 (8, 2) on rank 1" in uneven
        assert short.startswith("BadArgumentError")
        assert "a local shape of (4, 2), but the local tensor has (2, 2)" in short
        assert half == "28.0"
        assert meta == str(full((4, 2))[2 * (rank % 2) : 2 * (rank % 2) + 2].tolist())


def uneven_fsdp_over_tp(rank: int, folder: str, tp: int, dp: int, sizes: list[int]) -> int:
    """Parameters of all sizes as FSDP2 over tensor parallelism lays them out; each element is its own index."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    state = {}
    for size in sizes:
        model = torch.nn.Linear(3, size)
        with torch.no_grad():
            model.weight.copy_(torch.arange(3.0 * size).reshape(size, 3))
            model.bias.copy_(torch.arange(float(size)))
        parallelize_module(model, mesh["tp"], ColwiseParallel())
        fully_shard(model, mesh=mesh["dp"])
        state[f"m{size}"] = model
    gs.save(state, Path(folder, "c"))
    for model in state.values():
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    gs.load(state, Path(folder, "c"))
    gs.save(state, Path(folder, "again"))
    return len(state)


@pytest.mark.parametrize(("tp", "dp"), [(2, 3), (3, 2), (4, 2)])
def test_uneven_fsdp2_over_tensor_parallel(tmp_path: Path, tp: int, dp: int) -> None:
    sizes = [1, 2, 3, 5, 7, 10, 13, 27]
    assert results(run_processes(tp * dp, uneven_fsdp_over_tp, str(tmp_path), tp, dp, sizes)) == [len(sizes)] * (tp * dp)
    for folder in ("c", "again"):
        checkpoint = gs.open_checkpoint(tmp_path / folder)
        for size in sizes:
            assert (checkpoint[f"m{size}.weight"][...].reshape(-1) == list(range(3 * size))).all()
            assert (checkpoint[f"m{size}.bias"][...] == list(range(size))).all()


def train_fsdp_over_tp(rank: int, folder: str) -> dict[str, str]:
    """FSDP2 over tensor parallelism, as torch shards it; returns a digest of each full parameter."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 6))
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    model(torch.ones(3, 6)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    gs.save({"model": model}, Path(folder, "c"))
    before = {name: value.full_tensor().detach().numpy().tobytes().hex() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    gs.load({"model": model}, Path(folder, "c"))
    after = {name: value.full_tensor().detach().numpy().tobytes().hex() for name, value in model.state_dict().items()}
    if before != after:
        raise AssertionError("parameters differ after loading")
    return before


def test_fsdp2_over_tensor_parallel_as_torch_makes_it(tmp_path: Path) -> None:
    (expected, *_) = results(run_processes(4, train_fsdp_over_tp, str(tmp_path)))
    checkpoint = gs.open_checkpoint(tmp_path / "c")
    assert {key.removeprefix("model."): checkpoint[key][...].tobytes().hex() for key in checkpoint} == expected
    plain = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 6))
    loaded = gs.load({"model": plain}, tmp_path / "c")
    assert loaded["model"] is plain
    assert {name: value.detach().numpy().tobytes().hex() for name, value in plain.state_dict().items()} == expected


def test_a_placement_nobody_knows_is_refused() -> None:
    class Odd:
        def is_partial(self) -> bool:
            return False

        def is_replicate(self) -> bool:
            return False

    with pytest.raises(gs.errors.BadArgumentError, match="cannot be described"):
        splits_per_dimension("w", 2, [Odd()], (2,), (0,))
