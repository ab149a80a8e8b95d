"""Ranks as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from giantstep.group.threads import ThreadGroup, ThreadGroups

Result = TypeVar("Result")


class RanksFailedError(AssertionError):
    """Some ranks raised.

    Attributes:
        errors: per rank what it raised, or None.
    """

    def __init__(self, errors: list[BaseException | None]) -> None:
        self.errors = errors
        told = "; ".join(f"rank {rank}: {type(error).__name__}: {error}" for rank, error in enumerate(errors) if error)
        super().__init__(told)


def run_ranks_collecting(
    size: int, function: Callable[[ThreadGroup], Result]
) -> tuple[list[Result | None], list[BaseException | None]]:
    """Run `function(group)` on `size` threads, each with its own group; return results and errors by rank."""
    groups = ThreadGroups(size)
    results: list[Result | None] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(groups.rank(rank))
        except BaseException as error:  # noqa: BLE001 - every way in which a rank can end is a result here
            errors[rank] = error
        finally:
            groups.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, errors


def run_ranks(size: int, function: Callable[[ThreadGroup], Result]) -> list[Result]:
    """As `run_ranks_collecting`; raises `RanksFailedError` if any rank raised.

    Pass the group to `giantstep.save` and `giantstep.load` as `process_group`.
    """
    results, errors = run_ranks_collecting(size, function)
    if any(error is not None for error in errors):
        raise RanksFailedError(errors) from next(error for error in errors if error is not None)
    return results  # type: ignore[return-value]
