"""What a `LocalTier` refuses, on all ranks alike: senseless and differing arguments, too little room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import BadArgumentError, DisagreementError, StoreError
from giantstep.storage.memory import MemoryStore
from tiered.runs import Job
from tiers.clusters import SAVING, one_error


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0},
        {"every": True},
        {"every": 2.5},
        {"keep": 0},
        {"keep": None},
        {"replicas": -1},
        {"replicas": 3},
        {"parity": (2, 3)},
        {"parity": 4},
        {"run": None},
        {"domain": ""},
        {"domain": 7},
        {"circle": 7},
        {"save_options": {"timeout_secs": 1}},
        {"load_options": SAVING},
        {"asynchronous": "no"},
    ],
    ids=str,
)
def test_senseless_arguments_are_refused_on_all_ranks(tmp_path: Path, arguments: dict[str, Any]) -> None:
    job = Job(tmp_path)
    errors = job.errors(lambda group: job.tier(group, **arguments))
    one_error(errors, BadArgumentError)


@pytest.mark.parametrize(
    ("name", "first", "other"),
    [
        ("every", 5, 6),
        ("keep", 1, 2),
        ("replicas", 0, 1),
        ("parity", None, (2, 1)),
        ("run", "", "mine"),
        ("asynchronous", True, False),
        ("save_options", SAVING, gs.SaveOptions()),
    ],
)
def test_arguments_that_differ_between_ranks_are_refused(tmp_path: Path, name: str, first: Any, other: Any) -> None:
    job = Job(tmp_path)
    errors = job.errors(lambda group: job.tier(group, **{name: other if group.rank == 2 else first}))
    one_error(errors, DisagreementError, name, "rank 0", "rank 2")


def test_a_host_in_two_domains_is_refused(tmp_path: Path) -> None:
    job = Job(tmp_path)
    errors = job.errors(lambda group: job.tier(group, domain=f"d{group.rank}"))
    one_error(errors, DisagreementError, "'a'", "'d0'", "'d1'")


def test_a_path_that_cannot_be_is_refused_on_all_ranks(tmp_path: Path) -> None:
    job = Job(tmp_path)
    errors = job.errors(lambda group: gs.LocalTier("s3://x" if group.rank == 1 else tmp_path, host="a", process_group=group))
    one_error(errors, BadArgumentError, "rank 1", "s3://x")


def test_a_closed_tier_says_so(tmp_path: Path) -> None:
    with gs.LocalTier(tmp_path, replicas=0) as tier:
        pass
    with pytest.raises(BadArgumentError, match="closed"):
        tier.save(1, {})
    with pytest.raises(BadArgumentError, match="closed"):
        tier.restore({})


def test_too_little_room_is_told_before_training_with_the_host(tmp_path: Path) -> None:
    class Small(MemoryStore):
        def free_bytes(self) -> int | None:
            return 100_000

    stores = {"a": MemoryStore("roomy"), "b": Small("small")}
    job = Job(tmp_path, ("a", "b"), {"keep": 2}, dict(stores))

    def work(group: Any, elements: int) -> None:
        job.tier(group).check_space({"x": torch.zeros(elements)})

    # Three steps of two copies: 24 bytes an element.
    assert job.errors(lambda group: work(group, 4_000)) == [None, None]
    one_error(job.errors(lambda group: work(group, 5_000)), StoreError, "host b")


def test_room_is_looked_at_in_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    gs.LocalTier(tmp_path / "new" / "place", replicas=0).check_space({"x": torch.zeros(10)})
