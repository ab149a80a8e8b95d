"""What is wanted of a checkpoint for one optimizer: the state that the checkpoint has for its parameters.

Reads records and hyper-parameters, which say what there is; makes memory for tensors that the optimizer does not have yet.
The optimizer itself is not touched. Called by `OptimizerState` when `load` has opened the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from giantstep.errors import CorruptionError, MismatchError
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.optimizer import data_of, distributed_like, is_distributed, local_of
from giantstep.mapping.param_layout import built_tensors, distributed_empty, reduced_shape
from giantstep.mapping.placed import StoredNames
from giantstep.mapping.sharded_object import LocalNonpersistentObject, SharedObject
from giantstep.optimizer.groups import same
from giantstep.optimizer.kinds import (
    DISTRIBUTED,
    ELEMENTS,
    MAIN_PARAM,
    SHARD,
    SHARD_OBJECT,
    Kind,
    checked_kind,
    leaf_of,
    statistic,
    stored_name,
)
from giantstep.optimizer.options import OptimizerOptions
from giantstep.optimizer.slots import Name, Slot
from giantstep.shards.object_keys import ObjectPosition

Record = dict[str, Any]
StoredTensor = tuple[tuple[int, ...], torch.dtype]
_FIELDS: dict[str, type] = {"group": str, "tensors": dict, "values": dict, "beside": list, "filler": list}
_SHOWN = 10


@dataclass(slots=True)
class Wanted:
    """What is requested of one optimizer's state.

    Attributes:
        tree: as `records.describe_optimizer` makes it; a record per position that a parameter touches.
        digests: per slot, of the group that it was saved in; None where there is no record of it.
        groups: hyper-parameters by digest.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    digests: list[str | None] = field(default_factory=list)
    groups: dict[str, Any] = field(default_factory=dict)


def want_optimizer(optimizer: Any, slots: Sequence[Slot], place: str, stored: StoredNames, options: OptimizerOptions) -> Wanted:
    """The request for an optimizer.

    Raises:
        MismatchError: some state cannot be cut as the parameters are now; names it.
        CorruptionError: a record is not one.
    """
    asker = _Asker(optimizer, place, stored, options)
    asker.read_records(slots)
    for slot in slots:
        asker.ask(slot)
    return asker.finish()


class _Asker:
    """Makes the request for one optimizer."""

    def __init__(self, optimizer: Any, place: str, stored: StoredNames, options: OptimizerOptions) -> None:
        self._optimizer = optimizer
        self._place = place
        self._stored = stored
        self._options = options
        self._records: dict[str, Record] = {}
        # By place, what is wrong with a record.
        self._faults: dict[str, str] = {}
        self._dropped: list[str] = []
        self._wanted = Wanted()
        # Tensors by parameter and name: tied names share them.
        self._made: dict[tuple[int, str], Tensor] = {}
        self._problems: list[str] = []

    # Records.

    def read_records(self, slots: Sequence[Slot]) -> None:
        """Read the records of all parameters, and the hyper-parameters of all groups."""
        touched: dict[str, list[ObjectPosition]] = {}
        for name in [name for slot in slots for name in slot.names]:
            key = self._record_key(name)
            grid = self._stored.grid(key)
            if grid is not None:
                places = name.layout.positions(grid)
                if places is None:
                    self._faults[name.place] = f"{name.key}: stacked {grid} when saved, its shape is {name.layout.shape} now"
                touched[name.place] = [ObjectPosition(key, grid, position) for position in places or ()]
        flat = [position for positions in touched.values() for position in positions]
        found = iter(self._stored.objects(flat))
        for place, positions in touched.items():
            records = [_checked(next(found), position) for position in positions]
            if records:
                self._note_record(place, positions, records)
        self._read_groups()

    def _note_record(self, place: str, positions: Sequence[ObjectPosition], records: Sequence[Record]) -> None:
        differing = [n for n, record in enumerate(records) if n and not same(record, records[0])]
        if differing:
            pair = f"{positions[0].offset} and {positions[differing[0]].offset}"
            self._faults[place] = f"{place}: positions {pair} had different steps, groups or kinds of state, and are one now"
        self._records[place] = records[0]
        self._wanted.tree.setdefault("param", {})[place] = [
            SharedObject(position.key, None, position.shape, position.offset) for position in positions
        ]

    def _read_groups(self) -> None:
        # Of any optimizer, under whatever name it was saved; those of this one are found again by their keys.
        digests = [digest for digest in self._stored.endings(".group.") if self._stored.grid(self._group_key(digest)) == ()]
        positions = [ObjectPosition(self._group_key(digest), (), ()) for digest in digests]
        for digest, position, found in zip(digests, positions, self._stored.objects(positions), strict=True):
            if not isinstance(found, dict):
                raise CorruptionError(f"object {position.unique_key!r} is no param group")
            self._wanted.groups[digest] = found
            self._wanted.tree.setdefault("group", {})[digest] = SharedObject(position.key, None, (), ())
        lost = [record["group"] for record in self._records.values() if record["group"] not in self._wanted.groups]
        if lost:
            raise CorruptionError(f"param group {self._group_key(lost[0])!r} of {len(lost)} parameters is not stored")

    def _record_key(self, name: Name) -> str:
        return f"{self._place}.param.{name.key}"

    def _group_key(self, digest: str) -> str:
        return f"{self._place}.group.{digest}"

    # State.

    def ask(self, slot: Slot) -> None:
        """Request what is stored of a parameter's state."""
        known = [name for name in slot.names if name.place in self._records]
        if not known:
            self._ask_unknown(slot.names[0])
            self._wanted.digests.append(None)
            return
        self._wanted.digests.append(self._records[known[0].place]["group"])
        for name in known:
            record = self._records[name.place]
            for what in record["filler"]:
                self._stored.settle(f"{self._place}.state.{what}.{name.key}")
            self._ask_tensors(slot, name, record)

    def _ask_unknown(self, name: Name) -> None:
        """A parameter without a record: added, or stacked so that no record can be its."""
        key = self._record_key(name)
        if self._stored.grid(key) is None:
            asked = SharedObject(key, None, name.layout.grid, name.layout.position)
            self._wanted.tree.setdefault("param", {})[name.place] = [asked]
        elif self._options.on_uncuttable == "drop":
            self._stored.settle(key)
            self._dropped.append(name.place)
        else:
            self._problems.append(self._faults[name.place])

    def _ask_tensors(self, slot: Slot, name: Name, record: Record) -> None:
        leaves: dict[str, tuple[str, Any]] = {}
        problems = [self._faults[name.place]] if name.place in self._faults else []
        # Of a copy that is none here nothing is requested, and so it is reported as missing: the model has fewer bits.
        wanted = {
            what: self._located(slot, name, what, kind)
            for what, kind in record["tensors"].items()
            if what != MAIN_PARAM or slot.is_copy
        }
        # Where one is left out, all others stay as they are too.
        whole = not any(self._is_absent(*place) for place in wanted.values())
        for what, (kind, keys) in wanted.items():
            made = self._leaf(slot, name, what, kind, keys, in_place=whole or what == MAIN_PARAM)
            if isinstance(made, str):
                problems.append(made)
            else:
                leaves[what] = made
        if problems and self._options.on_uncuttable == "drop":
            self._dropped.append(name.place)
            for what in record["tensors"].keys() - {MAIN_PARAM}:
                self._stored.settle(f"{self._place}.state.{what}.{name.key}")
            leaves, problems = {what: leaf for what, leaf in leaves.items() if what == MAIN_PARAM}, []
        self._problems += problems
        for what, (where, leaf) in leaves.items():
            self._wanted.tree.setdefault("state", {}).setdefault(what, {})[where] = leaf

    def _located(self, slot: Slot, name: Name, what: str, kind: Kind) -> tuple[Kind, list[str]]:
        """The kind of stored state under this layout, and its keys: of a factory those of its parts."""
        prefix = f"{self._place}.state.{what}"
        kind = self._kind_here(kind, slot, name, what)
        sample = leaf_of(kind, None if kind == SHARD_OBJECT else self._shaped(slot, kind, None), name, prefix)[1]
        parts = built_tensors(sample) if isinstance(sample, ShardedTensorFactory) else ()
        return kind, [part.key for part in parts] or [stored_name(kind, name, prefix, sample)]

    def _is_absent(self, kind: Kind, keys: Sequence[str]) -> bool:
        held = (self._stored.tensor(key) is not None or self._stored.is_wrapper(key) for key in keys)
        return kind != SHARD_OBJECT and not all(held)

    def _leaf(
        self, slot: Slot, name: Name, what: str, kind: Kind, keys: Sequence[str], *, in_place: bool
    ) -> tuple[str, Any] | str:
        """The leaf to be filled, or a problem. What is not stored, or left out, is requested without memory."""
        prefix = f"{self._place}.state.{what}"
        if kind == SHARD_OBJECT:
            where, leaf = leaf_of(kind, None, name, prefix)
            return (where, leaf) if self._stored.grid(keys[0]) is not None else self._uncuttable(name, what)
        absent = self._is_absent(kind, keys)
        held = None if absent else self._stored.tensor(keys[0])
        if held is None and (kind == SHARD or kind[0] == "statistic"):
            return self._uncuttable(name, what)
        value = self._made.get((id(slot), what))
        if value is None and not absent and (in_place or held is None):
            value = self._fitting(slot, what, kind, held)
        if value is None and held is None and not absent:
            raise MismatchError(
                f"state {what!r} of parameter {name.key!r} is stored as a wrapper tensor, which cannot be made here: expected "
                f"one in {self._place}. Let the optimizer make its state before loading, by a step whose result is overwritten."
            )
        if value is None:
            value = self._empty(slot, name, kind, held)
        self._made[id(slot), what] = value
        return leaf_of(kind, value, name, prefix)

    def _kind_here(self, kind: Kind, slot: Slot, name: Name, what: str) -> Kind:
        """The kind of stored state under this layout: what is whole in the checkpoint may be a DTensor here, or was one."""
        of_shards = kind == SHARD or kind[0] == "statistic"
        if of_shards and is_distributed(slot.param) and self._stored.tensor(f"{self._place}.state.{what}.{name.key}"):
            return DISTRIBUTED
        if kind == DISTRIBUTED and name.layout.cut and not is_distributed(data_of(name.leaf)):
            axis, keeps = self._options.statistics.get(what, (0, True))
            return statistic(axis, keeps_axis=keeps) if axis else SHARD
        return kind

    def _fitting(self, slot: Slot, what: str, kind: Kind, held: StoredTensor | None) -> Tensor | None:
        """The tensor that the optimizer has, if it can be filled."""
        state = self._optimizer.state.get(slot.param) or {}
        current = slot.param if what == MAIN_PARAM else state.get(what)
        if not isinstance(current, Tensor) or local_of(current).is_meta:
            return None
        if kind in (SHARD, DISTRIBUTED):
            return current if held is None or tuple(current.shape) == held[0] else None
        shapes = {tuple(current.shape), tuple(local_of(current).shape)}
        return current if tuple(self._shaped(slot, kind, None).shape) in shapes else None

    def _shaped(self, slot: Slot, kind: Kind, dtype: torch.dtype | None, device: Any = "meta") -> Tensor:
        """A tensor shaped as state of a kind is; of kinds with shapes of their own, one without elements."""
        local = local_of(slot.param).detach()
        if kind == ELEMENTS:
            return torch.empty_like(local, dtype=dtype, device=device, requires_grad=False)
        shape: tuple[int, ...] = (0,)
        if kind[0] == "statistic":
            shape = reduced_shape(tuple(local.shape), kind[1], keeps_axis=kind[2]) or ()
        return torch.empty(shape, dtype=dtype or local.dtype, device=device)

    def _empty(self, slot: Slot, name: Name, kind: Kind, held: StoredTensor | None) -> Tensor:
        """Memory for a tensor that the optimizer does not have; none if it is not stored."""
        if held is None:
            return self._shaped(slot, kind, None)
        shape, dtype = held
        device = local_of(slot.param).device if self._options.device is None else torch.device(self._options.device)
        if kind == DISTRIBUTED:
            return distributed_empty(data_of(name.leaf), shape, dtype)
        if kind == SHARD:
            return torch.empty(shape, dtype=dtype, device=device)
        made = self._shaped(slot, kind, dtype, device)
        return distributed_like(slot.param, made) if kind == ELEMENTS else made

    def _uncuttable(self, name: Name, what: str) -> str:
        return f"{what} of {name.key}: nothing is stored for the shard {name.layout.cut or '(all of it)'}"

    # The whole.

    def finish(self) -> Wanted:
        """The request; raises if some state cannot be loaded."""
        if self._problems:
            shown = "\n".join(f"  {problem}" for problem in self._problems[:_SHOWN])
            more = f"\n  ... and {len(self._problems) - _SHOWN} more" if len(self._problems) > _SHOWN else ""
            raise MismatchError(
                f"{len(self._problems)} pieces of state of {self._place} cannot be cut as its parameters are now. State that "
                "was computed from the shard of a parameter that a rank held (a statistic over an axis that is cut, a "
                f"preconditioner) holds for that shard only:\n{shown}{more}\nLoad in the layout in which they were saved, "
                "or pass OptimizerOptions(on_uncuttable='drop') to let these parameters begin without state."
            )
        rest = f"{self._place}.rest"
        if self._stored.grid(rest) == ():
            self._wanted.tree["rest"] = SharedObject(rest, None, (), ())
        if self._dropped:
            self._wanted.tree["dropped"] = LocalNonpersistentObject(self._dropped)
        return self._wanted


def _checked(found: Any, position: ObjectPosition) -> Record:
    """A record, with kinds as tuples."""
    kinds: dict[Any, Kind | None] = {}
    fits = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in _FIELDS.items())
    if fits:
        kinds = {name: checked_kind(kind) for name, kind in found["tensors"].items()}
        fits = None not in kinds.values() and all(isinstance(name, str) for name in (*kinds, *found["filler"]))
    if not fits:
        raise CorruptionError(f"object {position.unique_key!r} is no record of a parameter's state")
    return {**found, "tensors": kinds}
