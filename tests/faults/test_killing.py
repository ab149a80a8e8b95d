"""Processes that are killed while they save lose nothing that was committed and mix nothing; and the check can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import giantstep as gs
from giantstep.testing import killed
from giantstep.testing.killing import KillReport, Victim, main, run_rounds, victim_of
from giantstep.testing.leftovers import Found, look_at

MODES = list(killed.MODES)


def quiet(_line: str) -> None:
    """What a process would print."""


def check(report: KillReport, rounds: int) -> None:
    assert report.problems == []
    assert (report.rounds, report.lost, report.mixed) == (rounds, 0, 0)
    # They do nothing but save.
    assert report.killed_in_save >= rounds // 2


@pytest.mark.parametrize("mode", MODES)
def test_a_process_killed_at_random_moments_leaves_all_that_was_committed(mode: str, tmp_path: Path) -> None:
    check(run_rounds(mode, 4, 1, tmp_path / "run"), 4)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_hundreds_of_processes_killed_leave_all_that_was_committed(mode: str, seed: int, tmp_path: Path) -> None:
    check(run_rounds(mode, 50, seed, tmp_path / "run"), 50)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_killed_together_leave_all_that_was_committed(mode: str, tmp_path: Path) -> None:
    check(run_rounds(mode, 20, 4, tmp_path / "run", ranks=2), 20)


def test_what_is_killed_has_saves_in_flight_and_links_files(tmp_path: Path) -> None:
    said: list[str] = []
    killed.save_steps("in_flight", tmp_path / "flight", 1, 6, said.append)
    assert [line for line in said if line.startswith("committed")] == [f"committed {step}" for step in range(1, 7)]
    assert sum(line.startswith("saving") for line in said[: said.index("committed 1")]) > 1
    killed.save_steps("incremental", tmp_path / "linked", 1, 3, quiet)
    assert any(path.stat().st_nlink > 1 for path in (tmp_path / "linked").rglob("*") if path.is_file())


# The check can fail.

# Four files that are each overwritten in place, by a process that says so as giantstep's does.
IN_PLACE = """
import sys
from pathlib import Path
folder, step = Path(sys.argv[1]), int(input())
folder.mkdir(exist_ok=True)
while True:
    print("saving", step, flush=True)
    for name in "abcd":
        with open(folder / name, "wb") as file:
            for _ in range(64):
                file.write(step.to_bytes(8, "little") * 1024)
    print("committed", step, flush=True)
    step += 1
"""
# It is safe, but it says what it has not done yet.
TOO_SOON = """
import sys, time
from pathlib import Path
folder, step = Path(sys.argv[1]), int(input())
folder.mkdir(exist_ok=True)
while True:
    print("saving", step, flush=True)
    for name in "abcd":
        (folder / f"{name}.new").write_bytes(step.to_bytes(8, "little") * 65536)
    print("committed", step, flush=True)
    time.sleep(0.05)
    for name in "abcd":
        (folder / f"{name}.new").rename(folder / name)
    step += 1
"""
ENDS = "import sys; print('committed 1'); sys.exit('out of luck')"


def read_in_place(folder: Path) -> Found:
    steps: set[int] = set()
    for name in "abcd":
        data = (folder / name).read_bytes() if (folder / name).exists() else b""
        found = {data[at : at + 8] for at in range(0, len(data), 8)}
        if len(data) != 8 * 65536 or len(found) != 1:
            return Found(None, (f"{name} is torn: {len(data)} bytes",))
        steps.add(int.from_bytes(found.pop(), "little"))
    return Found(max(steps), (), () if len(steps) == 1 else (f"steps {sorted(steps)}",))


def unsafe(script: str) -> Victim:
    return Victim(
        command=lambda folder, own: [sys.executable, "-c", script, str(folder)],
        look=read_in_place,
        clean=lambda folder, first: [],
    )


def test_a_saver_that_writes_in_place_is_reported(tmp_path: Path) -> None:
    report = run_rounds("in place", 12, 0, tmp_path / "run", victim=unsafe(IN_PLACE), span_secs=0.05)
    assert report.rounds == 12
    assert report.lost
    assert report.mixed or any("torn" in problem for problem in report.problems)
    assert report.killed_in_save


def test_a_saver_that_says_committed_too_soon_is_reported(tmp_path: Path) -> None:
    report = run_rounds("too soon", 6, 0, tmp_path / "run", victim=unsafe(TOO_SOON), span_secs=0.04)
    assert report.lost
    assert any("was committed, and the newest that loads is" in problem for problem in report.problems)


def test_a_process_that_ends_by_itself_is_reported_with_what_it_said(tmp_path: Path) -> None:
    report = run_rounds("ends", 1, 0, tmp_path / "run", victim=unsafe(ENDS), span_secs=1.0)
    assert any("ended by itself with 1: out of luck" in problem for problem in report.problems)


@pytest.mark.parametrize("mode", ["overwrite", "blocking"])
def test_a_mix_of_two_steps_and_damage_and_leftovers_are_seen(mode: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed.save_steps(mode, folder, 3, 1, quiet)
    assert look_at(mode, folder) == Found(3)
    place = folder if mode == "overwrite" else folder / "step_00000003"
    mixed: dict[str, Any] = killed.state_of(3, 0, 1)
    mixed["weights.2"].data[-1, -1] = 2.0
    gs.save(mixed, place)
    found = look_at(mode, folder)
    assert (found.newest, found.unsound, len(found.mixed)) == (3, (), 1)
    assert "weights.2" in found.mixed[0]
    (data,) = (place / "data").iterdir()
    with data.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    found = look_at(mode, folder)
    assert (found.newest, len(found.unsound)) == (None, 1)
    stray = folder / "stray"
    stray.write_bytes(b"x")
    told = victim_of(mode).clean(folder, 4)
    assert len(told) == 1
    assert "stray" in told[0]


def test_the_command_line_prints_a_table_and_fails_if_anything_is_wrong(tmp_path: Path, monkeypatch: Any) -> None:
    answers = {"lost": 0}

    def rounds(mode: str, count: int, seed: int, folder: Path, *, ranks: int) -> KillReport:
        return KillReport(mode, count, count, answers["lost"], 0, [])

    monkeypatch.setattr("giantstep.testing.killing.run_rounds", rounds)
    path = tmp_path / "report.json"
    done = CliRunner().invoke(main, ["--rounds", "3", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert [line.split()[:5] for line in done.output.splitlines()[1:]] == [[mode, "3", "3", "0", "0"] for mode in MODES]
    assert [report["mode"] for report in json.loads(path.read_text())] == MODES
    answers["lost"] = 1
    assert CliRunner().invoke(main, ["--mode", "async"]).exit_code == 1


def test_the_state_of_ranks_is_that_of_one(tmp_path: Path) -> None:
    whole = killed.state_of(2, 0, 1)["weights.0"].data
    halves = [killed.state_of(2, rank, 2)["weights.0"].data for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole)
