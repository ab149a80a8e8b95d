"""8-bit weights with scales per block, as they are trained: 128 x 128 blocks, and 1 x 32 with powers of two (mxfp8).

They are cut over tensor-parallel ranks between blocks, load under any other such cut to the bit, and are refused where a cut
would split a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, ShapeMismatchError
from giantstep.group.threads import ThreadGroup
from giantstep.mapping import wrappers
from giantstep.testing.ranks import RanksFailedError, run_ranks


class Blocks(torch.Tensor):
    """float8 values, and a scale for each block of them; presents itself as float32."""

    data8: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, data8: torch.Tensor, scale: torch.Tensor) -> Self:
        self = torch.Tensor._make_wrapper_subclass(cls, data8.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        self.data8, self.scale = data8, scale
        return self  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"Blocks({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"Blocks has no {func}")


def take_apart(tensor: Blocks) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {"data8": tensor.data8, "scale": tensor.scale}, {}


def put_together(parts: Mapping[str, torch.Tensor], _attributes: dict[str, Any]) -> Blocks:
    return Blocks(parts["data8"], parts["scale"])


def dequantise(tensor: Blocks) -> torch.Tensor:
    scale = tensor.scale.float()
    for axis in range(2):
        scale = scale.repeat_interleave(tensor.data8.shape[axis] // scale.shape[axis], dim=axis)
    return tensor.data8.float() * scale


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    # What other tests have registered comes back.
    monkeypatch.setattr(wrappers, "_BY_TYPE", {})
    monkeypatch.setattr(wrappers, "_BY_NAME", {})
    gs.register_wrapper(Blocks, name="blocks", take_apart=take_apart, put_together=put_together, dequantise=dequantise)


@dataclass(frozen=True)
class Recipe:
    """Shape of a weight, of its blocks, and dtype of its scales."""

    shape: tuple[int, int]
    block: tuple[int, int]
    scale: torch.dtype

    def whole(self) -> Blocks:
        """Of random bits: every float8 and every scale that there are, NaN included."""
        generator = torch.Generator().manual_seed(5)
        bits = torch.randint(0, 256, self.shape, dtype=torch.uint8, generator=generator)
        grid = [size // block for size, block in zip(self.shape, self.block, strict=True)]
        scales = torch.randint(1, 1 << 30, grid, dtype=torch.int32, generator=generator)
        wide = torch.float32 if self.scale == torch.float32 else torch.uint8
        return Blocks(bits.view(torch.float8_e4m3fn), scales.view(wide)[:, : grid[1]].contiguous().view(self.scale))

    def part(self, whole: Blocks, offset: tuple[int, int], size: tuple[int, int]) -> Blocks:
        data = whole.data8[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]
        first = [start // block for start, block in zip(offset, self.block, strict=True)]
        count = [max(1, length // block) for length, block in zip(size, self.block, strict=True)]
        scale = whole.scale[first[0] : first[0] + count[0], first[1] : first[1] + count[1]]
        return Blocks(data.contiguous(), scale.contiguous())


RECIPES = {
    "128 x 128": Recipe((768, 512), (128, 128), torch.float32),
    "mxfp8": Recipe((24, 192), (1, 32), torch.float8_e8m0fnu),
}
Cut = tuple[int, list[int]]
# Along which axis the ranks' parts lie, and how many blocks each has.
CUTS: dict[str, dict[str, Cut]] = {
    "128 x 128": {
        "one": (0, [6]),
        "columns": (0, [2, 2, 2]),
        "columns, unevenly": (0, [1, 5]),
        "rows": (1, [1, 1, 1, 1]),
        "rows, one empty": (1, [3, 0, 1]),
    },
    "mxfp8": {
        "one": (0, [24]),
        "columns": (0, [6, 6, 6, 6]),
        "columns, unevenly": (0, [5, 19]),
        "rows": (1, [2, 2, 2]),
        "rows, unevenly": (1, [1, 5]),
    },
}


def part_of_rank(recipe: Recipe, cut: Cut, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    axis, counts = cut
    offset, size = [0, 0], list(recipe.shape)
    offset[axis], size[axis] = sum(counts[:rank]) * recipe.block[axis], counts[rank] * recipe.block[axis]
    return (offset[0], offset[1]), (size[0], size[1])


def sharded(recipe: Recipe, tensor: Blocks, offset: tuple[int, int], size: tuple[int, int]) -> gs.ShardedTensor:
    return gs.ShardedTensor("w", tensor, torch.float32, size, recipe.shape, offset, None)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def saved(recipe: Recipe, cut: Cut, path: Path) -> Blocks:
    whole = recipe.whole()

    def rank(group: ThreadGroup) -> None:
        offset, size = part_of_rank(recipe, cut, group.rank)
        shard = sharded(recipe, recipe.part(whole, offset, size), offset, size) if size[cut[0]] else None
        gs.save({} if shard is None else {"w": shard}, path, process_group=group)

    run_ranks(len(cut[1]), rank)
    return whole


@pytest.mark.parametrize("name", RECIPES)
def test_any_cut_between_blocks_loads_under_any_other_to_the_bit(tmp_path: Path, name: str) -> None:
    recipe, cuts = RECIPES[name], CUTS[name]
    for number, before in enumerate(cuts.values()):
        path = tmp_path / str(number)
        whole = saved(recipe, before, path)
        stored = gs.open_checkpoint(path)
        assert stored.keys() == ["w.data8", "w.scale"]
        assert stored["w.data8"][...].tobytes() == bits(whole.data8)
        for after in cuts.values():

            def load(group: ThreadGroup, after: Cut = after, whole: Blocks = whole, path: Path = path) -> bool:
                offset, size = part_of_rank(recipe, after, group.rank)
                if not size[after[0]]:
                    gs.load({}, path, process_group=group, strict=gs.StrictHandling.RAISE_UNEXPECTED)
                    return True
                expected = recipe.part(whole, offset, size)
                target = Blocks(torch.zeros_like(expected.data8), torch.ones_like(expected.scale))
                strict = gs.StrictHandling.RAISE_UNEXPECTED
                gs.load({"w": sharded(recipe, target, offset, size)}, path, process_group=group, strict=strict)
                return (bits(target.data8), bits(target.scale)) == (bits(expected.data8), bits(expected.scale))

            assert all(run_ranks(len(after[1]), load)), (before, after)


@pytest.mark.parametrize("blocks", [0.5, 1.5])
@pytest.mark.parametrize("name", RECIPES)
def test_cuts_within_a_block_never_take_what_was_saved_between_blocks(tmp_path: Path, name: str, blocks: float) -> None:
    """Half a block with a scale is a block of its own, half as long: other scales than those that are stored."""
    recipe = RECIPES[name]
    whole = saved(recipe, CUTS[name]["one"], tmp_path)
    width = int(recipe.block[1] * blocks)

    def load(group: ThreadGroup) -> None:
        offset, size = (0, group.rank * width), (recipe.shape[0], width)
        target = recipe.part(whole, (0, 0), (recipe.shape[0], 2 * recipe.block[1]))
        scales = math.ceil(blocks)
        half = Blocks(torch.zeros_like(target.data8[:, :width]), torch.ones_like(target.scale[:, :scales]))
        strict = gs.StrictHandling.RAISE_UNEXPECTED
        gs.load({"w": sharded(recipe, half, offset, size)}, tmp_path, process_group=group, strict=strict)

    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, load)
    # The grid of scales is another one, or no grid at all.
    assert all(isinstance(found, BadArgumentError | ShapeMismatchError) for found in caught.value.errors)
    assert "scale" in str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_plain_tensors_cut_anywhere_are_loaded_dequantised(tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    whole = saved(recipe, CUTS[name]["rows"], tmp_path)
    expected = dequantise(whole)

    def rank(group: ThreadGroup) -> torch.Tensor:
        rows = [range(5), range(5, recipe.shape[0])][group.rank]
        target = torch.zeros(len(rows), recipe.shape[1])
        shard = gs.ShardedTensor("w", target, torch.float32, target.shape, recipe.shape, (rows.start, 0), None)
        gs.load({"w": shard}, tmp_path, process_group=group, options=gs.LoadOptions(dequantise=True))
        return target

    assert bits(torch.cat(run_ranks(2, rank))) == bits(expected)
