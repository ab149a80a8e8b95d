"""Names of layers: from a stage's own count to the global index and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn_pipelines import by_rank, layouts, stages_of, whole_model
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.errors import BadArgumentError, DisagreementError
from giantstep.pipeline import PipelineLayout, check_names, describe_stage, globalise, localise

LAYOUT = PipelineLayout.parse("Et|tt|t|tmL", 2)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.booleans())
def test_the_stages_of_all_ranks_are_the_whole_model_and_come_apart_again(layout: PipelineLayout, tied: bool) -> None:
    whole = whole_model(layout.layers, layout.mtp_layers, tied=tied, start=0)
    stages = stages_of(layout, whole, tied=tied)
    union = {}
    for rank, chunks in enumerate(by_rank(layout, stages)):
        held: dict[str, object] = {}
        for virtual, chunk in enumerate(chunks):
            named = globalise(chunk, layout, rank, virtual)
            assert len(named) == len(chunk)
            check_names(named, layout, rank, virtual)
            assert localise(named, layout, rank, virtual) == chunk
            held |= named
        check_names(held, layout, rank)
        union |= held
        # Out of the state of all stages, a stage finds its own layers.
        layer_names = [{name for name in chunk if ".layers." in name} for chunk in chunks]
        for virtual, names in enumerate(layer_names):
            assert {name for name in localise(held, layout, rank, virtual) if ".layers." in name} == names
    assert union.keys() | {"output_layer.weight"} == whole.keys() | {"output_layer.weight"}
    assert all(value.equal(union[name]) for name, value in whole.items())  # type: ignore[attr-defined]


def test_names_that_are_no_layers_stay() -> None:
    names = ["decoder.layers.weight", "decoder.layersx.0.w", "decoder.layers.0x.w", "x.decoder.layers.0.w", "mtp.layers.", ""]
    assert list(globalise(dict.fromkeys(names), LAYOUT, 1)) == names
    assert list(globalise({"decoder.layers.1": 0}, LAYOUT, 1)) == ["decoder.layers.2"]
    assert globalise({"h.1.w": 5}, LAYOUT, 1, prefix="h.") == {"h.2.w": 5}
    assert globalise({"mtp.layers.0.w": 5, "decoder.layers.0.w": 6}, LAYOUT, 1, 1) == {
        "mtp.layers.0.w": 5,
        "decoder.layers.4.w": 6,
    }


def test_names_that_are_global_already_are_noticed() -> None:
    state = {f"decoder.layers.{n}.w": n for n in range(2)}
    once = globalise(state, LAYOUT, 1)
    assert list(once) == ["decoder.layers.1.w", "decoder.layers.2.w"]
    with pytest.raises(
        BadArgumentError,
        match=r"layers.2.w': rank 1, virtual stage 0 has 2 decoder layers \(1 to 2\), .*no number 2\. .*global already",
    ):
        globalise(once, LAYOUT, 1)
    with pytest.raises(BadArgumentError, match=r"has 0 MTP layers \(none\)"):
        globalise({"mtp.layers.0.w": 0}, LAYOUT, 1)


def test_stage_local_names_are_noticed_whatever_the_values() -> None:
    state = {f"decoder.layers.{n}.w": 0 for n in range(2)}
    with pytest.raises(
        DisagreementError,
        match=r"'decoder.layers.0.w' on pipeline rank 1 names decoder layer 0, which is held by rank 0; this rank holds "
        r"1 to 2, 4. .*stage-local.*giantstep.pipeline.globalise",
    ):
        check_names(state, LAYOUT, 1)
    check_names(globalise(state, LAYOUT, 1), LAYOUT, 1)
    with pytest.raises(DisagreementError, match=r"decoder layer 9, which is not among the 5; this rank holds 0, 3\."):
        check_names(["decoder.layers.9.w"], LAYOUT, 0)
    with pytest.raises(DisagreementError, match=r"this rank holds 0\."):
        check_names(["decoder.layers.3.w"], LAYOUT, 0, 0)


def test_prefixes_that_cannot_be_told_apart_are_refused() -> None:
    for prefixes in (("", "m."), ("h.", "h.")):
        with pytest.raises(BadArgumentError, match="prefixes"):
            globalise({}, LAYOUT, 0, prefix=prefixes[0], mtp_prefix=prefixes[1])


@pytest.mark.parametrize("call", [globalise, check_names, describe_stage])
@pytest.mark.parametrize("name", ["module.decoder.layers.0.w", "exp_avg.decoder.layers.1.w", "m.decoder.layers.0"])
def test_layers_that_are_all_behind_another_prefix_are_not_passed_over(call: Any, name: str) -> None:
    layout = PipelineLayout.parse("E|tt|ttL", 3)
    state = {name: torch.ones(1), "norm": torch.ones(1)}
    wrapper = name.split(".", maxsplit=1)[0]
    with pytest.raises(BadArgumentError, match=rf"give '{wrapper}\.decoder\.layers\.' as what they begin with"):
        call(state, layout, 1)
    # A stage without layers may have others' names, and so may one whose own are there.
    call(state, layout, 0)
    if call is not check_names:
        call({**state, "decoder.layers.1.w": torch.ones(1)}, layout, 1)


def test_two_names_never_become_one() -> None:
    layout = PipelineLayout.even(4, 2)
    state = {"decoder.layers.0.w": 1, "decoder.layers.00.w": 2}
    assert globalise(state, layout, 1) == {"decoder.layers.2.w": 1, "decoder.layers.00.w": 2}
