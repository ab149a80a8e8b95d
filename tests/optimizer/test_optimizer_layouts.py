"""Every kind of optimizer through every change of layout: state equal to the bit, and training that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import LAYOUTS, OPTIMIZERS, Job, _muon, assembled, load, same_state, save

import giantstep as gs

CHANGES = [
    ("one", "one"),
    ("rows of 2", "columns"),
    ("rows of 2", "rows of 2"),
    ("one", "flat"),
    ("flat", "flat, others"),
    ("flat", "columns"),
    ("replicas", "flat, others"),
    ("pipeline", "pipeline, moved"),
    ("experts of 2", "experts of 4"),
    ("experts of 4", "one"),
    ("rows of 4", "one"),
    ("one", "rows of 4"),
    ("pipeline", "rows of 2"),
]


@pytest.mark.parametrize("change", CHANGES, ids=" to ".join)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_and_hyper_parameters_are_what_was_saved(name: str, change: tuple[str, str], tmp_path: Path) -> None:
    saved = save(change[0], OPTIMIZERS[name], tmp_path / "c")
    loaded = load(change[1], OPTIMIZERS[name], tmp_path / "c")
    assert same_state(assembled(saved), assembled(loaded))
    before = {key: group for job in saved for key, group in job.groups().items()}
    for job in loaded:
        assert job.groups() == {key: before[key] for key in job.groups()}
        assert job.report.missing == job.report.unexpected == ()
        held = [f"{what} of {key}" for (what, key), parts in job.held().items() for _ in parts if what not in ("param", "step")]
        values = {"step", "mu_product", "eta", "mu"}
        assert sorted(job.state.report.loaded) == sorted(item for item in held if item.split(" ")[0] not in values)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["adamw", "adamw, fused", "adamw, tensor lr", "sgd, momentum", "lion", "nadam"])
def test_training_goes_on_as_if_uninterrupted(name: str, layout: str, tmp_path: Path) -> None:
    saved = save(layout, OPTIMIZERS[name], tmp_path / "c")
    loaded = load(layout, OPTIMIZERS[name], tmp_path / "c")
    for job in (*saved, *loaded):
        job.train(3, 6)
    assert same_state(assembled(saved), assembled(loaded))
    for before, after in zip(saved, loaded, strict=True):
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(before.params, after.params, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_is_there_already_is_filled_in_place(name: str, tmp_path: Path) -> None:
    saved = save("one", OPTIMIZERS[name], tmp_path / "c")
    job = Job("one", 0, OPTIMIZERS[name], seed=1)
    job.train(10, 12)
    (optimizer,) = job.optimizers
    before = {id(param): dict(state) for param, state in optimizer.state.items()}
    gs.load(job.tree(), tmp_path / "c")
    assert same_state(assembled(saved), assembled([job]))
    for param, state in optimizer.state.items():
        for what, value in state.items():
            assert value is before[id(param)][what] or not isinstance(value, torch.Tensor)


@pytest.mark.parametrize("change", CHANGES, ids=" to ".join)
@pytest.mark.parametrize("name", ["adamw", "sgd, momentum"])
def test_fp32_copies_of_bf16_parameters_go_through_every_change(name: str, change: tuple[str, str], tmp_path: Path) -> None:
    saved = save(change[0], OPTIMIZERS[name], tmp_path / "c", copies=True)
    loaded = load(change[1], OPTIMIZERS[name], tmp_path / "c", copies=True)
    assert same_state(assembled(saved), assembled(loaded)), "copies and moments"
    for job in loaded:
        assert job.report.missing == job.report.unexpected == ()
        assert {f"fp32_param of {key}" for key, _ in job.params} <= set(job.state.report.loaded)
        assert all(param.dtype == torch.float32 for _, param in job.params)
        assert all(shard.data.dtype == torch.bfloat16 for shard in job.shards if shard.data is not None)
    if change[0] == change[1]:
        for job in (*saved, *loaded):
            job.train(3, 6)
        assert same_state(assembled(saved), assembled(loaded))


MATRIX_CHANGES = [change for change in CHANGES if not any("flat" in layout for layout in change)]


@pytest.mark.parametrize("change", MATRIX_CHANGES, ids=" to ".join)
def test_chained_optimizers_have_a_part_each(change: tuple[str, str], tmp_path: Path) -> None:
    def make(params: Any) -> Any:
        chained = _muon(params)
        if not any(param.dim() == 2 for _, param in params):
            chained["muon"].param_groups[0]["params"] = []
        return chained

    saved = save(change[0], make, tmp_path / "c")
    loaded = load(change[1], make, tmp_path / "c")
    assert same_state(assembled(saved), assembled(loaded))
    if change[0] == change[1]:
        for job in (*saved, *loaded):
            job.train(3, 6)
        assert same_state(assembled(saved), assembled(loaded))
