"""A loaded tree put into an optimizer: state by parameter, `step` and the like, hyper-parameters of groups.

Tensors are filled by now; what the optimizer had keeps its memory. torch's own `load_state_dict` is not used: it casts state
to the parameter's dtype. Called by `OptimizerState`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from giantstep.mapping.optimizer import data_of, is_distributed, local_of, place_in_memory
from giantstep.optimizer.groups import plan_groups, set_options
from giantstep.optimizer.kinds import ELEMENTS, MAIN_PARAM, SHARD_OBJECT, Kind, takes
from giantstep.optimizer.options import OptimizerOptions
from giantstep.optimizer.report import OptimizerReport
from giantstep.optimizer.slots import Name, Slot


class Restorer:
    """Puts the state of one optimizer in place.

    Args:
        optimizer: has `state` and `param_groups`.
        slots: its parameters.
        tree: what was loaded, as `requests.want_optimizer` asked for it.
        options: see `OptimizerOptions`.
    """

    def __init__(self, optimizer: Any, slots: Sequence[Slot], tree: Mapping[str, Any], options: OptimizerOptions) -> None:
        self._optimizer = optimizer
        self._slots = slots
        self._tree = tree
        self._options = options
        self._report = OptimizerReport()

    def restore(self) -> OptimizerReport:
        """Do it; say what was done."""
        members: list[dict[str, str]] = [{} for _ in self._optimizer.param_groups]
        dropped = set(self._tree.get("dropped", ()))
        for slot in self._slots:
            found = [(name, record) for name in slot.names if (record := self._record(name)) is not None]
            if found:
                members[slot.group][slot.names[0].place] = found[0][1]["group"]
            if dropped & {name.place for name in slot.names}:
                self._drop(slot)
            elif found:
                self._put(slot, *found[0])
            else:
                self._report.added += (slot.names[0].key,)
                self._derive(slot, slot.names[0])
        stored = {digest: group for digest, group in self._tree.get("group", {}).items() if isinstance(group, dict)}
        keep = self._options.on_group_conflict == "keep"
        plans = plan_groups(self._optimizer.param_groups, members, stored, keep_conflicts=keep)
        set_options(self._optimizer.param_groups, plans)
        self._report.groups = tuple(plan.note for plan in plans if plan.note)
        rest = self._tree.get("rest")
        if isinstance(rest, dict):
            self._optimizer.state.update(rest)
            self._report.values += len(rest)
        return self._report

    def _record(self, name: Name) -> dict[str, Any] | None:
        found = self._tree.get("param", {}).get(name.place)
        record = found[0] if found else None
        return record if isinstance(record, dict) else None

    def _loaded(self, what: str, name: Name) -> Any:
        """What was loaded; None if nothing was."""
        places = self._tree.get("state", {}).get(what, {})
        for place in (name.place, name.key + name.layout.cut, name.key):
            if place in places:
                return places[place]
        return None

    def _drop(self, slot: Slot) -> None:
        """Let a parameter begin without state; of a copy, its own elements can always be loaded."""
        self._report.dropped += (slot.names[0].key,)
        self._optimizer.state.pop(slot.param, None)
        if _is_hollow(self._loaded(MAIN_PARAM, slot.names[0])):
            self._derive(slot, slot.names[0])

    def _put(self, slot: Slot, name: Name, record: Mapping[str, Any]) -> None:
        kinds = {what: tuple(kind) for what, kind in record["tensors"].items() if what != MAIN_PARAM or slot.is_copy}
        tensors = {what: self._loaded(what, name) for what in kinds}
        if any(_is_hollow(value) for what, value in tensors.items() if kinds[what] != SHARD_OBJECT):
            self._report.skipped += (name.key,)
            if _is_hollow(tensors.get(MAIN_PARAM)):
                self._derive(slot, name)
            return
        if tensors.pop(MAIN_PARAM, None) is None:
            self._derive(slot, name)
        else:
            self._report.loaded += (f"{MAIN_PARAM} of {name.key}",)
        held = self._optimizer.state.get(slot.param) or {}
        gone = [what for what in held if what not in tensors and what not in record["values"]]
        self._report.removed += tuple(f"{what} of {name.key}" for what in gone)
        state = {what: _kept(held.get(what), as_state(value, slot.param, kinds[what])) for what, value in tensors.items()}
        for what, value in record["values"].items():
            state[what] = self._value(held.get(what), value, slot, what, record)
        self._report.loaded += tuple(f"{what} of {name.key}" for what in tensors)
        self._report.values += len(record["values"])
        if not state:
            self._report.without_state += (name.key,)
            self._optimizer.state.pop(slot.param, None)
            return
        for what in gone:
            del held[what]
        held.update(state)
        self._optimizer.state[slot.param] = held

    def _value(self, current: Any, value: Any, slot: Slot, what: str, record: Mapping[str, Any]) -> Any:
        """A stored value as the optimizer keeps such: a tensor on the device where it is, or would be, used."""
        if isinstance(current, Tensor):
            place = local_of(current)
            if takes(place, value):
                with torch.no_grad():
                    place.copy_(value) if isinstance(value, Tensor) else place.fill_(value)
                return current
            return value.to(place.device) if isinstance(value, Tensor) else value
        if not isinstance(value, Tensor):
            return value
        group = self._optimizer.param_groups[slot.group]
        on_device = what in record["beside"] or (what == "step" and (group.get("fused") or group.get("capturable")))
        return value.to(local_of(slot.param).device) if on_device else value

    def _derive(self, slot: Slot, name: Name) -> None:
        """Of a main parameter that is not stored: it is the model's parameter, unless that is it already, rounded."""
        data = data_of(name.leaf)
        if data is None or not slot.is_copy:
            return
        with torch.no_grad():
            place, model = local_of(slot.param).detach(), local_of(data).detach()
            if not torch.equal(place.to(model.device, model.dtype).reshape(model.shape), model):
                place.copy_(model.reshape(place.shape))
                self._report.derived += (name.key,)


def _is_hollow(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and local_of(value).is_meta)


def _kept(current: Any, value: Any) -> Any:
    """The tensor that the optimizer has, if that is what was filled."""
    both = isinstance(current, Tensor) and isinstance(value, Tensor)
    return current if both and place_in_memory(current) == place_in_memory(value) else value


def as_state(value: Any, param: Tensor, kind: Kind) -> Any:
    """A loaded tensor as the optimizer is to have it: elements of the parameter have its shape, not that of a view."""
    if not isinstance(value, Tensor):
        return value
    if is_distributed(value) and not is_distributed(param):
        value = local_of(value)
    viewed = kind == ELEMENTS and value.numel() == param.numel() and value.dim() != param.dim()
    if viewed and value.is_contiguous():
        return value.view(param.shape)
    return value
