"""`giantstep.experts`: the experts of a layer as one stored tensor [experts, ...], however ranks hold them.

A rank may have its experts in one tensor, in one concatenated for grouped matrix products, or in a tensor for each; some
experts and not others, as many as it likes; and of each a part, fused or not. All that is stored alike, and each form loads
what another has saved. For users, beside `giantstep.fused`; shared experts and routers are ordinary tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.arranged import ArrangedFactory, Prepend, Stored, arranged
from giantstep.mapping.replica import ReplicaId
from giantstep.shards.arrangement import Axis, Run
from giantstep.shards.axis_layouts import AxisLayout

__all__ = ["Inner", "LocalExperts", "grouped", "sequential"]


@dataclass(frozen=True, slots=True)
class LocalExperts:
    """The experts of one rank.

    Attributes:
        ids: their global numbers, in local order.
        total: number of experts of the layer on all ranks.
    """

    ids: tuple[int, ...]
    total: int

    def __post_init__(self) -> None:
        ids = _ints(self.ids, "experts")
        object.__setattr__(self, "total", *_ints((self.total,), "total of experts"))
        if len(set(ids)) != len(ids) or any(not 0 <= one < self.total for one in ids):
            raise BadArgumentError(f"experts {self.ids} must be different numbers from 0 to {self.total - 1}")
        object.__setattr__(self, "ids", ids)

    @classmethod
    def even(cls, total: int, ep_rank: int, ep_size: int) -> LocalExperts:
        """As many on each rank, in order.

        Raises:
            BadArgumentError: `total` is not a multiple of `ep_size`, or there is no such rank.
        """
        total, ep_size = _ints((total, ep_size), "experts and ranks")
        if ep_size < 1 or total % ep_size:
            raise BadArgumentError(f"{total} experts cannot be divided evenly among {ep_size} ranks: use LocalExperts.uneven")
        return cls.uneven([total // ep_size] * ep_size, ep_rank)

    @classmethod
    def uneven(cls, counts: Sequence[int], ep_rank: int) -> LocalExperts:
        """`counts[rank]` on each rank, in order; none is allowed."""
        counts = _ints(counts, "expert counts")
        if any(count < 0 for count in counts) or not 0 <= ep_rank < len(counts):
            raise BadArgumentError(
                f"rank {ep_rank} of expert counts {tuple(counts)}: counts must not be negative, and the rank one of theirs"
            )
        first = sum(counts[:ep_rank])
        return cls(tuple(range(first, first + counts[ep_rank])), sum(counts))

    def axis(self, length: int, what: str) -> Axis:
        """See `AxisLayout`."""
        if length != len(self.ids):
            raise BadArgumentError(
                f"{what}: there are {length} experts, but this rank is to hold the {len(self.ids)} {self.ids}"
            )
        return Axis(tuple(Run(one, 1) for one in self.ids), (self.total,))


def _ints(values: Iterable[int], what: str) -> tuple[int, ...]:
    """Whole numbers of any kind as Python's; raises `BadArgumentError` if they are none."""
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as error:
        raise BadArgumentError(f"{what} {values!r} must be whole numbers: {error}") from error


@dataclass(frozen=True, slots=True)
class Inner:
    """What the tensor of a single expert is.

    Attributes:
        axes: how its axes are put together, as stored, e.g. `{0: Gated(etp_rank, etp_size)}`; others are not divided.
        shape: of what the rank holds of it, as it lies in memory, where `data` have another shape; None: as `data` say.
        transposed: in memory its last two axes are exchanged, compared with what is stored.
    """

    axes: Mapping[int, AxisLayout] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    transposed: bool = False


_AS_IT_IS = Inner()


def grouped(
    key: str,
    data: torch.Tensor,
    experts: LocalExperts,
    *,
    inner: Inner = _AS_IT_IS,
    replica_id: ReplicaId = 0,
    prepend: Prepend = (),
) -> ArrangedFactory:
    """All experts of a rank in one tensor: [local experts, ...], or, with `inner.shape`, that in another shape.

    Args:
        key: of the stored tensor, [experts, ...].
        data: the local tensor; contiguous if `inner.shape` is given. Meta: allocated on load.
        experts: which they are.
        inner: what one expert's tensor is.
        replica_id: 0 (or zeros) on one of the ranks that hold the same parts of the same experts: their rank among the
            data-parallel ranks of these experts.
        prepend: leading axes that the stored tensor has besides, see `giantstep.fused.fused`.

    Raises:
        BadArgumentError: tensor, experts and layouts do not fit; names key and axis.
    """
    if not isinstance(data, torch.Tensor) or not data.dim():
        raise BadArgumentError(f"factory {key!r}: data must be a tensor with an axis of experts")
    shape = tuple(data.shape[1:]) if inner.shape is None else tuple(inner.shape)
    memory = (data.shape[0] if inner.shape is None else len(experts.ids), *shape)
    return arranged(key, data, _stored(key, memory, experts, inner, prepend), replica_id)


def sequential(
    key: str,
    tensors: Sequence[torch.Tensor],
    experts: LocalExperts,
    *,
    inner: Inner = _AS_IT_IS,
    replica_id: ReplicaId = 0,
    prepend: Prepend = (),
) -> list[ArrangedFactory]:
    """A tensor for each expert of a rank.

    Args:
        key: of the stored tensor, [experts, ...]; the same for all.
        tensors: in the order of `experts.ids`.
        experts, inner, replica_id, prepend: see `grouped`.

    Returns:
        A factory for each, to be put where the tensors stand in the state dict.
    """
    if len(tensors) != len(experts.ids):
        raise BadArgumentError(f"factory {key!r}: {len(tensors)} tensors for {len(experts.ids)} experts {experts.ids}")
    found = []
    for data, one in zip(tensors, experts.ids, strict=True):
        if not isinstance(data, torch.Tensor):
            raise BadArgumentError(f"factory {key!r}: what is given for expert {one} is a {type(data).__name__}, not a tensor")
        shape = tuple(data.shape) if inner.shape is None else tuple(inner.shape)
        alone = LocalExperts((one,), experts.total)
        found.append(arranged(key, data, _stored(key, (1, *shape), alone, inner, prepend), replica_id))
    return found


def _stored(key: str, memory: tuple[int, ...], experts: LocalExperts, inner: Inner, prepend: Prepend) -> Stored:
    order = list(range(len(memory)))
    if inner.transposed:
        if len(memory) < 3:
            raise BadArgumentError(f"factory {key!r}: an expert's tensor of shape {memory[1:]} has no two axes to exchange")
        order[-2], order[-1] = order[-1], order[-2]
    if any(axis < 0 for axis in inner.axes):
        raise BadArgumentError(f"factory {key!r}: axes {list(inner.axes)} of an expert's tensor are counted from 0")
    axes: dict[int, AxisLayout] = {0: experts} | {axis + 1: layout for axis, layout in inner.axes.items()}
    return Stored(prepend, axes, memory, tuple(order))
