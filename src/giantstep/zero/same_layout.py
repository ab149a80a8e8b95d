"""The form that loads only in the layout that saved it: buckets as they lie, a few large tensors, and the layout beside them.

Called by users who save often and seldom change the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from giantstep.errors import BadArgumentError, LayoutMismatchError
from giantstep.mapping.checked_object import CheckedObject
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.shards.flat_buffers import FlatLayout
from giantstep.zero.buffers import BucketTensors, check_buckets
from giantstep.zero.fingerprint import Position, check_position, differences, fingerprint

_LAYOUT = "layout"


def same_layout_state(
    layout: FlatLayout,
    rank: int,
    states: Mapping[str, BucketTensors],
    *,
    position: Position | None = None,
    prefix: str = "optimizer.buckets",
    instance: int = 0,
) -> dict[str, Any]:
    """A rank's optimizer state for `save` or `load`, under the layout that it has.

    Each bucket of each state is a 1-dimensional tensor, of which every rank has its range, padding included. Beside them
    the layout is stored. `load` compares it first: where it differs, all ranks raise a `LayoutMismatchError` that says in
    what, before any tensor is touched.

    Args:
        layout: the buckets.
        rank: of this process among the data-parallel ranks that share them.
        states: by name, per bucket the rank's own range; None where a bucket has no such state. Owned by the caller; saving
            reads it, loading fills it.
        position: where this process stands on each axis of model parallelism, all of those that cut or repeat parameters:
            name -> (index, size), such as `{"tp": (0, 2), "pp": (1, 4)}`.
        prefix: of the keys; another one for each of several layouts, such as that of experts.
        instance: as for `reshardable_state`.

    Returns:
        `{"layout": ..., name: [one leaf per bucket]}`.

    Raises:
        BadArgumentError: memory does not fit the layout; names state and bucket.
    """
    position = dict(position or {})
    check_position(position)
    layout.check_rank(rank)
    if type(instance) is not int or instance < 0:
        raise BadArgumentError(f"instance {instance!r} must be an int of at least 0")
    if _LAYOUT in states:
        raise BadArgumentError(f"{_LAYOUT!r} is not a name for a state: it is the key of the stored layout")

    def check(stored: Any, what: str) -> None:
        _refuse(differences(stored, what, layout, position), what)

    shape, offset = tuple(size for _, size in position.values()), tuple(index for index, _ in position.values())
    # The replica is stored by the first rank of the first instance.
    main = (rank, instance)
    held = CheckedObject(f"{prefix}.{_LAYOUT}", fingerprint(layout, position), shape, offset, main, check)
    where = "".join(f".{axis}{index}" for axis, (index, _) in position.items())
    found: dict[str, Any] = {_LAYOUT: held}
    for name, tensors in states.items():
        check_buckets(layout, rank, name, tensors)
        leaves = [
            ShardedTensor(
                f"{prefix}{where}.{name}.{number}",
                tensor.detach(),
                tensor.dtype,
                tuple(tensor.shape),
                (bucket.elements,),
                (bucket.cuts[rank],),
                None,
                instance,
            )
            for number, (bucket, tensor) in enumerate(zip(layout.buckets, tensors, strict=True))
            if tensor is not None
        ]
        if leaves:
            found[name] = leaves
    return found


def _refuse(found: list[str], what: str) -> None:
    if found:
        raise LayoutMismatchError(
            f"{what}: the optimizer's buckets were saved in another layout: {'; '.join(found)}. In this form they load only "
            "in the layout that saved them: run with that one, or save with giantstep.zero.reshardable_state, which loads "
            "in any."
        )
