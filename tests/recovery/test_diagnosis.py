"""What `diagnose` says of whatever a path may lead to."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save

import giantstep as gs
from giantstep.diagnosis import Diagnosis, Problem, diagnose
from giantstep.format.digests import anchor_digest
from giantstep.steps import step_name
from giantstep.storage.local import LocalStore
from giantstep.testing.ranks import run_ranks


def save(root: Path, *steps: int) -> None:
    for step in steps:
        gs.save({"w": torch.full((4,), float(step)), "n": step}, root / step_name(step))


def only(found: Diagnosis) -> Problem:
    """The one problem there is."""
    assert not found.healthy
    (problem,) = found.problems
    return problem


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A checkpoint of two ranks."""

    def rank(group: Any) -> None:
        rows = torch.arange(12.0).reshape(3, 4)
        own = gs.ShardedTensor.from_rank_offsets(f"of.{group.rank}", rows)
        gs.save({f"of.{group.rank}": own, "step": 1}, tmp_path / step_name(7), process_group=group)

    run_ranks(2, rank)
    return tmp_path / step_name(7)


@pytest.mark.parametrize("full", [False, True])
def test_a_good_checkpoint_is_healthy(two: Path, full: bool) -> None:
    found = diagnose(two, full=full)
    assert (found.healthy, found.problems, found.notes, found.loads_instead) == (True, [], [], "")
    assert found.location == str(two)
    assert ("every byte" in found.looked_at) is full
    assert "2 tensors in 2 data files" in found.looked_at


def test_a_path_that_is_not_there_names_what_is_near(tmp_path: Path) -> None:
    save(tmp_path / "run", 100, 200)
    problem = only(diagnose(tmp_path / "run" / "step_0000200"))
    assert problem.what == f"{tmp_path}/run/step_0000200 does not exist"
    assert f"Did you mean {tmp_path}/run/step_00000200" in problem.remedy
    problem = only(diagnose(tmp_path / "rum" / "deep" / "step_00000200"))
    assert problem.why == f"{tmp_path} holds no 'rum', but run"
    assert problem.remedy == f"Did you mean {tmp_path}/run?"
    found = diagnose(tmp_path / "run" / step_name(150))
    assert found.loads_instead == f"{tmp_path}/run/{step_name(100)}"
    assert "does not exist" in only(diagnose("memory://nowhere-at-all")).what


def test_a_file_is_told_from_a_directory_and_its_format_is_recognised(two: Path, tmp_path: Path) -> None:
    problem = only(diagnose(two / "checkpoint.json"))
    assert problem.remedy == f"Name the directory: {two}"
    data = next((two / "data").iterdir())
    assert only(diagnose(data)).remedy == f"Name the directory: {two}"
    assert only(diagnose(two / "data")).remedy == f"Name the directory above: {two}"
    torch.save({"w": torch.ones(2)}, tmp_path / "new.pt")
    assert "zip archive" in only(diagnose(tmp_path / "new.pt")).what
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "a pickle" in only(diagnose(tmp_path / "old.pt")).what
    (tmp_path / "copy.safetensors").write_bytes(data.read_bytes())
    assert "a safetensors file" in only(diagnose(tmp_path / "copy.safetensors")).what
    for content in ("x", "", "x" * 100):
        (tmp_path / "text").write_text(content)
        assert only(diagnose(tmp_path / "text")).what == f"{tmp_path}/text is a file"


class Bomb:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({".metadata": b"", "__0_0.distcp": b""}, "torch.distributed.checkpoint"),
        ({"metadata.json": b'{"sharded_backend": "torch_dist"}', ".metadata": b""}, "Megatron-Core's dist_checkpointing"),
        ({"metadata.json": b"[1", "weights.bin": pickle.dumps(Bomb())}, "a pickle"),
        ({"metadata.json": b"[1]", "pytorch_model.bin": b"PK\x03\x04" + b"x" * 20}, "a zip archive"),
        ({"model.safetensors.index.json": b"{}"}, "a model in safetensors files"),
        ({"model-00001.safetensors": (10).to_bytes(8, "little") + b"{        }"}, "a safetensors file"),
    ],
)
def test_checkpoints_of_others_are_recognised_and_not_opened(tmp_path: Path, names: dict[str, bytes], text: str) -> None:
    for name, data in names.items():
        (tmp_path / name).write_bytes(data)
    problem = only(diagnose(tmp_path))
    assert text in problem.what
    assert problem.why == "giantstep does not open it"
    assert "save that with giantstep.save" in problem.remedy


def test_a_real_checkpoint_of_torch_is_recognised(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="single process"):
        dcp_save({"w": torch.ones(2)}, storage_writer=FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    assert "torch.distributed.checkpoint" in only(diagnose(tmp_path / "dcp")).what


def test_directories_of_no_known_kind_say_what_they_hold(tmp_path: Path) -> None:
    assert only(diagnose(tmp_path)).why == "it is empty"
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text("x")
    (tmp_path / "checkpoint.json").write_text("{}")
    assert only(diagnose(tmp_path)).why.endswith("but 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 3 more")


def test_of_a_root_the_newest_committed_step_is_looked_at(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    (tmp_path / step_name(3) / "checkpoint.json").unlink()
    (tmp_path / step_name(4)).mkdir()
    found = diagnose(tmp_path)
    assert found.healthy
    assert found.location == str(tmp_path / step_name(2))
    assert [note.what for note in found.notes] == [
        "step 3 is newer and not committed",
        "step 4 is newer and not committed",
        f"{tmp_path} is a root of steps, of which the newest committed one was looked at",
    ]
    assert found.notes[-1].why == "steps: committed: 1, 2; unfinished: 3, 4"
    next((tmp_path / step_name(2) / "data").iterdir()).unlink()
    found = diagnose(tmp_path)
    assert "is missing" in only(found).why
    assert found.loads_instead == str(tmp_path / step_name(1))


def test_a_step_that_shares_the_damaged_file_does_not_load_instead(tmp_path: Path) -> None:
    frozen = torch.arange(20_000.0)
    for step in range(1, 5):
        previous = tmp_path / step_name(step - 1) if step in (3, 4) else None
        options = gs.SaveOptions(digests=True, previous=previous)
        gs.save({"frozen": frozen, "w": torch.tensor(step)}, tmp_path / step_name(step), options=options)
    newest = tmp_path / step_name(4)
    shared = max((newest / "data").iterdir(), key=lambda file: file.stat().st_size)
    flip(shared)
    for found in (diagnose(newest, full=True), diagnose(tmp_path, full=True)):
        assert found.damaged_files == [f"data/{shared.name}"]
        assert found.loads_instead == str(tmp_path / step_name(1))
    # A name of it that is gone is that of one step alone.
    flip(shared)
    shared.unlink()
    found = diagnose(newest, full=True)
    assert (found.damaged_files, found.loads_instead) == ([], str(tmp_path / step_name(3)))


def test_a_damaged_newest_step_is_a_problem_of_the_root(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip(tmp_path / step_name(2) / "checkpoint.json")
    found = diagnose(tmp_path)
    assert only(found).what == f"the commit record of {tmp_path / step_name(2)} is damaged"
    assert found.loads_instead == str(tmp_path / step_name(1))
    flip(tmp_path / step_name(1) / "checkpoint.json")
    found = diagnose(tmp_path)
    assert found.problems[0].what == f"{tmp_path} holds no committed step"
    assert found.loads_instead == ""


def test_a_save_that_never_committed_says_when_it_began_and_what_loads_instead(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    (tmp_path / step_name(2) / "checkpoint.json").unlink()
    found = diagnose(tmp_path / step_name(2))
    problem = only(found)
    assert "never committed" in problem.what
    assert " UTC" in problem.why
    assert "giantstep recover" in problem.remedy
    assert found.loads_instead == str(tmp_path / step_name(1))
    (tmp_path / step_name(1) / "checkpoint.json").unlink()
    assert diagnose(tmp_path / step_name(2)).loads_instead == str(tmp_path / step_name(3))


def test_a_damaged_record_and_one_of_a_newer_version_are_told_apart(two: Path) -> None:
    record = two / "checkpoint.json"
    good = record.read_bytes()
    record.write_bytes(good[: len(good) // 2])
    assert only(diagnose(two)).what == f"the commit record of {two} is damaged"
    signed = good.replace(b'"format_version": "1.', b'"format_version": "9.')
    signed = signed[: signed.rindex(b'  "digest"')]
    record.write_bytes(signed + b'  "digest": "' + anchor_digest(signed).encode() + b'"\n}\n')
    assert only(diagnose(two)).remedy == "Upgrade giantstep."


def test_an_index_may_be_missing_damaged_or_of_another_save(two: Path, tmp_path: Path) -> None:
    index = two / gs.open_checkpoint(two).record.index.name
    good = index.read_bytes()
    flip(index, 0)
    assert "is damaged" in only(diagnose(two)).why
    index.write_bytes(good)
    flip(index)
    assert "is damaged in bytes" in only(diagnose(two)).why
    index.write_bytes(good[:-1])
    assert "expected" in only(diagnose(two)).why
    index.unlink()
    assert "is missing" in only(diagnose(two)).why
    gs.save({"w": torch.ones(3)}, tmp_path / "other")
    other = gs.open_checkpoint(tmp_path / "other").record
    index.write_bytes((tmp_path / "other" / other.index.name).read_bytes())
    assert f"says it is the index of save {other.save_id}" in only(diagnose(two)).why


def test_data_files_that_are_missing_or_of_another_size_name_rank_and_tensors(two: Path) -> None:
    chunk = gs.open_checkpoint(two).info("of.1").chunks[0]
    file = two / chunk.file
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    problem = only(diagnose(two))
    assert problem.what == f"file {chunk.file}, written by rank 1, is not what was written"
    assert problem.why == f"has {len(good) - 1} bytes, expected {len(good)}; it holds of.1"
    file.unlink()
    assert only(diagnose(two)).why == "is missing; it holds of.1"
    (two / gs.open_checkpoint(two).record.index.name).unlink()
    assert [problem.why.partition(";")[0] for problem in diagnose(two).problems[1:]] == ["is missing"]


def test_bytes_that_changed_are_found_by_a_full_look_only(two: Path) -> None:
    chunk = gs.open_checkpoint(two).info("of.1").chunks[0]
    flip(two / chunk.file, chunk.start)
    assert diagnose(two).healthy
    problem = only(diagnose(two, full=True))
    assert "written by rank 1" in problem.what
    assert "checksum differs" in problem.why
    assert "of.1" in problem.why


def test_a_damaged_common_state_is_found(tmp_path: Path) -> None:
    gs.save({"step": 1234567}, tmp_path / "c")
    data = next((tmp_path / "c" / "data").iterdir())
    flip(data, data.read_bytes().index(b"1234567"))
    assert "common state" in only(diagnose(tmp_path / "c")).what


PROGRAM = """
import dataclasses, enum
import giantstep as gs

class Phase(enum.Enum):
    WARM = 1

@dataclasses.dataclass
class Schedule:
    warmup: int

if __name__ != "__main__":
    gs.register_type(Schedule, name="my.Schedule")
    gs.save({"schedules": [Schedule(1), Schedule(2)], "phase": Phase.WARM}, "c")
    from giantstep.diagnosis import diagnose
    assert diagnose("c").notes == []
"""


def test_types_that_are_not_registered_here_are_noted_with_their_places(tmp_path: Path) -> None:
    (tmp_path / "their_program.py").write_text(PROGRAM)
    command = [sys.executable, "-c", "import their_program"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = diagnose(tmp_path / "c")
    assert found.healthy
    assert [note.what.split("'")[1] for note in found.notes] == ["my.Schedule", "their_program:Phase"]
    assert found.notes[0].why == "the common state holds values of it at schedules.0, schedules.1"
    assert "register_type(..., name='my.Schedule')" in found.notes[0].remedy
    assert "import the module 'their_program'" in found.notes[1].remedy


def test_leftovers_beside_a_checkpoint_are_a_note(two: Path) -> None:
    (two / "data" / "20200101T000000-0000000000000000-r00000-0.safetensors").write_bytes(b"left")
    found = diagnose(two)
    assert found.healthy
    assert [note.what for note in found.notes] == ["1 files that this checkpoint does not need lie beside it"]


@pytest.mark.parametrize(
    ("error", "text"),
    [(PermissionError(13, "Permission denied"), "permission to read"), (OSError(5, "Input/output error"), "cannot be read")],
)
def test_what_the_system_refuses_is_reported(two: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, text: str) -> None:
    def refuse(_self: LocalStore, _name: str, *, direct: bool = False) -> Any:
        raise error

    monkeypatch.setattr(LocalStore, "open_read", refuse)
    found = diagnose(two)
    problem = only(found)
    assert text in problem.what
    assert found.looked_at == "it could not be read"
    assert str(error) in problem.why


def test_a_diagnosis_changes_nothing(two: Path) -> None:
    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in two.parent.rglob("*") if path.is_file()}

    before = everything()
    for path in (two, two.parent, two / "data", two / "no"):
        diagnose(path, full=True)
    assert everything() == before
