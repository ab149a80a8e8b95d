"""All policies for keys that request and checkpoint do not share; prefixes, renaming, filtering; one readable report."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, DisagreementError, KeyMismatchError, MismatchError
from giantstep.options import StrictHandling
from giantstep.planning.matching import Holdings, Requests, Strictness, judge
from giantstep.testing.ranks import run_ranks, run_ranks_collecting

ALL = list(StrictHandling)
RAISES_UNEXPECTED = {StrictHandling.ASSUME_OK_UNEXPECTED, StrictHandling.RAISE_UNEXPECTED, StrictHandling.RAISE_ALL}
LOGS_UNEXPECTED = {StrictHandling.LOG_UNEXPECTED, StrictHandling.LOG_ALL}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Tensors a, b and sharded objects o, p."""
    objects = {name: gs.ShardedObject(name, name, (1,), (0,)) for name in "op"}
    gs.save({"a": torch.ones(2), "b": torch.full((2,), 2.0), **objects, "common": 1}, tmp_path)
    return tmp_path


def everything() -> dict[str, Any]:
    objects = {name: gs.ShardedObject(name, None, (1,), (0,)) for name in "op"}
    return {"a": torch.zeros(2), "b": torch.zeros(2), **objects}


def test_the_values_are_megatrons() -> None:
    assert {policy.value for policy in ALL} == {
        *("assume_ok_unexpected", "log_unexpected", "log_all", "raise_unexpected"),
        *("raise_all", "return_unexpected", "return_all", "ignore_all"),
    }


@pytest.mark.parametrize("strict", ALL)
def test_an_exact_match_is_silent_under_every_policy(stored: Path, strict: StrictHandling, caplog: Any) -> None:
    loaded = gs.load(everything(), stored, strict=strict)
    assert (loaded.report.missing, loaded.report.unexpected) == ((), ())
    assert (loaded.report.tensors, loaded.report.objects) == (2, 2)
    assert not caplog.records


@pytest.mark.parametrize("strict", ALL)
def test_unexpected_keys_under_every_policy(stored: Path, strict: StrictHandling, caplog: Any) -> None:
    """Requested but not in the checkpoint: a tensor and an object."""
    extra = torch.zeros(1)
    wanted = everything() | {"new": extra, "obj": gs.ShardedObject("new object", "local", (1,), (0,))}
    _, errors = run_ranks_collecting(2, lambda group: gs.load(wanted, stored, strict=strict, process_group=group))
    if strict in RAISES_UNEXPECTED:
        assert {type(error) for error in errors} == {KeyMismatchError}
        assert len({str(error) for error in errors}) == 1
        text = str(errors[0])
        assert "2 keys are requested but not in the checkpoint" in text
        assert "requested by no rank" not in text
        assert not wanted["a"].any()
    else:
        assert errors == [None, None]
        loaded = gs.load(wanted, stored, strict=strict)
        assert loaded.report.unexpected == ("new", "new object")
        assert loaded.report.missing == ()
        assert loaded["a"].tolist() == [1, 1]
        assert loaded["new"] is extra
        assert loaded["obj"] == "local"
    # Once for all ranks; the second call here is alone.
    assert len(caplog.records) == (2 if strict in LOGS_UNEXPECTED else 0)
    if strict in LOGS_UNEXPECTED:
        assert "2 keys are requested but not in the checkpoint:\n    new\n    new object" in caplog.text
        assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("strict", ALL)
def test_missing_keys_under_every_policy(stored: Path, strict: StrictHandling, caplog: Any) -> None:
    """In the checkpoint but requested by no rank: a tensor and an object. The common state is never missing."""
    wanted = everything()
    del wanted["b"], wanted["p"]
    _, errors = run_ranks_collecting(2, lambda group: gs.load(wanted, stored, strict=strict, process_group=group))
    if strict is StrictHandling.RAISE_ALL:
        assert {type(error) for error in errors} == {KeyMismatchError}
        assert "2 keys are in the checkpoint but requested by no rank:\n    b\n    p\n" in str(errors[0])
        assert "common" not in str(errors[0])
    else:
        assert errors == [None, None]
        loaded = gs.load(wanted, stored, strict=strict)
        assert loaded.report.missing == ("b", "p")
        assert loaded["common"] == 1
    assert len(caplog.records) == (2 if strict is StrictHandling.LOG_ALL else 0)


def test_a_key_is_missing_only_if_no_rank_asks_and_unexpected_if_any_does(stored: Path) -> None:
    def load(group: Any) -> Any:
        names = ("a", "o", "x") if group.rank else ("b", "p")
        wanted = {name: value for name, value in everything().items() if name in names}
        if group.rank:
            wanted["x"] = torch.zeros(1)
        return gs.load(wanted, stored, strict=StrictHandling.RETURN_ALL, process_group=group).report

    for report in run_ranks(2, load):
        assert (report.missing, report.unexpected) == ((), ("x",))


def test_prefixes_have_policies_of_their_own(stored: Path, caplog: Any) -> None:
    wanted = everything() | {"opt.m": torch.zeros(1), "opt.x.v": torch.zeros(1)}
    del wanted["b"]

    def load(**overrides: StrictHandling) -> Any:
        named = {name.replace("_", "."): policy for name, policy in overrides.items()}
        return gs.load(wanted, stored, options=gs.LoadOptions(strict_overrides=named)).report

    with pytest.raises(KeyMismatchError, match=r"1 key is in the checkpoint"):
        load(opt=StrictHandling.IGNORE_ALL)
    with pytest.raises(KeyMismatchError, match=r"opt\.x\.v") as caught:
        load(opt=StrictHandling.LOG_ALL, opt_x=StrictHandling.RAISE_ALL, b=StrictHandling.IGNORE_ALL)
    assert "opt.m" not in str(caught.value)
    assert not caplog.records
    report = load(opt=StrictHandling.LOG_ALL, opt_x=StrictHandling.IGNORE_ALL, b=StrictHandling.RETURN_ALL)
    assert (report.missing, report.unexpected) == (("b",), ("opt.m", "opt.x.v"))
    assert [record.getMessage().splitlines()[1:] for record in caplog.records] == [
        ["  1 key is requested but not in the checkpoint:", "    opt.m"]
    ]


def test_renaming_by_a_function_and_by_a_mapping(stored: Path) -> None:
    wanted = {"module.a": torch.zeros(2), "module.o": gs.ShardedObject("module.o", None, (1,), (0,))}
    lenient = StrictHandling.RAISE_UNEXPECTED
    by_function = gs.LoadOptions(rename=lambda key: key.removeprefix("module."))
    loaded = gs.load(wanted, stored, strict=lenient, options=by_function)
    assert loaded["module.a"].tolist() == [1, 1]
    assert loaded["module.o"] == "o"
    swapped = gs.load(everything(), stored, options=gs.LoadOptions(rename={"a": "b", "b": "a", "o": "p", "p": "o"}))
    assert (swapped["a"].tolist(), swapped["b"].tolist(), swapped["o"], swapped["p"]) == ([2, 2], [1, 1], "p", "o")
    assert swapped.report.missing == ()
    with pytest.raises(KeyMismatchError, match=r"module\.a"):
        gs.load(wanted, stored, strict=lenient, options=gs.LoadOptions(rename={"module.o": "o"}))


def test_what_renaming_leaves_out_stays_as_it_is(stored: Path) -> None:
    wanted = everything() | {"new": torch.full((1,), 7.0), "o": gs.ShardedObject("o", "local", (1,), (0,))}

    def only_b(key: str) -> str | None:
        return key if key == "b" else None

    # Stored or not, what is left out is neither missing nor unexpected.
    loaded = gs.load(wanted, stored, options=gs.LoadOptions(rename=only_b))
    assert (loaded["a"].tolist(), loaded["b"].tolist(), loaded["new"].tolist(), loaded["o"]) == ([0, 0], [2, 2], [7], "local")
    assert loaded.report.skipped == ("a", "new", "o", "p")
    assert loaded.report.missing == ()
    assert (loaded.report.tensors, loaded.report.objects) == (1, 0)


def test_several_requests_of_one_stored_tensor(stored: Path) -> None:
    wanted = {"policy": torch.zeros(2), "reference": torch.zeros(2, dtype=torch.float64)}
    options = gs.LoadOptions(rename=lambda _: "b", cast="floating")
    loaded = gs.load(wanted, stored, strict=StrictHandling.RAISE_UNEXPECTED, options=options)
    assert loaded["policy"].tolist() == loaded["reference"].tolist() == [2, 2]


def test_a_rename_that_gives_no_text_and_ranks_that_rename_differently(stored: Path) -> None:
    with pytest.raises(BadArgumentError, match=r"rename\('a'\)=5"):
        gs.load(everything(), stored, options=gs.LoadOptions(rename=lambda _: 5))  # type: ignore[arg-type,return-value]

    def load(group: Any) -> None:
        options = gs.LoadOptions(rename={"a": "b"} if group.rank else None)
        gs.load(everything(), stored, process_group=group, options=options)

    _, errors = run_ranks_collecting(2, load)
    assert {type(error) for error in errors} == {DisagreementError}


def requests_of(count: int) -> Requests:
    names = [f"unexpected.{n}" for n in range(count)]
    triples = [(f"k{n}", "(1,)", "(2,)") for n in range(count)]
    return Requests([], [], names, triples, triples, triples)


def test_the_report_has_at_most_fifty_lines_however_many_kinds_of_mismatch() -> None:
    holdings = Holdings("there", [f"stored.{n}" for n in range(10_000)])
    for chosen in itertools.product([False, True], repeat=5):
        full = requests_of(10_000)
        request = Requests(list(range(10_000)) if not chosen[4] else [])
        for name, kept in zip(("unexpected", "shapes", "dtypes", "grids"), chosen[:4], strict=True):
            if kept:
                setattr(request, name, getattr(full, name))
        if not any(chosen):
            judge([request], holdings, Strictness(StrictHandling.RAISE_ALL))
            continue
        with pytest.raises(MismatchError) as caught:
            judge([request], holdings, Strictness(StrictHandling.RAISE_ALL))
        lines = str(caught.value).splitlines()
        assert len(lines) <= 50
        assert sum("10000" in line for line in lines) == sum(chosen)
        assert sum("... and" in line for line in lines) == sum(chosen)


def test_the_warning_has_at_most_fifty_lines_too() -> None:
    holdings = Holdings("there", [f"stored.{n}" for n in range(10_000)])
    request = Requests(unexpected=[f"unexpected.{n}" for n in range(10_000)])
    verdict = judge([request, request], holdings, Strictness(StrictHandling.LOG_ALL))
    assert len(verdict.warning.splitlines()) <= 50
    assert len(verdict.differences.missing) == len(verdict.differences.unexpected) == 10_000


def test_keys_that_hold_line_breaks_stay_on_one_line() -> None:
    with pytest.raises(KeyMismatchError) as caught:
        judge([Requests(unexpected=["a\nb"])], Holdings("there", []), Strictness(StrictHandling.RAISE_ALL))
    assert "'a\\nb'" in str(caught.value)


def test_the_report_prints_shortly(stored: Path) -> None:
    wanted = {"a": torch.zeros(2, dtype=torch.float64)} | {f"x{n}": torch.zeros(1) for n in range(50)}
    options = gs.LoadOptions(cast="any", rename={"x7": None})
    text = str(gs.load(wanted, stored, strict=StrictHandling.IGNORE_ALL, options=options).report)
    assert len(text.splitlines()) == 5
    assert "left out: 1: x7" in text
    assert "not in the checkpoint: 49: x0, x1" in text


@pytest.mark.parametrize(
    "settings",
    [
        {"strict_overrides": {"a": "raise_all"}},
        {"strict_overrides": [("a", StrictHandling.RAISE_ALL)]},
        {"rename": {"a": 5}},
        {"rename": "b"},
        {"on_object_reshard": "keep"},
        {"on_object_reshard": {"a": "keep"}},
        {"dequantise": 1},
    ],
)
def test_options_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(BadArgumentError, match=next(iter(settings))):
        gs.LoadOptions(**settings)


class Schedule:
    """An object whose state is plain values only."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.loads = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "empty": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.loads = state["epoch"], self.loads + 1


def test_a_stateful_object_of_which_nothing_is_stored_is_unexpected_and_left_alone(stored: Path) -> None:
    schedule = Schedule(3)
    with pytest.raises(KeyMismatchError, match=r"train\.schedule"):
        gs.load({**everything(), "train": {"schedule": schedule}}, stored)
    loaded = gs.load({**everything(), "train": {"schedule": schedule}}, stored, strict=StrictHandling.RETURN_ALL)
    assert loaded.report.unexpected == ("train.schedule",)
    assert loaded["train"]["schedule"] is schedule
    assert (schedule.epoch, schedule.loads) == (3, 0)
    gs.save({"train": {"schedule": Schedule(9)}}, stored)
    gs.load({"train": {"schedule": schedule}}, stored)
    assert (schedule.epoch, schedule.loads) == (9, 1)


def test_a_state_that_was_stored_empty_is_stored(stored: Path) -> None:
    class Empty(Schedule):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loads += 1

    gs.save({"s": Empty(0)}, stored)
    given: list[dict[str, Any]] = []
    schedule = Schedule(1)
    schedule.load_state_dict = given.append  # type: ignore[method-assign]
    gs.load({"s": schedule}, stored)
    assert ["epoch" in state for state in given] == [False]


@pytest.mark.parametrize("rows", [[], [4], [5, 3, 4, 9, 4, 0, 1], list(range(100))])
def test_requested_rows_travel_as_runs(rows: list[int]) -> None:
    assert Requests.decode(Requests(rows=rows).encode()).rows == sorted(set(rows))
    assert len(Requests(rows=list(range(10_000))).encode()) < 100
