"""Extra states of modules: objects, whatever they are made of; present or missing on either side."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import DisagreementError, KeyMismatchError
from giantstep.group.threads import ThreadGroup
from giantstep.testing.ranks import RanksFailedError, run_ranks


class Scaled(torch.nn.Linear):
    """A layer with something beside its weights."""

    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Model(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 2), layer


EXTRA: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "empty tensor": lambda: torch.empty(0, dtype=torch.uint8),
    "bytes as a tensor": lambda: torch.arange(7, dtype=torch.uint8),
    "dict": lambda: {"amax": torch.ones(3), "scale": {"fwd": torch.tensor(2.0)}, "recipe": ("delayed", 16)},
    "file": lambda: io.BytesIO(b"abc"),
    "list": lambda: [torch.ones(2), 3],
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one.getvalue() == other.getvalue() if isinstance(one, io.BytesIO) else bool(one == other)


@pytest.mark.parametrize("before", EXTRA)
@pytest.mark.parametrize("kind", EXTRA)
def test_whatever_it_is_comes_back_whatever_was_there_before(tmp_path: Path, kind: str, before: str) -> None:
    gs.save({"model": Model(Scaled(EXTRA[kind]()))}, tmp_path)
    assert gs.open_checkpoint(tmp_path).keys() == [
        "model.first.bias",
        "model.first.weight",
        "model.second.bias",
        "model.second.weight",
    ]
    target = Model(Scaled(EXTRA[before]()))
    gs.load({"model": target}, tmp_path)
    assert same(target.second.extra, EXTRA[kind]())  # type: ignore[arg-type]


def test_what_the_checkpoint_does_not_have_stays_as_it_is_and_is_reported(tmp_path: Path) -> None:
    plain = Model(torch.nn.Linear(2, 2))
    gs.save({"model": plain}, tmp_path)
    target = Model(Scaled({"amax": torch.ones(3)}))
    report = gs.load({"model": target}, tmp_path).report
    assert torch.equal(target.second.weight, plain.second.weight)
    assert same(target.second.extra, {"amax": torch.ones(3)})
    assert report.skipped == ("model.second._extra_state",)
    assert report.unexpected == ()


def test_what_the_model_does_not_have_is_missing_unless_a_policy_for_this_ending_says_otherwise(tmp_path: Path) -> None:
    gs.save({"model": Model(Scaled({"amax": torch.ones(3)}))}, tmp_path)
    target = Model(torch.nn.Linear(2, 2))
    with pytest.raises(KeyMismatchError, match=r"model\.second\._extra_state"):
        gs.load({"model": target}, tmp_path)
    options = gs.LoadOptions(strict_overrides={"*_extra_state": gs.StrictHandling.IGNORE_ALL})
    report = gs.load({"model": target}, tmp_path, options=options).report
    assert report.missing == ("model.second._extra_state",)


def test_ranks_with_different_extra_states_are_told_to_give_each_its_own(tmp_path: Path) -> None:
    model = Model(Scaled(None))

    def save(group: ThreadGroup) -> None:
        # Threads share torch's generator, so each copies one model.
        mine = copy.deepcopy(model)
        mine.second.extra = {"amax": group.rank}
        gs.save({"model": mine}, tmp_path, process_group=group)

    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, save)
    assert all(isinstance(error, DisagreementError) for error in caught.value.errors)
    assert "model.second._extra_state" in str(caught.value)


def test_the_longest_of_prefixes_and_endings_decides(tmp_path: Path) -> None:
    gs.save({"a": torch.ones(1)}, tmp_path)
    ignore, strict = gs.StrictHandling.IGNORE_ALL, gs.StrictHandling.RAISE_ALL
    wanted = {"a": torch.ones(1), "b": {"long": {"_extra_state": torch.ones(1)}}}
    for overrides, passes in (
        ({"*_extra_state": ignore}, True),
        ({"*_extra_state": ignore, "b.long._extra_state": strict}, False),
        ({"*_extra_state": strict, "b.": ignore}, False),
        ({"*": ignore}, True),
        ({"*other": ignore}, False),
    ):
        options = gs.LoadOptions(strict_overrides=overrides)
        if passes:
            gs.load(wanted, tmp_path, options=options)
        else:
            with pytest.raises(KeyMismatchError):
                gs.load(wanted, tmp_path, options=options)
