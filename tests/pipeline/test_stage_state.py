"""Stages of one pipeline load what the stages of another have saved, tied embeddings and moments included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_pipelines import by_rank, layouts, stages_of, whole_model
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError
from giantstep.fused import swiglu
from giantstep.pipeline import ModelNames, PipelineLayout, describe_stage, localise
from giantstep.testing import check_coverage, round_trip

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def rank_states(
    layout: PipelineLayout, stages: list[Any], moments: list[Any], *, tied: bool, copies: int
) -> list[dict[str, Any]]:
    """States of all ranks, for each of the copies that data parallelism makes."""
    names = ModelNames(tied=tied)
    found = []
    for copy in range(copies):
        for rank, pairs in enumerate(by_rank(layout, list(zip(stages, moments, strict=True)))):
            model: dict[int, Any] = {}
            optimizer: dict[int, Any] = {}
            for virtual, (stage, moment) in enumerate(pairs):
                model[virtual] = describe_stage(stage, layout, rank, virtual, names=names, replica_id=copy)
                shards = {
                    name: gs.ShardedTensor.from_rank_offsets(f"exp_avg.{name}", part, replica_id=copy)
                    for name, part in moment.items()
                }
                optimizer[virtual] = describe_stage(shards, layout, rank, virtual, names=names)
            found.append({"model": model, "optimizer": optimizer})
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data(), layers=st.integers(0, 6), mtp=st.integers(0, 2), tied=st.booleans(), copies=st.integers(1, 2))
def test_any_pipeline_loads_what_any_other_has_saved(
    data: st.DataObject, layers: int, mtp: int, tied: bool, copies: int
) -> None:
    saving, loading = (data.draw(layouts(layers, mtp=mtp)) for _ in range(2))
    whole, moments = (whole_model(layers, mtp, tied=tied, start=start) for start in (0, 50_000))
    states = rank_states(
        saving, stages_of(saving, whole, tied=tied), stages_of(saving, moments, tied=tied), tied=tied, copies=copies
    )
    expected = [stages_of(loading, model, tied=tied) for model in (whole, moments)]
    found = [[{name: part * 0 for name, part in stage.items()} for stage in stages] for stages in expected]
    round_trip(states, rank_states(loading, *found, tied=tied, copies=1))
    for before, after in zip(expected, found, strict=True):
        for held, loaded in zip(before, after, strict=True):
            assert held.keys() == loaded.keys()
            assert all(torch.equal(part, loaded[name]) for name, part in held.items())
    # One process without a pipeline, under the names of the whole model.
    plain = {name: part * 0 for name, part in whole.items()}
    keyed = {name: gs.ShardedTensor.from_rank_offsets(name, part) for name, part in plain.items()}
    round_trip(states, [keyed], strict=gs.StrictHandling.RAISE_UNEXPECTED)
    assert all(torch.equal(part, plain[name]) for name, part in whole.items())


def test_a_tied_embedding_is_stored_once_and_written_by_the_first_stage() -> None:
    layout = PipelineLayout.parse("E|tt|L", 3)
    weight = torch.rand(5, 3)
    names = ModelNames(tied=True)
    states = [
        describe_stage({EMBEDDING: weight}, layout, 0, names=names),
        describe_stage({"decoder.layers.0.w": weight, "decoder.layers.1.w": weight + 1}, layout, 1, names=names),
        describe_stage({OUTPUT: weight.clone()}, layout, 2, names=names, replica_id=(0, 0)),
    ]
    assert states[2][OUTPUT].key == EMBEDDING
    assert [states[0][EMBEDDING].replica_id, states[2][OUTPUT].replica_id] == [0, (0, 0, 1)]
    found = check_coverage(states)
    assert (found.tensors, found.replicas) == (3, 1)
    # Untied, each is a tensor of its own.
    states[0] = describe_stage({EMBEDDING: weight}, layout, 0)
    states[2] = describe_stage({OUTPUT: weight.clone()}, layout, 2)
    assert check_coverage(states).tensors == 4


def test_factories_get_the_names_of_their_layers_and_so_do_their_moments(tmp_path: Path) -> None:
    layout = PipelineLayout.parse("Et|tL", 2)
    name = "decoder.layers.0.mlp.weight"
    local = {rank: torch.rand(4, 3) for rank in range(2)}

    def state(rank: int, data: torch.Tensor) -> dict[str, Any]:
        weight = swiglu(name, data, 0, 1)
        moment = replace(weight, key=f"exp_avg.{name}", data=data + 1)
        model = describe_stage({name: weight, "step": 3}, layout, rank)
        return {"model": model, "optimizer": describe_stage({name: moment}, layout, rank)}

    targets = [state(rank, torch.zeros(4, 3)) for rank in range(2)]
    loaded = round_trip([state(rank, local[rank]) for rank in range(2)], targets, path=tmp_path)
    assert gs.open_checkpoint(tmp_path).keys() == [
        f"{front}decoder.layers.{n}.mlp.weight" for front in ("", "exp_avg.") for n in range(2)
    ]
    for rank in range(2):
        assert torch.equal(localise(loaded[rank]["model"], layout, rank)[name], local[rank])
        assert torch.equal(localise(loaded[rank]["optimizer"], layout, rank)[name], local[rank] + 1)
        assert loaded[rank]["model"]["step"] == 3


def test_objects_of_layers_get_their_names_too() -> None:
    layout = PipelineLayout.parse("Et|tL", 2)
    name = "decoder.layers.0._extra_state"

    def state(rank: int, value: object) -> dict[str, Any]:
        return describe_stage({name: gs.ShardedObject(name, value, (1,), (0,))}, layout, rank)

    loaded = round_trip([state(rank, {"scale": rank}) for rank in range(2)], [state(rank, None) for rank in range(2)])
    assert [localise(found, layout, rank)[name] for rank, found in enumerate(loaded)] == [{"scale": 0}, {"scale": 1}]


def test_what_belongs_to_no_stage_or_to_another_is_refused() -> None:
    layout = PipelineLayout.parse("E|tt|L", 3)
    weight = torch.rand(2)
    with pytest.raises(BadArgumentError, match=r"rank 1, virtual stage 0: in the layout 'E.tt.L' it is held by rank 0 stage 0"):
        describe_stage({EMBEDDING: weight}, layout, 1)
    with pytest.raises(BadArgumentError, match="it is held by rank 2 stage 0"):
        describe_stage({OUTPUT: weight}, layout, 0)
    with pytest.raises(BadArgumentError, match="has 2 decoder layers"):
        describe_stage({"decoder.layers.2.w": weight}, layout, 1)
    other = gs.ShardedTensor.from_rank_offsets("another.w", weight)
    with pytest.raises(
        BadArgumentError, match=r"'decoder.layers.0.w' is described with the key 'another.w', in which .*expected"
    ):
        describe_stage({"decoder.layers.0.w": other}, layout, 1)
    with pytest.raises(BadArgumentError, match="replica_id"):
        describe_stage({}, layout, 1, replica_id=-1)
