"""The state of one optimizer as a tree of leaves that are named by parameter.

    param/<key>      what there is of a parameter's state, `step` and the like, and its group: an object
    group/<digest>   hyper-parameters of a group: an object
    state/<name>     tensors of this name, by parameter
    rest             state that belongs to no parameter: an object

Called by `OptimizerState` to save; `requests` asks for the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from giantstep.errors import BadArgumentError
from giantstep.mapping.optimizer import is_distributed, local_of
from giantstep.mapping.param_layout import reduced_shape
from giantstep.mapping.sharded_object import SharedObject
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.optimizer.groups import digest_of, options_of, same
from giantstep.optimizer.kinds import ELEMENTS, MAIN_PARAM, SHARD, VALUE, Kind, kind_of, leaf_of, on_host
from giantstep.optimizer.options import OptimizerOptions
from giantstep.optimizer.report import OptimizerReport
from giantstep.optimizer.slots import Name, Slot, stale_state

Record = dict[str, Any]


def describe_optimizer(
    optimizer: Any, slots: Sequence[Slot], place: str, settings: OptimizerOptions
) -> tuple[dict[str, Any], OptimizerReport]:
    """The state of an optimizer, to be saved.

    Args:
        optimizer: has `state` and `param_groups`.
        slots: its parameters.
        place: dotted path at which the tree stands.
        settings: say of some state what it is.

    Returns:
        The tree, whose leaves share memory with the state, and what is in it.

    Raises:
        BadArgumentError: there is state that cannot be named, or parameters of one key have state that differs.
    """
    if stale := stale_state(optimizer, slots):
        raise BadArgumentError(
            f"{place} has state of {len(stale)} tensors that are in none of its param groups, the first of shape "
            f"{tuple(stale[0].shape)}. Remove it from optimizer.state, or put the tensors into a group."
        )
    builder = _Builder(optimizer, slots, place, settings)
    for slot in slots:
        builder.add(slot)
    return builder.finish()


class _Builder:
    """Makes the tree of one optimizer."""

    def __init__(self, optimizer: Any, slots: Sequence[Slot], place: str, settings: OptimizerOptions) -> None:
        self._optimizer = optimizer
        self._place = place
        self._settings = settings
        self._options = [options_of(group) for group in optimizer.param_groups]
        self._digests = [digest_of(options, place) for options in self._options]
        self._pieces = [self._pieces_of(slot) for slot in slots]
        _tell_square_ones(slots, self._pieces)
        self._divisible = {number: cut for number, pieces in enumerate(self._pieces) if (cut := _divisible(pieces))}
        self._numbers = {id(slot): number for number, slot in enumerate(slots)}
        self._slots = slots
        self._tree: dict[str, Any] = {}
        self._records: dict[str, tuple[SharedObject, str]] = {}
        self._values: list[dict[str, Any]] = []
        self._stored: list[str] = []
        self._without: list[str] = []

    def _pieces_of(self, slot: Slot) -> dict[str, tuple[Kind, Any]]:
        state = self._optimizer.state.get(slot.param) or {}
        if slot.is_copy and MAIN_PARAM in state:
            raise BadArgumentError(
                f"{self._place}: state {MAIN_PARAM!r} of {slot.names[0].key!r} is the name of the copy itself"
            )
        known = self._settings.statistics, self._settings.of_shards
        found = {name: (kind_of(name, value, slot.param, *known), value) for name, value in state.items()}
        return {MAIN_PARAM: (ELEMENTS, slot.param), **found} if slot.is_copy else found

    def add(self, slot: Slot) -> None:
        """Put a parameter's state into the tree."""
        pieces = self._pieces[self._numbers[id(slot)]]
        values = {name: value for name, (kind, value) in pieces.items() if kind == VALUE}
        tensors = {name: kind for name, (kind, _) in pieces.items() if kind != VALUE}
        local = local_of(slot.param)
        beside = [name for name, value in values.items() if isinstance(value, Tensor) and value.device == local.device]
        if local.device.type == "cpu":
            beside = []
        self._values.append(values)
        state = self._optimizer.state.get(slot.param) or {}
        for name in slot.names:
            # A part without elements may have no state where the others have, or have taken fewer steps: it gets no gradients.
            if not local.numel() and name.layout.elements != 0:
                continue
            filler = {} if state else self._filler(slot, name)
            for what, (kind, value) in pieces.items():
                if kind != VALUE:
                    self._put(what, kind, value, name)
            for what, (kind, value) in filler.items():
                self._put(what, kind, value, name)
            record = {
                "group": self._digests[slot.group],
                "tensors": {what: list(kind) for what, kind in tensors.items()},
                "values": values,
                "beside": beside,
                "filler": sorted(filler),
            }
            self._put_record(record, name)
        if not state:
            self._without.append(slot.names[0].key)

    def _filler(self, slot: Slot, name: Name) -> dict[str, tuple[Kind, Tensor]]:
        """State in place of what a parameter lacks, although others that are stacked with it may have it: never loaded."""
        if not name.layout.grid or not isinstance(name.leaf, ShardedTensor):
            return {}
        local, found = local_of(slot.param), {}
        for what, (kind, value) in self._likest(slot, name).items():
            if kind == ELEMENTS:
                shape: tuple[int, ...] | None = name.leaf.data_shape()
            else:
                shape = reduced_shape(tuple(local.shape), kind[1], keeps_axis=kind[2])
            if shape is not None:
                found[what] = kind, torch.zeros((), dtype=value.dtype, device=local.device).expand(shape)
        return found

    def _likest(self, slot: Slot, name: Name) -> dict[str, tuple[Kind, Any]]:
        """The state of the parameter that is likest to one without: of its key, of its group, with as many axes."""

        def unlike(number: int) -> tuple[bool, bool, bool]:
            other = self._slots[number]
            same_key = any(each.key == name.key for each in other.names)
            return not same_key, other.group != slot.group, other.param.dim() != slot.param.dim()

        likest = min(self._divisible, key=unlike, default=None)
        # A frozen one has state nowhere, unless its key says so.
        if likest is None or not (slot.param.requires_grad or not unlike(likest)[0]):
            return {}
        return self._divisible[likest]

    def _put(self, what: str, kind: Kind, value: Any, name: Name) -> None:
        if not isinstance(what, str) or "." in what:
            raise BadArgumentError(
                f"{self._place}: state {what!r} of parameter {name.key!r} is to be part of a key: expected a text without a "
                "dot as its name"
            )
        prefix = f"{self._place}.state.{what}"
        where, leaf = leaf_of(kind, value, name, prefix)
        self._tree.setdefault("state", {}).setdefault(what, {})[where] = leaf
        self._stored.append(f"{what} of {name.key}")

    def _put_record(self, record: Record, name: Name) -> None:
        layout = name.layout
        made = SharedObject(f"{self._place}.param.{name.key}", record, layout.grid, layout.position)
        other, place = self._records.setdefault(made.unique_key, (made, name.place))
        if other is made:
            self._tree.setdefault("param", {})[name.place] = made
        elif not same(other.data, record):
            raise BadArgumentError(
                f"two parts of parameter {name.key!r} on this rank ({place!r}, {name.place!r}) have state that differs in more "
                "than its elements (steps, group, or which state there is). Give them different keys, or stack them with "
                "prepend_axis_num."
            )

    def finish(self) -> tuple[dict[str, Any], OptimizerReport]:
        """The whole tree and the report."""
        on_host(self._values)
        for digest, options in zip(self._digests, self._options, strict=True):
            key = f"{self._place}.group.{digest}"
            self._tree.setdefault("group", {})[digest] = SharedObject(key, options, (), ())
        rest = {key: value for key, value in self._optimizer.state.items() if not isinstance(key, Tensor)}
        if rest:
            self._tree["rest"] = SharedObject(f"{self._place}.rest", rest, (), ())
        count = sum(map(len, self._values)) + len(rest)
        return self._tree, OptimizerReport(
            stored=tuple(self._stored), values=count, without_state=tuple(dict.fromkeys(self._without))
        )


def _tell_square_ones(slots: Sequence[Slot], every: Sequence[dict[str, tuple[Kind, Any]]]) -> None:
    """A preconditioner of a square part looks like elements: what its name is elsewhere in the group tells."""
    of_shards = {
        (slot.group, what)
        for slot, pieces in zip(slots, every, strict=True)
        for what, (kind, _) in pieces.items()
        if kind == SHARD
    }
    for slot, pieces in zip(slots, every, strict=True) if of_shards else ():
        shape = local_of(slot.param).shape
        if len(shape) > 1 and len(set(shape)) == 1:
            for what, (kind, value) in pieces.items():
                if kind == ELEMENTS and (slot.group, what) in of_shards and not is_distributed(value):
                    pieces[what] = SHARD, value


def _divisible(pieces: Mapping[str, tuple[Kind, Any]]) -> dict[str, tuple[Kind, Any]]:
    """State that is sharded like the parameter, all of which somebody must store."""
    return {
        what: (kind, value)
        for what, (kind, value) in pieces.items()
        if kind[0] in ("elements", "statistic") and what != MAIN_PARAM
    }
