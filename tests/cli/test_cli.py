"""The command line, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.testing.ranks import run_ranks


def run(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "giantstep.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **settings)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    def rank(group: Any) -> None:
        rows = torch.arange(12.0).reshape(3, 4) + 12 * group.rank
        state = {
            "decoder": {"weight": gs.ShardedTensor.from_rank_offsets("decoder.weight", rows, (0, group.rank, 2))},
            "norm": torch.tensor([1.0, float("nan"), float("inf"), 0.0]).bfloat16(),
            "flags": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(2.5 + 1j),
            "fp8": torch.ones(4).to(torch.float8_e4m3fn),
            "step": 100,
            "dtype": torch.bfloat16,
        }
        gs.save(state, tmp_path / "c", process_group=group, content_metadata={"run": "x"})

    run_ranks(2, rank)
    return tmp_path / "c"


def test_ls_lists_tensors_objects_and_totals(path: Path) -> None:
    found = run("ls", path)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0].split() == ["tensor", "dtype", "shape", "size", "chunks"]
    assert lines[1].split() == ["decoder.weight", "float32", "[6,", "4]", "96", "B", "2"]
    assert [line.split()[0] for line in lines[1:7]] == ["decoder.weight", "empty", "flags", "fp8", "norm", "scalar"]
    assert "objects: common_state" in found.stdout
    assert 'content metadata: {"run": "x"}' in found.stdout
    assert "saved by 2 ranks" in lines[-1]


def test_ls_filters_and_speaks_json(path: Path) -> None:
    found = json.loads(run("ls", path, "--match", "*o*m", "--json").stdout)
    assert [tensor["key"] for tensor in found["tensors"]] == ["norm"]
    assert found["world_size"] == 2
    assert "1 of 6 tensors" in run("ls", path, "--match", "norm").stdout


def test_show_says_where_each_chunk_lies_and_what_is_in_it(path: Path) -> None:
    found = run("show", path, "decoder.weight", "--values", "5")
    assert found.returncode == 0, found.stderr
    assert "float32 [6, 4], 96 B, 2 chunks" in found.stdout
    chunk = gs.open_checkpoint(path).info("decoder.weight").chunks[1]
    assert next(line for line in found.stdout.splitlines() if "[3:6,0:4]" in line).split() == [
        "[3:6,0:4]",
        chunk.file,
        str(chunk.start),
        "48",
        "B",
        "1",
    ]
    assert "min 0, max 23, mean 11.5, std 6.92219; 0 NaN, 0 infinite, 1 zero" in found.stdout
    assert "first values: 0 1 2 3 4" in found.stdout


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("norm", "min 0, max 1, mean 0.5, std 0.5; 1 NaN, 1 infinite, 1 zero"),
        ("norm", "first values: 1 nan inf 0"),
        ("flags", "first values: True False"),
        ("empty", "no finite values"),
        ("empty", "first values: (none)"),
        ("scalar", "complex64 [], 8 B, 1 chunks"),
        ("scalar", "first values: 2.5+1j"),
        ("fp8", "min 1, max 1, mean 1"),
        ("common_state", '"step": 100'),
        ("common_state", "torch.bfloat16"),
    ],
)
def test_show_every_kind(path: Path, key: str, text: str) -> None:
    found = run("show", path, key)
    assert found.returncode == 0, found.stderr
    assert text in found.stdout


def test_verify_says_ok_or_what_is_broken(path: Path) -> None:
    found = run("verify", path)
    assert (found.returncode, found.stderr) == (0, "")
    assert "files are what was written (6 tensors)" in found.stdout
    chunk = gs.open_checkpoint(path).info("decoder.weight").chunks[1]
    file = path / chunk.file
    data = bytearray(file.read_bytes())
    data[chunk.start] ^= 1
    file.write_bytes(data)
    found = run("verify", path)
    assert found.returncode == 1
    assert f"BROKEN {chunk.file}, written by rank 1: bytes 0 to" in found.stdout
    assert "affects decoder.weight" in found.stdout
    report = json.loads(run("verify", path, "--json").stdout)
    assert report["ok"] is False
    assert report["damages"][0]["file"] == chunk.file
    file.unlink()
    assert "is missing" in run("verify", path).stdout


def test_errors_are_a_line_and_an_exit_code(path: Path, tmp_path: Path) -> None:
    missing = run("ls", tmp_path / "no")
    assert missing.returncode == 1
    assert missing.stderr == f"giantstep: {tmp_path / 'no'} does not exist\n"
    key = run("show", path, "decoder.weights")
    assert key.returncode == 2
    assert "Nearest: 'decoder.weight'" in key.stderr
    assert "Traceback" not in key.stderr
    assert run("verify", path / "data").returncode == 1
    assert run("frobnicate").returncode == 2
    assert run("ls").returncode == 2
    assert "Usage" in run("--help").stdout
    assert run("--version").stdout.startswith("giantstep")


def test_no_command_imports_torch_unless_it_must(path: Path) -> None:
    """`torch` is made impossible to import; only the object that holds a torch dtype needs it."""
    program = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'giantstep';from giantstep.cli.main import main; main()"

    def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    for arguments in (("--help",), ("ls", path), ("verify", path), ("show", path, "fp8"), ("show", path, "norm")):
        found = without_torch(*arguments)
        assert found.returncode == 0, found.stderr
    assert without_torch("show", path, "common_state").returncode != 0


def test_a_closed_pipe_is_no_error(path: Path) -> None:
    command = f'"{sys.executable}" -m giantstep.cli.main ls "{path}" | head -1'
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert found.stdout.startswith("tensor")
    assert found.stderr == ""


def test_a_terminal_gets_a_progress_bar(path: Path) -> None:
    import pty

    parent, child = pty.openpty()
    command = [sys.executable, "-m", "giantstep.cli.main", "verify", str(path)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=child, timeout=60, check=False, env=environment)
    os.close(child)
    shown = os.read(parent, 100_000).decode()
    os.close(parent)
    assert found.returncode == 0
    assert "━" in shown


def test_objects_of_one_grid_are_listed_together(tmp_path: Path) -> None:
    def save(group: Any) -> None:
        rng = gs.ShardedObject("rng", group.rank, (group.size,), (group.rank,))
        state = {"rng": rng, "one": gs.ShardedObject("one", 1, (1,), (0,), replica_id=group.rank), "lr": 0.1}
        gs.save(state, tmp_path, process_group=group)

    run_ranks(5, save)
    assert "objects: common_state, one/shard_0_1, rng/shard_*_5 (5)\n" in run("ls", str(tmp_path)).stdout
    listed = json.loads(run("ls", "--json", str(tmp_path)).stdout)
    assert len(listed["objects"]) == 7
