"""Stages that save `layers.0` as if it were one layer: an error at save, which says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import CoverageError, DisagreementError, GiantstepError, LayoutError
from giantstep.pipeline import PipelineLayout, check_names, describe_stage, globalise
from giantstep.testing.ranks import run_ranks, run_ranks_collecting

LAYOUT = PipelineLayout.even(4, 2)
HINT = "stage-local names mean another tensor on each. Name layers by their global index (giantstep.pipeline.globalise)"


def refusal(make: Callable[[int], dict[str, Any]], path: Path, kind: type[GiantstepError], ranks: int = 2) -> str:
    """What all ranks raise alike when they save what `make` gives each; nothing is left of the save."""
    _, errors = run_ranks_collecting(ranks, lambda group: gs.save(make(group.rank), path, process_group=group))
    assert [type(error) for error in errors] == [kind] * ranks
    assert len({str(error) for error in errors}) == 1
    assert not path.exists() or not any(path.rglob("*.*"))
    return str(errors[0])


def stage(rank: int, value: float | None = None) -> dict[str, torch.Tensor]:
    """Two layers, counted from 0."""
    return {f"decoder.layers.{n}.weight": torch.full((3,), 10.0 * rank + n if value is None else value) for n in range(2)}


def test_plain_tensors_of_different_values(tmp_path: Path) -> None:
    message = refusal(stage, tmp_path / "x", DisagreementError)
    assert "tensor 'decoder.layers.0.weight', region [0:3]: rank 0 and rank 1 hold different values" in message
    assert "1 more like this. Its key has the number 0: if pipeline stages count" in message
    assert HINT in message


def test_sharded_tensors_that_are_all_main_replicas(tmp_path: Path) -> None:
    def state(rank: int) -> dict[str, Any]:
        # Equal values: what they claim is wrong all the same.
        return {name: gs.ShardedTensor.from_rank_offsets(name, part) for name, part in stage(rank, 1.0).items()}

    message = refusal(state, tmp_path / "x", CoverageError)
    assert "'decoder.layers.0.weight': region [0:3] has 2 main replicas, on rank 0, 1" in message
    assert HINT in message


def test_virtual_stages_of_one_rank(tmp_path: Path) -> None:
    def state(_: int) -> dict[str, Any]:
        return {
            f"model{virtual}": {n: gs.ShardedTensor.from_rank_offsets(n, part) for n, part in stage(virtual).items()}
            for virtual in range(2)
        }

    message = refusal(state, tmp_path / "x", CoverageError, ranks=1)
    assert "has 2 main replicas, on rank 0." in message
    assert HINT in message


def test_layers_of_different_shapes_and_regions_that_overlap(tmp_path: Path) -> None:
    message = refusal(lambda rank: {"layers.0.w": torch.zeros(3 + rank)}, tmp_path / "x", DisagreementError)
    assert "'layers.0.w' is F32 (3,) on rank 0 but F32 (4,) on rank 1" in message
    assert HINT in message

    def halves(rank: int) -> dict[str, Any]:
        shard = gs.ShardedTensor("layers.0.w", torch.zeros(2 + rank), torch.float32, (2 + rank,), (4,), (1 - rank,), None)
        return {"w": shard}

    message = refusal(halves, tmp_path / "y", CoverageError)
    assert "overlap" in message
    assert HINT in message


def test_objects_of_layers(tmp_path: Path) -> None:
    def state(rank: int) -> dict[str, Any]:
        return {"x": gs.ShardedObject("layers.0._extra_state", rank, (1,), (0,))}

    message = refusal(state, tmp_path / "x", CoverageError)
    assert "object 'layers.0._extra_state/shard_0_1' has several main replicas: it is held by rank 0, 1" in message
    assert HINT in message


def test_keys_without_a_number_get_no_such_hint(tmp_path: Path) -> None:
    message = refusal(lambda rank: {"weight": torch.full((2,), float(rank))}, tmp_path / "x", DisagreementError)
    assert "hold different values" in message
    assert "pipeline" not in message


def test_equal_plain_tensors_look_like_replicas_to_save_and_are_found_by_name_alone(tmp_path: Path) -> None:
    """Norms are all ones at first. Nothing in the values tells two layers from one: the names do, if the layout is known."""
    run_ranks(2, lambda group: gs.save(stage(group.rank, 1.0), tmp_path, process_group=group))
    assert len(gs.open_checkpoint(tmp_path).keys()) == 2, "two of four layers"
    with pytest.raises(LayoutError, match="names decoder layer 0, which is held by rank 0; this rank holds 2 to 3"):
        check_names(stage(1, 1.0), LAYOUT, 1)
    # What the layout has named cannot be mistaken.
    for path, named in (
        ("a", lambda rank: globalise(stage(rank, 1.0), LAYOUT, rank)),
        ("b", lambda rank: describe_stage(stage(rank, 1.0), LAYOUT, rank)),
    ):
        run_ranks(2, lambda group, named=named, path=path: gs.save(named(group.rank), tmp_path / path, process_group=group))
        assert gs.open_checkpoint(tmp_path / path).keys() == [f"decoder.layers.{n}.weight" for n in range(4)]
