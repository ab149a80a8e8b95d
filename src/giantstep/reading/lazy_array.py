"""A stored tensor that is read when it is indexed, and only as far as it is."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import BadArgumentError
from giantstep.reading.index_reader import TensorEntry
from giantstep.shards.dtypes import DType
from giantstep.shards.region import MAX_DIMS, MAX_ELEMENTS, Region

Indexer = int | slice | EllipsisType
ReadRegion = Callable[[TensorEntry, Region], NDArray[Any]]


class LazyArray:
    """A global tensor of a checkpoint, read when it is indexed.

    Indexing with integers, slices and `...` reads those elements into a new NumPy array; only blocks that hold
    them are read.

    bf16 and fp8 come as ml_dtypes; packed fp4 as uint8, two values per element; complex32 as float16 pairs in a
    last dimension of 2.
    """

    def __init__(self, entry: TensorEntry, read: ReadRegion) -> None:
        self._entry = entry
        self._read = read

    @property
    def key(self) -> str:
        """Key of the tensor."""
        return self._entry.key

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape, in elements."""
        return self._entry.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self._entry.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the arrays that indexing returns."""
        return numpy_dtype(self._entry.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the global tensor."""
        return self._entry.bytes

    def __len__(self) -> int:
        if not self._entry.shape:
            raise TypeError("len() of a 0-d tensor")
        return self._entry.shape[0]

    def __getitem__(self, index: Indexer | tuple[Indexer, ...]) -> NDArray[Any]:
        region, within = _resolve(index, self._entry.shape, self._entry.key)
        _check_numpy_can(region.size, self._entry)
        bits = self._read(self._entry, region)
        array = view_as(bits, self._entry.dtype)
        found: NDArray[Any] = array[within]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a stored tensor can only become an array by reading a copy of it")
        return np.asarray(self[...], dtype=dtype)

    def __repr__(self) -> str:
        return f"LazyArray({self._entry.key!r}, shape={self._entry.shape}, dtype={self._entry.dtype.torch_name})"


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The NumPy dtype that shows elements of `dtype`."""
    if not hasattr(np, dtype.numpy_name):
        import ml_dtypes  # noqa: PLC0415 - only bf16 and fp8 need it

        extended: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype.numpy_name))
        return extended
    return np.dtype(dtype.numpy_name)


def view_as(bits: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Contiguous words as elements of `dtype`, without a copy."""
    shown = numpy_dtype(dtype)
    if shown.itemsize == dtype.item_bytes:
        return bits.view(shown)
    return bits.reshape(-1).view(shown).reshape(*bits.shape, dtype.item_bytes // shown.itemsize)


def _check_numpy_can(size: tuple[int, ...], entry: TensorEntry) -> None:
    """Torch has tensors that NumPy has no arrays for: with a dimension of 0 beside huge ones, or of 64 dimensions."""
    values = entry.dtype.item_bytes // numpy_dtype(entry.dtype).itemsize
    dims = len(size) + (values > 1)
    if dims > MAX_DIMS or math.prod(count or 1 for count in size) * entry.dtype.item_bytes > MAX_ELEMENTS:
        raise BadArgumentError(
            f"tensor {entry.key!r} cannot be read as a NumPy array of {entry.dtype.torch_name} of shape {size}: "
            "index a part of it, or use giantstep.load"
        )


def _resolve(index: Any, shape: tuple[int, ...], key: str) -> tuple[Region, tuple[Any, ...]]:
    """The region to read, and how to index what was read to get what was asked for."""
    items = list(index) if isinstance(index, tuple) else [index]
    ellipses = [place for place, item in enumerate(items) if item is Ellipsis]
    if len(ellipses) > 1 or len(items) - len(ellipses) > len(shape):
        raise BadArgumentError(f"index {index!r} has too many parts for tensor {key!r} of shape {shape}")
    if not ellipses:
        ellipses.append(len(items))
        items.append(Ellipsis)
    (place,) = ellipses
    items[place : place + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    offset: list[int] = []
    size: list[int] = []
    within: list[int | slice] = []
    for axis, (item, length) in enumerate(zip(items, shape, strict=True)):
        if isinstance(item, slice):
            first, count, step = _slice_extent(item, length)
            offset.append(first)
            size.append(count)
            within.append(step)
        else:
            offset.append(_position(item, length, axis, key, shape))
            size.append(1)
            within.append(0)
    return Region(tuple(offset), tuple(size)), tuple(within)


def _position(item: Any, length: int, axis: int, key: str, shape: tuple[int, ...]) -> int:
    try:
        position = operator.index(item)
    except TypeError as error:
        raise BadArgumentError(
            f"index {item!r} of tensor {key!r} is not supported: expected integers, slices and '...'; "
            "index the array that comes back for more"
        ) from error
    if not -length <= position < length:
        raise BadArgumentError(f"index {position} is out of bounds for axis {axis} of tensor {key!r} of shape {shape}")
    return position % length


def _slice_extent(item: slice, length: int) -> tuple[int, int, slice]:
    """First index, count and inner slice for the smallest range that holds the slice."""
    try:
        chosen = range(length)[item]
    except (TypeError, ValueError) as error:
        raise BadArgumentError(f"slice {item!r} cannot be: {error}") from error
    if not len(chosen):
        return 0, 0, slice(None)
    low, high = min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])
    if chosen.step == 1:
        return low, high - low + 1, slice(None)
    return low, high - low + 1, slice(None, None, chosen.step)
