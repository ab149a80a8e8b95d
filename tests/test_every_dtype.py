"""Every dtype, to the bit: saved whole and cut, loaded whole and resharded, as plain tensors and as flat ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import DtypeMismatchError
from giantstep.shards.region import Region
from giantstep.testing.ranks import run_ranks
from layouts import DTYPES, bits, cut, random_tensor, zeros_like

SHAPE = (12, 10)
NAMED = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def value(dtype: torch.dtype) -> torch.Tensor:
    """Random bits: NaN payloads, infinities, negative zeros and denormals among them."""
    return random_tensor(SHAPE, dtype, seed=5)


def test_all_dtypes_that_are_named_are_there() -> None:
    """This torch has every dtype of the table, so that none is left out of these tests unseen."""
    assert len(DTYPES) == 22
    names = {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    assert {"bfloat16", "float64", "bool", "complex128", "complex32", "float8_e4m3fn", "float8_e5m2"} <= names
    assert {"float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"} <= names


@NAMED
def test_saved_whole_and_loaded_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = value(dtype)
    gs.save({"x": tensor, "scalar": tensor[0, 0].clone()}, tmp_path)
    target = {"x": zeros_like(tensor), "scalar": zeros_like(tensor[0, 0])}
    gs.load(target, tmp_path)
    assert bits(target["x"]) == bits(tensor)
    assert bits(target["scalar"]) == bits(tensor[0, 0])
    assert gs.open_checkpoint(tmp_path)["x"][...].tobytes() == bits(tensor)
    assert bits(gs.metadata.load_plain_tensors(tmp_path)["x"]) == bits(tensor)


@NAMED
def test_saved_in_rows_and_loaded_in_columns(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = value(dtype)

    def shard(group: Any, axis: int, *, filled: bool) -> gs.ShardedTensor:
        size = SHAPE[axis] // group.size
        offset, shape = [0, 0], list(SHAPE)
        offset[axis], shape[axis] = group.rank * size, size
        part = cut(tensor, Region(tuple(offset), tuple(shape)))
        return gs.ShardedTensor.from_rank_offsets("x", part if filled else zeros_like(part), (axis, group.rank, group.size))

    run_ranks(4, lambda group: gs.save({"x": shard(group, 0, filled=True)}, tmp_path, process_group=group))

    def load(group: Any) -> None:
        loaded = gs.load({"x": shard(group, 1, filled=False)}, tmp_path, process_group=group)
        assert bits(loaded["x"]) == bits(shard(group, 1, filled=True).data)  # type: ignore[arg-type]

    for ranks in (1, 2, 5):
        run_ranks(ranks, load)


@NAMED
def test_saved_as_flat_ranges_and_loaded_as_others(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = value(dtype)

    def shard(low: int, high: int, *, filled: bool) -> gs.ShardedTensor:
        flat = tensor.reshape(-1)[low:high]
        data = flat if filled else zeros_like(flat)
        return gs.ShardedTensor.from_rank_offsets_flat("x", data, SHAPE, flattened_range=slice(low, high))

    edges = [0, 7, 7, 95, 120]
    run_ranks(
        4,
        lambda group: gs.save(
            {"x": shard(edges[group.rank], edges[group.rank + 1], filled=True)}, tmp_path, process_group=group
        ),
    )
    for low, high in ((0, 120), (3, 8), (11, 109), (50, 50)):
        loaded = gs.load({"x": shard(low, high, filled=False)}, tmp_path)
        assert bits(loaded["x"]) == bits(tensor.reshape(-1)[low:high])


@NAMED
def test_objects_hold_tensors_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = value(dtype)
    gs.save({"o": gs.ShardedObject("o", {"state": tensor}, (1,), (0,))}, tmp_path)
    loaded = gs.load({"o": gs.ShardedObject("o", None, (1,), (0,))}, tmp_path)["o"]["state"]
    assert (loaded.dtype, bits(loaded)) == (dtype, bits(tensor))


def test_packed_fp4_is_cut_between_bytes_and_cast_to_nothing(tmp_path: Path) -> None:
    """Torch counts packed bytes, so no cut of a tensor can split one; a cast would change what an element is."""
    packed = value(torch.float4_e2m1fn_x2)
    gs.save({"x": packed}, tmp_path)
    column = zeros_like(packed[:, :1])
    gs.load({"x": gs.ShardedTensor("x", column, column.dtype, (12, 1), SHAPE, (0, 3), None)}, tmp_path)
    assert bits(column) == bits(packed[:, 3:4])
    for dtype in (torch.float32, torch.uint8):
        with pytest.raises(DtypeMismatchError, match="float4_e2m1fn_x2"):
            gs.load({"x": torch.zeros(SHAPE, dtype=dtype)}, tmp_path, options=gs.LoadOptions(cast="any"))
