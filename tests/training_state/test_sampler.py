"""Samples go on where training stood, on any number of ranks: none twice, none lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError, MismatchError
from giantstep.group.threads import ThreadGroup
from giantstep.testing.ranks import run_ranks
from giantstep.training_state import ResumableSampler


@given(
    size=st.integers(1, 200),
    batch=st.integers(1, 5),
    shuffle=st.booleans(),
    phases=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 8)), min_size=1, max_size=4),
)
def test_every_sample_is_used_once_whatever_the_number_of_ranks(
    size: int, batch: int, shuffle: bool, phases: list[tuple[int, int]]
) -> None:
    seen: list[int] = []
    state = None
    for ranks, steps in [*phases, (1, size)]:
        samplers = [ResumableSampler(size, rank, ranks, shuffle=shuffle, seed=3) for rank in range(ranks)]
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {len(samplers[0])}
        whole = len(parts[0]) // batch
        for step in range(min(steps, whole)):
            for part, sampler in zip(parts, samplers, strict=True):
                seen += part[step * batch : (step + 1) * batch]
                sampler.advance(batch * ranks)
        assert len({sampler.used for sampler in samplers}) == 1
        state = samplers[0].state_dict()
    rest = ResumableSampler(size, 0, 1, shuffle=shuffle, seed=3)
    rest.load_state_dict(state or {})
    assert sorted([*seen, *rest]) == list(range(size))


def test_through_a_checkpoint_and_torchs_loader_with_workers_that_read_ahead(tmp_path: Path) -> None:
    data = torch.arange(103)

    def loader_of(sampler: ResumableSampler, workers: int) -> torch.utils.data.DataLoader[torch.Tensor]:
        context = "forkserver" if workers else None
        return torch.utils.data.DataLoader(
            data, batch_size=4, sampler=sampler, num_workers=workers, multiprocessing_context=context
        )

    def first(group: ThreadGroup) -> list[int]:
        sampler = ResumableSampler(103, group.rank, group.size, seed=1)
        seen: list[int] = []
        for number, found in enumerate(loader_of(sampler, 0)):
            if number == 5:
                break
            seen += found.tolist()
            sampler.advance(4 * group.size)
        gs.save({"sampler": sampler}, tmp_path, process_group=group)
        return seen

    def second(group: ThreadGroup) -> list[int]:
        sampler = ResumableSampler(103, group.rank, group.size, seed=1)
        gs.load({"sampler": sampler}, tmp_path, process_group=group)
        assert sampler.used == 5 * 4 * 3
        return [number for found in loader_of(sampler, 0) for number in found.tolist()]

    seen = [number for part in run_ranks(3, first) for number in part]
    left = [number for part in run_ranks(2, second) for number in part]
    assert len(seen) == 60
    assert len(left) == 42, "43 are left, of which two ranks get 21 each"
    assert len({*seen, *left}) == 102

    alone = ResumableSampler(103, 0, 1, seed=1)
    gs.load({"sampler": alone}, tmp_path)
    with_worker = [number for found in loader_of(alone, 1) for number in found.tolist()]
    assert sorted([*seen, *with_worker]) == list(range(103))


def test_epochs_have_orders_of_their_own_and_setting_the_one_that_runs_loses_nothing() -> None:
    sampler = ResumableSampler(50, 0, 1, seed=4)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.advance(10)
    sampler.set_epoch(1)
    assert len(sampler) == 40
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_other_data_and_other_orders_are_refused() -> None:
    stored = ResumableSampler(50, 0, 1, seed=4).state_dict()
    for sampler in (
        ResumableSampler(51, 0, 1, seed=4),
        ResumableSampler(50, 0, 1, seed=5),
        ResumableSampler(50, 0, 1, seed=4, shuffle=False),
    ):
        with pytest.raises(MismatchError, match="the stored sampler has"):
            sampler.load_state_dict(stored)


def test_bad_arguments_are_told() -> None:
    for arguments in ((0, 0, 1), (5, 1, 1), (5, -1, 2), (5.0, 0, 1)):
        with pytest.raises(BadArgumentError):
            ResumableSampler(*arguments)  # type: ignore[arg-type]
    sampler = ResumableSampler(5, 0, 1)
    with pytest.raises(BadArgumentError, match="0 of the 5 samples"):
        sampler.advance(6)
