"""Damage to a checkpoint that several ranks load: all raise the same error, which names the file, or load an older step.

Each with and without an exchange of what is read, and in files of a real file system.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import giantstep as gs
from giantstep.errors import CorruptionError, GiantstepError, IncompleteError, OpenError
from giantstep.format.names import RECORD_NAME
from giantstep.format.record import MAX_RECORD_BYTES
from giantstep.group.threads import ThreadGroup
from giantstep.steps import step_name
from giantstep.testing.ranks import run_ranks, run_ranks_collecting

SAVING = 3
LOADING = 3
ROWS, COLUMNS = 96, 64
OLD, NEW = 1, 2
EXCHANGES: dict[str, Any] = {"each-reads": "none", "exchange": list(range(LOADING))}


def values_of(key: str, step: int) -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS) + 100_000 * step + len(key)


def state_of(group: ThreadGroup, step: int | None) -> dict[str, Any]:
    """What a rank holds: rows of "w", all of "norm", which rank 0 saves; of no step: memory to load into."""

    def held(key: str) -> torch.Tensor:
        return torch.full((ROWS, COLUMNS), -1.0) if step is None else values_of(key, step)

    rows = held("w")[group.rank * ROWS // group.size : (group.rank + 1) * ROWS // group.size].clone()
    w = gs.ShardedTensor.from_rank_offsets("w", rows, (0, group.rank, group.size))
    norm = {} if step is not None and group.rank else {"norm": held("norm")}
    if step is not None and norm:
        norm = {"norm": gs.ShardedTensor.from_rank_offsets("norm", norm["norm"])}
    return {"w": w, **norm, "step": -1 if step is None else step}


def save(path: Path, step: int) -> None:
    options = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096)
    run_ranks(SAVING, lambda group: gs.save(state_of(group, step), path, process_group=group, options=options))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, of equal layout."""
    root = tmp_path_factory.mktemp("good")
    for step in (OLD, NEW):
        save(root / step_name(step), step)
    return root


@pytest.fixture
def root(tmp_path: Path, good: Path) -> Path:
    """A copy of them, to be damaged."""
    return shutil.copytree(good, tmp_path / "run")


def record_at(place: Path) -> Path:
    return place / RECORD_NAME


def index_at(place: Path) -> Path:
    (found,) = place.glob("*.index.safetensors")
    return found


def data_at(place: Path) -> Path:
    """The last rank's data file."""
    return max((place / "data").iterdir())


def folder_at(place: Path) -> Path:
    return place / "data"


class Harm(NamedTuple):
    """What happens to a file.

    Attributes:
        which: the file.
        do: what is done to it.
        error: what all ranks raise.
    """

    which: Callable[[Path], Path]
    do: Callable[[Path], None]
    error: type[GiantstepError] = CorruptionError


def swap(path: Path) -> None:
    other = sorted(path.parent.iterdir())[-2]
    assert other.stat().st_size == path.stat().st_size, "or sizes alone would tell"
    between = path.with_name("between")
    path.rename(between)
    other.rename(path)
    between.rename(other)


def stale_index(path: Path) -> None:
    """The index of the save that this one replaced in the same place."""
    place = path.parent
    old = place.with_name("earlier")
    save(old, NEW)
    path.write_bytes(index_at(old).read_bytes())


def index_of_another_step(path: Path) -> None:
    path.write_bytes(index_at(path.parent.with_name(step_name(OLD))).read_bytes())


def index_of_another_model(path: Path) -> None:
    other = path.parent.with_name("other")
    gs.save({"other": torch.ones(3)}, other)
    path.write_bytes(index_at(other).read_bytes())


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def full_directory(path: Path) -> None:
    directory(path)
    (path / "file").write_bytes(b"x")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def pipe(path: Path) -> None:
    """Opened without a writer, it would never answer."""
    path.unlink()
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    path.unlink()
    here = Path.cwd()
    # Paths of sockets are short.
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def file_for_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"x")


def loop_for_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.name)


def zero_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    assert any(content[middle : middle + 4096])
    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)


def zero_all(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(4096))


def lengthen_hugely(path: Path) -> None:
    os.truncate(path, MAX_RECORD_BYTES + 1)


def remove(path: Path) -> None:
    path.unlink()


HARMS = {
    "data files of two ranks swapped": Harm(data_at, swap),
    "index of an earlier save": Harm(index_at, stale_index),
    "index of another step": Harm(index_at, index_of_another_step),
    "index of another model": Harm(index_at, index_of_another_model),
    "a page of zeros in a data file": Harm(data_at, zero_page),
    "a page of zeros in the index": Harm(index_at, zero_page),
    "a flipped bit in a data file": Harm(data_at, flip),
    "a flipped bit in the index": Harm(index_at, flip),
    "a flipped bit in the record": Harm(record_at, flip),
    "a data file without its last byte": Harm(data_at, truncate),
    "an index without its last byte": Harm(index_at, truncate),
    "a record without its last byte": Harm(record_at, truncate),
    "half a data file": Harm(data_at, halve),
    "half an index": Harm(index_at, halve),
    "half a record": Harm(record_at, halve),
    "an empty data file": Harm(data_at, empty),
    "an empty index": Harm(index_at, empty),
    "an empty record": Harm(record_at, empty),
    "a record of zeros": Harm(record_at, zero_all),
    "a longer data file": Harm(data_at, lengthen),
    "a longer index": Harm(index_at, lengthen),
    "a longer record": Harm(record_at, lengthen),
    "a record larger than any": Harm(record_at, lengthen_hugely),
    "no data file": Harm(data_at, remove, IncompleteError),
    "no index": Harm(index_at, remove, OpenError),
    "no record": Harm(record_at, remove, IncompleteError),
    **{
        f"{what} in place of {of}": Harm(which, do)
        for of, which in (("a data file", data_at), ("the index", index_at), ("the record", record_at))
        for what, do in (
            ("a directory", directory),
            ("a full directory", full_directory),
            ("a link in a circle", loop),
            ("a pipe", pipe),
            ("a socket", bound_socket),
        )
    },
    "no folder of data": Harm(folder_at, shutil.rmtree, IncompleteError),
    "a file in place of the folder of data": Harm(folder_at, file_for_folder, IncompleteError),
    "a link in a circle in place of the folder of data": Harm(folder_at, loop_for_folder),
    "a link to nowhere in place of a data file": Harm(data_at, nowhere, IncompleteError),
    "a link to nowhere in place of the index": Harm(index_at, nowhere, OpenError),
    "a link to nowhere in place of the record": Harm(record_at, nowhere, IncompleteError),
}


def damaged_by(root: Path, harm: Harm) -> tuple[Path, list[str]]:
    """The damaged step, and how its damaged files may be called."""
    place = root / step_name(NEW)
    path = harm.which(place)
    harm.do(path)
    names = [path.name, *(other.name for other in (place / "data").iterdir())] if harm.do is swap else [path.name]
    return place, names


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("verify", ["reading", "before"])
@pytest.mark.parametrize("harm", HARMS)
def test_all_ranks_raise_the_same_error_which_names_the_file(root: Path, harm: str, verify: Any, exchange: str) -> None:
    place, names = damaged_by(root, HARMS[harm])
    options = gs.LoadOptions(exchange=EXCHANGES[exchange], verify=verify, timeout_secs=60)
    targets: dict[int, torch.Tensor] = {}

    def load(group: ThreadGroup) -> None:
        state = state_of(group, None)
        targets[group.rank] = state["norm"]
        gs.load(state, place, process_group=group, options=options)

    results, errors = run_ranks_collecting(LOADING, load)
    assert results == [None] * LOADING
    assert [type(error).__mro__.index(HARMS[harm].error) >= 0 for error in errors] == [True] * LOADING
    assert len({(type(error), str(error)) for error in errors}) == 1
    assert any(name in str(errors[0]) for name in names)
    if verify == "before":
        assert all(bool((target == -1).all()) for target in targets.values())


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("harm", HARMS)
def test_all_ranks_load_the_older_step_instead(root: Path, harm: str, exchange: str) -> None:
    place, names = damaged_by(root, HARMS[harm])
    options = gs.LoadOptions(exchange=EXCHANGES[exchange], timeout_secs=60)

    def load(group: ThreadGroup) -> Any:
        found = gs.load(state_of(group, None), place, process_group=group, options=options, on_corrupt="fallback")
        own = slice(group.rank * ROWS // group.size, (group.rank + 1) * ROWS // group.size)
        assert torch.equal(found["w"], values_of("w", OLD)[own])
        assert torch.equal(found["norm"], values_of("norm", OLD))
        assert found["step"] == OLD
        assert (found.report.exchange == "none") is (exchange == "each-reads")
        return found.report.passed_over

    reasons = run_ranks(LOADING, load)
    assert len(set(reasons)) == 1
    (reason,) = reasons[0]
    assert reason.startswith(f"{step_name(NEW)}: ")
    assert any(name in reason for name in names)
