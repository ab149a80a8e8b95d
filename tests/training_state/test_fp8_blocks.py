"""8-bit weights with a scale per block, as wrappers: resharded to the bit between blocks, refused inside of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, MismatchError, ShapeMismatchError
from giantstep.group.threads import ThreadGroup
from giantstep.mapping import wrappers
from giantstep.testing.ranks import RanksFailedError, run_ranks


class BlockScaled(torch.Tensor):
    """float8 values and a scale for each block of them; presents itself as bfloat16."""

    block = (128, 128)
    scale_dtype = torch.float32
    values: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Self:
        self = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]
        self.values, self.scale = values, scale
        return self  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].values.detach(), args[0].scale.detach())
        raise NotImplementedError(f"{cls.__name__} has no {func}")

    @classmethod
    def scales_of(cls, shape: tuple[int, int]) -> tuple[int, int]:
        return (-(-shape[0] // cls.block[0]), -(-shape[1] // cls.block[1]))

    @classmethod
    def random(cls, shape: tuple[int, int]) -> Self:
        """Any bits, those of NaN among them."""
        torch.manual_seed(1)
        values = torch.randint(256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scale = torch.randint(256, (*cls.scales_of(shape), cls.scale_dtype.itemsize), dtype=torch.uint8)
        return cls(values, scale.view(cls.scale_dtype).squeeze(-1))

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> Self:
        return cls(torch.zeros(shape).to(torch.float8_e4m3fn), torch.ones(cls.scales_of(shape)).to(cls.scale_dtype))

    def part(self, axis: int, number: int, count: int) -> Self:
        return type(self)(*(held.chunk(count, axis)[number].clone() for held in (self.values, self.scale)))

    def data_bytes(self) -> tuple[bytes, bytes]:
        values, scale = (held.contiguous().view(torch.uint8).numpy().tobytes() for held in (self.values, self.scale))
        return values, scale

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        scale = self.scale.float()
        for axis, size in enumerate(self.block):
            scale = scale.repeat_interleave(size, axis)
        return (self.values.float() * scale[: self.shape[0], : self.shape[1]]).to(torch.bfloat16)

    @staticmethod
    def take_apart(tensor: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        if any(length % size for length, size in zip(tensor.shape, tensor.block, strict=True)):
            raise BadArgumentError(f"{tuple(tensor.shape)} is no whole number of blocks {tensor.block}: cut between blocks")
        return {"values": tensor.values, "scale": tensor.scale}, {"block": list(tensor.block)}


class MxFp8(BlockScaled):
    """A scale, a power of two, for every 32 values of a row."""

    block = (1, 32)
    scale_dtype = torch.float8_e8m0fnu


class SmallBlocks(BlockScaled):
    block = (64, 64)


class Ragged(BlockScaled):
    """Blocks at the end may be shorter, which nothing checks."""

    @staticmethod
    def take_apart(tensor: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"values": tensor.values, "scale": tensor.scale}, {"block": list(tensor.block)}


SHAPES: dict[type[BlockScaled], tuple[int, int]] = {BlockScaled: (512, 384), MxFp8: (24, 96)}
NAMES = {BlockScaled: "fp8.blocks", MxFp8: "fp8.mx", SmallBlocks: "fp8.small", Ragged: "fp8.ragged"}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for kind, name in NAMES.items():

        def put_together(parts: Mapping[str, torch.Tensor], _attributes: Any, kind: Any = kind) -> Any:
            return kind(parts["values"], parts["scale"])

        gs.register_wrapper(kind, name=name, take_apart=kind.take_apart, put_together=put_together)
    yield
    for kind, name in NAMES.items():
        del wrappers._BY_TYPE[kind], wrappers._BY_NAME[name]


def save_parts(whole: BlockScaled, path: Path, axis: int, ranks: int) -> None:
    def save(group: ThreadGroup) -> None:
        part = whole.part(axis, group.rank, group.size)
        tensor = gs.ShardedTensor.from_rank_offsets("w", part, (axis, group.rank, group.size))
        gs.save({"w": tensor}, path, process_group=group)

    run_ranks(ranks, save)


def load_part(kind: type[BlockScaled], shape: tuple[int, int], path: Path, axis: int, group: ThreadGroup) -> Any:
    """This rank's part of a tensor of that shape."""
    local = list(shape)
    local[axis] //= group.size
    tensor = gs.ShardedTensor.from_rank_offsets("w", kind.empty((local[0], local[1])), (axis, group.rank, group.size))
    return gs.load({"w": tensor}, path, process_group=group)["w"]


# (axis, ranks): weights of linear layers in column-parallel (0) and row-parallel (1) ranks.
LAYOUTS: dict[type[BlockScaled], list[tuple[int, int]]] = {
    BlockScaled: [(0, 1), (0, 2), (0, 4), (1, 3)],
    # Rows may be cut anywhere.
    MxFp8: [(0, 1), (0, 3), (0, 8), (1, 3)],
}


@pytest.mark.parametrize("kind", SHAPES)
def test_block_scaled_weights_are_resharded_to_the_bit(tmp_path: Path, kind: type[BlockScaled]) -> None:
    shape = SHAPES[kind]
    whole = kind.random(shape)
    for saving in LAYOUTS[kind]:
        path = tmp_path / f"{saving}"
        save_parts(whole, path, *saving)
        stored = gs.open_checkpoint(path)
        assert stored["w.scale"].shape == kind.scales_of(shape)
        assert (stored["w.values"].dtype, stored["w.scale"].dtype) == tuple(
            str(held.dtype).removeprefix("torch.") for held in (whole.values, whole.scale)
        )
        for axis, ranks in LAYOUTS[kind]:
            parts = run_ranks(ranks, lambda group, axis=axis, path=path: load_part(kind, shape, path, axis, group))
            for number, part in enumerate(parts):
                assert type(part) is kind
                assert part.data_bytes() == whole.part(axis, number, ranks).data_bytes(), (saving, axis, ranks)


# (kind, axis, ranks): a rank's share is no whole number of blocks.
INSIDE = [(BlockScaled, 0, 8), (BlockScaled, 1, 2), (BlockScaled, 1, 6), (MxFp8, 1, 2), (MxFp8, 1, 6)]


@pytest.mark.parametrize(("kind", "axis", "ranks"), INSIDE)
def test_ranks_whose_shares_end_inside_a_block_are_refused_at_save_and_at_load(
    tmp_path: Path, kind: type[BlockScaled], axis: int, ranks: int
) -> None:
    shape = SHAPES[kind]
    whole = kind.random(shape)
    gs.save({"w": whole}, tmp_path)
    local = list(shape)
    local[axis] //= ranks

    def save(group: ThreadGroup) -> None:
        part = kind.empty((local[0], local[1]))
        tensor = gs.ShardedTensor.from_rank_offsets("w", part, (axis, group.rank, group.size))
        gs.save({"w": tensor}, tmp_path / "other", process_group=group)

    for call in (save, lambda group: load_part(kind, shape, tmp_path, axis, group)):
        with pytest.raises(RanksFailedError) as caught:
            run_ranks(ranks, call)
        for error in caught.value.errors:
            assert isinstance(error, BadArgumentError)
            assert "cut between blocks" in str(error)
    assert not (tmp_path / "other" / "checkpoint.json").exists()


@pytest.mark.parametrize(("kind", "offset"), [(BlockScaled, (64, 0)), (BlockScaled, (0, 192)), (MxFp8, (3, 16))])
def test_a_whole_number_of_blocks_from_inside_a_block_is_refused(
    tmp_path: Path, kind: type[BlockScaled], offset: tuple[int, int]
) -> None:
    shape = SHAPES[kind]
    gs.save({"w": kind.random(shape)}, tmp_path)
    part = kind.empty(kind.block)
    before = part.data_bytes()
    tensor = gs.ShardedTensor("w", part, torch.bfloat16, kind.block, shape, offset, None)
    for call in (lambda: gs.load({"w": tensor}, tmp_path), lambda: gs.save({"w": tensor}, tmp_path / "other")):
        with pytest.raises(BadArgumentError, match=r"part 'scale' of tensor 'w': position \d+ .* lies inside an element"):
            call()
    assert part.data_bytes() == before


def test_blocks_of_another_size_are_not_loaded_into(tmp_path: Path) -> None:
    gs.save({"w": BlockScaled.random((256, 256))}, tmp_path)
    with pytest.raises(MismatchError):
        gs.load({"w": SmallBlocks.empty((256, 256))}, tmp_path)


def test_a_shorter_last_block_is_kept_in_a_tensor_that_is_not_cut_and_refused_in_parts_of_it(tmp_path: Path) -> None:
    whole = Ragged.random((320, 128))
    assert whole.scale.shape == (3, 1)
    gs.save({"w": whole}, tmp_path)
    target = Ragged.empty((320, 128))
    assert gs.load({"w": target}, tmp_path)["w"] is target
    assert target.data_bytes() == whole.data_bytes()
    # Two ranks have two scales each, so four of all, and three are stored.
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, lambda group: load_part(Ragged, (320, 128), tmp_path, 0, group))
    assert all(isinstance(error, ShapeMismatchError) for error in caught.value.errors)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("ranks", [1, 4, 6])
def test_plain_weights_cut_anywhere_are_dequantised_from_block_scaled_ones(
    tmp_path: Path, kind: type[BlockScaled], ranks: int
) -> None:
    rows, columns = SHAPES[kind]
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-9, 9, kind.scales_of((rows, columns)), generator=generator).float()).to(kind.scale_dtype)
    whole = kind(values, scale)
    save_parts(whole, tmp_path, 1, 3)

    def load(group: ThreadGroup) -> torch.Tensor:
        plain = torch.empty(rows, columns // group.size, dtype=torch.bfloat16)
        tensor = gs.ShardedTensor.from_rank_offsets("w", plain, (1, group.rank, group.size))
        gs.load({"w": tensor}, tmp_path, options=gs.LoadOptions(dequantise=True), process_group=group)
        return plain

    found = torch.cat(run_ranks(ranks, load), dim=1)
    assert np.array_equal(found.view(torch.int16).numpy(), whole.dequantize().view(torch.int16).numpy())
