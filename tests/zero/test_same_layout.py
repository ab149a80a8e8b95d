"""The form that loads only in the layout that saved it: to the bit there, refused with words everywhere else."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from zero_layouts import Optimizer, Side, Spec, models, optimizers, sides

import giantstep as gs
from giantstep.errors import BadArgumentError, CorruptionError, KeyMismatchError, LayoutMismatchError
from giantstep.storage.memory import MemoryStore
from giantstep.testing import RanksFailedError, check_coverage, run_ranks
from giantstep.zero import Bucket, BucketRules, FlatLayout, FlatParameter, lay_out, same_layout_state

_NUMBERS = itertools.count()
LOAD = gs.LoadOptions(reader_threads=1, buffer_bytes=1 << 20)
SAVE = gs.SaveOptions(writer_threads=1, buffer_bytes=1 << 20, on_object_difference="raise")
MODEL = [Spec("embed", (12, 5), 0), Spec("norm", (7,)), Spec("mlp", (6, 4), 0, "glu"), Spec("low", (9,), dtype=torch.bfloat16)]


def state_of(one: Optimizer) -> dict[str, Any]:
    place = one.place
    state = same_layout_state(one.layout, place.dp, one.states, position=one.side.position(place), instance=place.instance)
    return {"optimizer": {"buckets": state, "step": 7}}


def save_all(ranks: list[Optimizer]) -> MemoryStore:
    store = MemoryStore(f"same-layout-{next(_NUMBERS)}")
    states = [state_of(rank) for rank in ranks]
    run_ranks(len(ranks), lambda group: gs.save(states[group.rank], store, process_group=group, options=SAVE))
    return store


def load_all(ranks: list[Optimizer], store: MemoryStore, **settings: Any) -> None:
    states = [state_of(rank) for rank in ranks]
    run_ranks(len(ranks), lambda group: gs.load(states[group.rank], store, process_group=group, options=LOAD, **settings))


def refusal(ranks: list[Optimizer], store: MemoryStore, **settings: Any) -> LayoutMismatchError:
    """The error of a load that is refused: the same on all ranks, and no buffer was touched."""
    before = [[buffer.clone() for buffers in one.states.values() for buffer in buffers] for one in ranks]
    with pytest.raises(RanksFailedError) as raised:
        load_all(ranks, store, **settings)
    after = [[buffer for buffers in one.states.values() for buffer in buffers] for one in ranks]
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        assert all(map(torch.equal, old, new)), rank
    errors = raised.value.errors
    assert len({(type(error), str(error)) for error in errors}) == 1
    assert isinstance(errors[0], LayoutMismatchError)
    assert "giantstep.zero.reshardable_state" in errors[0].message
    return errors[0]


@settings(max_examples=20, deadline=None)
@given(models(), sides())
def test_buckets_come_back_in_the_layout_that_saved_them(specs: list[Spec], side: Side) -> None:
    store = save_all([one.fill() for one in optimizers(side, specs)])
    ranks = optimizers(side, specs)
    for one in ranks:
        for buffers in one.states.values():
            for buffer in buffers:
                buffer.fill_(-2)
    load_all(ranks, store)
    for one in ranks:
        one.check()
    store.clear()


def test_padding_is_stored_as_it_lies_and_every_bucket_is_one_tensor() -> None:
    side = Side(dp=2, tp=2, rules=BucketRules(parameter_alignment=8, bucket_alignment=16))
    ranks = [one.fill() for one in optimizers(side, MODEL)]
    store = save_all(ranks)
    checkpoint = gs.open_checkpoint(store)
    assert [key for key in checkpoint.keys() if ".tp1.pp0.exp_avg." in key] == [  # noqa: SIM118 - it is no dict
        "optimizer.buckets.tp1.pp0.exp_avg.0",
        "optimizer.buckets.tp1.pp0.exp_avg.1",
    ]
    whole = torch.cat([ranks[2].expected("exp_avg")[0], ranks[3].expected("exp_avg")[0]])
    assert (checkpoint["optimizer.buckets.tp1.pp0.exp_avg.0"][...] == whole.numpy()).all()
    assert (whole == -1).any()


def test_each_element_of_each_bucket_is_covered_once() -> None:
    found = check_coverage([state_of(one.fill()) for one in optimizers(Side(2, 2, 2, 2), MODEL)])
    assert not found.differences
    assert found.objects == 2 * 2 + 1


BASE = Side(dp=2, rules=BucketRules(parameter_alignment=4))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (replace(BASE, dp=3), "the number of data-parallel ranks was 2 and is 3"),
        (replace(BASE, dp=1), "the number of data-parallel ranks was 2 and is 1"),
        (replace(BASE, tp=2), "tp was 1 and is 2"),
        (replace(BASE, pp=2), "pp was 1 and is 2"),
        (replace(BASE, tp=3, dp=4), "tp was 1 and is 3; the number of data-parallel ranks was 2 and is 4"),
        (replace(BASE, seed=5), "parameter number 0 in the order of the buckets was 'embed' (float32 (12, 5)) and is '"),
        (
            replace(BASE, rules=BucketRules()),
            "parameter 'mlp' began at element 68 of bucket 0 and begins at element 67 of bucket 0 (other bucket sizes",
        ),
        (
            replace(BASE, rules=BucketRules(parameter_alignment=4, max_elements=20)),
            "parameter 'norm' began at element 60 of bucket 0 and begins at element 0 of bucket 1",
        ),
        (
            replace(BASE, rules=BucketRules(parameter_alignment=4, bucket_alignment=64)),
            "bucket 0 had 116 elements, 1 of padding, and has 128, 13 of padding",
        ),
    ],
)
def test_another_layout_is_refused_in_words_on_all_ranks_before_a_tensor_is_touched(after: Side, words: str) -> None:
    store = save_all([one.fill() for one in optimizers(BASE, MODEL)])
    error = refusal(optimizers(after, MODEL), store)
    assert words in error.message
    assert error.phase == "match"


def test_what_differs_on_some_ranks_only_is_told_to_all() -> None:
    before, after = [Spec("a", (4,)), Spec("b", (6,))], [Spec("a", (4,)), Spec("c", (6,))]
    store = save_all([one.fill() for one in optimizers(Side(dp=2, pp=2), before)])
    error = refusal(optimizers(Side(dp=2, pp=2), after), store)
    assert error.rank == 2
    assert "parameter number 0 in the order of the buckets was 'b' (float32 (6,)) and is 'c' (float32 (6,))" in error.message


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (4, 1)])
def test_fewer_and_more_tensor_parallel_ranks_are_refused_alike(sizes: tuple[int, int]) -> None:
    specs = [Spec("w", (8, 3), 0)]
    store = save_all([one.fill() for one in optimizers(Side(tp=sizes[0]), specs)])
    assert f"tp was {sizes[0]} and is {sizes[1]}" in refusal(optimizers(Side(tp=sizes[1]), specs), store).message


@pytest.mark.parametrize("strict", [gs.StrictHandling.IGNORE_ALL, gs.StrictHandling.LOG_ALL, gs.StrictHandling.RETURN_ALL])
def test_no_strictness_lets_another_layout_pass(strict: gs.StrictHandling) -> None:
    store = save_all([one.fill() for one in optimizers(BASE, MODEL)])
    refusal(optimizers(replace(BASE, dp=3), MODEL), store, strict=strict)


def test_plans_that_are_kept_do_not_let_another_layout_pass() -> None:
    store = save_all([one.fill() for one in optimizers(BASE, MODEL)])
    caches = [gs.PlanCache() for _ in range(2)]

    def load(side: Side) -> list[bool]:
        states = [state_of(one) for one in optimizers(side, MODEL)]
        return run_ranks(
            2,
            lambda group: (
                gs.load(
                    states[group.rank], store, process_group=group, options=replace(LOAD, plan_cache=caches[group.rank])
                ).report.plan_reused
            ),
        )

    assert load(BASE) == [False, False]
    assert load(BASE) == [True, True]
    # The buckets are as long as before.
    with pytest.raises(RanksFailedError, match="LayoutMismatchError"):
        load(replace(BASE, rules=BucketRules()))


def test_another_shape_or_dtype_or_number_of_parameters_is_named() -> None:
    store = save_all([one.fill() for one in optimizers(Side(), [Spec("a", (4,)), Spec("b", (3, 2))])])

    def words(*specs: Spec) -> str:
        return refusal(optimizers(Side(), list(specs)), store).message

    assert "parameter number 1 in the order of the buckets was 'b' (float32 (3, 2)) and is 'b' (float32 (2, 3))" in words(
        Spec("a", (4,)), Spec("b", (2, 3))
    )
    assert "there were 2 parameters and are 1: 'b' (float32 (3, 2)) is gone" in words(Spec("a", (4,)))
    assert "and are 3: 'c' (float32 ()) is new" in words(Spec("a", (4,)), Spec("b", (3, 2)), Spec("c", ()))
    assert "was 'a' (float32 (4,)) and is 'b' (float32 (3, 2))" in words(Spec("b", (3, 2)), Spec("a", (4,)))
    assert "was 'a' (float32 (4,)) and is 'a' (bfloat16 (4,))" in words(
        Spec("a", (4,), dtype=torch.bfloat16), Spec("b", (3, 2))
    )


def test_other_cuts_of_equal_buckets_are_named() -> None:
    parameter, store = FlatParameter("w", (12,), "float32"), MemoryStore("cuts")

    def state(rank: int, cuts: tuple[int, ...]) -> dict[str, Any]:
        layout = FlatLayout((Bucket((parameter,), (0,), 12, cuts),), 2)
        return same_layout_state(layout, rank, {"m": [torch.zeros(cuts[rank + 1] - cuts[rank])]})

    run_ranks(2, lambda group: gs.save(state(group.rank, (0, 6, 12)), store, process_group=group))
    with pytest.raises(RanksFailedError, match=r"bucket 0 was divided among ranks at \(0, 6, 12\) and is at \(0, 5, 12\)"):
        run_ranks(2, lambda group: gs.load(state(group.rank, (0, 5, 12)), store, process_group=group))


def test_a_checkpoint_without_such_state_is_met_by_strictness() -> None:
    store = MemoryStore("other-form")
    gs.save({"step": 1}, store)
    (one,) = optimizers(Side(), MODEL)
    with pytest.raises(KeyMismatchError, match=r"optimizer\.buckets\.layout"):
        gs.load(state_of(one), store)


@pytest.mark.parametrize("value", [None, {}, {"axes": {}, "layout": b"rubbish"}, {"axes": 3, "layout": b""}])
def test_a_stored_value_that_is_no_layout_is_corruption(value: Any) -> None:
    store = MemoryStore(f"rubbish-{next(_NUMBERS)}")
    gs.save({"layout": gs.ShardedObject("optimizer.buckets.layout", value, (1, 1), (0, 0))}, store)
    (one,) = optimizers(Side(), MODEL)
    with pytest.raises(CorruptionError, match=r"optimizer.buckets.layout/shard_0.0_1.1.* does not describe a layout"):
        gs.load(state_of(one), store)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": {"tp": (2, 2)}}, "axis 'tp' with"),
        ({"position": {"tp": 2}}, "axis 'tp' with 2"),
        ({"position": {"t.p": (0, 2)}}, "axis 't.p'"),
        ({"rank": 1}, "rank 1"),
        ({"instance": -1}, "instance -1"),
        ({"states": {"layout": []}}, "'layout' is not a name for a state"),
        ({"states": {"m": [torch.zeros(3)]}}, "state 'm', bucket 0"),
        ({"states": {"m": []}}, "0 tensors for 1 buckets"),
    ],
)
def test_what_does_not_fit_the_layout_is_refused_when_described(settings: dict[str, Any], message: str) -> None:
    layout = lay_out([FlatParameter("w", (12,), "float32")], 1)
    given_settings = {"rank": 0, "states": {"m": [torch.zeros(12)]}, **settings}
    with pytest.raises(BadArgumentError, match=message):
        same_layout_state(layout, given_settings.pop("rank"), given_settings.pop("states"), **given_settings)
