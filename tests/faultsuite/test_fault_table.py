"""The table of faults tells what a library did: libraries that lose, lie, hang or detect are told apart."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FAULTS = Path(__file__).parents[2] / "faults"


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FAULTS))
    yield
    for name in ("libraries", "verdicts", "damage", "power", "scenarios", "workers", "worker"):
        sys.modules.pop(name, None)


def answer(path: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.startswith("E"):
        return {"word": "failed", "path": path, "error": "Error: broken"}
    return {"word": "loaded", "path": path, "value": value}


@pytest.mark.parametrize(
    ("values", "committed", "outcome"),
    [
        ([7, 6, 5], 7, "survives"),
        ([8, 7], 7, "survives"),
        (["E", 7, 6], 7, "survives"),
        (["E", 6], 7, "LOSES"),
        (["E", "E"], 7, "LOSES"),
        ([], 7, "LOSES"),
        (["a mix", 7], 7, "SILENT"),
        ([-7, 7], 7, "SILENT"),
        ([], None, "survives"),
    ],
)
def test_after_a_kill_the_newest_that_loads_must_be_the_last_committed_or_newer(
    values: list[Any], committed: int | None, outcome: str
) -> None:
    from verdicts import of_latest

    assert of_latest([answer(str(number), value) for number, value in enumerate(values)], committed).outcome.value == outcome


@pytest.mark.parametrize(("value", "outcome"), [(1, "survives"), ("E", "detects"), (2, "SILENT"), ("a mix", "SILENT")])
def test_what_is_damaged_must_load_right_or_not_at_all(value: Any, outcome: str) -> None:
    from verdicts import of_load

    assert of_load([answer("p", value)], [1]).outcome.value == outcome
    assert of_load([], [1]).outcome.value == "detects", "a process that dies loads nothing wrong"


def test_of_several_the_worst_counts_with_its_number() -> None:
    from verdicts import Outcome, Verdict, worst

    found = worst([Verdict(Outcome.DETECTS), Verdict(Outcome.SILENT, "loads 3"), Verdict(Outcome.SURVIVES)])
    assert str(found) == "SILENT (1 of 3: loads 3)"


def test_a_state_with_one_wrong_element_is_a_mix() -> None:
    from worker import state_of, value_of

    state = state_of(41)
    assert value_of(state) == 41
    state["t3"][77] += 1
    assert value_of(state) == "a mix"
    state = state_of(41)
    state["t0"], state["t1"] = state["t1"], state["t0"]
    assert value_of(state) == "a mix"


def test_what_was_not_flushed_is_found_in_what_strace_writes(tmp_path: Path) -> None:
    import power

    log = tmp_path / "log"
    root = tmp_path / "step"
    (root / "data").mkdir(parents=True)
    for name in ("data/a", "data/b", "record"):
        (root / name).write_bytes(b"x")
    log.write_text(
        f"12 fsync(3<{root}/data/a>) = 0\n"
        f"12 fsync(3<{root}/record.tmp>)  = 0\n"
        f'12 rename("{root}/record.tmp", "{root}/record") = 0\n'
        f"13 fdatasync(4<{root}>) = 0\n"
        f"13 fsync(5<{root}/data/b>) = -1 EIO (Input/output error)\n"
    )
    flushes = power.Flushes.read(log)
    assert not flushes.everything
    assert power.lose_bytes(root, flushes) == ["b"]
    assert (root / "data" / "a").read_bytes() == (root / "record").read_bytes() == b"x"
    assert sorted(power.lose_names(root, flushes)) == ["a", "b", "step"]
    assert not root.exists()


def test_giantstep_is_tried_for_real(tmp_path: Path) -> None:
    from scenarios import Effort, files_swapped, killed_overwriting
    from verdicts import Outcome

    assert killed_overwriting("giantstep", tmp_path / "a", Effort(rounds=1)).outcome is Outcome.SURVIVES
    assert files_swapped("giantstep", tmp_path / "b", Effort()).outcome is Outcome.DETECTS


def test_what_a_library_writes_to_before_it_renames_it_is_no_step(tmp_path: Path) -> None:
    from scenarios import _steps_in

    for name in ("step_00000001", "step_00000002", "tmp_step_00000003", ".step_00000004"):
        (tmp_path / name).mkdir()
    assert [Path(path).name for path in _steps_in(tmp_path)] == ["step_00000002", "step_00000001"]
    assert _steps_in(tmp_path / "none") == []
