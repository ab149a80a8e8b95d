"""One case of `scale.py` in a process of its own: `python scale_case.py LAYOUT RANKS TENSORS`; prints JSON.

The process is rank 0; what the other ranks would send is made before anything is measured.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median

import numpy as np
from index_access import BLOCK_BYTES, Opened, open_and_find, store_index, write_reports
from measure import measure
from planning_calls import (
    Buffer,
    Parts,
    SavePlan,
    answers,
    arriving,
    decoded,
    gathered,
    indexed,
    leaving,
    message_bytes,
    planned,
    tokens,
    used_again,
)
from shard_layouts import LAYOUTS, sharded
from tensors import Tensors, large_transformer

from giantstep.format.index import Index, decode_texts
from giantstep.options import LoadOptions
from giantstep.planning.load_plan import plan_load
from giantstep.planning.load_tables import tabulate_chunks, tabulate_wanted
from giantstep.planning.reuse import fingerprint
from giantstep.shards.region import Region

_MEMORY_FOLDER = "/dev/shm"  # noqa: S108 - no disk between the index and its reader
_REPETITIONS, _ENOUGH_SECS = 3, 3.0
_LOADED_RANK = 1
_FINGERPRINTS, _WARM_RUNS = 16, 5


@dataclass(slots=True)
class Figures:
    """What was measured; seconds without another word are CPU time of rank 0.

    Attributes:
        layout, ranks, shards: the case; shards that ranks describe, all together.
        describe_secs: for one rank to encode its description.
        gathered_bytes, gathered_once_bytes: all descriptions; what of them reaches rank 0 over the tree.
        scattered_bytes, scattered_once_bytes: all parts of the plan; what rank 0 sends of them into the tree.
        phases: gather (bundles to messages), decode, plan (checks included), answer, scatter (answers to bundles).
        cold_secs, cold_wall_secs: all of them.
        cold_system_secs: those of them that the system took, to provide memory.
        warm_secs: to agree that the plan still holds.
        warm_gathered_bytes: what reaches rank 0 for that.
        fingerprint_secs: for one rank to see that it holds what it held.
        extra_bytes: memory that they need beyond the bundles that came in.
        chunks: of the checkpoint.
        index_secs: reports to index, and the index to bytes.
        opened: see there.
        load_plan_secs: one rank's load, on three quarters of the ranks.
    """

    layout: str
    ranks: int
    shards: int = 0
    describe_secs: float = 0
    gathered_bytes: int = 0
    gathered_once_bytes: int = 0
    scattered_bytes: int = 0
    scattered_once_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    cold_secs: float = 0
    cold_system_secs: float = 0
    cold_wall_secs: float = 0
    warm_secs: float = 0
    warm_gathered_bytes: int = 0
    fingerprint_secs: float = 0
    extra_bytes: int = 0
    chunks: int = 0
    index_secs: float = 0
    opened: Opened | None = None
    load_plan_secs: float = 0


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    begin = time.process_time()
    yield
    phases[name] = time.process_time() - begin


def _describe(layout: str, ranks: int, tensors: Tensors, figures: Figures) -> list[Parts]:
    """Everybody's message."""
    descriptions = LAYOUTS[layout](tensors, ranks)
    figures.shards = sum(len(description.shard_tensor) for description in descriptions)
    begin = time.process_time()
    messages = [description.encode() for description in descriptions]
    figures.describe_secs = (time.process_time() - begin) / ranks
    return messages


@dataclass(slots=True)
class _Outcome:
    phases: dict[str, float]
    plan: SavePlan
    sent: list[Parts]
    wires: list[list[Buffer]]


def _coordinate(own: Parts, wires: list[list[Buffer]]) -> _Outcome:
    """All that rank 0 does between the messages that come in and those that go out."""
    phases: dict[str, float] = {}
    with _timed(phases, "gather"):
        reports = gathered(own, wires)
    with _timed(phases, "decode"):
        descriptions = decoded(reports)
    with _timed(phases, "plan"):
        plan = planned(descriptions)
    with _timed(phases, "answer"):
        sent = answers(plan, descriptions)
    with _timed(phases, "scatter"):
        return _Outcome(phases, plan, sent, leaving(sent))


def _cold(own: Parts, wires: list[list[Buffer]], figures: Figures) -> _Outcome:
    """Several times if that is quick; the fastest counts."""
    found: list[_Outcome] = []
    spent = 0.0
    for repetition in range(_REPETITIONS):
        found.clear()
        system = resource.getrusage(resource.RUSAGE_SELF).ru_stime
        took = measure(lambda: found.append(_coordinate(own, wires)), lambda: None, "plan", "giantstep", repetition)
        cold_secs, wall_secs = sum(found[0].phases.values()), took.end - took.begin
        if not repetition or cold_secs < figures.cold_secs:
            figures.phases, figures.cold_secs, figures.cold_wall_secs = found[0].phases, cold_secs, wall_secs
            figures.cold_system_secs = resource.getrusage(resource.RUSAGE_SELF).ru_stime - system
        figures.extra_bytes = max(figures.extra_bytes, took.extra_bytes)
        spent += wall_secs
        if spent > _ENOUGH_SECS:
            break
    return found[0]


def _warm(reports: list[Parts], plan: SavePlan, figures: Figures) -> None:
    """Planning the same once more: every rank sends a token, rank 0 finds that they agree."""
    descriptions = decoded(reports)
    begin = time.process_time()
    for description in descriptions[:_FINGERPRINTS]:
        fingerprint(description, b"")
    figures.fingerprint_secs = (time.process_time() - begin) / len(descriptions[:_FINGERPRINTS])
    messages = tokens(plan, descriptions)
    own, wires = messages[0], arriving(messages)
    del descriptions, messages
    gc.collect()
    figures.warm_gathered_bytes = message_bytes(wires)
    runs = []
    for _ in range(_WARM_RUNS):
        begin = time.process_time()
        used_again(own, wires)
        runs.append(time.process_time() - begin)
    figures.warm_secs = median(runs)


def _load_plan_secs(index: Index, tensors: Tensors, ranks: int) -> float:
    """One rank's plan to load its rows of every tensor, divided over three quarters of the ranks."""
    number = {key: row for row, key in enumerate(decode_texts(index.tensor_key_ends, index.tensor_key_bytes))}
    wanted = sharded(tensors, ranks * 3 // 4)[_LOADED_RANK]
    dims = wanted.tensor_ndim[wanted.shard_tensor].tolist()
    rows, regions, end = [], [], 0
    for tensor, count in zip(wanted.shard_tensor.tolist(), dims, strict=True):
        offset, size = wanted.shard_offset[end : end + count], wanted.shard_size[end : end + count]
        rows.append(number[wanted.keys[tensor]])
        regions.append(Region(tuple(offset.tolist()), tuple(size.tolist())))
        end += count
    begin = time.process_time()
    chunks = tabulate_chunks(index)
    table = tabulate_wanted(rows, regions, [False] * len(rows), chunks.width)
    plan_load(chunks, table, block_bytes=BLOCK_BYTES, buffer_bytes=LoadOptions().buffer_bytes)
    return time.process_time() - begin


def measure_case(layout: str, ranks: int, tensors: Tensors) -> Figures:
    """All figures of one case."""
    figures = Figures(layout, ranks)
    messages = _describe(layout, ranks, tensors, figures)
    wires = arriving(messages)
    figures.gathered_bytes, figures.gathered_once_bytes = message_bytes(messages), message_bytes(wires)
    own = messages[0]
    del messages
    gc.collect()
    outcome = _cold(own, wires, figures)
    plan = outcome.plan
    figures.chunks = len(plan.tensor)
    figures.scattered_bytes, figures.scattered_once_bytes = message_bytes(outcome.sent), message_bytes(outcome.wires)
    del outcome
    _warm(gathered(own, wires), plan, figures)
    del wires
    written = write_reports(plan)
    begin = time.process_time()
    index, files = indexed(plan, written)
    figures.index_secs = time.process_time() - begin
    with tempfile.TemporaryDirectory(dir=_MEMORY_FOLDER) as root:
        begin = time.process_time()
        store_index(root, index, files)
        figures.index_secs += time.process_time() - begin
        figures.opened = open_and_find(root, plan.keys[int(np.argmax(np.bincount(plan.tensor)))])
    figures.load_plan_secs = _load_plan_secs(index, tensors, ranks)
    return figures


def main() -> None:
    """Measure the case that the arguments name."""
    layout, ranks, tensors = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(asdict(measure_case(layout, ranks, large_transformer(tensors)))))


if __name__ == "__main__":
    main()
