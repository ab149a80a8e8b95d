"""Random tensors and random layouts over ranks, for property tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from giantstep import ShardedTensor
from giantstep.shards.dtypes import BY_TORCH_NAME
from giantstep.shards.region import Region
from giantstep.words import words_of

DTYPES = [getattr(torch, name) for name in BY_TORCH_NAME if hasattr(torch, name)]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bytes as a tensor, NaN payloads and all; valid bools."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes in row-major order."""
    words = words_of(tensor).clone(memory_format=torch.contiguous_format)
    return words.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def cut(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """A contiguous copy of a region."""
    return words_of(tensor)[region.slices()].clone(memory_format=torch.contiguous_format).view(tensor.dtype)


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros, also of dtypes for which torch cannot fill."""
    return torch.zeros_like(words_of(tensor)).view(tensor.dtype)


def strided(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    """An equal tensor with other strides: 0 contiguous, 1 reversed axes, 2 every second element of a larger one."""
    words = words_of(tensor)
    if kind == 1 and tensor.dim() > 1:
        axes = tuple(reversed(range(tensor.dim())))
        words = words.permute(axes).contiguous().permute(axes)
    if kind == 2 and tensor.dim() > 0:
        larger = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] * 2), dtype=words.dtype)
        larger[..., ::2].copy_(words)
        words = larger[..., ::2]
    return words.view(tensor.dtype)


@dataclass(frozen=True)
class Shard:
    """Who holds a region, with which replica id and strides."""

    rank: int
    region: Region
    replica_id: int
    stride_kind: int = 0


@dataclass(frozen=True)
class Case:
    """A global tensor with a layout for saving and one for loading."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    saved: tuple[Shard, ...]
    loaded: tuple[Shard, ...]

    def value(self) -> torch.Tensor:
        return random_tensor(self.shape, self.dtype, self.seed)

    def sharded(self, shard: Shard, data: torch.Tensor | None) -> ShardedTensor:
        region = shard.region
        return ShardedTensor(self.key, data, self.dtype, region.size, self.shape, region.offset, None, shard.replica_id)


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...], max_parts: int = 8) -> list[Region]:
    """Regions that partition a tensor, made by cutting boxes again and again: an irregular grid."""
    parts = [Region.whole(shape)]
    for _ in range(draw(st.integers(0, max_parts - 1))):
        divisible = [n for n, part in enumerate(parts) if any(size > 1 for size in part.size)]
        if not divisible:
            break
        part = parts.pop(draw(st.sampled_from(divisible)))
        axis = draw(st.sampled_from([axis for axis, size in enumerate(part.size) if size > 1]))
        at = draw(st.integers(1, part.size[axis] - 1))
        for start, count in ((0, at), (at, part.size[axis] - at)):
            offset = (*part.offset[:axis], part.offset[axis] + start, *part.offset[axis + 1 :])
            parts.append(Region(offset, (*part.size[:axis], count, *part.size[axis + 1 :])))
    return parts


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """Any region of a tensor, empty ones included."""
    offset, size = [], []
    for length in shape:
        start = draw(st.integers(0, length))
        offset.append(start)
        size.append(draw(st.integers(0, length - start)))
    return Region(tuple(offset), tuple(size))


@st.composite
def cases(draw: st.DrawFn, key: str, ranks_saving: int, ranks_loading: int) -> Case:
    """A random tensor under random layouts."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=0, max_size=5)))
    saved: list[Shard] = []
    for region in draw(partitions(shape)):
        holders = draw(st.lists(st.integers(0, ranks_saving - 1), min_size=1, max_size=ranks_saving, unique=True))
        saved += [Shard(rank, region, n, draw(st.integers(0, 2))) for n, rank in enumerate(holders)]
    loaded = [
        Shard(draw(st.integers(0, ranks_loading - 1)), draw(regions(shape)), 0, draw(st.integers(0, 2)))
        for _ in range(draw(st.integers(1, 5)))
    ]
    return Case(key, shape, dtype, draw(st.integers(0, 2**31)), tuple(saved), tuple(loaded))
