"""How many threads of a rank move bytes."""

from __future__ import annotations

import os

import pytest

from giantstep.options import Threads, threads_for


@pytest.mark.parametrize(
    ("cores", "ranks", "local", "spared", "expected"),
    [
        (64, 1, None, 0, 2),
        (64, 8, None, 1, 2),
        (2, 1, None, 0, 2),
        (2, 1, None, 1, 1),
        (2, 2, None, 0, 1),
        (2, 8, None, 1, 1),
        (64, 1024, None, 0, 1),
        (64, 1024, "8", 0, 2),
        (16, 1024, "8", 1, 1),
        (16, 4, "8", 0, 2),
        (16, 8, "none", 0, 2),
        (16, 8, "0", 0, 2),
    ],
)
def test_there_are_no_more_threads_in_memory_than_a_rank_has_cores_for(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, local: str | None, spared: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert threads_for(None, ranks, spared=spared) == Threads(2, expected)


def test_a_number_that_was_asked_for_is_used_everywhere() -> None:
    assert threads_for(5, 1000, spared=1) == Threads(5, 5)
