"""Exchange on load: bytes are read once per group and arrive where they are wanted, whatever the layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import giantstep as gs
from counting_store import CountingStore, counting_store
from giantstep.errors import BadArgumentError, DisagreementError
from giantstep.group.threads import ThreadGroup
from giantstep.reports import LoadReport
from giantstep.testing.ranks import RanksFailedError, run_ranks
from layouts import bits

BLOCK = 4096
SAVING = gs.SaveOptions(block_bytes=BLOCK, buffer_bytes=16 * BLOCK, writer_threads=1)
ROWS, COLUMNS, LAYERS = 480, 960, 3
Layout = Callable[[int, int], list[tuple[str, torch.Tensor, gs.ShardedTensor | torch.Tensor]]]


@pytest.fixture
def store() -> Iterator[CountingStore]:
    with counting_store() as found:
        yield found


def value(layer: int) -> torch.Tensor:
    return (torch.arange(ROWS * COLUMNS, dtype=torch.int64) * 2654435761 + layer).to(torch.float32).reshape(ROWS, COLUMNS)


def norm(layer: int) -> torch.Tensor:
    return torch.arange(1000, dtype=torch.float64) + layer


def part(size: int, rank: int, parts: int) -> slice:
    return slice(size * rank // parts, size * (rank + 1) // parts)


def sharded(layer: int, data: torch.Tensor, rows: slice, columns: slice, replica: int = 0) -> gs.ShardedTensor:
    offset = (rows.start, columns.start)
    return gs.ShardedTensor(f"w{layer}", data, data.dtype, tuple(data.shape), (ROWS, COLUMNS), offset, None, replica)


def box_of(layout: str, rank: int, size: int) -> tuple[slice, slice, int]:
    """Rows, columns and replica of a rank."""
    whole = slice(0, ROWS), slice(0, COLUMNS)
    if layout == "rows":
        return part(ROWS, rank, size), whole[1], 0
    if layout == "columns":
        return whole[0], part(COLUMNS, rank, size), 0
    if layout == "hsdp":
        half = size // 2
        return part(ROWS, rank % half, half), whole[1], rank // half
    return *whole, rank


def state_of(layout: str, rank: int, size: int, *, filled: bool) -> dict[str, Any]:
    """Matrices in a layout, and a replicated vector for each."""
    rows, columns, replica = box_of(layout, rank, size)
    state: dict[str, Any] = {}
    for layer in range(LAYERS):
        data = (
            value(layer)[rows, columns].clone()
            if filled
            else torch.full((rows.stop - rows.start, columns.stop - columns.start), -1.0)
        )
        state[f"w{layer}"] = sharded(layer, data, rows, columns, replica)
        state[f"norm{layer}"] = norm(layer) if filled else torch.full((1000,), -1.0, dtype=torch.float64)
    return state


def save(store: CountingStore, layout: str, size: int) -> None:
    run_ranks(
        size, lambda group: gs.save(state_of(layout, group.rank, size, filled=True), store, process_group=group, options=SAVING)
    )


def load(store: CountingStore, layout: str, size: int, exchange: Any = "auto", **settings: Any) -> list[LoadReport]:
    """Load in a layout and check every bit; `exchange` may be a function of the rank."""

    def rank(group: ThreadGroup) -> LoadReport:
        state = state_of(layout, group.rank, size, filled=False)
        chosen = exchange(group.rank) if callable(exchange) else exchange
        options = gs.LoadOptions(**{"buffer_bytes": 16 * BLOCK, "exchange": chosen, **settings})
        report = gs.load(state, store, process_group=group, options=options).report
        rows, columns, _ = box_of(layout, group.rank, size)
        for layer in range(LAYERS):
            if bits(state[f"w{layer}"].data) != bits(value(layer)[rows, columns]) or bits(state[f"norm{layer}"]) != bits(
                norm(layer)
            ):
                raise AssertionError(f"layer {layer} is wrong on rank {group.rank}")
        return report

    store.forget()
    return run_ranks(size, rank)


def test_eight_replicas_read_each_byte_once_in_equal_shares(store: CountingStore) -> None:
    save(store, "replicated", 8)
    reports = load(store, "replicated", 8)
    assert store.bytes_read == store.unique_bytes()
    assert store.bytes_read <= LAYERS * (ROWS * COLUMNS * 4 + 8000) + 8 * 2 * BLOCK + 8 * BLOCK
    read = [report.bytes_read for report in reports]
    assert sum(read) == store.bytes_read
    assert max(read) * len(read) / sum(read) <= 1.05
    assert {report.exchange for report in reports} == {"all"}
    # What each rank did not read it received, but for alignment.
    wanted = LAYERS * (ROWS * COLUMNS * 4 + 8000)
    for report in reports:
        assert wanted - report.bytes_read <= report.bytes_received <= wanted
    assert sum(report.bytes_sent for report in reports) == sum(report.bytes_received for report in reports)


CHANGES = [
    ("rows", 4, "columns", 4),
    ("rows", 4, "columns", 3),
    ("columns", 3, "rows", 4),
    ("rows", 8, "rows", 5),
    ("rows", 8, "replicated", 2),
    ("rows", 8, "columns", 16),
    ("hsdp", 8, "hsdp", 6),
    ("replicated", 2, "hsdp", 8),
    ("columns", 2, "rows", 1),
]


@pytest.mark.parametrize(("saved", "before", "loaded", "after"), CHANGES)
def test_no_block_is_read_twice_whatever_the_change_of_layout(
    store: CountingStore, saved: str, before: int, loaded: str, after: int
) -> None:
    save(store, saved, before)
    everyone = list(range(after))
    reports = load(store, loaded, after, everyone)
    assert store.bytes_read == store.unique_bytes()
    # Every rank's file begins and ends within a block.
    assert store.bytes_read <= LAYERS * (ROWS * COLUMNS * 4 + 8000) + before * 3 * BLOCK
    assert {report.exchange for report in reports} == {"group" if after > 1 else "none"}
    alone = load(store, loaded, after, "none")
    assert {report.exchange for report in alone} == {"none"}
    assert [report.bytes_filled for report in alone] == [report.bytes_filled for report in reports]


def test_auto_reads_no_more_than_a_tenth_above_what_is_wanted(store: CountingStore) -> None:
    """Saved without any hint of how it will be loaded."""
    save(store, "rows", 6)
    for layout, size in (("columns", 6), ("columns", 4), ("rows", 4), ("hsdp", 6), ("replicated", 3)):
        load(store, layout, size)
        assert store.bytes_read <= 1.1 * LAYERS * (ROWS * COLUMNS * 4 + 8000)


def test_groups_read_each_byte_once_each(store: CountingStore) -> None:
    save(store, "rows", 2)
    load(store, "replicated", 4, "none")
    alone = store.bytes_read
    reports = load(store, "replicated", 4, lambda rank: [rank // 2 * 2, rank // 2 * 2 + 1])
    assert store.bytes_read * 2 == alone
    assert {report.exchange for report in reports} == {"group"}
    # Crosswise, given in another order, and one group of its own.
    reports = load(store, "replicated", 4, lambda rank: (3,) if rank == 3 else (2, 0, 1))
    assert store.bytes_read * 2 == alone
    assert reports[3].bytes_received == reports[3].bytes_sent == 0


def test_auto_does_not_exchange_what_nobody_else_wants_or_what_is_small(store: CountingStore) -> None:
    save(store, "rows", 4)
    reports = load(store, "rows", 4)
    assert {report.exchange for report in reports} == {"none"}
    with counting_store() as small:
        state = {"w": torch.arange(1000.0)}
        run_ranks(4, lambda group: gs.save(dict(state), small, process_group=group, options=SAVING))
        reports = run_ranks(4, lambda group: gs.load({"w": torch.zeros(1000)}, small, process_group=group).report)
        assert {report.exchange for report in reports} == {"none"}


def test_the_report_says_what_was_exchanged(store: CountingStore) -> None:
    save(store, "rows", 2)
    assert "exchanged with all ranks: sent " in str(load(store, "replicated", 2)[0])
    assert "exchanged with its group: sent " in str(load(store, "replicated", 2, [0, 1])[0])
    assert "exchanged" not in str(load(store, "replicated", 2, "none")[0])


@pytest.mark.parametrize("verify", ["reading", "before", "never"])
def test_each_byte_is_read_once_per_pass(store: CountingStore, verify: str) -> None:
    save(store, "rows", 3)
    load(store, "columns", 3, verify=verify)
    assert store.bytes_read == store.unique_bytes() * (2 if verify == "before" else 1)


def test_small_rounds_give_the_same(store: CountingStore) -> None:
    """Units of a few blocks, readers that take turns, one thread or many."""
    save(store, "rows", 3)
    for settings in ({"exchange_bytes": 1 << 20}, {"reader_threads": 1}, {"reader_threads": 5, "buffer_bytes": 1 << 16}):
        load(store, "columns", 4, **settings)
        assert store.bytes_read == store.unique_bytes()


def test_groups_must_fit_together(store: CountingStore) -> None:
    save(store, "rows", 2)

    def attempt(exchange: Any) -> list[BaseException]:
        with pytest.raises(RanksFailedError) as failed:
            load(store, "replicated", 3, exchange)
        return [error for error in failed.value.errors if error is not None]

    for error in attempt(lambda rank: [[0, 1], [0, 1, 2], [2]][rank]):
        assert isinstance(error, DisagreementError)
        assert "All ranks of a group must give the same one" in str(error)
    for error in attempt(lambda rank: "auto" if rank else [0, 1, 2]):
        assert isinstance(error, DisagreementError)
        assert "options" in str(error)
    for error in attempt(lambda rank: [0, 1]):
        assert isinstance(error, BadArgumentError)
        assert "rank 2 among them" in str(error)
    for wrong in ([0, 1, 2, 3], [0, 1, 1, 2], [-1, 0, 1, 2]):
        for error in attempt(lambda rank, wrong=wrong: wrong):
            assert isinstance(error, BadArgumentError)


@pytest.mark.parametrize("wrong", ["all", None, 3, [], [0.5], ["0"], True])
def test_what_is_no_way_to_exchange_is_refused(wrong: Any) -> None:
    with pytest.raises(BadArgumentError, match="exchange="):
        gs.LoadOptions(exchange=wrong)
    with pytest.raises(BadArgumentError, match="exchange_bytes"):
        gs.LoadOptions(exchange_bytes=1000)
