"""Random generators of ranks: the same numbers go on; other numbers of ranks follow a policy, and never share a stream."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, KeyMismatchError, ShapeMismatchError
from giantstep.group.threads import ThreadGroup
from giantstep.testing.ranks import RanksFailedError, run_ranks
from giantstep.training_state import RandomState
from processes import results, run_processes


def own_generators(number: int) -> dict[str, Any]:
    return {
        "torch": torch.Generator().manual_seed(number),
        "numpy": np.random.default_rng(number),
        "philox": np.random.Generator(np.random.Philox(number)),
        "legacy": np.random.RandomState(number),
        "python": random.Random(number),
    }


def draw(generators: dict[str, Any]) -> list[float]:
    return [
        float(torch.rand(1, generator=generators["torch"])),
        float(generators["numpy"].random()),
        float(generators["philox"].random()),
        float(generators["legacy"].random_sample()),
        generators["python"].random(),
    ]


def state_of(group: ThreadGroup, generators: dict[str, Any], **settings: Any) -> RandomState:
    return RandomState(generators, streams=(), process_group=group, **settings)


def save(path: Path, ranks: int) -> list[list[float]]:
    """Save generators that were used for a while; return what they give next."""

    def rank(group: ThreadGroup) -> list[float]:
        generators = own_generators(group.rank)
        draw(generators)
        gs.save({"rng": state_of(group, generators)}, path, process_group=group)
        return draw(generators)

    return run_ranks(ranks, rank)


def load(path: Path, ranks: int, **settings: Any) -> list[list[float]]:
    def rank(group: ThreadGroup) -> list[float]:
        generators = own_generators(100 + group.rank)
        gs.load({"rng": state_of(group, generators, **settings)}, path, process_group=group)
        return draw(generators)

    return run_ranks(ranks, rank)


def test_each_rank_goes_on_with_the_numbers_of_its_own_generators(tmp_path: Path) -> None:
    expected = save(tmp_path, 3)
    assert load(tmp_path, 3) == expected
    assert load(tmp_path, 3, on_reshard="derive") == expected, "the same grid needs no policy"


def test_another_number_of_ranks_is_refused_unless_a_policy_says_what_to_do(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(RanksFailedError) as caught:
        load(tmp_path, 2)
    assert all(isinstance(error, ShapeMismatchError) for error in caught.value.errors)
    assert "(3,)" in str(caught.value)
    assert "on_reshard" in str(caught.value)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_by_rank_ranks_keep_their_streams_and_new_ones_begin_new_ones(tmp_path: Path, ranks: int) -> None:
    expected = save(tmp_path, 3)
    found = load(tmp_path, ranks, on_reshard="by_rank")
    assert found[:3] == expected[:ranks]
    assert len({tuple(numbers) for numbers in found}) == ranks
    assert load(tmp_path, ranks, on_reshard="by_rank") == found, "new streams are the same each time"


@pytest.mark.parametrize("ranks", [2, 5])
def test_derived_streams_are_new_everywhere_and_the_same_each_time(tmp_path: Path, ranks: int) -> None:
    expected = save(tmp_path, 3)
    found = load(tmp_path, ranks, on_reshard="derive")
    numbers = [number for rank in (*found, *expected) for number in rank]
    assert len(set(numbers)) == len(numbers), "no two generators of any rank give the same"
    assert load(tmp_path, ranks, on_reshard="derive") == found
    save(tmp_path / "other", 2)
    assert load(tmp_path / "other", ranks if ranks != 2 else 3, on_reshard="derive")[:2] != found[:2]


def test_a_function_makes_states_of_those_that_are_stored(tmp_path: Path) -> None:
    expected = save(tmp_path, 3)

    def backwards(stored: Any, grid: tuple[int, ...], position: tuple[int, ...]) -> Any:
        assert grid == (2,)
        return stored[2 - position[0],]

    assert load(tmp_path, 2, on_reshard=backwards) == [expected[2], expected[1]]


def test_ranks_that_share_a_position_have_the_same_numbers(tmp_path: Path) -> None:
    """Four ranks, two by two: data ranks have their own streams, tensor ranks share them."""

    def rank(group: ThreadGroup) -> list[float]:
        data, tensor = divmod(group.rank, 2)
        generators = own_generators(data)
        state = RandomState(generators, streams=(), grid=2, position=data, replica_id=tensor)
        gs.save({"rng": state}, tmp_path, process_group=group)
        expected = draw(generators)
        gs.load({"rng": state}, tmp_path, process_group=group)
        assert draw(generators) == expected
        return expected

    first, second, third, fourth = run_ranks(4, rank)
    assert first == second
    assert third == fourth
    assert first != third


def test_positions_of_a_grid_with_several_axes_are_counted_row_by_row(tmp_path: Path) -> None:
    def save_rank(group: ThreadGroup) -> list[float]:
        generators = own_generators(group.rank)
        place = divmod(group.rank, 3)
        gs.save({"rng": RandomState(generators, streams=(), grid=(2, 3), position=place)}, tmp_path, process_group=group)
        return draw(generators)

    expected = run_ranks(6, save_rank)
    assert load(tmp_path, 6, on_reshard="by_rank") == expected


def process_streams(rank: int, path: str) -> bool:
    """The process's own streams, in real processes."""
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    gs.save({"rng": RandomState()}, path)
    expected = [random.random(), np.random.rand(), float(torch.rand(1)), float(torch.nn.Dropout(0.5)(torch.ones(99)).sum())]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    state = RandomState()
    gs.load({"rng": state}, path)
    assert state.loaded
    assert (state.skipped, state.kept) == ((), ())
    found = [random.random(), np.random.rand(), float(torch.rand(1)), float(torch.nn.Dropout(0.5)(torch.ones(99)).sum())]
    return found == expected


def test_the_streams_of_processes_go_on(tmp_path: Path) -> None:
    assert results(run_processes(2, process_streams, str(tmp_path))) == [True, True]


def test_one_process_continues_what_two_have_saved_and_derives_its_own_streams(tmp_path: Path) -> None:
    results(run_processes(2, process_streams, str(tmp_path)))
    drawn = []
    for policy in ("by_rank", "derive", "derive"):
        gs.load({"rng": RandomState(on_reshard=policy)}, tmp_path)  # type: ignore[arg-type]
        drawn.append([random.random(), np.random.rand(), float(torch.rand(1))])
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert drawn[0] == [random.random(), np.random.rand(), float(torch.rand(1))]
    assert drawn[1] == drawn[2] != drawn[0]


class Tracker:
    """As Megatron's: several states by name."""

    def __init__(self, *names: str) -> None:
        self.states = {name: torch.Generator().manual_seed(len(name)).get_state() for name in names}

    def get_states(self) -> dict[str, torch.Tensor]:
        return self.states

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states = states


def test_trackers_of_several_states_are_generators_too_but_cannot_be_seeded(tmp_path: Path) -> None:
    gs.save({"rng": RandomState({"tracker": Tracker("model", "data")}, streams=())}, tmp_path)
    target = Tracker()
    gs.load({"rng": RandomState({"tracker": target}, streams=())}, tmp_path)
    assert target.states.keys() == {"model", "data"}
    assert torch.equal(target.states["model"], Tracker("model").states["model"])
    wanted = RandomState({"tracker": target}, streams=(), grid=2, position=1, on_reshard="by_rank")
    with pytest.raises(BadArgumentError, match=r"'tracker' \(Tracker\) cannot be seeded"):
        gs.load({"rng": wanted}, tmp_path)


def test_what_only_one_side_has_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gs.save({"rng": RandomState({"a": torch.Generator(), "b": torch.Generator()}, streams=("torch",))}, tmp_path)
    state = RandomState({"b": torch.Generator(), "c": torch.Generator()}, streams=("python",))
    with caplog.at_level(logging.WARNING, "giantstep"):
        gs.load({"rng": state}, tmp_path)
    assert state.skipped == ("generators.a", "torch")
    assert state.kept == ("generators.c", "python")
    assert "generators.a" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_states_of_a_cuda_device_are_skipped_where_there_is_none(tmp_path: Path) -> None:
    state = RandomState(streams=("torch",))
    value = {**state.state_dict()["value"].data, "cuda": torch.zeros(16, dtype=torch.uint8)}
    gs.save({"rng": {"value": gs.ShardedObject("rng", value, (1,), (0,))}}, tmp_path)
    target = RandomState()
    gs.load({"rng": target}, tmp_path)
    assert target.skipped == ("cuda",)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_stream_of_a_cuda_device_goes_on(tmp_path: Path) -> None:
    torch.cuda.manual_seed(7)
    torch.rand(5, device="cuda")
    gs.save({"rng": RandomState()}, tmp_path)
    expected = torch.rand(9, device="cuda")
    torch.cuda.manual_seed(8)
    gs.load({"rng": RandomState()}, tmp_path)
    assert torch.equal(torch.rand(9, device="cuda"), expected)


def test_a_checkpoint_without_random_states_is_an_error_or_leaves_them_as_they_are(tmp_path: Path) -> None:
    gs.save({"x": torch.ones(2)}, tmp_path)
    with pytest.raises(KeyMismatchError):
        gs.load({"x": torch.ones(2), "rng": RandomState()}, tmp_path)
    generators = own_generators(5)
    expected = draw(own_generators(5))
    state = RandomState(generators, streams=(), on_missing="keep")
    gs.load({"x": torch.ones(2), "rng": state}, tmp_path)
    assert not state.loaded
    assert draw(generators) == expected
    lenient = RandomState(generators, streams=())
    gs.load({"x": torch.ones(2), "rng": lenient}, tmp_path, strict=gs.StrictHandling.LOG_UNEXPECTED)
    assert not lenient.loaded


def test_asynchronous_saves_store_the_state_at_the_time_of_the_call(tmp_path: Path) -> None:
    generators = own_generators(3)
    pending = gs.async_save({"rng": RandomState(generators, streams=())}, tmp_path)
    expected = draw(generators)
    pending.result()
    gs.load({"rng": RandomState(generators, streams=())}, tmp_path)
    assert draw(generators) == expected


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"streams": ("numpi",)}, "'numpi' is none of"),
        ({"grid": 2}, "given together"),
        ({"grid": 2, "position": 2}, "no position of grid"),
        ({"grid": "2", "position": 0}, "must be an int"),
        ({"on_reshard": "drop"}, "'by_rank'"),
        ({"on_missing": "drop"}, "'strict' or 'keep'"),
        ({"generators": {"x": object()}}, "object is no random generator"),
    ],
)
def test_bad_arguments_are_told_when_the_state_is_made(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(BadArgumentError, match=text):
        RandomState(**settings)
