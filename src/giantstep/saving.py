"""`save`: the flow from a state dict to a committed checkpoint, one call per stage.

state -describe-> leaves -plan_save-> part -host_pieces-> bytes -write-> data files -publish-> checkpoint

Incremental saves go through one more stage before they write: `compare` finds what lies unchanged in the previous step.
"""

from __future__ import annotations

import copy
import datetime as dt
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.collection import uncollected
from giantstep.commit.clean import discard, remove_superseded
from giantstep.commit.publish import current_record, publish
from giantstep.errors import BadArgumentError, GiantstepError, PeerError
from giantstep.format.data_file import ChunkLayout, DataFilePlan, file_metadata
from giantstep.format.names import DATA_DIR, new_save_id
from giantstep.format.record import CommitRecord, Json, check_content_metadata
from giantstep.group.base import Group, Parts, consult, consult_parts
from giantstep.group.torch_group import group_of
from giantstep.kept_outlines import keep_outline, kept_outlines
from giantstep.mapping.describe import NOTHING, Described, describe
from giantstep.options import SaveOptions, Threads, threads_for
from giantstep.phases import Stopwatch, settings
from giantstep.planned_save import Place, SavePlanner, Subject
from giantstep.planning.columns import pack_column, unpack_column
from giantstep.planning.contents import ContentReport, Verdict
from giantstep.planning.index_plan import WriteReport, build_index
from giantstep.planning.previous import CHANGED, SETTLED
from giantstep.reports import SaveReport
from giantstep.reusing import Reuse
from giantstep.sources import PartSources, encoded, write_report
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, store_at
from giantstep.writing.contents import digests_of, heads_of
from giantstep.writing.write import Sources, write

_LOG = logging.getLogger("giantstep")


def save(
    state_dict: dict[Any, Any],
    path: StoreLike,
    *,
    process_group: Any = None,
    options: SaveOptions | None = None,
    content_metadata: Json = None,
) -> SaveReport:
    """Save the state of all ranks as one checkpoint; return when it is committed and durable.

    Collective: every rank of the group calls it with the same path and options.

    Args:
        state_dict: nested dicts and lists. Leaves may be `ShardedTensor`, `ShardedTensorFactory`, `DTensor`, plain
            tensors (the same on all ranks that have the key; tied ones are stored once), tensors of registered wrapper
            classes, `ShardedObject`, `LocalNonpersistentObject` (left out), objects with
            `state_dict`/`load_state_dict`, and plain values (common state, the same on all ranks). Only read; must not
            change during the call.
        path: where the checkpoint is to be: a directory, a `file://` or `memory://` URL, or a `Store`. An
            earlier checkpoint there stays loadable until the new one is committed, and is then deleted.
        process_group: ranks that save together; default: the default group, or one process alone.
        options: see `SaveOptions`.
        content_metadata: a JSON value of the user's, kept in the commit record; rank 0's is stored.

    Raises (the same on all ranks):
        BadArgumentError, UnsupportedTypeError: something cannot be saved; nothing was written.
        CoverageError, DisagreementError: the ranks' shards do not fit together; nothing was written.
        StoreError: a storage operation failed. An earlier checkpoint at the path is untouched.
        PeerError: a rank died or did not report in time. Likewise.
    """
    group = group_of(process_group)
    run = Save(state_dict, path, process_group, options, content_metadata)

    def describe() -> Subject:
        run.describe(group)
        return run.subject()

    # Thousands of objects are made, and gone when the save is through.
    with uncollected():
        with run.watch.phase("plan"):
            run.plan(group, describe)
        run.compare()
        with run.watch.phase("write"):
            run.write_and_commit()
        with run.watch.phase("clean"):
            removed = run.clean()
        return run.report(removed)


@dataclass(slots=True)
class _RootState:
    """What only rank 0 knows: the commit record before, and the one that it published."""

    before: bytes | None = None
    record: CommitRecord | None = None
    reuse: Reuse | None = None


@dataclass(frozen=True, slots=True)
class _Content:
    """What a rank is to write, by its part of the plan, and digests of the heads of its chunks."""

    chosen: PartSources
    layout: ChunkLayout
    sources: Sources
    heads: NDArray[np.uint64]


class Save:
    """One save in progress on one rank. Its methods are called in the order in which they stand here.

    Attributes:
        watch: time per phase.
        options: what the caller gave, or the defaults.
        described: the state taken apart; `async_save` puts copies in the place of its tensors.
        objects: the encoded objects that this rank may write.
    """

    described: Described
    objects: Mapping[str, bytes]

    def __init__(
        self, state_dict: dict[Any, Any], path: StoreLike, process_group: Any, options: SaveOptions | None, metadata: Json
    ) -> None:
        self.watch = Stopwatch()
        self._state_dict = state_dict
        self._path = path
        self._process_group = process_group
        self._asked = options
        self.options = options if isinstance(options, SaveOptions) else SaveOptions()
        self._metadata = metadata
        self._root = _RootState()
        self._written_bytes = 0
        self._content: _Content | None = None
        self._verdict: Verdict | None = None
        self._totals = (0, 0, 0)

    # Stage 1: describe.

    def describe(self, group: Group) -> None:
        """Take this rank's state apart, and encode its objects."""
        if not isinstance(self._asked, SaveOptions | None):
            raise BadArgumentError(f"options must be SaveOptions, not {type(self._asked).__name__}")
        self._store: Store = store_at(self._path)
        self._previous = None if self.options.previous is None else store_at(self.options.previous)
        check_content_metadata(self._metadata)
        self._metadata = copy.deepcopy(self._metadata)
        self._place = Place.of(group.rank, group.size, self._process_group, self.options)
        self.described = describe(self._state_dict, for_load=False, known=kept_outlines(group))
        keep_outline(group, self.described.outline)
        self.objects = encoded(self.described.stored)
        # They are the caller's; a save in the background must not keep them alive.
        self._state_dict, self._process_group = {}, None

    @property
    def location(self) -> str:
        """Where the checkpoint is to be."""
        return self._store.location

    def call(self, name: str) -> dict[str, Any]:
        """What must be equal on all ranks."""
        previous = None if self._previous is None else self._previous.location
        return {"call": name, "path": self.location, "previous": previous, "options": settings(self.options)}

    def subject(self, name: str = "save") -> Subject:
        """What is to be planned; `name` is that of the call that all ranks must make."""
        return Subject(self.described, self.call(name), {name: len(data) for name, data in self.objects.items()}, self._place)

    # Stage 2: plan.

    def plan(self, group: Group, describe: Callable[[], Subject]) -> None:
        """Learn what to write. Nothing is written."""
        self._group = group
        self._planner = SavePlanner(group, self.options)
        self._save_id = self._planner.agree(describe, self._prepare).decode("ascii")

    def _prepare(self) -> bytes:
        self._store.prepare(DATA_DIR)
        self._root.before = current_record(self._store)
        return new_save_id(dt.datetime.now(dt.UTC), secrets.token_hex(8)).encode("ascii")

    # Incremental saves only: compare.

    def compare(self, check: Callable[[], None] = lambda: None, *, spared: int = 0) -> None:
        """Take digests of what is to be written, and find what the previous step holds of it. Only links are made.

        Args:
            check, spared: as of `write_and_commit`.
        """
        if not self.options.keeps_digests:
            return

        def digest(rows: NDArray[np.bool_] | None) -> Parts:
            check()
            content = self._content = self._content or self._contents()
            objects = list(content.chosen.objects)
            chunks = len(content.sources.bytes) - len(objects)
            wanted = np.ones(len(content.sources.bytes), dtype=bool)
            if rows is not None:
                wanted[:chunks] = rows
            threads = threads_for(self.options.writer_threads, self._group.size, spared=spared).memory
            digests = digests_of(content.sources, np.flatnonzero(wanted), threads, check)
            sizes = content.sources.bytes[chunks:]
            return ContentReport(content.heads[:chunks], digests[:chunks], objects, sizes, digests[chunks:]).encode()

        def decide(reports: Sequence[Parts]) -> list[Parts]:
            return self._reuse().decide(self._planner.planned(), reports)

        with self.watch.phase("compare"):
            rows = None if self._previous is None else self._look(check)
            try:
                answer = consult_parts(self._group, "compare", self.options.timeout_secs, lambda: digest(rows), decide, "link")
            except BaseException:
                # Nothing of this save was published, and nothing will be.
                self._unlink()
                raise
            self._verdict = Verdict.decode(answer)

    def _look(self, check: Callable[[], None]) -> NDArray[np.bool_]:
        """Of which chunks of this rank digests are to be taken: not of those that change at every step."""

        def heads() -> bytes:
            check()
            content = self._content = self._contents()
            chunks = len(content.sources.bytes) - len(content.chosen.objects)
            return pack_column(content.heads[:chunks])

        def decide(reports: Sequence[bytes]) -> list[bytes]:
            found = [unpack_column(report, np.uint64).reshape(-1, 1) for report in reports]
            return [pack_column(wanted) for wanted in self._reuse().look(self._planner.planned(), found)]

        answer = consult(self._group, "compare", self.options.timeout_secs, heads, decide, "compare")
        return unpack_column(answer).astype(bool)

    def _reuse(self) -> Reuse:
        if self._root.reuse is None:
            self._root.reuse = Reuse(self._store, self._previous, self.options)
        return self._root.reuse

    def _contents(self) -> _Content:
        # Thousands of tensors, thousands of small objects: but only until the bytes begin to flow.
        with uncollected():
            chosen = PartSources(self._planner.part, self._planner.description, self.described, self.objects)
            layout = self._planner.layout_of(chosen.layout)
            sources = chosen.sources(layout, self.options.buffer_bytes)
            none = np.zeros((len(sources.bytes), 1), dtype=np.uint64)
            return _Content(chosen, layout, sources, heads_of(sources) if self.options.keeps_digests else none)

    # Stages 3 to 5: stage, write, commit.

    def write_and_commit(self, check: Callable[[], None] = lambda: None, *, spared: int = 0) -> None:
        """Write this rank's part; rank 0 commits once all have.

        Args:
            check: raises if the checkpoint must not be committed.
            spared: processor cores of each rank that have something else to do.
        """

        def write() -> Parts:
            check()
            report = self._write(threads_for(self.options.writer_threads, self._group.size, spared=spared), check)
            check()
            return report

        try:
            (answer,) = consult_parts(self._group, "write", self.options.timeout_secs, write, self._decide_commit, "commit")
        except GiantstepError as error:
            # Only an agreement on a failed write proves that rank 0 has not published.
            if error.agreed and error.phase == "write" and not isinstance(error, PeerError):
                self._discard()
                self._unlink()
            raise
        tensors, objects, total = (int(part) for part in answer.split())
        self._totals = (tensors, objects, total)

    def _write(self, threads: Threads, check: Callable[[], None]) -> Parts:
        content, self._content = self._content or self._contents(), None
        sources = content.sources
        plans = self._file_plans(content)
        self._store.prepare(DATA_DIR)
        written = write(self._store, self._save_id, self._group.rank, plans, sources, self.options, threads, check)
        self._written_bytes = sum(int(sources.bytes[plan.order].sum()) for plan in plans)
        return write_report(written, sources, list(content.chosen.objects)).encode()

    def _file_plans(self, content: _Content) -> list[DataFilePlan]:
        metadata = file_metadata(self._save_id, self._group.rank)
        state = None if self._verdict is None else self._verdict.state
        if state is None or (state == CHANGED).all():
            with uncollected():
                return content.chosen.plans(content.layout, self.options.max_file_bytes, metadata)
        # What has settled is in files of its own, which the next save can use again.
        groups = [np.flatnonzero(state == SETTLED), np.flatnonzero(state == CHANGED)]
        return content.chosen.plans_of(groups, self.options.max_file_bytes, metadata)

    def _decide_commit(self, reports: Sequence[Parts]) -> list[Parts]:
        reuse = self._root.reuse
        told = [WriteReport.decode(report) for report in reports]
        index, files = build_index(self._planner.planned(), told, None if reuse is None else reuse.reused)
        record: CommitRecord = publish(
            self._store,
            self._save_id,
            index,
            files,
            world_size=self._group.size,
            block_bytes=self.options.block_bytes,
            content_metadata=self._metadata,
            before=self._root.before,
        )
        self._root.record = record
        totals = record.totals
        return [(f"{totals.tensors} {totals.objects} {totals.bytes}".encode("ascii"),)] * len(reports)

    # After the commit point.

    def clean(self) -> list[str]:
        """Rank 0 deletes what the commit made superfluous. A failure here is logged: the checkpoint exists."""
        if self._root.record is None:
            return []
        try:
            return remove_superseded(self._store, self._root.record, self._root.before)
        except OSError as error:
            _LOG.warning("%s: files of superseded saves could not be deleted: %s", self._store.location, error)
            return []

    def _discard(self) -> None:
        try:
            discard(self._store, self._save_id, self._group.rank)
        except OSError as error:
            _LOG.warning("%s: files of a failed save could not be deleted: %s", self._store.location, error)

    def _unlink(self) -> None:
        if self._root.reuse is not None:
            self._root.reuse.give_up()

    def forget(self) -> None:
        """Let go of the state."""
        self.described, self.objects, self._state_dict, self._content = NOTHING, {}, {}, None
        # There is none if the save came to nothing before.
        planner: SavePlanner | None = getattr(self, "_planner", None)
        if planner is not None:
            planner.forget()

    def report(self, removed: list[str]) -> SaveReport:
        """The report of this rank."""
        tensors, objects, total = self._totals
        verdict = self._verdict
        return SaveReport(
            location=self._store.location,
            save_id=self._save_id,
            tensors=tensors,
            objects=objects,
            bytes=total,
            bytes_written=self._written_bytes,
            seconds=self.watch.seconds,
            removed=tuple(removed),
            plan_reused=self._planner.reused,
            bytes_reused=0 if verdict is None else verdict.bytes_reused,
            bytes_dead=0 if verdict is None else verdict.bytes_dead,
            not_reused="" if verdict is None else verdict.problem,
        )
