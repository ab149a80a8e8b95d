"""`check_coverage`: simulated ranks are judged as real ones are."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import giantstep as gs
import giantstep.testing
from giantstep.errors import BadArgumentError, CoverageError, DisagreementError, LayoutError, UnsupportedTypeError
from giantstep.storage.memory import MemoryStore
from giantstep.testing import check_coverage, draw, round_trip
from giantstep.testing.ranks import run_ranks, run_ranks_collecting
from layouts import Case, cases, cut

SMALL = gs.SaveOptions(split_bytes=1, writer_threads=1, buffer_bytes=256 << 10)


def box(key: str, offset: Sequence[int], size: Sequence[int], shape: Sequence[int], replica: int = 0, **more: Any) -> Any:
    """A shard anywhere, with values that tell where each element belongs."""
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(tuple(shape))
    data = whole[tuple(slice(start, start + count) for start, count in zip(offset, size, strict=True))].clone()
    return gs.ShardedTensor(key, data, data.dtype, tuple(size), tuple(shape), tuple(offset), None, replica, **more)


def flat(start: int, stop: int, replica: int = 0) -> Any:
    """A range of a flattened tensor of 4 x 6."""
    data = torch.arange(24.0)[start:stop]
    return gs.ShardedTensor.from_rank_offsets_flat("m", data, (4, 6), flattened_range=slice(start, stop), replica_id=replica)


def tensor_parallel(ranks: int, copies: int, device: str = "cpu") -> list[dict[str, Any]]:
    """Weights cut by rows, held by `copies` groups of ranks, beside a bias that all have."""
    states = []
    for rank in range(ranks * copies):
        part = torch.full((4, 8), float(rank % ranks), device=device)
        weight = gs.ShardedTensor.from_rank_offsets("w", part, (0, rank % ranks, ranks), replica_id=rank // ranks)
        states.append({"w": weight, "bias": torch.ones(8, device=device), "lr": 0.5})
    return states


def saved_error(states: list[dict[str, Any]], options: gs.SaveOptions | None = None) -> BaseException:
    """What real ranks raise who save these states."""
    store = MemoryStore("saved-error")
    _, errors = run_ranks_collecting(
        len(states), lambda group: gs.save(states[group.rank], store, process_group=group, options=options)
    )
    store.clear()
    assert errors[0] is not None
    return errors[0]


def saved_bytes(states: list[dict[str, Any]], options: gs.SaveOptions) -> list[gs.SaveReport]:
    store = MemoryStore("saved-bytes")
    reports = run_ranks(len(states), lambda group: gs.save(states[group.rank], store, process_group=group, options=options))
    store.clear()
    return reports


GOOD = {
    "tensor parallel": tensor_parallel(4, 1),
    "tensor parallel with replicas": tensor_parallel(4, 8),
    "one rank": [{"w": torch.ones(3), "s": torch.ones(()), "n": 5}],
    "replicated": [{"w": torch.ones(3, 5), "n": 5} for _ in range(5)],
    "flat ranges of any length": [{"m": flat(*span)} for span in ((0, 7), (7, 7), (7, 19), (19, 24))],
    "pipeline": [{"layers": [box(f"layer{2 * stage + n}", (0, 0), (2, 2), (2, 2)) for n in range(2)]} for stage in range(3)],
    "irregular": [
        {"w": box("w", offset, size, (5, 6))}
        for offset, size in (((0, 0), (5, 2)), ((0, 2), (3, 4)), ((3, 2), (2, 4)), ((2, 2), (0, 4)))
    ],
    "objects": [{"rng": gs.ShardedObject("rng", {"seed": rank}, (3,), (rank,)), "step": 1} for rank in range(3)],
    "nothing": [{} for _ in range(2)],
    "tied": [{"a": {"w": shared}, "b": {"w": shared}} for shared in [torch.ones(4)]],
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_told_is_what_saving_does(name: str) -> None:
    states = GOOD[name]
    for options in (SMALL, gs.SaveOptions(writer_threads=1)):
        found = check_coverage(states, options=options)
        reports = saved_bytes(states, options)
        assert list(found.bytes_by_rank) == [report.bytes_written for report in reports]
        assert (found.tensors, found.objects, found.bytes) == (reports[0].tensors, reports[0].objects, reports[0].bytes)
        assert not found.differences
        assert not found.uncompared


def test_shards_and_replicas_are_counted() -> None:
    found = check_coverage(tensor_parallel(4, 2), options=SMALL)
    # 4 rows twice, and 8 times the bias.
    assert (found.tensors, found.shards, found.replicas) == (2, 16, 4 + 7)
    # 4 x 4 x 8 floats, the bias, and the common state, which rank 0 writes instead of floats.
    assert found.bytes - (4 * 4 * 8 + 8) * 4 in range(1, 100)
    # Its share of the rows is the smaller for that; so small tensors are divided at rows of 32 bytes, no further.
    assert max(found.bytes_by_rank) - min(found.bytes_by_rank) <= 32
    assert found.imbalance == max(found.bytes_by_rank) / (found.bytes / 8)
    assert str(found).splitlines()[0] == "2 tensors on 8 ranks, each covered once: 16 shards, 11 replicas among them"


def test_sixty_four_ranks_share_the_work() -> None:
    states = [
        {
            f"layer{n}": gs.ShardedTensor.from_rank_offsets(
                f"layer{n}", torch.empty(64, 256, device="meta"), (0, rank % 8, 8), replica_id=rank // 8
            )
            for n in range(16)
        }
        for rank in range(64)
    ]
    found = check_coverage(states, options=gs.SaveOptions(split_bytes=1))
    assert found.shards == 64 * 16
    assert found.bytes == 16 * 8 * 64 * 256 * 4
    assert found.imbalance <= 1.05


WRONG = {
    "gap": [{"w": box("w", (0, 0), (2, 4), (6, 4))}, {"w": box("w", (4, 0), (2, 4), (6, 4))}],
    "overlap": [{"w": box("w", (0, 0), (4, 4), (6, 4))}, {"w": box("w", (3, 0), (3, 4), (6, 4))}],
    "doubled main replica": [{"w": box("w", (0, 0), (6, 4), (6, 4))} for _ in range(3)],
    "only copies": [{"w": box("w", (0, 0), (6, 4), (6, 4), replica=1)} for _ in range(2)],
    "flat gap": [{"m": flat(0, 7)}, {"m": flat(9, 24)}],
    "flat overlap": [{"m": flat(0, 9)}, {"m": flat(7, 24)}],
    "differing plain tensors": [{"w": torch.zeros(3)}, {"w": torch.ones(3)}],
    "dtypes": [{"w": torch.zeros(3)}, {"w": torch.zeros(3, dtype=torch.int8)}],
    "shapes": [{"w": torch.zeros(3)}, {"w": torch.zeros(4)}],
    "plain and sharded": [{"w": torch.zeros(3)}, {"w": box("w", (0,), (3,), (3,))}],
    "position missing": [{"o": gs.ShardedObject("o", 1, (3,), (rank,))} for rank in range(2)],
    "object twice": [{"o": gs.ShardedObject("o", 1, (1,), (0,))} for _ in range(2)],
}


@pytest.mark.parametrize("name", WRONG)
def test_layouts_that_do_not_fit_are_refused_in_the_words_of_save(name: str) -> None:
    expected = saved_error(WRONG[name])
    assert isinstance(expected, LayoutError)
    with pytest.raises(type(expected)) as found:
        check_coverage(WRONG[name])
    assert str(found.value) == str(expected)


@pytest.mark.parametrize("state", [{"w": torch.ones(2).to_sparse()}, {"x": object()}, {("w",): {"a", 1j}, "w": iter(())}, 5])
def test_states_that_cannot_be_saved_name_the_rank(state: Any) -> None:
    states = [{"w": torch.ones(2)}, state]
    expected = saved_error(states)
    with pytest.raises(BadArgumentError) as found:
        check_coverage(states)
    assert str(found.value) == str(expected)
    assert found.value.rank == 1


@pytest.mark.parametrize("states", [[], {}, {"w": torch.ones(1)}, None])
def test_states_must_be_a_sequence_of_them(states: Any) -> None:
    with pytest.raises(BadArgumentError, match="one per rank"):
        check_coverage(states)


def test_a_flat_range_that_is_missing_is_named() -> None:
    with pytest.raises(CoverageError, match="elements 7:9 are held by no rank") as found:
        check_coverage(WRONG["flat gap"])
    assert found.value.tensor_key == "m"


def test_copies_that_differ_are_found_although_save_trusts_them() -> None:
    """The classic mistake: the tensor-parallel rank was left out of the offsets, and went into the replica id."""
    states = [
        {"w": gs.ShardedTensor.from_rank_offsets("w", torch.full((2, 3), float(rank)), replica_id=rank)} for rank in range(3)
    ]
    saved_bytes(states, SMALL)
    with pytest.raises(DisagreementError, match=r"'w', region \[0:2,0:3\]: rank 0 and rank 1 hold different values") as found:
        check_coverage(states)
    assert "replica_id 0 and 1" in str(found.value)


def test_common_state_that_differs_is_told_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    states = [{"lr": 0.1, "step": 3, "rank": rank} for rank in range(3)]
    with caplog.at_level(logging.WARNING):
        saved_bytes(states, gs.SaveOptions())
    found = check_coverage(states)
    assert found.differences == "common state differs from rank 0's at 'rank' (ranks 1, 2)"
    assert found.differences in caplog.text
    assert found.differences in str(found)
    strict = gs.SaveOptions(on_object_difference="raise")
    with pytest.raises(DisagreementError) as error:
        check_coverage(states, options=strict)
    assert str(error.value) == str(saved_error(states, strict))


def test_states_without_values_are_checked_but_not_compared() -> None:
    found = check_coverage(tensor_parallel(4, 2, device="meta"), options=SMALL)
    full = check_coverage(tensor_parallel(4, 2), options=SMALL)
    assert found.bytes_by_rank == full.bytes_by_rank
    assert found.uncompared == ("bias", "w")
    assert "replicas not compared, since some have no values: 2: bias, w" in str(found)


def test_gaps_of_states_without_values_are_refused_likewise() -> None:
    states = [{"w": gs.ShardedTensor("w", None, torch.float32, (2, 4), (6, 4), (offset, 0), None)} for offset in (0, 4)]
    with pytest.raises(CoverageError) as found:
        check_coverage(states)
    assert str(found.value) == str(saved_error(WRONG["gap"]))


def test_a_rank_with_values_beside_one_without_does_not_disagree() -> None:
    found = check_coverage([{"w": torch.ones(3), "v": torch.ones(2)}, {"w": torch.ones(3, device="meta"), "v": torch.ones(2)}])
    assert found.uncompared == ("w",)


def test_tensors_without_values_are_not_taken_for_tied_ones() -> None:
    """Equal shapes without memory are two tensors; with values, one memory under two names is stored once."""
    meta = [{"a": torch.ones(8, device="meta"), "b": torch.ones(8, device="meta")} for _ in range(2)]
    assert check_coverage(meta).bytes == 64
    shared = torch.ones(8)
    assert check_coverage([{"a": shared, "b": shared}] * 2).bytes == 32


def test_objects_beside_tensors_without_values_keep_their_rules() -> None:
    twice = {
        "w": torch.ones(1, device="meta"),
        "a": gs.ShardedObject("o", 1, (1,), (0,)),
        "b": gs.ShardedObject("o", 1, (1,), (0,)),
    }
    with pytest.raises(BadArgumentError, match="two objects of the state dict are 'o/shard_0_1'"):
        check_coverage([twice])
    with pytest.raises(UnsupportedTypeError, match="rank 0, phase describe"):
        check_coverage([{"w": torch.ones(1, device="meta"), "x": object()}])


def test_a_model_that_fits_in_no_memory_is_checked() -> None:
    """Eight times 128 experts of 2 GiB each, cut by expert and by tensor parallelism."""
    states: list[dict[str, Any]] = []
    for rank in range(16):
        expert, part = divmod(rank, 2)
        data = torch.empty(16, 16384, 16384, dtype=torch.bfloat16, device="meta")
        tensor = gs.ShardedTensor.from_rank_offsets("experts", data, (0, expert, 8), (2, part, 2))
        states.append({"experts": tensor, "step": 3})
    found = check_coverage(states)
    assert found.bytes >= 128 * 16384 * 32768 * 2
    assert found.imbalance < 1.001


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Case], int]:
    ranks = draw(st.integers(1, 8))
    return [
        draw(cases(key, ranks, 1))
        for key in draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4, unique=True))
    ], ranks


def states_of(drawn: list[Case], ranks: int, *, values: bool = True) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = [{} for _ in range(ranks)]
    for case in drawn:
        for number, shard in enumerate(case.saved):
            data = cut(case.value(), shard.region) if values else None
            states[shard.rank][f"{case.key}/{number}"] = case.sharded(shard, data)
    return states


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(layouts())
def test_any_partition_is_covered_and_one_shard_less_is_not(drawn: tuple[list[Case], int]) -> None:
    tensors, ranks = drawn
    options = gs.SaveOptions(split_bytes=16)
    found = check_coverage(states_of(tensors, ranks), options=options)
    assert found.tensors == len(tensors)
    assert found.bytes_by_rank == check_coverage(states_of(tensors, ranks, values=False), options=options).bytes_by_rank
    first = tensors[0]
    main = next(shard for shard in first.saved if shard.replica_id == 0)
    lacking = dataclasses.replace(first, saved=tuple(shard for shard in first.saved if shard is not main))
    states = states_of([lacking, *tensors[1:]], ranks)
    if main.region.elements and lacking.saved:
        with pytest.raises(CoverageError, match="no rank saves"):
            check_coverage(states, options=options)
    else:
        # Nobody mentions the tensor, or nothing of it is lacking.
        check_coverage(states, options=options)


@pytest.mark.parametrize("function", [check_coverage, draw, round_trip])
def test_the_examples_in_the_docstrings_run(function: Any) -> None:
    lines = inspect.cleandoc(function.__doc__).splitlines()
    example = "\n".join(line[4:] for line in lines[1 : lines.index("Args:")] if line.startswith("    "))
    assert f"{function.__name__}(rows" in example
    names = {name: getattr(giantstep.testing, name) for name in giantstep.testing.__all__}
    exec(example, {"torch": torch, "gs": gs} | names)  # noqa: S102 - the project's own example
