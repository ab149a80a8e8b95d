"""Tiers: a run that comes by the same steps again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import VersionError
from giantstep.format.digests import anchor_digest
from giantstep.testing.ranks import RanksFailedError, run_ranks

HOSTS = ("a", "b")


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((5,), value), "value": value}


def tiers(group: Any, root: Path, every: int = 1, durable: int = 2) -> gs.Tiers:
    host, options = HOSTS[group.rank], gs.SaveOptions(timeout_secs=60)
    local = gs.LocalTier(str(root / host), host=host, every=every, process_group=group, save_options=options)
    place = str(root / "durable")
    return gs.Tiers([local, gs.CheckpointManager(place, save_when=durable, process_group=group, save_options=options)])


def train(group: Any, root: Path, steps: range, factor: float, *, back_to: int | None = None, every: int = 1) -> None:
    with tiers(group, root, every) as opened:
        if back_to is not None:
            found = opened.restore(state(0.0), back_to)
            assert found is not None
        for step in steps:
            if opened.should_save(step):
                opened.save(step, state(step * factor))


def durable_value(root: Path, step: int) -> float:
    place = root / "durable" / f"step_{step:08d}"
    checkpoint = gs.open_checkpoint(place)
    assert checkpoint.verify().ok
    loaded = gs.load({"w": torch.zeros(5)}, place, strict=gs.StrictHandling.IGNORE_ALL)
    assert torch.equal(loaded["w"], torch.full((5,), loaded["value"]))
    # Nothing is left of what was replaced.
    assert {file.name.split("-r")[0].split(".")[0] for file in place.rglob("*.safetensors")} == {checkpoint.record.save_id}
    return float(loaded["value"])


@pytest.mark.parametrize("every", [1, 3], ids=["drained", "saved in the durable place"])
def test_a_run_that_has_gone_back_replaces_the_durable_steps_of_the_course_that_it_left(tmp_path: Path, every: int) -> None:
    run_ranks(2, lambda group: train(group, tmp_path, range(1, 5), 1.0, every=every))
    assert durable_value(tmp_path, 4) == 4.0
    run_ranks(2, lambda group: train(group, tmp_path, range(3, 5), 10.0, back_to=2, every=every))
    assert durable_value(tmp_path, 2) == 2.0
    assert durable_value(tmp_path, 4) == 40.0


def test_a_damaged_durable_step_is_replaced(tmp_path: Path) -> None:
    run_ranks(2, lambda group: train(group, tmp_path, range(1, 3), 1.0))
    record = tmp_path / "durable" / "step_00000002" / "checkpoint.json"
    record.write_bytes(record.read_bytes().replace(b"world_size", b"world_sizf"))
    run_ranks(2, lambda group: train(group, tmp_path, range(2, 3), 5.0))
    assert durable_value(tmp_path, 2) == 10.0


def test_a_step_that_is_saved_again_at_once_is_durable_as_it_was_saved_last(tmp_path: Path) -> None:
    def run(group: Any) -> None:
        with tiers(group, tmp_path) as opened:
            for value in (1.0, 2.0, 3.0):
                opened.save(2, state(value))
                opened.wait()

    run_ranks(2, run)
    assert durable_value(tmp_path, 2) == 3.0


def test_a_durable_step_of_a_newer_version_is_not_replaced(tmp_path: Path) -> None:
    run_ranks(2, lambda group: train(group, tmp_path, range(1, 3), 1.0))
    record = tmp_path / "durable" / "step_00000002" / "checkpoint.json"
    signed = record.read_bytes().replace(b'"format_version": "1.', b'"format_version": "9.').rpartition(b'  "digest"')[0]
    newer = signed + b'  "digest": "' + anchor_digest(signed).encode() + b'"\n}\n'
    record.write_bytes(newer)
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, lambda group: train(group, tmp_path, range(2, 3), 5.0))
    assert {type(error) for error in caught.value.errors} == {VersionError}
    assert record.read_bytes() == newer


def test_tiers_may_be_closed_twice(tmp_path: Path) -> None:
    def run(group: Any) -> None:
        with tiers(group, tmp_path) as opened:
            opened.save(2, state(1.0))
            opened.close()

    run_ranks(2, run)
    assert durable_value(tmp_path, 2) == 1.0
