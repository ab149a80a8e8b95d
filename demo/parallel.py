"""The demo of many ranks: equal shares, each byte read once, plans used again, thousands of ranks planned in a moment.

Run by `make demo` after the demo of state. Ranks are threads of this process. Checks every claim it makes, and exits with
1 if one is false.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from story import Story

import giantstep as gs
from giantstep.planning.description import IMPLICIT, MAIN, Description, decode_descriptions
from giantstep.planning.save_plan import plan_save
from giantstep.storage.base import ReadHandle
from giantstep.storage.local import LocalStore
from giantstep.testing import run_ranks
from giantstep.testing.ranks import run_ranks_collecting
from giantstep.writers import LowestRank

RANKS = 8
MIB = 1 << 20
State = dict[str, Any]


class CountingStore:
    """A directory that counts the bytes read from its data files."""

    def __init__(self, path: Path) -> None:
        self._store = LocalStore(str(path))
        self._lock = threading.Lock()
        self.read_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def open_read(self, name: str, *, direct: bool = False) -> Any:
        """A handle that counts if the file is a data file."""
        handle = self._store.open_read(name, direct=direct)
        return _CountingHandle(self, handle) if name.startswith("data/") else handle

    def count(self, added: int) -> None:
        """Bytes were read."""
        with self._lock:
            self.read_bytes += added


class _CountingHandle(ReadHandle):
    def __init__(self, store: CountingStore, handle: Any) -> None:
        self._store, self._handle = store, handle

    @property
    def size(self) -> int:
        """As the handle's."""
        return int(self._handle.size)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Read and count."""
        self._handle.read_into(offset, target)
        self._store.count(len(target))

    def close(self) -> None:
        """As the handle's."""
        self._handle.close()


EMBEDDING, LAYERS = (8192, 512), [(1024, 512)] * 6
SHAPES = {"embedding": EMBEDDING, **{f"layer{n}": shape for n, shape in enumerate(LAYERS)}}
TOTAL = sum(4 * rows * columns for rows, columns in SHAPES.values())


def whole(key: str) -> torch.Tensor:
    """The global tensor."""
    rows, columns = SHAPES[key]
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) + len(key)


def replicated(_rank: int, _ranks: int, fill: bool) -> State:
    """Plain tensors: every rank holds everything."""
    return {key: whole(key) if fill else torch.zeros(shape) for key, shape in SHAPES.items()}


def cut(axis: int) -> Callable[[int, int, bool], State]:
    """Every rank holds an equal part along an axis."""

    def state(rank: int, ranks: int, fill: bool) -> State:
        found = {}
        for key, shape in SHAPES.items():
            size = list(shape)
            size[axis] //= ranks
            part = whole(key).narrow(axis, rank * size[axis], size[axis]).clone() if fill else torch.zeros(size)
            found[key] = gs.ShardedTensor.from_rank_offsets(key, part, (axis, rank, ranks))
        return found

    return state


def same(state: State, layout: Callable[[int, int, bool], State], rank: int, ranks: int) -> bool:
    """Whether a rank's loaded tensors are what its layout says, bit for bit."""
    expected = layout(rank, ranks, True)
    return all(torch.equal(state[key], getattr(value, "data", value)) for key, value in expected.items())


def equal_shares(story: Story, folder: Path) -> None:
    """Who writes what."""
    story.section(f"{RANKS} replicas, one tensor with {4 * EMBEDDING[0] * EMBEDDING[1] / TOTAL:.0%} of the bytes: equal shares")
    for name, options in (("lowest rank", gs.SaveOptions(writers=LowestRank())), ("balanced", gs.SaveOptions())):

        def save(group: Any, options: gs.SaveOptions = options) -> int:
            return gs.save(replicated(0, 1, True), folder, process_group=group, options=options).bytes_written

        shares = run_ranks(RANKS, save)
        story.row(f"{name}: MiB per rank", [f"{share / MIB:.2f}" for share in shares])
    worst = max(shares) * RANKS / sum(shares)
    story.check(worst <= 1.05, f"balanced, the busiest rank writes {worst:.3f} x the mean, and each byte is written once")


def read_once(story: Story, folder: Path) -> None:
    """Who reads what."""
    story.section("Loading: each byte is read once and sent to the ranks that need it")
    story.row("bytes read / stored", ["none", "auto", "ranks"])
    cases = (
        ("replicas", replicated, replicated, RANKS),
        ("rows to columns", cut(0), cut(1), 4),
        ("rows to fewer columns", cut(0), cut(1), 2),
        ("columns to replicas", cut(1), replicated, 4),
    )
    for name, saved, loaded, ranks in cases:
        path = folder / name.replace(" ", "_")
        run_ranks(
            RANKS, lambda group, saved=saved, path=path: gs.save(saved(group.rank, RANKS, True), path, process_group=group)
        )
        ratios, exact = [], True
        for exchange in ("none", "auto"):
            store = CountingStore(path)

            def load(group: Any, store: Any = store, loaded: Any = loaded, exchange: str = exchange) -> bool:
                wanted = loaded(group.rank, group.size, False)
                state = gs.load(wanted, store, process_group=group, options=gs.LoadOptions(exchange=exchange))
                return same(state, loaded, group.rank, group.size)

            exact &= all(run_ranks(ranks, load))
            ratios.append(store.read_bytes / TOTAL)
        story.row(name, [f"{ratios[0]:.2f}", f"{ratios[1]:.2f}", f"{RANKS} to {ranks}"])
        story.check(exact and ratios[1] <= 1.02, f"{name}: bit-identical, {ratios[1]:.3f} x the bytes read from the store")


def one_broken_block(story: Story, folder: Path) -> None:
    """An error on the one rank that reads a block is everybody's."""
    story.section("A flipped bit, seen by the one rank that reads the block")
    file = sorted((folder / "replicas" / "data").iterdir())[3]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    def load(group: Any) -> None:
        gs.load(replicated(0, 1, False), folder / "replicas", process_group=group)

    _, errors = run_ranks_collecting(RANKS, load)
    alike = {str(error) for error in errors}
    story.check(
        len(alike) == 1 and all(isinstance(error, gs.errors.CorruptionError) for error in errors),
        f"all {RANKS} ranks raise the same CorruptionError:",
    )
    story.say(str(errors[0]), indent=" " * 12)


def plans_again(story: Story, folder: Path) -> None:
    """What the second save costs, and what ends a plan."""
    story.section("Plans: the second save agrees on 16 bytes per rank; a change on any rank is noticed by all")
    caches = [gs.PlanCache() for _ in range(RANKS)]

    def save(group: Any, change: bool) -> tuple[bool, float]:
        state: State = {f"w{n}": torch.zeros(8) for n in range(1000)}
        if change and group.rank == 5:
            del state["w999"]
        options = gs.SaveOptions(plan_cache=caches[group.rank])
        report = gs.save(state, folder / "plans", process_group=group, options=options)
        return report.plan_reused, report.seconds["plan"]

    turns = [
        run_ranks(RANKS, lambda group, change=change: save(group, change)) for change in (False, False, True, False, False)
    ]
    titles = ("first save", "second", "one rank lacks a key", "it has it again", "once more")
    for title, turn in zip(titles, turns, strict=True):
        reused, secs = turn[0]
        story.row(title, ["plan reused" if reused else "planned", f"{secs * 1e3:.0f} ms"])
    found = [{reused for reused, _ in turn} for turn in turns]
    story.check(found == [{False}, {True}, {False}, {False}, {True}], "all ranks know each time whether the plan holds")


def thousands_of_ranks(story: Story) -> None:
    """Planning in one process for ranks that do not exist."""
    ranks, tensors = 2048, 1000
    story.section(f"Planning for {ranks:,} ranks with {tensors:,} tensors each, on this core")
    base = Description(
        keys=[f"layers.{n // 10}.w{n % 10}" for n in range(tensors)],
        dtype=np.full(tensors, 12, dtype=np.uint8),
        dims_ends=np.arange(tensors + 1) * 2,
        dims=np.tile([ranks * 2, 64], tensors),
        shard_tensor=np.arange(tensors),
        shard_role=np.full(tensors, MAIN, dtype=np.uint8),
        shard_mesh=np.zeros(tensors, dtype=np.int64),
        shard_offset=np.zeros(2 * tensors, dtype=np.int64),
        shard_size=np.tile([2, 64], tensors),
        shard_digest=np.zeros((tensors, 2), dtype=np.uint64),
        tied=np.arange(tensors),
        object_keys=[],
        object_role=np.zeros(0, dtype=np.uint8),
        object_digest=np.zeros((0, 2), dtype=np.uint64),
        object_bytes=np.zeros(0, dtype=np.int64),
    )
    copies = replace(base, shard_role=np.full(tensors, IMPLICIT, np.uint8), shard_size=base.dims, shard_mesh=base.tied + 1)
    offsets = [np.tile([rank * 2, 0], tensors) for rank in range(ranks)]
    for name, found in (
        ("every rank its own rows", [replace(base, shard_offset=offset) for offset in offsets]),
        ("replicas on all ranks", [copies] * ranks),
    ):
        kept: dict[bytes, bytes] = {}
        reports = [tuple(kept.setdefault(part, part) for part in description.encode()) for description in found]
        begin = time.process_time()
        descriptions = decode_descriptions(reports)
        plan = plan_save(descriptions, split_bytes=MIB, max_chunk_bytes=1 << 40)
        parts = [part.encode() for part in plan.parts(descriptions)]
        secs = time.process_time() - begin
        loads = np.bincount(plan.writer, plan.bytes, minlength=ranks)
        story.check(
            len(parts) == ranks and loads.max() <= 1.05 * loads.mean(),
            f"{name}: {secs:.2f} s of CPU to check and plan {len(plan.tensor):,} chunks; max/mean "
            f"{loads.max() / loads.mean():.3f}; {sum(map(len, kept)) / MIB:.1f} MiB gathered, equal parts once",
        )


def main() -> int:
    """Tell everything; 0 if every claim is true."""
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="giantstep-parallel-") as folder:
        story = Story(Path(folder))
        print("Many ranks. Ranks are threads of this process; every claim is checked.")
        equal_shares(story, Path(folder) / "shares")
        read_once(story, Path(folder))
        one_broken_block(story, Path(folder))
        plans_again(story, Path(folder))
        thousands_of_ranks(story)
        print(f"\n{story.claims - story.failed} of {story.claims} claims hold.")
    return 1 if story.failed else 0


if __name__ == "__main__":
    sys.exit(main())
