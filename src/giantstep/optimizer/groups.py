"""Param groups by what they say and which parameters they hold, not by position.

The hyper-parameters of a group are stored under a digest of themselves, and every parameter's record names its group's.
So a group is whole again wherever its parameters are, in whichever order and number of groups. Called by `records`,
`requests` and `OptimizerState`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import MismatchError
from giantstep.optimizer.kinds import takes

# Which tensors, and what they are called here.
_MEMBERS = {"params", "param_names"}
# How this process computes, not what: never taken from a checkpoint.
_MANNER = {"foreach", "fused", "capturable", "differentiable"}
# What schedules change: says nothing of which group it is.
_VARYING = {"lr", "initial_lr", "momentum", "betas", "step", "max_lr", "min_lr"}

_ABSENT = object()

Group = Mapping[str, Any]


def options_of(group: Group) -> dict[str, Any]:
    """The hyper-parameters of a param group."""
    return {str(name): group[name] for name in sorted(group, key=str) if name not in _MEMBERS}


def digest_of(options: Mapping[str, Any], place: str) -> str:
    """Names hyper-parameters by what they are.

    Raises:
        UnsupportedTypeError: one cannot be stored; names it.
    """
    return hashlib.sha256(OBJECT_CODEC.encode(options, (place, "group"))).hexdigest()[:16]


def same(left: Any, right: Any) -> bool:
    """Whether two stored values are equal, to the bit."""
    return OBJECT_CODEC.encode(left) == OBJECT_CODEC.encode(right)


@dataclass(slots=True)
class GroupPlan:
    """What becomes of a param group.

    Attributes:
        values: hyper-parameters to be set.
        note: what is to be said of it; empty where nothing is.
    """

    values: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def plan_groups(
    groups: Sequence[Group],
    members: Sequence[Mapping[str, str]],
    stored: Mapping[str, Group],
    *,
    keep_conflicts: bool,
) -> list[GroupPlan]:
    """Find for each group the hyper-parameters that it is to have.

    Args:
        groups: the optimizer's.
        members: for each, its parameters that the checkpoint knows, with the digest of the group that they were saved in.
        stored: hyper-parameters by digest.
        keep_conflicts: what differs between parameters of a group stays as the optimizer has it.

    Raises:
        MismatchError: parameters of a group were saved with different hyper-parameters; names group, option and two of them.
    """
    return [
        _plan(number, group, held, stored, keep_conflicts=keep_conflicts)
        for number, (group, held) in enumerate(zip(groups, members, strict=True))
    ]


def _plan(
    number: int, group: Group, members: Mapping[str, str], stored: Mapping[str, Group], *, keep_conflicts: bool
) -> GroupPlan:
    digests = list(dict.fromkeys(members.values()))
    what = f"group {number}" + (f" ({group['name']!r})" if "name" in group else "")
    if len(digests) > 1 and "name" in group:
        named = [digest for digest, found in stored.items() if found.get("name") == group["name"]]
        if len(named) == 1:
            moved = [key for key, digest in members.items() if digest != named[0]]
            return _manner(group, stored[named[0]], f"{what}: {len(moved)} parameters were in other groups: {moved[0]}")
    if len(digests) > 1:
        return _several(what, members, stored, keep_conflicts=keep_conflicts)
    if digests:
        return _manner(group, stored[digests[0]], "", what)
    alike = _like(group, stored)
    if alike is not None:
        return _manner(group, alike, "", what)
    why = "none of its parameters was saved" if group["params"] else "it is empty, and none like it was saved"
    return GroupPlan({}, f"{what}: left as it is: {why}")


def _manner(group: Group, options: Group, note: str, what: str = "") -> GroupPlan:
    """All hyper-parameters but those that say how this process computes."""
    kept = [name for name in options if name in _MANNER and group.get(name) != options[name]]
    if kept and not note:
        note = f"{what}: keeps its own {', '.join(kept)}"
    # Which algorithm it is: what was saved may be another optimizer's.
    others = [name for name in options if name not in _MANNER and _is_switched(options[name], group.get(name, _ABSENT))]
    if others:
        note = f"{note or what}; takes {', '.join(f'{name}={options[name]!r}' for name in others)}, unlike this optimizer"
    return GroupPlan({name: value for name, value in options.items() if name not in _MANNER}, note)


def _is_switched(stored: Any, current: Any) -> bool:
    """Whether a stored hyper-parameter is none that the group has, or a switch that it has otherwise."""
    return current is _ABSENT or (isinstance(stored, bool) and current is not stored)


def _several(what: str, members: Mapping[str, str], stored: Mapping[str, Group], *, keep_conflicts: bool) -> GroupPlan:
    firsts: dict[str, str] = {}
    for key, digest in members.items():
        firsts.setdefault(digest, key)
    options = [{name: value for name, value in stored[digest].items() if name not in _MANNER} for digest in firsts]
    names = list(dict.fromkeys(name for found in options for name in found))
    differing = [
        name for name in names if any(name not in found or not same(found[name], options[0].get(name)) for found in options)
    ]
    if differing and not keep_conflicts:
        told = "; ".join(
            f"{name}: "
            + ", ".join(f"{stored[digest].get(name, 'none')!r} of {key!r}" for digest, key in list(firsts.items())[:3])
            for name in differing[:5]
        )
        raise MismatchError(
            f"parameters of {what} were saved in groups with different hyper-parameters ({told}). Divide them into groups as "
            "they were saved, give groups a 'name', or pass OptimizerOptions(on_group_conflict='keep')."
        )
    note = f"{what}: keeps its own {', '.join(differing)}, in which its parameters differ" if differing else ""
    return GroupPlan({name: value for name, value in options[0].items() if name not in differing}, note)


def _like(group: Group, stored: Mapping[str, Group]) -> Group | None:
    """For a group without parameters that were saved: the stored group of its name, or if it is empty the one like it."""
    if group["params"] and "name" not in group:
        return None
    named = [found for found in stored.values() if "name" in group and found.get("name") == group["name"]]
    if named or group["params"]:
        return named[0] if len(named) == 1 else None
    ours = _constant(group)
    alike = [found for found in stored.values() if same(_constant(found), ours)]
    return alike[0] if len(alike) == 1 else None


def _constant(group: Group) -> dict[str, Any]:
    return {name: value for name, value in options_of(group).items() if name not in _VARYING | _MANNER}


def set_options(groups: Sequence[dict[str, Any]], plans: Sequence[GroupPlan]) -> None:
    """Give groups their hyper-parameters; what is a tensor stays the tensor that it is, and a number a number."""
    written: dict[int, Any] = {}
    for group, plan in zip(groups, plans, strict=True):
        for name, value in plan.values.items():
            current = group.get(name)
            if isinstance(current, torch.Tensor) and _fits(current, value):
                with torch.no_grad():
                    if not same(written.setdefault(id(current), value), value):
                        # torch gives all groups one tensor at first: these are to have different values.
                        group[name] = current = current.clone()
                    current.copy_(value.view_as(current)) if isinstance(value, torch.Tensor) else current.fill_(value)
            elif isinstance(value, torch.Tensor) and isinstance(current, float | int):
                group[name] = value.item()
            else:
                # Groups that were saved alike need not stay so.
                group[name] = copy.deepcopy(value)


def _fits(current: torch.Tensor, value: Any) -> bool:
    """Whether a hyper-parameter that is a tensor stays that tensor, with the stored value."""
    return value.numel() == current.numel() if isinstance(value, torch.Tensor) else takes(current, value)
