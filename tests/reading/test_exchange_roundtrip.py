"""Whatever is loaded with an exchange is, to the bit, what is loaded without one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import giantstep as gs
import giantstep.loading
from counting_store import counting_store
from giantstep.group.threads import ThreadGroup
from giantstep.planning.exchange_part import ExchangePart
from giantstep.reading.exchange import Exchanged, exchange
from giantstep.storage.memory import MemoryStore
from giantstep.testing.ranks import run_ranks
from giantstep.testing.roundtrip import round_trip
from handmade import save_misaligned
from layouts import Case, bits
from test_roundtrip import checkpoints, examples, load_and_compare, save_all

_NAMES = itertools.count()
BLOCK = 4096


@examples(100)
@given(checkpoints(), st.integers(0, 3))
def test_any_layout_loads_under_any_other_with_an_exchange(drawn: tuple[list[Case], int, int], cut: int) -> None:
    tensors, saving, loading = drawn
    store = MemoryStore(f"exchange-{next(_NAMES)}")
    try:
        save_all(tensors, saving, store, gs.SaveOptions(block_bytes=BLOCK, buffer_bytes=2 * BLOCK, split_bytes=16))
        # One group or two.
        border = min(cut, loading - 1)

        def members(rank: int) -> list[int]:
            return list(range(border + 1)) if rank <= border else list(range(border + 1, loading))

        for exchange in (lambda _rank: list(range(loading)), members):
            load_and_compare_with(tensors, loading, store, exchange)
    finally:
        store.clear()


def load_and_compare_with(tensors: list[Case], ranks: int, store: MemoryStore, exchange: Any) -> None:
    """`load_and_compare`, each rank with its own options."""
    real = gs.load

    def load(state: Any, path: Any, *, process_group: ThreadGroup, options: Any) -> Any:
        chosen = gs.LoadOptions(exchange=exchange(process_group.rank), buffer_bytes=1 << 16)
        return real(state, path, process_group=process_group, options=chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gs, "load", load)
        load_and_compare(tensors, ranks, store)


def exchanging(ranks: int, **settings: Any) -> gs.LoadOptions:
    return gs.LoadOptions(exchange=list(range(ranks)), buffer_bytes=1 << 16, **settings)


def matrix(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(96 * 80).reshape(96, 80).to(dtype)


def test_scalars_empty_tensors_and_many_dtypes_round_trip() -> None:
    def state() -> dict[str, Any]:
        return {
            "zero": torch.tensor(3.5),
            "empty": torch.zeros(0, 4),
            "bool": torch.tensor([True, False, True]),
            "bytes": torch.arange(7, dtype=torch.uint8),
            "complex": torch.arange(5).to(torch.complex128),
            "half": matrix(torch.bfloat16),
            "fp4": torch.arange(12, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        }

    round_trip([state(), state()], [state(), state(), state()], load_options=exchanging(3))


def test_padding_is_zero_and_what_is_stored_is_not() -> None:
    rows = [{"w": gs.ShardedTensor.from_rank_offsets("w", matrix()[48 * n : 48 * n + 48].clone(), (0, n, 2))} for n in range(2)]

    def padded(rank: int) -> dict[str, Any]:
        return {
            "w": gs.ShardedTensor(
                "w", torch.ones(40, 80), torch.float32, (40, 80), (120, 80), (40 * rank, 0), None, allow_shape_mismatch=True
            )
        }

    round_trip(rows, [padded(rank) for rank in range(3)], load_options=exchanging(3))


def test_tied_tensors_come_once_for_all_that_are_one_and_again_for_those_that_are_not() -> None:
    with counting_store() as store:
        weight = matrix()
        gs.save(
            {"a": weight, "b": weight, "c": weight + 1}, store, options=gs.SaveOptions(block_bytes=BLOCK, buffer_bytes=BLOCK)
        )
        store.forget()

        def load(group: ThreadGroup) -> None:
            one, two = torch.zeros(96, 80), torch.zeros(96, 80)
            state = {"a": one, "b": one if group.rank else two, "c": torch.zeros(96, 80)}
            gs.load(state, store, process_group=group, options=exchanging(3))
            for key, expected in (("a", weight), ("b", weight), ("c", weight + 1)):
                if bits(state[key]) != bits(expected):
                    raise AssertionError(f"{key} on rank {group.rank}")

        run_ranks(3, load)
        assert store.bytes_read == store.unique_bytes()


def test_renamed_and_cast_tensors_are_exchanged_too() -> None:
    with counting_store() as store:
        gs.save({"old": matrix(), "other": matrix()}, store, options=gs.SaveOptions(block_bytes=BLOCK, buffer_bytes=BLOCK))
        store.forget()

        def load(group: ThreadGroup) -> None:
            state = {"new": torch.zeros(96, 80, dtype=torch.float64 if group.rank else torch.float32)}
            options = exchanging(2, rename={"new": "old"}, cast="floating")
            report = gs.load(state, store, strict=gs.StrictHandling.IGNORE_ALL, process_group=group, options=options).report
            if not torch.equal(state["new"].float(), matrix()) or report.exchange != "group":
                raise AssertionError(f"rank {group.rank}")

        run_ranks(2, load)
        assert store.bytes_read == store.unique_bytes()


def test_ranks_that_want_nothing_or_nothing_in_common_take_part() -> None:
    with counting_store() as store:
        gs.save({"a": matrix(), "b": matrix() + 1}, store, options=gs.SaveOptions(block_bytes=BLOCK, buffer_bytes=BLOCK))
        store.forget()

        def load(group: ThreadGroup) -> None:
            state = [{"a": torch.zeros(96, 80)}, {}, {"b": torch.zeros(96, 80)}, {"a": torch.zeros(96, 80)}][group.rank]
            gs.load(state, store, process_group=group, options=exchanging(4))
            for key, found in state.items():
                if not torch.equal(found, matrix() + (key == "b")):
                    raise AssertionError(f"{key} on rank {group.rank}")

        run_ranks(4, load)
        assert store.bytes_read <= store.unique_bytes() + BLOCK


WANTED = [[(0, 600_000)], [(0, 500_000), (0, 20_000)], [(0, 500), (100, 600_000)], [(7, 500_000), (7, 30_000)]]


def test_ranks_may_want_regions_that_begin_alike_and_differ_in_length() -> None:
    with counting_store() as store:
        full = torch.arange(600_000.0)
        gs.save({"w": full}, store, options=gs.SaveOptions(block_bytes=BLOCK, buffer_bytes=BLOCK))
        store.forget()

        def load(group: ThreadGroup) -> None:
            wanted = WANTED[group.rank]
            state = {str(n): part_of("w", full, low, high) for n, (low, high) in enumerate(wanted)}
            gs.load(state, store, process_group=group, options=exchanging(4))
            for n, (low, high) in enumerate(wanted):
                if not torch.equal(state[str(n)].data, full[low:high]):
                    raise AssertionError(f"{low} to {high} on rank {group.rank}")

        run_ranks(4, load)
        assert store.bytes_read == store.unique_bytes()


def part_of(key: str, full: torch.Tensor, low: int, high: int) -> gs.ShardedTensor:
    """Zeros for `full[low:high]`."""
    data = torch.zeros(high - low, dtype=full.dtype)
    return gs.ShardedTensor(key, data, full.dtype, (high - low,), tuple(full.shape), (low,), None, 0)


def test_elements_that_lie_across_the_border_of_two_blocks_are_loaded_without_an_exchange() -> None:
    """No writer makes such a file; a reader of one block could not send such an element."""
    with counting_store() as store:
        value = torch.arange(3 * BLOCK, dtype=torch.int32)
        save_misaligned(store, "w", value.numpy().tobytes(), "int32", 3 * BLOCK)
        store.forget()

        def load(group: ThreadGroup) -> str:
            state = {"w": torch.zeros(3 * BLOCK, dtype=torch.int32)}
            report = gs.load(state, store, process_group=group, options=exchanging(2)).report
            if not torch.equal(state["w"], value):
                raise AssertionError(f"rank {group.rank}")
            return report.exchange

        assert run_ranks(2, load) == ["none", "none"]


@pytest.mark.parametrize(
    ("ranks", "exchange_bytes", "block"), [(2, 1 << 20, 4096), (8, 1 << 20, 4096), (8, 8 << 20, 4096), (16, 1 << 20, 1 << 16)]
)
def test_buffers_are_bounded_however_much_is_loaded(
    ranks: int, exchange_bytes: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of messages; units read, one per thread, and packed, one more. Of 16 readers, half are active at a time."""
    moved: list[Exchanged] = []
    real = giantstep.loading.exchange

    def counted(source: Any, part: ExchangePart, *arguments: Any) -> Exchanged:
        assert 2 * part.received_bytes <= exchange_bytes
        moved.append(real(source, part, *arguments))
        return moved[-1]

    monkeypatch.setattr(giantstep.loading, "exchange", counted)
    buffer_bytes, threads, count = 256 << 10, 2, 3 << 20
    with counting_store() as store:
        gs.save({"w": torch.arange(count)}, store, options=gs.SaveOptions(block_bytes=block, buffer_bytes=1 << 20))
        store.forget()

        def load(group: ThreadGroup) -> None:
            state = {"w": torch.zeros(count, dtype=torch.int64)}
            options = gs.LoadOptions(buffer_bytes=buffer_bytes, exchange_bytes=exchange_bytes, reader_threads=threads)
            gs.load(state, store, process_group=group, options=options)
            if not torch.equal(state["w"], torch.arange(count)):
                raise AssertionError(f"rank {group.rank}")

        run_ranks(ranks, load)
        assert store.bytes_read == store.unique_bytes()
    assert len(moved) == ranks
    assert max(found.bytes_received for found in moved) > 2 * exchange_bytes
    assert max(found.peak_bytes for found in moved) <= exchange_bytes + (2 * threads + 1) * buffer_bytes


THREADS = 2


def check_buffers(ranks: int, full: dict[str, torch.Tensor], wanted: Callable[[int], dict[str, Any]], **limits: int) -> None:
    """Save `full` and load `wanted(rank)` on each rank; messages and buffers keep their limits."""
    peaks: list[int] = []
    most_received, most_packed = limits["exchange_bytes"], limits["buffer_bytes"]

    def counted(source: Any, part: ExchangePart, *arguments: Any) -> Exchanged:
        assert 2 * part.received_bytes <= most_received
        assert part.packed_bytes <= most_packed
        found = exchange(source, part, *arguments)
        peaks.append(found.peak_bytes)
        return found

    def load(group: ThreadGroup) -> None:
        state = wanted(group.rank)
        options = gs.LoadOptions(exchange=range(ranks), reader_threads=THREADS, **limits)
        gs.load(state, store, process_group=group, options=options)
        for leaf in state.values():
            region = tuple(slice(low, low + size) for low, size in zip(leaf.global_offset, leaf.local_shape, strict=True))
            if not torch.equal(leaf.data, full[leaf.key][region]):
                raise AssertionError(f"{leaf.key} on rank {group.rank}")

    with counting_store() as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(giantstep.loading, "exchange", counted)
        gs.save(full, store, options=gs.SaveOptions(block_bytes=BLOCK, buffer_bytes=BLOCK))
        store.forget()
        run_ranks(ranks, load)
        assert store.bytes_read == store.unique_bytes()
    assert len(peaks) == ranks
    assert max(peaks) <= most_received + (2 * THREADS + 1) * most_packed


@pytest.mark.parametrize("ranks", [16, 32])
def test_what_is_packed_is_bounded_however_many_ranks_want_the_same_and_something_of_their_own(ranks: int) -> None:
    """Rows that all want lie between columns that each wants for itself: no two ranks want equal messages."""
    full = {f"{n:03}{kind}": torch.randint(0, 255, (64, 512), dtype=torch.uint8) for n in range(64) for kind in "rc"}
    width = 512 // ranks

    def wanted(rank: int) -> dict[str, Any]:
        def part(key: str) -> gs.ShardedTensor:
            columns = (0, 512) if key[-1] == "r" else (width * rank, width)
            data = torch.zeros(64, columns[1], dtype=torch.uint8)
            return gs.ShardedTensor(key, data, torch.uint8, (64, columns[1]), (64, 512), (0, columns[0]), None, 0)

        return {key: part(key) for key in full}

    check_buffers(ranks, full, wanted, exchange_bytes=8 << 20, buffer_bytes=1 << 16)


def test_what_is_received_is_bounded_however_much_the_regions_of_a_rank_overlap() -> None:
    full = {"w": torch.arange(1 << 18)}

    def wanted(_rank: int) -> dict[str, Any]:
        return {f"x{n}": part_of("w", full["w"], 64 * n, 1 << 18) for n in range(32)}

    check_buffers(4, full, wanted, exchange_bytes=1 << 20, buffer_bytes=8 << 20)
