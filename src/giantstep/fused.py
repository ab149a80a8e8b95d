"""`giantstep.fused`: fused weights - gate and up, queries, keys and values, any widths - as factories that any layout loads.

Tensor parallelism cuts each of the weights that are fused, so that a rank's tensor is no region of the whole one. The
factories made here say which runs of rows lie where. They store views, copy nothing, and take flat ranges. For users, beside
`giantstep.experts`; not here: weights that are not fused (`ShardedTensor`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from giantstep.mapping.arranged import ArrangedFactory, Prepend, Stored, arranged
from giantstep.mapping.replica import ReplicaId
from giantstep.shards.arrangement import Axis, Run
from giantstep.shards.axis_layouts import AxisLayout, Cut, Fused, FusedHeads, Gated, Heads, Span

__all__ = [
    "Axis",
    "AxisLayout",
    "Cut",
    "Fused",
    "FusedHeads",
    "Gated",
    "Heads",
    "Run",
    "Span",
    "fused",
    "fused_rows",
    "qkv",
    "swiglu",
]


def fused(
    key: str, data: torch.Tensor, axes: Mapping[int, AxisLayout], *, replica_id: ReplicaId = 0, prepend: Prepend = ()
) -> ArrangedFactory:
    """A factory of a tensor whose axes are put together as said; the functions below are cases of it.

    Args:
        key: of the stored tensor; where a layout has names, of tensors `key.name`.
        data: the local tensor, at least 1-dimensional; only read by saving, filled by loading. Meta: allocated on load.
        axes: by axis of `data`; others are not divided.
        replica_id: 0 (or zeros) on one of the ranks that hold equal tensors. Copies that a layout knows of itself
            (`FusedHeads`) have replica ids without it.
        prepend: leading axes that the stored tensor has and `data` has not, (index, length) each, such as the global
            number of the layer and of all layers.

    Raises:
        BadArgumentError: layouts and tensor do not fit; names key and axis.
    """
    shape = tuple(data.shape) if isinstance(data, torch.Tensor) else ()
    return arranged(key, data, Stored(prepend, axes, shape, tuple(range(len(shape)))), replica_id)


def swiglu(
    key: str,
    data: torch.Tensor,
    tp_rank: int,
    tp_size: int,
    *,
    axis: int = 0,
    replica_id: ReplicaId = 0,
    prepend: Prepend = (),
) -> ArrangedFactory:
    """Gate and up fused: locally this rank's gate rows above its up rows; weight or bias.

    Stored as one tensor, all gate rows above all up rows, which is what a model without tensor parallelism holds.

    Args:
        key, data, replica_id, prepend: see `fused`.
        tp_rank, tp_size: this rank among those that divide both.
        axis: along which they are fused.
    """
    return fused(key, data, {axis: Gated(tp_rank, tp_size)}, replica_id=replica_id, prepend=prepend)


def fused_rows(
    key: str,
    data: torch.Tensor,
    widths: Sequence[int],
    tp_rank: int,
    tp_size: int,
    *,
    axis: int = 0,
    names: Sequence[str] | None = None,
    replica_id: ReplicaId = 0,
    prepend: Prepend = (),
) -> ArrangedFactory:
    """Any number of weights fused, of different widths, each divided among the ranks.

    Args:
        key, data, replica_id, prepend: see `fused`.
        widths: of the weights on all ranks together, each a multiple of `tp_size`.
        tp_rank, tp_size, axis: see `swiglu`.
        names: None to store one tensor, in the order without tensor parallelism; or to store each weight as `key.name`.
    """
    layout = Fused(tuple(widths), tp_rank, tp_size, None if names is None else tuple(names))
    return fused(key, data, {axis: layout}, replica_id=replica_id, prepend=prepend)


def qkv(
    key: str,
    data: torch.Tensor,
    heads: Heads,
    tp_rank: int,
    tp_size: int,
    *,
    replica_id: ReplicaId = 0,
    prepend: Prepend = (),
) -> ArrangedFactory:
    """The fused projection to queries, keys and values, along axis 0; weight or bias.

    Stored as `key.q`, `key.k` and `key.v`, heads in order, whatever the local order is, so that each order loads what
    another has saved. With fewer groups than ranks, key and value heads are replicas.

    Args:
        key, data, replica_id, prepend: see `fused`.
        heads: of the layer, and their local order.
        tp_rank, tp_size: this rank among those that divide the heads.
    """
    return fused(key, data, {0: FusedHeads(heads, tp_rank, tp_size)}, replica_id=replica_id, prepend=prepend)
