"""`FlatFactory`: a range of a flattened tensor that a factory stores in parts, such as optimizer state of a fused weight.

The factory's own `build_fn` is shown a tensor of the whole shape without memory, and says by its views which elements each
part has; the range is intersected with each. Called by `giantstep.zero`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.sharded_object import LocalNonpersistentObject
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.tree import Tree, flatten
from giantstep.shards.strided import boxes_in_range, is_nested


@dataclass(eq=False, slots=True)
class FlatFactory(ShardedTensorFactory):
    """A factory whose data are a range of its flattened tensor.

    `build_fn` need not know of ranges: it is called with a meta tensor of `local_shape` and None for the range, and must
    return `ShardedTensor`s (and factories) whose data are views of that tensor, however cut, strided or transposed.

    Attributes:
        data: 1-dimensional and contiguous, as long as `flattened_range`; saved from and loaded into without a copy.
        flattened_range: which elements of the flattened tensor `data` are.
        local_shape: of the whole local tensor.
    """

    local_shape: tuple[int, ...] = ()

    def validate(self) -> None:
        ShardedTensorFactory.validate(self)
        flat = self.flattened_range
        if flat is None or not 0 <= flat.start <= flat.stop <= math.prod(self.local_shape):
            raise BadArgumentError(
                f"factory {self.key!r}: flattened_range {flat} must lie in the {math.prod(self.local_shape)} elements of local "
                f"shape {self.local_shape}"
            )
        if self.data.shape != (flat.stop - flat.start,) or not self.data.is_contiguous():
            raise BadArgumentError(
                f"factory {self.key!r}: data of shape {tuple(self.data.shape)} must be 1-dimensional, contiguous, and have "
                f"{flat.stop - flat.start} elements"
            )

    def build(self) -> Any:
        """Shards for what of each of `build_fn`'s tensors lies in the range, one after another."""
        whole = torch.empty(self.local_shape, dtype=self.data.dtype, device="meta")
        shards = self._cut(self.build_fn(self.key, whole, self.replica_id, None), whole)
        # An empty list would be common state.
        return shards or LocalNonpersistentObject(None)

    def merge(self, loaded: Any) -> Any:
        """`data`, which loading has filled; where it has no memory, a tensor made of what was loaded."""
        if not self.data.is_meta:
            return self.data
        merged = torch.empty(self.data.shape, dtype=self.data.dtype)
        twins = replace(self, data=merged).build()
        for twin, part in zip(twins, loaded or (), strict=True) if isinstance(twins, list) else ():
            twin.data.copy_(part)
        return merged

    def _cut(self, built: Tree, whole: torch.Tensor) -> list[ShardedTensor]:
        found: list[ShardedTensor] = []
        for part in flatten(built).values():
            if isinstance(part, ShardedTensorFactory):
                found += self._cut(part.build(), whole)
                continue
            if not isinstance(part, ShardedTensor) or part.data is None or part.flattened_range is not None:
                self._refuse(f"returned {_what(part)}")
            found += self._shards(part, part.data, whole)
        return found

    def _shards(self, part: ShardedTensor, view: torch.Tensor, whole: torch.Tensor) -> list[ShardedTensor]:
        """The boxes of a part that lie in the range, with views of `data`."""
        same_memory = view.untyped_storage()._cdata == whole.untyped_storage()._cdata and view.dtype == whole.dtype
        if not same_memory or not is_nested(view.shape, view.stride()):
            self._refuse(f"made tensor {part.key!r} of a copy of its data, or of elements that repeat")
        flat, shape = self.flattened_range or slice(0, 0), tuple(view.shape)
        if not view.numel():
            # Somebody has to say that there is such a tensor.
            empty = self.data.detach()[:0].view(shape)
            return [replace(part, data=empty)] if flat.start == 0 else []
        data, found = self.data.detach(), []
        for box in boxes_in_range(shape, view.stride(), int(view.storage_offset()), flat.start, flat.stop):
            place = data.storage_offset() + box.position - flat.start
            ahead, inner = part.global_offset[: part.prepend_axis_num], part.global_offset[part.prepend_axis_num :]
            found.append(
                replace(
                    part,
                    data=data.as_strided(box.region.size, view.stride(), place),
                    local_shape=box.region.size,
                    global_offset=(*ahead, *(a + b for a, b in zip(inner, box.region.offset, strict=True))),
                    axis_fragmentations=None,
                )
            )
        return found

    def _refuse(self, what: str) -> NoReturn:
        raise BadArgumentError(
            f"factory {self.key!r}: its build_fn {what}, so a flat range of it cannot be saved. It must return ShardedTensors "
            "whose data are views of the tensor that it is given (torch.chunk, split, view, transpose), without a range."
        )


def _what(part: Any) -> str:
    if isinstance(part, ShardedTensor):
        return f"tensor {part.key!r} without data or with a range of its own"
    return f"a value of type {type(part).__name__}"
