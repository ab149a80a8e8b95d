"""`ArrangedFactory`: a factory whose tensor is stored as an `Arrangement` of boxes says. No element is computed or copied.

What is stored are views of the tensor, so that saving copies nothing and loading fills it in place, flat ranges too. Made by
`giantstep.fused` and `giantstep.experts`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.overlap import memory_of
from giantstep.mapping.replica import ReplicaId
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.shards.arrangement import Arrangement, Axis, PlacedBox, Run
from giantstep.shards.axis_layouts import AxisLayout

Prepend = Sequence[tuple[int, int]]
"""Leading axes that only the global tensor has: (index, length) each."""


@dataclass(frozen=True, slots=True)
class Builder:
    """The functions of an `ArrangedFactory`. They serve every tensor that is arranged alike."""

    arrangement: Arrangement

    def build(self, key: str, data: torch.Tensor, replica_id: ReplicaId, flat: slice | None) -> dict[int, ShardedTensor]:
        """The shards, numbered; an empty one of each global tensor of which `data` has no element."""
        tensors = [(f"{key}.{name}" if name else key, shape) for name, shape in self.arrangement.tensors]
        found: list[ShardedTensor] = []
        for placed, view in self._views(key, data.detach(), flat):
            name, shape = tensors[placed.tensor]
            replica = (*_as_tuple(replica_id), placed.replica) if placed.replica else replica_id
            found.append(ShardedTensor(name, view, view.dtype, tuple(view.shape), shape, placed.offset, None, replica))
        held = {shard.key for shard in found}
        for name, shape in tensors:
            if name not in held:
                empty = (0,) * len(shape)
                nothing = data.detach().new_empty(empty)
                found.append(ShardedTensor(name, nothing, nothing.dtype, empty, shape, empty, None, replica_id))
        return dict(enumerate(found))

    def _views(self, key: str, data: torch.Tensor, flat: slice | None) -> Iterable[tuple[PlacedBox, torch.Tensor]]:
        start = 0 if flat is None else flat.start
        for box in self.arrangement.memory_boxes(flat):
            memory = data if flat is None else data[box.position - start :][: math.prod(box.size)]
            try:
                stored = memory.view(box.size).permute(self.arrangement.order)
            except RuntimeError as error:
                raise BadArgumentError(
                    f"factory {key!r}: data of shape {tuple(data.shape)} and strides {data.stride()} cannot be viewed as "
                    f"{box.size}. Pass a contiguous tensor."
                ) from error
            for placed, slices in box.held:
                yield placed, stored[slices]

    def merge(self, loaded: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """A new tensor of the local shape, of all shards of a tensor that is not flattened."""
        first = next(iter(loaded.values()))
        whole = torch.empty(self.arrangement.data_shape, dtype=first.dtype, device=first.device)
        self.fill(whole, loaded, None)
        return whole

    def fill(self, data: torch.Tensor, loaded: Mapping[int, torch.Tensor], flat: slice | None) -> None:
        """Copy shards that lie elsewhere to their places."""
        with torch.no_grad():
            for number, shard in self.build("data", data, 0, flat).items():
                found, place = loaded.get(number), shard.data
                if found is not None and place is not None and memory_of(found) != memory_of(place):
                    place.copy_(found)


@dataclass(eq=False, slots=True)
class ArrangedFactory(ShardedTensorFactory):
    """A factory of boxes.

    To describe another tensor that is arranged alike, such as an optimizer's moment, use `dataclasses.replace(factory,
    key=..., data=...)`; for a range of the flattened one, with `flattened_range=` as well, and 1-dimensional data.

    Attributes:
        arrangement: where the elements of the local tensor lie.
    """

    arrangement: Arrangement = field(kw_only=True)

    def merge(self, loaded: Any) -> Any:
        """`data`, filled; a new tensor where it has no memory."""
        data = self.data
        if data.is_meta:
            first = next(iter(loaded.values()))
            data = torch.empty(data.shape, dtype=first.dtype, device=first.device)
        Builder(self.arrangement).fill(data, loaded, self.flattened_range)
        return data

    def validate(self) -> None:
        """Raise `BadArgumentError` unless the data have the shape of the arrangement, or are a flat range of it."""
        ShardedTensorFactory.validate(self)
        if not isinstance(self.data, torch.Tensor):
            raise BadArgumentError(f"factory {self.key!r}: data must be a torch.Tensor, not {type(self.data).__name__}")
        expected = self.arrangement.data_shape
        if self.flattened_range is not None:
            self.flattened_range = _checked_range(self.key, self.flattened_range, math.prod(expected))
            expected = (self.flattened_range.stop - self.flattened_range.start,)
        if tuple(self.data.shape) != expected:
            raise BadArgumentError(f"factory {self.key!r}: data have shape {tuple(self.data.shape)}, expected {expected}")


@dataclass(frozen=True, slots=True)
class Stored:
    """What an arrangement is made of.

    Attributes:
        prepend: leading axes that only the global tensor has.
        axes: layouts of the stored axes behind those; axes that are left out are not divided.
        memory_shape: what the data are in memory, row-major.
        order: stored axis `i` is axis `order[i]` of `memory_shape`.
    """

    prepend: Prepend
    axes: Mapping[int, AxisLayout]
    memory_shape: tuple[int, ...]
    order: tuple[int, ...]


def arranged(key: str, data: torch.Tensor, stored: Stored, replica_id: ReplicaId) -> ArrangedFactory:
    """The factory of a tensor.

    Raises:
        BadArgumentError: the layouts do not fit the tensor; names key and axis.
    """
    if not isinstance(data, torch.Tensor):
        raise BadArgumentError(f"factory {key!r}: data must be a torch.Tensor, not {type(data).__name__}")
    lengths = [stored.memory_shape[axis] for axis in stored.order]
    wrong = [axis for axis in stored.axes if type(axis) is not int or not 0 <= axis < len(lengths)]
    if wrong or not lengths:
        raise BadArgumentError(f"factory {key!r}: axis {wrong} must be among the {len(lengths)} axes {tuple(lengths)}")
    axes = [_prepended(key, index, length) for index, length in stored.prepend]
    for number, length in enumerate(lengths):
        layout = stored.axes.get(number)
        axes.append(Axis.whole(length) if layout is None else layout.axis(length, f"factory {key!r}, axis {number}"))
    ahead = len(stored.prepend)
    order = (*range(ahead), *(ahead + axis for axis in stored.order))
    shape = tuple(data.shape)
    try:
        arrangement = Arrangement(shape, ((1,) * ahead + stored.memory_shape), order, tuple(axes))
    except BadArgumentError as error:
        raise BadArgumentError(f"factory {key!r}: {error.message}") from error
    builder = Builder(arrangement)
    return ArrangedFactory(key, data, builder.build, builder.merge, replica_id, arrangement=arrangement)


def _prepended(key: str, index: int, length: int) -> Axis:
    if not 0 <= index < length:
        raise BadArgumentError(f"factory {key!r}: index {index} of a prepended axis must be from 0 to {length - 1}")
    return Axis((Run(index, 1),), (length,))


def _checked_range(key: str, flat: slice, total: int) -> slice:
    try:
        start, stop, step = (operator.index(part) for part in (flat.start, flat.stop, 1 if flat.step is None else flat.step))
    except (AttributeError, TypeError):
        start, stop, step = -1, -1, 1
    if step != 1 or not 0 <= start <= stop <= total:
        raise BadArgumentError(
            f"factory {key!r}: flattened_range {flat} must be slice(start, stop) inside the {total} local elements"
        )
    return slice(start, stop)


def _as_tuple(replica_id: ReplicaId) -> tuple[int, ...]:
    return (replica_id,) if isinstance(replica_id, int) else replica_id
