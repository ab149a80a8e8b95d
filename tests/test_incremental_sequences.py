"""Whatever is saved, changed, resharded, deleted, removed and materialised: every step that remains loads to the bit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import giantstep as gs
from giantstep.commit.remove import remove_checkpoint
from giantstep.difference import compare
from giantstep.materializing import materialize
from giantstep.storage.base import read_all
from giantstep.storage.memory import MemoryStore
from giantstep.storage.record_file import files_of_ours
from giantstep.testing.ranks import run_ranks
from independent_reader import read_checkpoint
from layouts import DTYPES, Shard, bits, cut, partitions, random_tensor

_NAMES = itertools.count()
KEYS = ("a", "b", "c", "d")


@dataclass
class Tensor:
    """A tensor with the layouts in which it may be saved."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layouts: list[list[Shard]]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    layouts = []
    for _ in range(2):
        shards: list[Shard] = []
        for region in draw(partitions(shape, 4)):
            holders = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
            shards += [Shard(rank, region, number) for number, rank in enumerate(holders)]
        layouts.append(shards)
    return Tensor(shape, draw(st.sampled_from(DTYPES)), layouts)


class Run:
    """Steps under a root, and what each must hold."""

    def __init__(self, held: dict[str, Tensor]) -> None:
        self.root = MemoryStore(f"sequence-{next(_NAMES)}")
        self.tensors = held
        self.values = {key: random_tensor(one.shape, one.dtype, 0) for key, one in held.items()}
        self.steps: dict[int, dict[str, bytes]] = {}
        self.reused = 0

    def save(self, step: int, layout: int, previous: int | None, options: dict[str, Any], background: bool) -> None:
        before = None if previous is None else self.root.folder(str(previous))
        chosen = gs.SaveOptions(
            digests=True,
            previous=before,
            block_bytes=4096,
            buffer_bytes=1 << 16,
            split_bytes=1,
            writer_threads=1,
            timeout_secs=30,
            **options,
        )

        def rank(group: Any) -> gs.SaveReport:
            state: dict[str, Any] = {"step": step, "fixed": "x" * 40}
            for key, one in self.tensors.items():
                for number, shard in enumerate(one.layouts[layout]):
                    if shard.rank == group.rank:
                        region, data = shard.region, cut(self.values[key], shard.region)
                        state[f"{key} {number}"] = gs.ShardedTensor(
                            key, data, one.dtype, region.size, one.shape, region.offset, None, shard.replica_id
                        )
            if background:
                return gs.async_save(state, self.root.folder(str(step)), process_group=group, options=chosen).result(60)
            return gs.save(state, self.root.folder(str(step)), process_group=group, options=chosen)

        reports = run_ranks(3, rank)
        assert len({report.bytes_reused for report in reports}) == 1
        assert sum(report.bytes_written for report in reports) == reports[0].bytes - reports[0].bytes_reused
        self.reused += reports[0].bytes_reused
        self.steps[step] = {key: bits(value) for key, value in self.values.items()}

    def check(self) -> None:
        for step, expected in self.steps.items():
            store = self.root.folder(str(step))
            checkpoint = gs.open_checkpoint(store)
            assert checkpoint.verify().ok
            record = checkpoint.record
            names = {"checkpoint.json", record.index.name, *(file.name for file in record.files)}
            assert set(files_of_ours(store)) == names
            stored = read_checkpoint({name: read_all(store, name, 1 << 30) for name in names})
            assert {key: one.data.tobytes() for key, one in stored.tensors.items()} == expected
            assert checkpoint.common == {"step": step, "fixed": "x" * 40}

    def compare(self, first: int, second: int) -> None:
        found = compare(self.root.folder(str(first)), self.root.folder(str(second)))
        ours, theirs = self.steps[first], self.steps[second]
        assert [one.key for one in found.values] == sorted(key for key in ours if ours[key] != theirs[key])
        assert found.common == ("step",)

    def close(self) -> None:
        for name in list(self.root.folders()):
            self.root.folder(name).clear()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(tensors(), min_size=len(KEYS), max_size=len(KEYS)), st.data())
def test_every_remaining_step_of_any_sequence_is_what_was_saved(drawn: list[Tensor], data: st.DataObject) -> None:
    run = Run(dict(zip(KEYS, drawn, strict=True)))
    try:
        for step in range(data.draw(st.integers(2, 5), label="steps")):
            for key in data.draw(st.sets(st.sampled_from(KEYS), max_size=2), label="changed"):
                one = run.tensors[key]
                run.values[key] = random_tensor(one.shape, one.dtype, step + 1)
            previous = data.draw(st.sampled_from([None, *run.steps]) if run.steps else st.none(), label="previous")
            options = {
                "least_live": data.draw(st.sampled_from([0.01, 0.5, 1.0]), label="least live"),
                "direct_io": "never",
            }
            run.save(step, data.draw(st.integers(0, 1), label="layout"), previous, options, data.draw(st.booleans()))
            action = data.draw(st.sampled_from(["nothing", "delete", "materialise"]), label="action")
            chosen = data.draw(st.sampled_from([*run.steps]), label="chosen")
            if action == "delete" and len(run.steps) > 1:
                remove_checkpoint(run.root.folder(str(chosen)))
                del run.steps[chosen]
            elif action == "materialise":
                materialize(run.root.folder(str(chosen)))
            run.check()
        first, last = min(run.steps), max(run.steps)
        if first != last:
            run.compare(first, last)
            run.compare(last, first)
    finally:
        run.close()
