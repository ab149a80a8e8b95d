"""`giantstep doctor` and `giantstep recover`, as a user runs them."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import giantstep as gs
from giantstep.format.names import data_file_name, new_save_id
from giantstep.steps import step_name


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "giantstep.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two committed steps, and one between them that crashed two hours ago."""
    for step in (1, 3):
        gs.save({"w": torch.full((4,), float(step))}, tmp_path / step_name(step))
    begun = new_save_id(dt.datetime.now(dt.UTC) - dt.timedelta(hours=2), "0" * 11)
    crashed = tmp_path / step_name(2) / data_file_name(begun, 0, 0)
    crashed.parent.mkdir(parents=True)
    crashed.write_bytes(b"left")
    return tmp_path


def test_recover_shows_what_it_would_remove_and_removes_it_when_told_to(root: Path) -> None:
    crashed = root / step_name(2)
    found = run("recover", root)
    assert (found.returncode, found.stderr) == (1, "")
    lines = found.stdout.splitlines()
    assert lines[0].startswith(f"LEFTOVER {crashed} (files: 1, 4 B, begun ")
    assert lines[2].startswith("  of no use: ")
    assert lines[3] == "to be removed: 1 (giantstep recover --yes removes them)"
    assert crashed.exists()
    report = json.loads(run("recover", root, "--json").stdout)
    assert report["removed"] == []
    assert report["remaining"] == 1
    assert [(one["kind"], one["removable"], one["path"]) for one in report["findings"]] == [("leftover", True, str(crashed))]
    left = run("recover", root, "--older-than", 3 * 3600)
    assert left.returncode == 0
    assert "it may be running" in left.stdout
    assert left.stdout.endswith("nothing to be removed\n")
    done = run("recover", root, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("removed 2 files and directories\n")
    assert not crashed.exists()
    again = run("recover", root)
    assert again.returncode == 0
    assert again.stdout == "nothing found: all that is there belongs to good checkpoints\n"
    assert run("doctor", root, "--full").returncode == 0


def test_recover_of_one_step_that_goes_altogether(root: Path) -> None:
    done = run("recover", root / step_name(2), "--yes", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["removed"]) == 2
    assert report["remaining"] == 0
    gone = run("recover", root / step_name(2))
    assert gone.returncode == 1
    assert gone.stderr == f"giantstep: {root / step_name(2)} does not exist\n"
    assert run("recover", root, "--older-than", "-1").returncode == 2


def test_doctor_says_what_is_wrong_and_what_loads_instead(root: Path) -> None:
    good = run("doctor", root)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith(f"{root / step_name(3)}: healthy (a checkpoint of 1 tensors in 1 data files")
    (root / step_name(3) / "checkpoint.json").write_text("")
    next((root / step_name(1) / "data").iterdir()).write_bytes(b"short")
    bad = run("doctor", root / step_name(1))
    assert bad.returncode == 1
    lines = bad.stdout.splitlines()
    assert lines[0].startswith(f"{root / step_name(1)}: NOT HEALTHY")
    assert lines[1].startswith("PROBLEM file data/")
    assert "has 5 bytes" in lines[2]
    assert lines[2].endswith("it holds w")
    assert lines[3].startswith("  to do: Restore the file from a copy")
    gs.save({"w": torch.ones(4)}, root / step_name(0))
    report = json.loads(run("doctor", root / step_name(1), "--json").stdout)
    assert report["healthy"] is False
    assert report["loads_instead"] == str(root / step_name(0))
    assert list(report["problems"][0]) == ["what", "why", "remedy"]


def test_doctor_of_many_broken_files_shows_some(tmp_path: Path) -> None:
    options = gs.SaveOptions(max_file_bytes=1 << 20)
    gs.save({f"w{number:02d}": torch.zeros(300_000) for number in range(25)}, tmp_path / "c", options=options)
    for file in (tmp_path / "c" / "data").iterdir():
        file.unlink()
    found = run("doctor", tmp_path / "c")
    assert found.returncode == 1
    assert found.stdout.count("PROBLEM") == 20
    assert "more" in found.stdout.splitlines()[-1]
    missing = run("doctor", tmp_path / "d")
    assert missing.returncode == 1
    assert "does not exist" in missing.stdout
    assert "Traceback" not in missing.stderr
