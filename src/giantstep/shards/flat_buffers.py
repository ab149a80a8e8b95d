"""Flat buffers of a distributed optimizer: which elements of which parameters each data-parallel rank owns.

Parameters lie one after another in buckets, and each rank owns a range of each bucket. Pure interval arithmetic: no
tensors, no communication. How parameters are put into buckets is `bucketing`; how ranges are saved is `giantstep.zero`.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from giantstep.errors import BadArgumentError
from giantstep.shards.dtypes import BY_TORCH_NAME
from giantstep.shards.region import as_ints, check_shape

_MAX_PACKED_BYTES = 1 << 30
"""Most bytes that a stored layout may unpack to."""


@dataclass(frozen=True, slots=True)
class FlatParameter:
    """A parameter as one model-parallel position has it.

    Attributes:
        name: unique in its layout; any name, for instance that of `named_parameters`.
        shape: of the local tensor (what tensor parallelism has left of it), in elements.
        dtype: torch's name of the parameter's dtype, e.g. "bfloat16".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise BadArgumentError(f"parameter name {self.name!r} must be a str that is not empty")
        object.__setattr__(self, "shape", check_shape(self.shape, f"parameter {self.name!r}"))
        if self.dtype not in BY_TORCH_NAME:
            raise BadArgumentError(
                f"parameter {self.name!r}: dtype {self.dtype!r} must be torch's name of one, such as 'bfloat16'; "
                f"of a tensor: str(tensor.dtype).removeprefix('torch.')"
            )

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a 0-d parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A stretch of memory of one dtype in which parameters lie one after another, flattened row by row.

    Attributes:
        parameters: in the order in which they lie.
        starts: first element of each in the bucket; what lies between two parameters, or after the last, is padding.
        elements: length of the bucket, padding included.
        cuts: rank r owns elements `cuts[r]` to `cuts[r + 1]`; from 0 to `elements`, one more than there are ranks.
    """

    parameters: tuple[FlatParameter, ...]
    starts: tuple[int, ...]
    elements: int
    cuts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parameters or not all(isinstance(parameter, FlatParameter) for parameter in self.parameters):
            raise BadArgumentError("a bucket needs parameters, each a FlatParameter")
        (elements,) = as_ints((self.elements,), f"elements of {self.what}")
        object.__setattr__(self, "parameters", tuple(self.parameters))
        object.__setattr__(self, "elements", elements)
        object.__setattr__(self, "starts", as_ints(self.starts, f"starts of {self.what}"))
        object.__setattr__(self, "cuts", as_ints(self.cuts, f"cuts of {self.what}"))
        self._check_dtypes()
        self._check_places()
        self._check_cuts()

    @property
    def what(self) -> str:
        """The bucket in words, for errors."""
        return f"the bucket of parameters {self.parameters[0].name!r} to {self.parameters[-1].name!r}"

    @property
    def dtype(self) -> str:
        """Of all its parameters."""
        return self.parameters[0].dtype

    @property
    def ranks(self) -> int:
        """Number of ranks that share it."""
        return len(self.cuts) - 1

    @property
    def padding(self) -> int:
        """Elements that belong to no parameter."""
        return self.elements - sum(parameter.elements for parameter in self.parameters)

    def range_of(self, rank: int) -> tuple[int, int]:
        """First and one past the last element of the bucket that a rank owns."""
        return self.cuts[rank], self.cuts[rank + 1]

    def _check_dtypes(self) -> None:
        for parameter in self.parameters:
            if parameter.dtype != self.dtype:
                raise BadArgumentError(
                    f"{self.what} has parameters of dtypes {self.dtype} and {parameter.dtype} ({parameter.name!r}). "
                    "Put each dtype into buckets of its own."
                )

    def _check_places(self) -> None:
        if len(self.starts) != len(self.parameters):
            raise BadArgumentError(f"{self.what}: {len(self.parameters)} parameters have {len(self.starts)} starts")
        reached = 0
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            if start < reached:
                raise BadArgumentError(
                    f"{self.what}: parameter {parameter.name!r} begins at element {start}, before the one before it ends "
                    f"({reached})"
                )
            reached = start + parameter.elements
        if reached > self.elements:
            raise BadArgumentError(f"{self.what} has {self.elements} elements, its parameters reach to {reached}")

    def _check_cuts(self) -> None:
        cuts = self.cuts
        rising = len(cuts) > 1 and all(low <= high for low, high in itertools.pairwise(cuts))
        if not rising or cuts[0] != 0 or cuts[-1] != self.elements:
            raise BadArgumentError(
                f"{self.what}: cuts {cuts} must rise from 0 to the {self.elements} elements of the bucket, one more than ranks"
            )


@dataclass(frozen=True, slots=True)
class OwnedRange:
    """What a rank owns of a parameter.

    Attributes:
        parameter: which.
        bucket: number of its bucket.
        start, stop: range of the flattened local parameter, in elements.
        at: where it begins in the rank's own range of the bucket.
    """

    parameter: FlatParameter
    bucket: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class FlatLayout:
    """All buckets of a distributed optimizer at one model-parallel position. Make it once: it remembers what it worked out.

    Attributes:
        buckets: of any dtypes; none where the position has no parameters to optimize, such as frozen ones only.
        ranks: number of data-parallel ranks that share the buckets.
    """

    buckets: tuple[Bucket, ...]
    ranks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "buckets", tuple(self.buckets))
        if not all(isinstance(bucket, Bucket) for bucket in self.buckets):
            raise BadArgumentError("the buckets of a flat layout must be Buckets")
        if type(self.ranks) is not int or self.ranks < 1:
            raise BadArgumentError(f"ranks {self.ranks!r} must be an int of at least 1")
        seen: set[str] = set()
        for bucket in self.buckets:
            if bucket.ranks != self.ranks:
                raise BadArgumentError(
                    f"{bucket.what} is cut for {bucket.ranks} ranks, the layout is of {self.ranks}. Parameters that are "
                    "shared by other ranks, such as experts, need a layout of their own."
                )
            for parameter in bucket.parameters:
                if parameter.name in seen:
                    raise BadArgumentError(f"parameter {parameter.name!r} lies twice in the flat layout: names must be unique")
                seen.add(parameter.name)

    @property
    def parameters(self) -> tuple[FlatParameter, ...]:
        """All, bucket by bucket."""
        return tuple(parameter for bucket in self.buckets for parameter in bucket.parameters)

    def check_rank(self, rank: int) -> None:
        """Raise `BadArgumentError` unless there is such a rank."""
        if type(rank) is not int or not 0 <= rank < self.ranks:
            raise BadArgumentError(
                f"rank {rank!r} must be an int from 0 to {self.ranks - 1}: its place among the ranks that share the buckets"
            )

    def owned(self, rank: int) -> tuple[OwnedRange, ...]:
        """What a rank owns, in the order of the buckets; parameters of which it owns nothing are left out.

        Over all ranks, each element of each parameter is in exactly one range. A parameter without elements is one empty
        range of rank 0.
        """
        self.check_rank(rank)
        if rank not in self._owned:
            self._owned[rank] = tuple(
                found for number, bucket in enumerate(self.buckets) for found in _owned_of(bucket, number, rank)
            )
        return self._owned[rank]

    @cached_property
    def packed(self) -> bytes:
        """All of the layout, to be stored: zlib-compressed JSON."""
        rows = [
            [
                bucket.elements,
                bucket.cuts,
                [[one.name, one.shape, one.dtype, start] for one, start in zip(bucket.parameters, bucket.starts, strict=True)],
            ]
            for bucket in self.buckets
        ]
        return zlib.compress(json.dumps([self.ranks, rows], separators=(",", ":")).encode("utf-8"), 1)

    @classmethod
    def unpacked(cls, data: bytes) -> FlatLayout:
        """The inverse of `packed`; raises ValueError or TypeError if the data are nothing of the kind."""
        try:
            ranks, rows = json.loads(zlib.decompressobj().decompress(data, _MAX_PACKED_BYTES))
        except (zlib.error, RecursionError) as error:
            raise ValueError(str(error)) from error
        buckets = []
        for elements, cuts, parameters in rows:
            held = tuple(FlatParameter(name, tuple(shape), dtype) for name, shape, dtype, _ in parameters)
            buckets.append(Bucket(held, tuple(row[3] for row in parameters), elements, tuple(cuts)))
        return cls(tuple(buckets), ranks)

    @cached_property
    def _owned(self) -> dict[int, tuple[OwnedRange, ...]]:
        return {}


def _owned_of(bucket: Bucket, number: int, rank: int) -> Iterator[OwnedRange]:
    low, high = bucket.range_of(rank)
    starts = np.array(bucket.starts, dtype=np.int64)
    lengths = np.array([parameter.elements for parameter in bucket.parameters], dtype=np.int64)
    first, last = np.maximum(starts, low), np.minimum(starts + lengths, high)
    held = first < last
    if rank == 0:
        # Nobody else would say that there is such a parameter.
        empty = lengths == 0
        first, last, starts = np.where(empty, low, first), np.where(empty, low, last), np.where(empty, low, starts)
        held |= empty
    chosen = np.flatnonzero(held)
    columns = [column[chosen].tolist() for column in (first - starts, last - starts, first - low)]
    for place, start, stop, at in zip(chosen.tolist(), *columns, strict=True):
        yield OwnedRange(bucket.parameters[place], number, start, stop, at)
