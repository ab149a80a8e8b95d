"""Exchange between processes, over gloo."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import giantstep as gs
import giantstep.reading.exchange
from giantstep.errors import GiantstepError
from processes import DIED, results, run_processes

ROWS, COLUMNS = 1024, 1024
OPTIONS = {"buffer_bytes": 256 << 10, "timeout_secs": 20.0}


def value() -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.int64).reshape(ROWS, COLUMNS)


def write(path: Path) -> None:
    gs.save({"w": value(), "b": torch.arange(77)}, path, options=gs.SaveOptions(block_bytes=4096, buffer_bytes=1 << 16))


def load_columns(rank: int, path: str, groups: bool) -> tuple[str, int, int, int]:
    size = dist.get_world_size()
    group: Any = "auto"
    if groups:
        made = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = made[rank // 2]
    count = COLUMNS // size
    data = torch.zeros(ROWS, count, dtype=torch.int64)
    state = {"w": gs.ShardedTensor.from_rank_offsets("w", data, (1, rank, size)), "b": torch.zeros(77, dtype=torch.int64)}
    report = gs.load(state, path, options=gs.LoadOptions(exchange=group, **OPTIONS)).report
    if not torch.equal(data, value()[:, rank * count :][:, :count]) or not torch.equal(state["b"], torch.arange(77)):
        raise AssertionError("wrong values")
    return report.exchange, report.bytes_read, report.bytes_sent, report.bytes_received


def test_processes_read_once_and_send_each_other_the_rest(tmp_path: Path) -> None:
    write(tmp_path)
    found = results(run_processes(4, load_columns, str(tmp_path), False))
    size = sum(file.stat().st_size for file in (tmp_path / "data").iterdir())
    assert {kind for kind, _, _, _ in found} == {"all"}
    assert sum(read for _, read, _, _ in found) <= size
    assert sum(sent for _, _, sent, _ in found) == sum(received for _, _, _, received in found) >= size * 0.5


def test_process_groups_read_once_each(tmp_path: Path) -> None:
    write(tmp_path)
    found = results(run_processes(4, load_columns, str(tmp_path), True))
    size = sum(file.stat().st_size for file in (tmp_path / "data").iterdir())
    assert {kind for kind, _, _, _ in found} == {"group"}
    assert 1.9 * size <= sum(read for _, read, _, _ in found) <= 2 * size


def load_all(rank: int, path: str, culprit: int, what: str) -> tuple[str, int | None, str | None]:
    """Load with an accident in the second round; the class, rank and phase of the error."""
    real = giantstep.reading.exchange._Rounds._transfer
    done = 0

    def transfer(self: Any, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done == 2 and rank == culprit:
            if what == "die":
                os._exit(9)
            time.sleep(8)
        return real(self, *arguments)

    giantstep.reading.exchange._Rounds._transfer = transfer
    state = {"w": torch.zeros(ROWS, COLUMNS, dtype=torch.int64), "b": torch.zeros(77, dtype=torch.int64)}
    options = gs.LoadOptions(exchange="auto", buffer_bytes=256 << 10, timeout_secs=20.0 if what == "die" else 2.0)
    try:
        gs.load(state, path, options=options)
    except GiantstepError as error:
        return type(error).__name__, error.rank, error.phase
    return "loaded", None, None


def test_a_process_that_dies_in_an_exchange_is_named_by_all_others(tmp_path: Path) -> None:
    write(tmp_path)
    outcomes = run_processes(4, load_all, str(tmp_path), 2, "die")
    assert outcomes[2] == (DIED, 9)
    survivors = results([outcome for rank, outcome in enumerate(outcomes) if rank != 2])
    assert set(survivors) == {("PeerFailureError", 2, "read")}


def test_a_process_that_sleeps_in_an_exchange_is_named_by_all_others(tmp_path: Path) -> None:
    write(tmp_path)
    found = results(run_processes(4, load_all, str(tmp_path), 1, "sleep"))
    assert {outcome for rank, outcome in enumerate(found) if rank != 1} == {("PhaseTimeoutError", 1, "read")}
    assert found[1][0] != "loaded"


def load_damaged(rank: int, path: str) -> tuple[str, str]:
    state = {"w": torch.zeros(ROWS, COLUMNS, dtype=torch.int64), "b": torch.zeros(77, dtype=torch.int64)}
    try:
        gs.load(state, path, options=gs.LoadOptions(**OPTIONS))
    except GiantstepError as error:
        return type(error).__name__, str(error)
    return "loaded", ""


def test_a_damaged_block_is_the_same_error_on_all_processes(tmp_path: Path) -> None:
    write(tmp_path)
    (file,) = (tmp_path / "data").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = results(run_processes(4, load_damaged, str(tmp_path)))
    assert len(set(found)) == 1
    assert found[0][0] == "CorruptionError"
    assert "'w'" in found[0][1]
