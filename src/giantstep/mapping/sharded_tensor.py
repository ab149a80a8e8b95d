"""`ShardedTensor`: what one rank holds of a global tensor, said explicitly.

The vocabulary is Megatron-Core's. Parallelism appears only here, as offsets; nothing of it is stored.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.replica import ReplicaId, check_replica_id
from giantstep.shards.flat import flat_range_to_regions
from giantstep.shards.region import Region, as_ints, check_shape, is_shape
from giantstep.words import stored_dtype

RankOffset = tuple[int, int, int]
"""(axis, index of this rank's part along it, number of parts)."""


class _Checked:
    """Remembers the attributes that were last seen to fit each other."""

    __slots__ = ("_attributes",)

    def _note(self, attributes: tuple[object, ...]) -> None:
        self._attributes = attributes

    def _is_noted(self, attributes: tuple[object, ...]) -> bool:
        """Whether these are the same objects. None of those that fit can change in place."""
        return all(map(operator.is_, getattr(self, "_attributes", _NOTHING), attributes))


_NOTHING = (object(),)


@dataclass(eq=False, slots=True)
class ShardedTensor(_Checked):
    """One rank's shard of a global tensor.

    Attributes:
        key: name of the global tensor, the same on all ranks.
        data: the local tensor, of shape `local_shape` without the prepended axes; or None, to be allocated
            on load. Owned by the caller; `save` only reads it, `load` fills it in place.
        dtype: dtype of the global tensor.
        local_shape: shape of the shard, in elements, without prepended axes.
        global_shape: shape of the global tensor, prepended axes included.
        global_offset: first element of the shard in it, per axis of `global_shape`.
        axis_fragmentations: number of equal parts per axis; None means an irregular grid, in which shards
            may lie anywhere, differ in size, or be empty.
        replica_id: 0 (or zeros) on exactly one of the ranks that hold this region.
        prepend_axis_num: leading axes of `global_shape` that the local tensor has not got, each of local size 1.
        allow_shape_mismatch: the stored global shape may differ on load (padded vocabularies): rows that
            both have are loaded, others become zero.
        flattened_range: the data are this range of the flattened shard, 1-dimensional.
    """

    key: str
    data: torch.Tensor | None
    dtype: torch.dtype
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    axis_fragmentations: tuple[int, ...] | None
    replica_id: ReplicaId = 0
    prepend_axis_num: int = 0
    allow_shape_mismatch: bool = False
    flattened_range: slice | None = None

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_rank_offsets(
        cls,
        key: str,
        data: torch.Tensor,
        *rank_offsets: RankOffset,
        replica_id: ReplicaId = 0,
        prepend_axis_num: int = 0,
        allow_shape_mismatch: bool = False,
    ) -> ShardedTensor:
        """A shard of a regular grid, from the position of this rank along some axes.

        Args:
            key: name of the global tensor.
            data: the local tensor.
            rank_offsets: per sharded axis (axis, index, parts), where axis counts prepended axes too; the
                global tensor is `parts` times the local one along it.
            replica_id, prepend_axis_num, allow_shape_mismatch: see the class.
        """
        return cls._from_grid(
            key, data, tuple(data.shape), rank_offsets, replica_id, prepend_axis_num, allow_shape_mismatch, None
        )

    @classmethod
    def from_rank_offsets_flat(
        cls,
        key: str,
        data: torch.Tensor,
        non_flat_local_shape: Sequence[int],
        *rank_offsets: RankOffset,
        flattened_range: slice,
        replica_id: ReplicaId = 0,
        prepend_axis_num: int = 0,
        allow_shape_mismatch: bool = False,
    ) -> ShardedTensor:
        """As `from_rank_offsets`, for a rank that holds a range of the flattened local tensor.

        Args:
            data: 1-dimensional, as long as `flattened_range`.
            non_flat_local_shape: shape of the local tensor before it was flattened.
            flattened_range: which of its elements, row-major, `data` are.
        """
        shape = tuple(non_flat_local_shape)
        return cls._from_grid(
            key, data, shape, rank_offsets, replica_id, prepend_axis_num, allow_shape_mismatch, flattened_range
        )

    @classmethod
    def _from_grid(
        cls,
        key: str,
        data: torch.Tensor,
        local_shape: tuple[int, ...],
        rank_offsets: Sequence[RankOffset],
        replica_id: ReplicaId,
        prepend_axis_num: int,
        allow_shape_mismatch: bool,
        flattened_range: slice | None,
    ) -> ShardedTensor:
        if not isinstance(data, torch.Tensor):
            raise BadArgumentError(f"tensor {key!r}: data must be a torch.Tensor, not {type(data).__name__}")
        if not all(isinstance(offset, tuple) and len(offset) == 3 for offset in rank_offsets):
            raise BadArgumentError(f"tensor {key!r}: rank offsets {rank_offsets} must be tuples (axis, index, parts)")
        shard_shape = (1,) * prepend_axis_num + local_shape
        parts, offset = [1] * len(shard_shape), [0] * len(shard_shape)
        seen: set[int] = set()
        for axis, index, count in rank_offsets:
            if not 0 <= axis < len(shard_shape) or axis in seen:
                raise BadArgumentError(
                    f"tensor {key!r}: axis {axis} of rank offset {(axis, index, count)} must be one of "
                    f"0..{len(shard_shape) - 1}, each at most once"
                )
            if not 0 <= index < count:
                raise BadArgumentError(
                    f"tensor {key!r}: rank offset {(axis, index, count)}: index must be from 0 to {count - 1}"
                )
            seen.add(axis)
            parts[axis], offset[axis] = count, index * shard_shape[axis]
        return cls(
            key,
            data,
            data.dtype,
            local_shape,
            tuple(size * count for size, count in zip(shard_shape, parts, strict=True)),
            tuple(offset),
            tuple(parts),
            replica_id,
            prepend_axis_num,
            allow_shape_mismatch,
            flattened_range,
        )

    def without_data(self) -> ShardedTensor:
        """A copy that describes the shard and holds no tensor."""
        return replace(self, data=None)

    def narrow(self, dim: int, start: int, length: int) -> list[ShardedTensor]:
        """The same range of every shard along one axis, as a tensor of its own; e.g. one half of a fused weight.

        All ranks narrow alike, so the global tensor shrinks as the shard does: along `dim`, its shape and this shard's
        offset are multiplied by `length / local_shape[dim]`. Give the result a key of its own with
        `dataclasses.replace`.

        Args:
            dim: axis of `local_shape`.
            start, length: range along it, in elements.

        Returns:
            One shard whose data are a view of this one's. A flattened shard can be narrowed along its first axis
            longer than 1, where the result is one range again.

        Raises:
            BadArgumentError: the range does not lie in the shard, shards of this length do not tile the global
                tensor, or a flattened shard would fall apart.
        """
        what = f"tensor {self.key!r}: narrow({dim}, {start}, {length})"
        if not 0 <= dim < len(self.local_shape) or not 0 <= start <= start + length <= self.local_shape[dim]:
            raise BadArgumentError(f"{what} does not lie in local shape {self.local_shape}")
        axis, whole = self.prepend_axis_num + dim, self.local_shape[dim]
        total, offset = self.global_shape[axis], self.global_offset[axis]
        if whole == 0 or total % whole or offset % whole:
            raise BadArgumentError(
                f"{what}: shards of {whole} along axis {axis} at offset {offset} do not tile global shape {self.global_shape}"
            )
        data, flat = self._narrowed_data(dim, start, length, what)
        return [
            replace(
                self,
                data=data,
                local_shape=_changed(self.local_shape, dim, length),
                global_shape=_changed(self.global_shape, axis, total // whole * length),
                global_offset=_changed(self.global_offset, axis, offset // whole * length),
                flattened_range=flat,
            )
        ]

    def _narrowed_data(self, dim: int, start: int, length: int, what: str) -> tuple[torch.Tensor | None, slice | None]:
        """The view of the data, and its flat range in the narrowed shard if this one is flattened."""
        flat = self.flattened_range
        if flat is None:
            return (None if self.data is None else self.data.narrow(dim, start, length)), None
        if any(count > 1 for count in self.local_shape[:dim]):
            raise BadArgumentError(f"{what}: a flattened shard can only be narrowed along its first axis longer than 1")
        row = math.prod(self.local_shape[dim + 1 :])
        low = min(max(flat.start, start * row), flat.stop)
        high = max(min(flat.stop, (start + length) * row), low)
        data = None if self.data is None else self.data[low - flat.start : high - flat.start]
        first = min(max(low - start * row, 0), length * row)
        return data, slice(first, first + high - low)

    def region(self) -> Region:
        """The shard's region of the global tensor, prepended axes included; for a flat shard, of its box."""
        return Region(self.global_offset, self._size())

    def _size(self) -> tuple[int, ...]:
        return (1,) * self.prepend_axis_num + self.local_shape

    def data_shape(self) -> tuple[int, ...]:
        """Shape that `data` has or will have."""
        if self.flattened_range is None:
            return self.local_shape
        return (self.flattened_range.stop - self.flattened_range.start,)

    def pieces(self, data: torch.Tensor) -> list[tuple[Region, torch.Tensor]]:
        """The regions that the shard covers, each with the view of `data` that holds it.

        One region, or as many as a flattened range needs. Views share memory with `data`.
        """
        whole = self.region()
        if self.flattened_range is None:
            return [(whole, data.view(whole.size) if self.prepend_axis_num else data)]
        start = self.flattened_range.start
        found = []
        for position, box in flat_range_to_regions(whole.size, start, self.flattened_range.stop):
            view = data[position - start : position - start + box.elements].view(box.size)
            offset = tuple(a + b for a, b in zip(whole.offset, box.offset, strict=True))
            found.append((Region(offset, box.size), view))
        return found

    def validate(self) -> None:
        """Raise `BadArgumentError` unless all attributes fit each other."""
        # Most were made a moment ago and did not change since.
        if not self._is_noted(self._all_but_data()):
            self._validate_attributes()
            self._note(self._all_but_data())
        self._validate_data()

    def _all_but_data(self) -> tuple[object, ...]:
        return (
            self.key,
            self.dtype,
            self.local_shape,
            self.global_shape,
            self.global_offset,
            self.axis_fragmentations,
            self.replica_id,
            self.prepend_axis_num,
            self.allow_shape_mismatch,
            self.flattened_range,
        )

    def _validate_attributes(self) -> None:
        if not isinstance(self.key, str):
            raise BadArgumentError(f"tensor key {self.key!r} must be a str")
        stored_dtype(self.dtype)
        # Mostly they are right already: what is checked to see that costs much less than a shape made anew.
        if not is_shape(self.local_shape):
            self.local_shape = check_shape(self.local_shape, f"the shard of tensor {self.key!r}")
        if not is_shape(self.global_shape):
            self.global_shape = check_shape(self.global_shape, f"tensor {self.key!r}")
        if not is_shape(self.global_offset):
            self.global_offset = as_ints(self.global_offset, f"global_offset of tensor {self.key!r}")
        self._validate_region()
        self._validate_grid()
        if type(self.replica_id) is not int or self.replica_id < 0:
            self.replica_id = check_replica_id(self.replica_id, f"tensor {self.key!r}")
        self._validate_flattened_range()

    def _validate_region(self) -> None:
        dims = self.prepend_axis_num + len(self.local_shape)
        if self.prepend_axis_num < 0 or len(self.global_shape) != dims or len(self.global_offset) != dims:
            raise BadArgumentError(
                f"tensor {self.key!r}: {self.prepend_axis_num} prepended axes and local shape {self.local_shape} need "
                f"{dims} global dimensions, found global shape {self.global_shape} and offset {self.global_offset}"
            )
        for start, count, length in zip(self.global_offset, self._size(), self.global_shape, strict=True):
            if start < 0 or start + count > length:
                raise BadArgumentError(
                    f"tensor {self.key!r}: region {self.region()} does not lie in global shape {self.global_shape}"
                )

    def _validate_grid(self) -> None:
        parts = self.axis_fragmentations
        if parts is None:
            return
        if not is_shape(parts):
            parts = self.axis_fragmentations = as_ints(parts, f"axis_fragmentations of tensor {self.key!r}")
        size = self._size()
        even = len(parts) == len(size)
        for count, start, length, total in zip(parts, self.global_offset, size, self.global_shape, strict=False):
            fits = length == 0 or (count >= 1 and start % length == 0)
            even = even and fits and (self.allow_shape_mismatch or length * count == total)
        if not even:
            raise BadArgumentError(
                f"tensor {self.key!r}: region {self.region()} is not a cell of the grid {self.axis_fragmentations} over "
                f"{self.global_shape}. Pass axis_fragmentations=None for an irregular grid."
            )

    def _validate_flattened_range(self) -> None:
        if self.flattened_range is None:
            return
        total = math.prod(self.local_shape)
        flat = self.flattened_range
        try:
            start, stop, step = (
                operator.index(part) for part in (flat.start, flat.stop, 1 if flat.step is None else flat.step)
            )
        except (AttributeError, TypeError):
            start, stop, step = -1, -1, 1
        if step == 1 and 0 <= start <= stop <= total:
            self.flattened_range = slice(start, stop)
        else:
            raise BadArgumentError(
                f"tensor {self.key!r}: flattened_range {self.flattened_range} must be slice(start, stop) inside the "
                f"{total} elements of the local shape {self.local_shape}"
            )

    def _validate_data(self) -> None:
        if self.data is None:
            return
        if not isinstance(self.data, torch.Tensor):
            raise BadArgumentError(f"tensor {self.key!r}: data must be a torch.Tensor or None, not {type(self.data).__name__}")
        if self.data.shape != self.data_shape() or self.data.dtype != self.dtype:
            raise BadArgumentError(
                f"tensor {self.key!r}: data have shape {tuple(self.data.shape)} and dtype {self.data.dtype}, "
                f"expected {self.data_shape()} and {self.dtype}"
            )


def _changed(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])
