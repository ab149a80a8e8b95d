"""Asynchronous saves: true snapshots, hand-off, back-pressure, guards; content as of a blocking save."""

from __future__ import annotations

import gc
import itertools
import resource
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import giantstep as gs
import giantstep.async_saving
import giantstep.saving
from conftest import Commits
from giantstep.errors import BadArgumentError, ChangedTooSoonError
from giantstep.group.base import Answer, Parts
from giantstep.group.threads import ThreadGroup
from giantstep.group.torch_group import group_of
from giantstep.saver import saver_of
from giantstep.storage.memory import _MEDIA
from giantstep.testing.ranks import run_ranks
from live_state import change, check_stored, live_state
from processes import results, run_processes
from slow_store import GatedStore, SlowStore

IGNORE = gs.StrictHandling.IGNORE_ALL
BACKGROUND = gs.SaveOptions(staging="background", block_bytes=4096, buffer_bytes=4096)
SMALL = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096)


@pytest.mark.parametrize("options", [SMALL, BACKGROUND], ids=["auto", "background"])
def test_what_is_stored_are_the_values_at_the_time_of_the_call_in_a_thousand_rounds(options: gs.SaveOptions) -> None:
    """Everything is overwritten as soon as the save is staged, while the writer has not begun."""
    state = live_state()
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
                assert gs.open_checkpoint(store).common["step"] == number
    finally:
        store.clear()


def test_with_the_defaults_the_state_may_change_as_soon_as_the_call_returns() -> None:
    store = GatedStore()
    state = live_state()
    change(state, 5)
    pending = gs.async_save(state, store)
    assert pending.staged()
    assert not pending.done()
    change(state, 6)
    store.gate.set()
    pending.result()
    check_stored(store, 5)


def test_an_asynchronous_save_has_the_bytes_of_a_blocking_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giantstep.saving, "new_save_id", lambda *_: "20300101T000000-0123456789abcdef")

    def run(group: ThreadGroup) -> None:
        generator = torch.Generator().manual_seed(group.rank)
        part = torch.rand(64, 33, generator=generator)
        state = {
            "shard": gs.ShardedTensor.from_rank_offsets("shard", part, (0, group.rank, 3)),
            "replica": torch.arange(30_000.0),
            "rng": gs.ShardedObject("rng", [group.rank], (3,), (group.rank,)),
            "tied": [torch.ones(100)] * 2,
            "config": {"a": (1, 2.5, None), "b": {3, 4}},
        }
        gs.save(state, tmp_path / "blocking", process_group=group, options=SMALL)
        gs.async_save(state, tmp_path / "async", process_group=group, options=SMALL).result()

    run_ranks(3, run)
    files = sorted(path.relative_to(tmp_path / "blocking") for path in (tmp_path / "blocking").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "async") for path in (tmp_path / "async").rglob("*") if path.is_file())
    assert len(files) >= 5
    for file in files:
        first, second = (tmp_path / "blocking" / file).read_bytes(), (tmp_path / "async" / file).read_bytes()
        if file.name == "checkpoint.json":
            # It says when it was written.
            assert len(first) == len(second)
        else:
            assert first == second, file


def test_it_loads_under_another_layout_and_with_another_number_of_ranks(tmp_path: Path) -> None:
    full = torch.arange(24.0 * 10).reshape(24, 10)

    def save(group: ThreadGroup) -> None:
        part = full.chunk(4)[group.rank].clone()
        state = {"w": gs.ShardedTensor.from_rank_offsets("w", part, (0, group.rank, 4)), "b": torch.ones(3)}
        pending = gs.async_save(state, tmp_path, process_group=group)
        part.zero_()
        pending.result()

    def load(group: ThreadGroup) -> None:
        data = torch.zeros(24, 5)
        state = {"w": gs.ShardedTensor.from_rank_offsets("w", data, (1, group.rank, 2)), "b": torch.zeros(3)}
        gs.load(state, tmp_path, process_group=group)
        assert torch.equal(data, full.chunk(2, dim=1)[group.rank])

    run_ranks(4, save)
    run_ranks(2, load)


@pytest.mark.parametrize(("most", "waits"), [(1, True), (2, False)])
def test_a_call_waits_while_as_many_saves_as_allowed_are_unfinished(most: int, waits: bool) -> None:
    store, other = GatedStore(), SlowStore()
    options = gs.SaveOptions(max_pending=most)
    first = gs.async_save({"w": torch.ones(4)}, store, options=options)
    begun: list[gs.PendingSave] = []
    caller = threading.Thread(target=lambda: begun.append(gs.async_save({"w": torch.ones(4)}, other, options=options)))
    caller.start()
    caller.join(0.5 if waits else 30)
    assert caller.is_alive() == waits
    store.gate.set()
    caller.join(30)
    # In the order of the calls.
    begun[0].result()
    assert first.done()


def test_copies_beyond_staging_bytes_are_refused_or_wait_for_earlier_ones() -> None:
    store, other = GatedStore(), SlowStore()
    options = gs.SaveOptions(staging_bytes=6000, max_pending=8)
    with pytest.raises(BadArgumentError, match="staging_bytes=6000 is not enough: copies of this rank's tensors take 8000"):
        gs.async_save({"w": torch.ones(2000)}, store, options=options)
    first = gs.async_save({"w": torch.ones(1000)}, store, options=options)
    begun: list[gs.PendingSave] = []
    caller = threading.Thread(target=lambda: begun.append(gs.async_save({"w": torch.ones(1000)}, other, options=options)))
    caller.start()
    caller.join(0.5)
    assert caller.is_alive()
    store.gate.set()
    caller.join(30)
    assert first.result().tensors == begun[0].result().tensors == 1


class Noted:
    """A group that counts what goes on in it."""

    def __init__(self, group: ThreadGroup) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self.transfer, self.withdraw, self.beside = group.transfer, group.withdraw, group.beside
        self.reports: list[int] = []

    def exchange(self, report: Parts, answer: Answer, phase: str, timeout_secs: float) -> Parts:
        self.reports.append(sum(map(len, report)))
        return self._group.exchange(report, answer, phase, timeout_secs)


def test_the_callers_thread_agrees_once_per_save_in_a_few_hundred_bytes() -> None:
    store = SlowStore()

    def run(group: ThreadGroup) -> list[int]:
        noted = Noted(group)
        state = {f"layer {n}": torch.full((5,), float(n)) for n in range(500)}
        for _ in range(3):
            gs.async_save(state, store, process_group=noted).result()
        return noted.reports

    for reports in run_ranks(3, run):
        assert len(reports) == 3
        assert max(reports) < 1000


def test_a_tensor_changed_before_it_is_staged_fails_the_save_on_all_ranks_and_nothing_is_committed() -> None:
    first, second = GatedStore(), SlowStore()

    def run(group: ThreadGroup) -> tuple[type, str]:
        tensors = {"kept": torch.ones(3), "changed": torch.ones(3)}
        options = gs.SaveOptions(staging="background", max_pending=2)
        # The thread is busy with one save, so the other is not staged yet.
        gs.async_save({"x": torch.ones(1)}, first, process_group=group, options=options)
        pending = gs.async_save(tensors, second, process_group=group, options=options)
        if group.rank == 1:
            tensors["changed"].add_(1)
        first.gate.set()
        error = pending.exception()
        return type(error), str(error)

    ((kind, text),) = set(run_ranks(3, run))
    assert kind is ChangedTooSoonError
    assert "rank 1" in text
    assert "'changed'" in text
    with pytest.raises(gs.errors.OpenError):
        gs.open_checkpoint(second)


def test_the_guard_makes_the_next_step_wait_until_the_save_is_staged_and_later_steps_for_nothing() -> None:
    gated, store = GatedStore(), SlowStore()
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones(4)
    options = gs.SaveOptions(staging="background", max_pending=2)
    gs.async_save({"x": torch.ones(1)}, gated, options=options)
    pending = gs.async_save({"w": weight}, store, options=options).guard(optimizer)
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    stepping.join(0.3)
    assert stepping.is_alive(), "the step waits: nothing is staged"
    gated.gate.set()
    stepping.join(30)
    assert pending.staged()
    assert weight.tolist() == [0.0] * 4
    pending.result()
    assert gs.open_checkpoint(store)["w"][...].tolist() == [1.0] * 4
    with pytest.raises(BadArgumentError, match="staging_guard"):
        pending.guard(object())


def test_the_guard_of_a_wrapped_optimizer_is_called_by_the_one_inside() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As accelerate's: an optimizer whose own part was never made."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:
            self.optimizer.step()

    gated, store = GatedStore(), SlowStore()
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = Wrapper(torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.ones(4)
    options = gs.SaveOptions(staging="background", max_pending=2)
    gs.async_save({"x": torch.ones(1)}, gated, options=options)
    pending = gs.async_save({"w": weight}, store, options=options).guard(optimizer)
    threading.Timer(0.2, gated.gate.set).start()
    optimizer.step()
    assert pending.staged()
    pending.result()
    assert gs.open_checkpoint(store)["w"][...].tolist() == [1.0] * 4
    with pytest.raises(BadArgumentError, match="working register_step_pre_hook"):
        pending.guard(Wrapper(object()))  # type: ignore[arg-type]


def test_guards_of_several_saves_and_hooks_of_the_users_own_get_along() -> None:
    store, calls = SlowStore(), []
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones(4)
    pending = [gs.async_save({"w": weight}, store).guard(optimizer) for _ in range(3)]
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        optimizer.step()
    assert weight.tolist() == [-2.0] * 4
    assert len(calls) == 3
    assert all(found.staged() for found in pending)
    pending[-1].result()


def test_modes_of_torch_that_the_caller_is_in_make_no_difference() -> None:
    store = SlowStore()
    weight = torch.ones(5)
    with torch.inference_mode():
        made_here = torch.full((3,), 2.0)
    for options in (SMALL, BACKGROUND):
        for number in range(4):
            with torch.inference_mode(mode=number % 2 == 0):
                gs.async_save({"w": weight, "i": made_here, "n": number}, store, options=options).result()
            assert gs.open_checkpoint(store)["i"][...].tolist() == [2.0] * 3
            assert gs.open_checkpoint(store).common["n"] == number


def test_the_block_of_a_guard_begins_when_the_save_is_staged() -> None:
    store = SlowStore()
    weight = torch.ones(100_000)
    for _ in range(50):
        weight.fill_(1.0)
        pending = gs.async_save({"w": weight}, store, options=BACKGROUND)
        with gs.staging_guard(pending):
            assert pending.staged()
            weight.zero_()
        pending.result()
        assert float(gs.open_checkpoint(store)["w"][...].sum()) == 100_000


def test_tensors_that_only_the_save_needed_are_freed_when_it_is_staged() -> None:
    store = GatedStore()
    weight, shard = torch.ones(1000), torch.ones(10)
    alive = [weakref.ref(weight), weakref.ref(shard)]
    state = {"w": weight, "s": gs.ShardedTensor.from_rank_offsets("s", shard)}
    pending = gs.async_save(state, store)
    del weight, shard, state
    store.waiting.wait(30)
    gc.collect()
    assert [found() for found in alive] == [None, None]
    store.gate.set()
    pending.result()


def test_plans_are_reused_and_memory_is_too() -> None:
    store = SlowStore()
    options = gs.SaveOptions(plan_cache=gs.PlanCache())
    pending = [gs.async_save({"w": torch.full((1000,), number)}, store, options=options) for number in (1.0, 2.0, 3.0)]
    assert [found.result().plan_reused for found in pending] == [False, True, True]


def test_timeouts_of_the_handle() -> None:
    store = GatedStore()
    pending = gs.async_save({"w": torch.ones(4)}, store)
    assert not pending.done()
    with pytest.raises(gs.errors.PhaseTimeoutError, match=r"not finished within 0\.05 s"):
        pending.result(timeout=0.05)
    with pytest.raises(gs.errors.PhaseTimeoutError):
        gs.finish_saves(timeout=0.05)
    assert "staged" in repr(pending)
    store.gate.set()
    gs.finish_saves()
    assert pending.done()
    assert "committed" in repr(pending)
    assert {"wait", "describe", "stage", "plan", "write", "clean"} <= set(pending.result().seconds)


def _used() -> tuple[int, int, int]:
    """Most memory so far in KiB, open files, threads."""
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        sum(1 for _ in Path("/proc/self/fd").iterdir()),
        threading.active_count(),
    )


def test_two_hundred_saves_leak_nothing(tmp_path: Path, committed: Commits) -> None:
    state = {f"w{number}": torch.ones(1 << 16) for number in range(8)}

    def rounds(count: int) -> None:
        for number in range(count):
            gs.async_save({**state, "step": number}, tmp_path / str(number % 2)).result()
            committed.clear()

    rounds(20)
    assert saver_of(group_of()).wait(60)
    memory, files, threads = _used()
    rounds(200)
    assert saver_of(group_of()).wait(60), "its thread ends when there is nothing to do"
    gc.collect()
    now_memory, now_files, now_threads = _used()
    assert now_memory - memory < 200 * 1024 / 4, "a quarter of the megabyte per save that is allowed"
    assert (now_files, now_threads) == (files, threads)
    assert sum(1 for _ in itertools.chain(*(folder.rglob("*.safetensors") for folder in tmp_path.iterdir()))) == 4
    gs.finish_saves()


def test_saves_that_refuse_their_arguments_begin_nothing_and_say_so_on_all_ranks() -> None:
    store = SlowStore()

    def run(group: ThreadGroup) -> str:
        state = {"w": torch.ones(3), "bad": object() if group.rank == 2 else 1}
        with pytest.raises(gs.errors.UnsupportedTypeError) as caught:
            gs.async_save(state, store, process_group=group)
        gs.async_save({"w": torch.ones(3)}, store, process_group=group).result()
        return str(caught.value)

    assert len(set(run_ranks(3, run))) == 1
    assert store.location.removeprefix("memory://") in _MEDIA


def test_saves_in_flight_at_once_and_of_changing_shapes_keep_their_own_copies() -> None:
    options = gs.SaveOptions(max_pending=4)
    gated, stores = GatedStore(), [SlowStore() for _ in range(3)]
    states = [
        {"w": torch.full((100,), 1.0), "v": torch.full((7,), 1.0)},
        {"w": torch.full((100,), 2.0), "v": torch.full((7,), 2.0)},
        {"w": torch.full((7,), 3.0), "v": torch.full((100,), 3.0)},
        {"w": torch.full((200,), 4, dtype=torch.int16), "v": torch.full((14,), 4, dtype=torch.int16)},
    ]
    for _ in range(3):
        gated.gate.clear()
        pending = [gs.async_save(state, store, options=options) for state, store in zip(states, [gated, *stores], strict=True)]
        gated.gate.set()
        for state, store, found in zip(states, [gated, *stores], pending, strict=True):
            found.result()
            for key, value in state.items():
                assert np.array_equal(gs.open_checkpoint(store)[key][...], value.numpy())
        states = states[1:] + states[:1]


def test_many_bytes_are_copied_whole() -> None:
    store = SlowStore()
    state = {f"w{number}": torch.arange(1 << 20, dtype=torch.float32) + number for number in range(9)}
    pending = gs.async_save(state, store)
    expected = {key: value.clone() for key, value in state.items()}
    for value in state.values():
        value.zero_()
    pending.result()
    checkpoint = gs.open_checkpoint(store)
    assert all(np.array_equal(checkpoint[key][...], value.numpy()) for key, value in expected.items())


def test_views_that_begin_at_the_same_element_are_told_apart() -> None:
    store = SlowStore()
    base = torch.arange(24.0)
    state = {"all": base, "some": base[:7], "matrix": base.view(4, 6), "column": base.view(4, 6)[:, 0], "tied": base.view(4, 6)}
    gs.async_save(state, store).result()
    checkpoint = gs.open_checkpoint(store)
    for key, value in state.items():
        assert np.array_equal(checkpoint[key][...], value.numpy()), key


def test_content_metadata_may_change_after_the_call() -> None:
    store, metadata = GatedStore(), {"tags": ["a"]}
    pending = gs.async_save({"w": torch.ones(2)}, store, content_metadata=metadata)
    metadata["tags"].append("b")
    store.gate.set()
    pending.result()
    assert gs.open_checkpoint(store).content_metadata == {"tags": ["a"]}


def test_memory_of_copies_is_given_back_by_saves_that_fail_too_and_freed_by_finish_saves() -> None:
    store = SlowStore()
    memory = saver_of(group_of()).memory
    gs.finish_saves()
    assert (memory.held_bytes, memory.taken_bytes) == (0, 0)
    store.fail = lambda name: (_ for _ in ()).throw(OSError(5, "gone"))
    for _ in range(3):
        gs.async_save({"w": torch.ones(10_000)}, store).exception()
        assert saver_of(group_of()).wait(30)
        assert memory.taken_bytes == 0
        assert 40_000 <= memory.held_bytes < 41_000
    store.fail = lambda name: None
    limit = gs.SaveOptions(staging_bytes=45_000)
    gs.async_save({"w": torch.ones(11_000)}, store, options=limit).result()
    assert memory.held_bytes <= 45_000
    gs.finish_saves()
    assert memory.held_bytes == 0


def test_a_tensor_whose_memory_was_freed_before_it_is_staged_fails_the_save() -> None:
    gated, store = GatedStore(), SlowStore()
    options = gs.SaveOptions(staging="background", max_pending=2)
    gs.async_save({"x": torch.ones(1)}, gated, options=options)
    freed = torch.ones(1 << 16)
    pending = gs.async_save({"w": freed}, store, options=options)
    freed.untyped_storage().resize_(0)
    gated.gate.set()
    assert isinstance(pending.exception(), ChangedTooSoonError)


def _change_a_dtensor(rank: int, path: str) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    value = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    options = gs.SaveOptions(staging="background")
    told = []
    real = giantstep.async_saving.line_up

    def line_up(*arguments: Any) -> None:
        changed.wait(30)
        real(*arguments)

    giantstep.async_saving.line_up = line_up
    for alter in (lambda: value.add_(1), optimizer.step, lambda: None):
        changed = threading.Event()
        pending = gs.async_save({"value": value, "parameter": parameter}, path, options=options)
        alter()
        changed.set()
        told.append(type(pending.exception(60)).__name__)
    return told


def test_a_dtensor_changed_before_it_is_staged_is_noticed(tmp_path: Path) -> None:
    found = results(run_processes(2, _change_a_dtensor, str(tmp_path)))
    assert found == [["ChangedTooSoonError", "ChangedTooSoonError", "NoneType"]] * 2


def test_states_of_one_look_or_another_are_stored_as_they_are_in_turn() -> None:
    """What is kept of one state - its outline, where copies lie, the copies themselves - never serves another."""
    base, tied = torch.zeros(6, 4), torch.zeros(5)
    variants: list[dict[str, torch.Tensor]] = [
        {"a": torch.zeros(6, 4), "b": torch.zeros(5), "c": torch.zeros(5)},
        {"a": torch.zeros(6, 4), "b": tied, "c": tied},
        {"a": base, "b": base.view(-1)[:5], "c": torch.zeros(5)},
        {"a": torch.zeros(4, 6).t(), "b": torch.zeros(10)[::2], "c": torch.zeros(5)},
        {"a": torch.zeros(6, 4, dtype=torch.float64), "b": torch.zeros(5), "c": torch.zeros(0)},
        {"a": torch.zeros(6, 4), "b": torch.nn.Parameter(torch.zeros(5)), "c": torch.zeros(5, dtype=torch.bool)},
    ]
    options = gs.SaveOptions(block_bytes=4096, buffer_bytes=4096, max_pending=2, plan_cache=gs.PlanCache())
    waiting: list[tuple[str, gs.PendingSave, dict[str, torch.Tensor]]] = []

    def check() -> None:
        path, pending, expected = waiting.pop(0)
        pending.result(60)
        found = gs.load({key: torch.zeros_like(value) for key, value in expected.items()}, path)
        assert all(torch.equal(found[key], value) for key, value in expected.items())

    for number in range(60):
        state = variants[(number * number + number // 7) % len(variants)]
        for place, tensor in enumerate(state.values()):
            with torch.no_grad():
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + number + 7 * place)
        path = f"memory://looks-{number % 3}"
        waiting.append(
            (path, gs.async_save(state, path, options=options), {key: value.detach().clone() for key, value in state.items()})
        )
        with torch.no_grad():
            for tensor in state.values():
                tensor.zero_()
        if len(waiting) == 2:
            check()
    while waiting:
        check()
