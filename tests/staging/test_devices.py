"""Asynchronous saves of tensors on CUDA devices: copies in page-locked memory, beside what the device does meanwhile."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.errors import ChangedTooSoonError
from giantstep.group.torch_group import group_of
from giantstep.saver import saver_of
from giantstep.staging.devices import locked_memory
from live_state import change, check_stored, live_state
from slow_store import GatedStore, SlowStore

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SMALL = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096)
BACKGROUND = gs.SaveOptions(staging="background", block_bytes=4096, buffer_bytes=4096)


@pytest.fixture(autouse=True)
def _finished() -> Iterator[None]:
    yield
    gs.finish_saves()


def keep_busy(secs: float) -> None:
    """Queue work on the current stream that takes about so long."""
    torch.cuda._sleep(int(secs * 1.5e9))


@pytest.mark.parametrize("options", [SMALL, BACKGROUND], ids=["auto", "background"])
def test_what_is_stored_are_the_values_at_the_time_of_the_call_in_a_thousand_rounds(options: gs.SaveOptions) -> None:
    """Everything is overwritten as soon as the save is staged, while the writer has not begun."""
    state = live_state("cuda")
    store = SlowStore(0.001)
    try:
        for number in range(1, 501):
            change(state, number)
            pending = gs.async_save(state, store, options=options)
            assert pending.wait_staged(60)
            change(state, -1)
            pending.result()
            if number % 50 == 0 or number < 20:
                check_stored(store, number)
            else:
                assert float(gs.open_checkpoint(store)["plain"][...].sum()) == 7 * number
    finally:
        store.clear()


def test_the_call_waits_neither_for_the_device_nor_for_copies_and_stores_what_was_queued_before_it() -> None:
    store = SlowStore()
    weight = torch.zeros(1 << 24, device="cuda")
    gs.async_save({"w": weight}, store).result()
    torch.cuda.synchronize()
    keep_busy(1.0)
    weight.fill_(5.0)
    begin = time.monotonic()
    pending = gs.async_save({"w": weight}, store)
    spent = time.monotonic() - begin
    assert not pending.staged(), "what the values will be is not computed yet"
    assert spent < 0.5
    pending.result()
    assert torch.cuda.current_stream().query()
    found = gs.open_checkpoint(store)["w"]
    assert found[...].min() == found[...].max() == 5.0


def test_kernels_that_are_queued_after_the_call_go_on_beside_the_copies() -> None:
    store = SlowStore()
    weight = torch.ones(1 << 28, device="cuda")
    # Kernels are loaded when they are first used.
    other = torch.ones(1 << 20, device="cuda") * 1.0001
    gs.async_save({"w": weight}, store).result()
    torch.cuda.synchronize()
    begin = time.monotonic()
    pending = gs.async_save({"w": weight}, store)
    for _ in range(20):
        other = other * 1.0001
    done = torch.cuda.Event()
    done.record()
    done.synchronize()
    kernels = time.monotonic() - begin
    was_staged = pending.staged()
    pending.wait_staged()
    assert not was_staged, f"1 GiB was copied within {kernels:.4f} s"
    pending.result()


def test_memory_that_the_caller_frees_is_not_given_to_other_tensors_before_it_is_copied() -> None:
    store = SlowStore()
    for number in range(20):
        tensors = {f"w{row}": torch.full((1 << 20,), float(number), device="cuda") for row in range(8)}
        keep_busy(0.02)
        pending = gs.async_save(tensors, store)
        del tensors
        others = [torch.full((1 << 20,), -1.0, device="cuda") for _ in range(16)]
        pending.result()
        for row in range(8):
            found = gs.open_checkpoint(store)[f"w{row}"][...]
            assert found.min() == found.max() == number
        del others


def test_the_guard_makes_the_next_step_wait_for_the_copies() -> None:
    store = SlowStore()
    for options in (SMALL, BACKGROUND):
        weight = torch.nn.Parameter(torch.ones(1 << 20, device="cuda"))
        optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
        for number in range(10):
            before = weight.detach().sum().item()
            weight.grad = torch.full_like(weight, 1.0 + number)
            keep_busy(0.02)
            pending = gs.async_save({"w": weight}, store, options=options).guard(optimizer)
            optimizer.step()
            assert pending.staged()
            pending.result()
            assert torch.from_numpy(gs.open_checkpoint(store)["w"][...]).cuda().sum().item() == before


def test_a_tensor_that_is_changed_before_it_is_staged_fails_the_save() -> None:
    store = SlowStore()
    weight = torch.ones(1 << 20, device="cuda")
    # To lock pages takes a while, and to load a kernel that is used for the first time.
    gs.async_save({"w": weight}, store).result()
    weight.add_(0)
    keep_busy(0.2)
    pending = gs.async_save({"w": weight}, store)
    weight.add_(1)
    assert isinstance(pending.exception(), ChangedTooSoonError)
    gs.async_save({"w": weight}, store).result()
    assert gs.open_checkpoint(store)["w"][...].max() == 2


def test_copies_lie_in_page_locked_memory_of_exactly_their_size_which_is_used_again_and_then_freed() -> None:
    store, memory = SlowStore(), saver_of(group_of()).memory
    gs.finish_saves()
    state = {"w": torch.ones(3 << 20, device="cuda"), "x": torch.ones(5, device="cuda"), "host": torch.ones(7)}
    for _ in range(5):
        gs.async_save(state, store).result()
    gs.finish_saves()
    assert memory.held_bytes == 0
    gated = GatedStore()
    pending = gs.async_save(state, gated)
    assert memory.held_bytes == memory.taken_bytes == (3 << 22) + 2 * 64
    gated.gate.set()
    pending.result()


class Spy:
    """The CUDA runtime, with a list of what unlocking gave back."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.unlocked: list[int] = []

    def cudaHostRegister(self, *arguments: int) -> Any:  # noqa: N802 - the runtime's name
        return self.runtime.cudaHostRegister(*arguments)

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802 - the runtime's name
        self.unlocked.append(int(self.runtime.cudaHostUnregister(address)))


def test_page_locked_memory_is_unlocked_once_its_last_slice_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(torch.cuda.cudart())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: spy)
    arena = locked_memory(1 << 20)
    assert torch.from_numpy(arena).is_pinned()
    part = torch.from_numpy(arena[: 1 << 19]).view(torch.int32)[5:]
    del arena
    gc.collect()
    assert part.is_pinned()
    assert spy.unlocked == []
    del part
    gc.collect()
    assert spy.unlocked == [0]


def test_several_saves_in_flight_of_changing_tensors_keep_their_own_copies() -> None:
    stores = [SlowStore(0.02) for _ in range(8)]
    weight = torch.zeros(1 << 20, device="cuda")
    options = gs.SaveOptions(max_pending=3)
    pending = []
    for number, store in enumerate(stores):
        weight.fill_(float(number))
        pending.append(gs.async_save({"w": weight}, store, options=options))
        pending[-1].wait_staged()
    for number, (store, save) in enumerate(zip(stores, pending, strict=True)):
        save.result()
        assert gs.open_checkpoint(store)["w"][...].mean() == number


def test_tensors_on_a_stream_of_the_callers_are_copied_after_what_it_has_queued_there() -> None:
    store = SlowStore()
    stream = torch.cuda.Stream()
    weight = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        keep_busy(0.3)
        weight.fill_(3.0)
        pending = gs.async_save({"w": weight}, store)
    pending.result()
    assert gs.open_checkpoint(store)["w"][...].min() == 3.0


def test_a_thread_that_waits_until_staged_does_not_hold_up_others() -> None:
    store = SlowStore()
    weight = torch.ones(1 << 20, device="cuda")
    keep_busy(0.5)
    pending = gs.async_save({"w": weight}, store)
    waiting = threading.Thread(target=pending.wait_staged)
    waiting.start()
    begin = time.monotonic()
    sum(range(100_000))
    assert time.monotonic() - begin < 0.4
    waiting.join(30)
    pending.result()


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocking_and_asynchronous_saves_and_loads_of_every_stride_are_the_same_to_the_bit(dtype: torch.dtype) -> None:
    words = torch.randint(0, 2, (64, 48, dtype.itemsize), dtype=torch.uint8, device="cuda")
    if dtype is not torch.bool:
        words = words * 37
    base = words.view(dtype).reshape(64, 48)
    state = {"dense": base, "columns": base[:, 5:20], "transposed": base.t(), "some": base[::3], "scalar": base[0, 0]}
    first, second = SlowStore(), SlowStore()
    gs.save(state, first, options=SMALL)
    gs.async_save(state, second, options=SMALL).result()
    for store in (first, second):
        for name in ("cuda", "cpu"):
            target = {
                "dense": torch.zeros(64, 48, dtype=dtype, device=name),
                "columns": torch.zeros(64, 96, dtype=dtype, device=name)[:, 10:40:2],
                "transposed": torch.zeros(64, 48, dtype=dtype, device=name).t(),
                "some": torch.zeros_like(state["some"], device=name),
                "scalar": torch.zeros((), dtype=dtype, device=name),
            }
            loaded = gs.load(target, store)
            for key, tensor in state.items():
                assert loaded[key] is target[key]
                found, wanted = (one.contiguous().view(-1).view(torch.uint8).cpu() for one in (loaded[key], tensor))
                assert torch.equal(found, wanted), key
