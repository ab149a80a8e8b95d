"""Rank 0's part in an incremental save: what lies unchanged in the previous step, and linking the files that hold it.

    heads of all ranks -always_changing-> of what digests are to be taken
    digests of all ranks -find_unchanged, choose_files-> files worth using -link_files-> what every rank need not write

Once a file is linked nothing depends on the previous step any more. What cannot be linked is written, with a warning: a
step that is gone must not cost the next one. See decision 0040. Called by `saving`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.commit.link import Links, link_files, unlink_files
from giantstep.errors import GiantstepError, PeerFailureError
from giantstep.format.index import Index
from giantstep.format.names import save_id_of
from giantstep.format.record import CommitRecord
from giantstep.group.base import Parts
from giantstep.options import SaveOptions
from giantstep.planning.contents import ContentReport, Verdict
from giantstep.planning.index_plan import Reused
from giantstep.planning.previous import (
    CHANGED,
    REUSED,
    Contents,
    Digests,
    FileUse,
    Pairs,
    Unchanged,
    always_changing,
    choose_files,
    common_regions,
    find_unchanged,
    planned_regions,
    states_of,
    stored_regions,
)
from giantstep.planning.save_plan import SavePlan
from giantstep.reading.index_reader import IndexReader
from giantstep.shards.region import Int64s
from giantstep.storage.base import Store
from giantstep.storage.record_file import read_record

_LOG = logging.getLogger("giantstep")


@dataclass(frozen=True, slots=True)
class _Step:
    """The previous step, as far as it is needed here."""

    record: CommitRecord
    index: Index
    keys: list[str]
    object_keys: list[str]

    @property
    def file_bytes(self) -> Int64s:
        return np.array([file.bytes for file in self.record.files], dtype=np.int64)


class Reuse:
    """What one save uses again.

    Args:
        store: where the checkpoint is to be.
        previous: the previous step.
        options: of the save.

    Attributes:
        reused: after `decide`, for the index.
    """

    reused: Reused

    def __init__(self, store: Store, previous: Store, options: SaveOptions) -> None:
        self._store = store
        self._previous = previous
        self._options = options
        self._links = Links()
        self._step: _Step | None = None
        self._pairs: Pairs | None = None
        self._problem = ""

    def look(self, plan: SavePlan, heads: Sequence[Digests]) -> list[NDArray[np.bool_]]:
        """By rank, of which of its chunks digests are to be taken: not of those that change at every step.

        Args:
            plan: of the save.
            heads: by rank, of the chunks that it writes.
        """
        self._step, self._problem = self._open()
        rows = plan.chunks_by_writer()
        if self._step is None:
            return [np.ones(len(found), dtype=bool) for found in rows]
        together = np.zeros((len(plan.tensor), 1), dtype=np.uint64)
        for found, head in zip(rows, heads, strict=True):
            if len(found) != len(head):
                raise PeerFailureError(f"a rank reported {len(head)} heads of {len(found)} chunks")
            together[found] = head
        self._pairs = common_regions(planned_regions(plan), stored_regions(self._step.index, self._step.keys))
        record = self._step.record
        recent = np.array([save_id_of(file.name) == record.save_id for file in record.files], dtype=bool)
        changing = always_changing(together, self._pairs, self._step.index, recent)
        return [~changing[found] for found in rows]

    def decide(self, plan: SavePlan, reports: Sequence[Parts]) -> list[Parts]:
        """Link what can be used again; tell each rank what it need not write.

        Raises:
            OSError: a storage operation failed. No link is left.
        """
        told = [ContentReport.decode(report) for report in reports]
        contents = _together(plan, told)
        try:
            return self._decide(contents, told)
        except BaseException:
            self.give_up()
            raise

    def _decide(self, contents: Contents, told: Sequence[ContentReport]) -> list[Parts]:
        step, problem, pairs = self._step, self._problem, self._pairs
        nothing = np.full(len(contents.plan.tensor), -1), np.full(len(contents.object_keys), -1)
        if step is None or pairs is None:
            states = [np.full(len(rows), CHANGED, dtype=np.uint8) for rows in nothing]
            self.reused = _reused(contents, None, Unchanged(*nothing), states, np.zeros(0, dtype=bool))
            dead = 0
        else:
            unchanged = find_unchanged(contents, pairs, step.index, step.object_keys)
            use = self._use(contents, unchanged, step)
            linked = self._link(step, use)
            states = [
                states_of(unchanged.chunk, step.index.chunk_file, linked),
                states_of(unchanged.object, step.index.object_file, linked),
            ]
            self.reused = _reused(contents, step, unchanged, states, linked)
            dead = int((use.total - use.live)[linked].sum())
            problem = self._links.problem
        if problem:
            _LOG.warning("%s: not all that is unchanged is used again: %s. It is written.", self._store.location, problem)
        reused = int(contents.plan.bytes[states[0] == REUSED].sum() + contents.object_bytes[states[1] == REUSED].sum())
        objects = np.split(states[1], np.cumsum([len(report.object_keys) for report in told])[:-1])
        return [
            Verdict(np.concatenate((states[0][rows], of_objects)), reused, dead, problem).encode()
            for rows, of_objects in zip(contents.plan.chunks_by_writer(), objects, strict=True)
        ]

    def _open(self) -> tuple[_Step | None, str]:
        """The previous step; or None, and why nothing of it can be used again."""
        try:
            record = read_record(self._previous)
            reader = IndexReader(self._previous, record)
            step = _Step(record, reader.load_all(), reader.tensor_keys(), reader.object_keys())
        except (GiantstepError, OSError) as error:
            return None, str(error)
        where = self._previous.location
        if record.block_bytes != self._options.block_bytes:
            blocks = f"{record.block_bytes} bytes, this save of {self._options.block_bytes}"
            return None, f"{where} has blocks of {blocks}"
        if step.index.chunk_digest is None and step.index.object_digest is None:
            return None, f"{where} was saved without digests: give SaveOptions(digests=True) from the first step on"
        return step, ""

    def _use(self, contents: Contents, unchanged: Unchanged, step: _Step) -> FileUse:
        options = self._options
        return choose_files(
            unchanged,
            step.index,
            step.file_bytes,
            contents,
            least_live=options.least_live,
            max_file_bytes=options.max_file_bytes,
        )

    def _link(self, step: _Step, use: FileUse) -> NDArray[np.bool_]:
        """[files] of the previous step, whether they are files of this one now."""
        files = step.record.files
        link_files(self._store, self._previous, [files[row] for row in np.flatnonzero(use.worth).tolist()], self._links)
        return np.array([file.name in self._links.there for file in files], dtype=bool)

    def give_up(self) -> None:
        """Nothing was published, nor will be: delete the links. A failure here is logged."""
        try:
            unlink_files(self._store, self._links)
        except OSError as error:
            _LOG.warning("%s: links of a failed save could not be deleted: %s", self._store.location, error)


def digests_alone(plan: SavePlan, reports: Sequence[Parts]) -> Reused:
    """For the index of a save that has no previous step: digests, as all ranks have reported them."""
    contents = _together(plan, [ContentReport.decode(report) for report in reports])
    return Reused.nothing(contents.chunk_head, contents.chunk_digest, contents.object_digest)


def _together(plan: SavePlan, told: Sequence[ContentReport]) -> Contents:
    head, digest = (np.zeros((len(plan.tensor), words), dtype=np.uint64) for words in (1, 2))
    for rows, report in zip(plan.chunks_by_writer(), told, strict=True):
        report.check(len(rows))
        head[rows], digest[rows] = report.chunk_head, report.chunk_digest
    return Contents(
        plan,
        head,
        digest,
        list(itertools.chain.from_iterable(report.object_keys for report in told)),
        np.concatenate([report.object_bytes for report in told]),
        np.concatenate([report.object_digest for report in told]),
    )


def _reused(
    contents: Contents,
    step: _Step | None,
    unchanged: Unchanged,
    states: Sequence[NDArray[np.uint8]],
    linked: NDArray[np.bool_],
) -> Reused:
    """For the index: the linked files, numbered in the order of the previous step, and what lies in them."""
    found = Reused.nothing(contents.chunk_head, contents.chunk_digest, contents.object_digest)
    if step is None or not linked.any():
        return found
    index, files = step.index, np.flatnonzero(linked)
    number = np.cumsum(linked) - 1
    blocks = np.diff(index.file_block_ends)
    for file, start, rows, state, columns in (
        (found.chunk_file, found.chunk_start, unchanged.chunk, states[0], (index.chunk_file, index.chunk_start)),
        (found.object_file, found.object_start, unchanged.object, states[1], (index.object_file, index.object_start)),
    ):
        held = np.flatnonzero(state == REUSED)
        file[held], start[held] = number[columns[0][rows[held]]], columns[1][rows[held]]
    return Reused(
        tuple(step.record.files[row] for row in files.tolist()),
        blocks[files],
        index.block_checksum[np.repeat(linked, blocks)],
        found.chunk_file,
        found.chunk_start,
        found.chunk_head,
        found.chunk_digest,
        found.object_file,
        found.object_start,
        found.object_digest,
    )
