"""Wrapper tensors: tensor subclasses whose values lie in other tensors (quantised data and its scales).

They are stored as their parts, plain tensors under `{key}.{part}`, and put together again on load. A part has as many
dimensions as its wrapper; along each, its length is a fixed fraction of the wrapper's (1/2 for two values per byte,
1/128 for one scale per block, one per shard for a scale of a whole shard), so that regions of the wrapper are
regions of its parts, or the cut is refused. Called by `expand` and, to dequantise, by `load`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from giantstep.errors import BadArgumentError, UnsupportedTypeError
from giantstep.mapping.torch_sharded import is_torch_sharded
from giantstep.shards.region import Region

Attributes = dict[str, Any]
TakeApart = Callable[[Any], tuple[Mapping[str, torch.Tensor], Attributes]]
PutTogether = Callable[[Mapping[str, torch.Tensor], Attributes], torch.Tensor]
Dequantise = Callable[[Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Wrapper:
    """How tensors of one subclass are taken apart and put together; see `register_wrapper`."""

    kind: type
    name: str
    take_apart: TakeApart
    put_together: PutTogether
    dequantise: Dequantise | None


# Tensors that hold their own values.
OWN_VALUES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
# Values that share one element of a part, at most: 1-bit values in a byte.
_MOST_PACKED = 8
_LOCK = threading.Lock()
_BY_TYPE: dict[type, Wrapper] = {}
_BY_NAME: dict[str, Wrapper] = {}


def register_wrapper(
    kind: type[torch.Tensor],
    *,
    name: str,
    take_apart: TakeApart,
    put_together: PutTogether,
    dequantise: Dequantise | None = None,
) -> None:
    """Say how tensors of a subclass are stored.

    Subclasses with `__tensor_flatten__` and `__tensor_unflatten__` can be saved and loaded into tensors of the
    same kind without this; registering makes `LoadOptions(dequantise=True)` possible, and is the way for all others.

    Args:
        kind: the subclass, matched exactly.
        name: stored with the tensors; it must not change while checkpoints are to be read.
        take_apart: `(tensor) -> (parts, attributes)`. The parts are tensors that share memory with the given
            one, each with as many dimensions (views with dimensions of 1 where needed); saving reads them and loading
            fills them. They may be wrappers themselves. Attributes are plain values, equal on all ranks, that hold for
            every part of the tensor: what depends on sizes is to be taken from the parts. It is to raise for lengths that
            are no whole number of scale blocks, if the tensor may be cut: blocks are taken to be of equal length.
        put_together: the inverse, for parts of any shapes that fit each other: for any range of rows or columns too,
            with the scales that serve it.
        dequantise: `(tensor) -> ` plain floating-point tensor; default: the method `dequantize`.

    Raises:
        BadArgumentError: the type or the name is registered for another.
    """
    if not (isinstance(kind, type) and issubclass(kind, torch.Tensor)) or kind in (torch.Tensor, torch.nn.Parameter, DTensor):
        raise BadArgumentError(f"{kind!r} cannot be registered as a wrapper: expected a subclass of torch.Tensor")
    if not isinstance(name, str) or not name:
        raise BadArgumentError(f"wrapper name {name!r} must be a str that is not empty")
    wrapper = Wrapper(kind, name, take_apart, put_together, dequantise)
    with _LOCK:
        if _BY_TYPE.get(kind, wrapper) != wrapper or _BY_NAME.get(name, wrapper) != wrapper:
            raise BadArgumentError(f"wrapper type {kind.__qualname__} or name {name!r} is registered with other functions")
        _BY_TYPE[kind] = _BY_NAME[name] = wrapper


@dataclass(frozen=True, slots=True)
class Parts:
    """A wrapper tensor taken apart.

    Attributes:
        name: registered name, or the name of the class.
        tensors: the parts, sharing memory with the wrapper.
        attributes: what is stored beside them; None for classes that are not registered.
        put_together: parts of the same names to a tensor like the one taken apart.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    attributes: Attributes | None
    put_together: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


def take_apart(tensor: torch.Tensor, what: str) -> Parts | None:
    """The parts of a wrapper tensor; None for a tensor that holds its own values.

    Raises:
        BadArgumentError: the tensor has no memory of its own and nothing says where its values are, or its parts do
            not follow its dimensions.
    """
    kind = type(tensor)
    if kind in OWN_VALUES or isinstance(tensor, DTensor) or is_torch_sharded(kind):
        return None
    wrapper = _BY_TYPE.get(kind)
    if wrapper is not None:
        found, attributes = wrapper.take_apart(tensor)
        crooked = [name for name, part in found.items() if part.dim() != tensor.dim()]
        if crooked:
            raise _does_not_follow(found[crooked[0]], tensor, f"part {crooked[0]!r} of {what}")
        # Torch's own protocol keeps settings of the given tensor that are not stored.
        like = _flattened(tensor) if _flattens(tensor) else None
        if like is not None and like.tensors.keys() == found.keys():
            return Parts(wrapper.name, dict(found), attributes, like.put_together)
        return Parts(wrapper.name, dict(found), attributes, lambda loaded: wrapper.put_together(loaded, attributes))
    if _flattens(tensor):
        return _flattened(tensor)
    if _lacks_memory(tensor):
        raise BadArgumentError(
            f"{what} is a {kind.__module__}.{kind.__qualname__}, which has no memory of its own. Say with "
            "giantstep.register_wrapper how to take it apart, or save its parts."
        )
    return None


def _flattens(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__") and hasattr(type(tensor), "__tensor_unflatten__")


def _flattened(tensor: Any) -> Parts:
    names, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name) for name in names}
    size, stride = tensor.size(), tensor.stride()

    def put_together(loaded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        given = {name: loaded[name].reshape(inner[name].shape) for name in names}
        result: torch.Tensor = type(tensor).__tensor_unflatten__(given, context, size, stride)
        return result

    return Parts(type(tensor).__qualname__, inner, None, put_together)


def following(part: torch.Tensor, tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The part as a view that follows the wrapper's dimensions one by one, as cutting needs it.

    A part of one element, or of one per row where no other dimension is as long, is viewed so; otherwise the number of
    dimensions must be the wrapper's.
    """
    if part.dim() == tensor.dim():
        return part
    if part.numel() == 1:
        return part.view((1,) * tensor.dim())
    if part.dim() == 1 and [axis for axis, size in enumerate(tensor.shape) if size == part.shape[0]] == [0]:
        return part.view(-1, *(1,) * (tensor.dim() - 1))
    raise _does_not_follow(part, tensor, what)


def _does_not_follow(part: torch.Tensor, tensor: torch.Tensor, what: str) -> BadArgumentError:
    return BadArgumentError(
        f"{what} has shape {tuple(part.shape)}, which does not follow the {tensor.dim()} dimensions of "
        f"{tuple(tensor.shape)}. Register the class with giantstep.register_wrapper and give the part as a view that does."
    )


def _lacks_memory(tensor: torch.Tensor) -> bool:
    if tensor.is_meta or not tensor.numel() or tensor.layout != torch.strided:
        return False
    try:
        return tensor.untyped_storage().data_ptr() == 0
    except (RuntimeError, NotImplementedError):
        # So says torch of storages that hold nothing.
        return True


@dataclass(frozen=True, slots=True)
class Scaling:
    """How lengths along one axis of a wrapper become lengths along the same axis of a part: times `part / whole`."""

    part: int
    whole: int

    def of(self, length: int, what: str) -> int:
        """A length or offset of the part; raises `BadArgumentError` if it is no whole number of elements."""
        if self.part == self.whole:
            return length
        if self.whole == 0 or length * self.part % self.whole:
            raise BadArgumentError(
                f"{what}: position {length} of the tensor lies inside an element of the part, of which there is one per "
                f"{self.whole}/{self.part} of the tensor's. Cut between packed values and between scale blocks only."
            )
        return length * self.part // self.whole


def scalings(part: torch.Tensor, shape: tuple[int, ...]) -> list[Scaling]:
    """Per axis, how regions of a wrapper of `shape` become regions of its part."""
    return [Scaling(size, whole) for size, whole in zip(part.shape, shape, strict=True)]


def description_of(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The object that is stored beside the parts of a wrapper.

    Args:
        shape: global shape of the wrapper.
        dtype: dtype that it presents.
    """
    return {
        "wrapper": parts.name,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "parts": sorted(parts.tensors),
        "attributes": parts.attributes,
    }


def _is_shared(part: int, whole: int) -> bool:
    """Whether one value of a part serves a whole axis, any range of it as well: a scale, not values packed together."""
    return part == 1 and whole > _MOST_PACKED


def alignment(shape: tuple[int, ...], parts: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Per axis of a wrapper, the multiples at which it can be cut without cutting an element of a part.

    Args:
        shape: global shape of the wrapper.
        parts: global shapes of its parts.
    """
    steps = []
    for axis, whole in enumerate(shape):
        lengths = [part[axis] for part in parts.values() if not _is_shared(part[axis], whole)]
        steps.append(math.lcm(*(whole // math.gcd(whole, length) for length in lengths)) if whole else 1)
    return steps


def aligned_hull(region: Region, shape: tuple[int, ...], parts: Mapping[str, tuple[int, ...]]) -> Region:
    """The smallest region around one of a wrapper that cuts no element of any part; see `alignment`."""
    steps = alignment(shape, parts)
    low = [start // step * step for start, step in zip(region.offset, steps, strict=True)]
    ends = [start + count for start, count in zip(region.offset, region.size, strict=True)]
    high = [min(-(-end // step) * step, whole) for end, step, whole in zip(ends, steps, shape, strict=True)]
    return Region(tuple(low), tuple(stop - start for start, stop in zip(low, high, strict=True)))


def part_of(hull: Region, shape: tuple[int, ...], part: tuple[int, ...]) -> Region:
    """The region of a part that belongs to an aligned region of its wrapper."""
    offset, size = [], []
    for start, count, length, whole in zip(hull.offset, hull.size, part, shape, strict=True):
        shared = _is_shared(length, whole)
        offset.append(0 if shared or not whole else start * length // whole)
        size.append(1 if shared else count * length // whole if whole else 0)
    return Region(tuple(offset), tuple(size))


def stored_wrapper(description: Mapping[str, Any], what: str) -> Wrapper:
    """The wrapper of a stored description.

    Raises:
        UnsupportedTypeError: it is not registered in this process, or was not when the tensor was saved.
    """
    wrapper = _BY_NAME.get(str(description["wrapper"]))
    if wrapper is None or description["attributes"] is None:
        when = "is not registered here" if wrapper is None else "was not registered when it was saved"
        raise UnsupportedTypeError(
            f"{what} is stored as a wrapper {description['wrapper']!r}, which {when}: it cannot be dequantised. Register it "
            "with giantstep.register_wrapper, or load into a tensor of that class."
        )
    return wrapper


def dequantised(description: Mapping[str, Any], parts: Mapping[str, torch.Tensor], what: str) -> torch.Tensor:
    """The plain tensor that stored parts stand for; raises as `stored_wrapper`."""
    wrapper = stored_wrapper(description, what)
    tensor: Any = wrapper.put_together(parts, dict(description["attributes"]))
    plain = wrapper.dequantise(tensor) if wrapper.dequantise is not None else tensor.dequantize()
    if not isinstance(plain, torch.Tensor):
        raise UnsupportedTypeError(f"{what}: dequantising it gave a {type(plain).__name__}, expected a tensor")
    return plain
