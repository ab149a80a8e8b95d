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

from giantstep.collection import uncollected
from giantstep.commit.clean import discard, remove_superseded
from giantstep.commit.publish import current_record, publish
from giantstep.comparison import Comparison
from giantstep.errors import BadArgumentError, GiantstepError, PeerError, StoreError
from giantstep.format.data_file import DataFilePlan, file_metadata
from giantstep.format.names import DATA_DIR, new_save_id
from giantstep.format.record import CommitRecord, Json, check_content_metadata, check_metrics
from giantstep.group.base import Group, Parts, consult_parts
from giantstep.group.torch_group import group_of
from giantstep.keeping import write_with_digests
from giantstep.kept_outlines import keep_outline, kept_outlines
from giantstep.mapping.describe import NOTHING, Described, describe
from giantstep.options import SaveOptions, Threads, threads_for
from giantstep.phases import Stopwatch, settings
from giantstep.planned_save import Place, SavePlanner, Subject
from giantstep.planning.contents import REPORT_PARTS
from giantstep.planning.index_plan import WriteReport, build_index
from giantstep.protected_save import Protected, ProtectedWrite
from giantstep.reports import SaveReport, size_text
from giantstep.reusing import digests_alone
from giantstep.sources import Content, PartSources, encoded, write_report
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, store_at
from giantstep.tiers.node_store import NodeStore
from giantstep.writing.write import write

_LOG = logging.getLogger("giantstep")


def save(
    state_dict: dict[Any, Any],
    path: StoreLike,
    *,
    process_group: Any = None,
    options: SaveOptions | None = None,
    content_metadata: Json = None,
    metrics: Mapping[str, float] | None = None,
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
        metrics: numbers by name, such as losses, kept in the commit record; rank 0's are stored.

    Raises (the same on all ranks):
        BadArgumentError, UnsupportedTypeError: something cannot be saved; nothing was written.
        CoverageError, DisagreementError: the ranks' shards do not fit together; nothing was written.
        StoreError: a storage operation failed. An earlier checkpoint at the path is untouched.
        PeerError: a rank died or did not report in time. Likewise.
    """
    group = group_of(process_group)
    run = Save(state_dict, path, process_group, options, content_metadata, metrics)

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
        self,
        state_dict: dict[Any, Any],
        path: StoreLike,
        process_group: Any,
        options: SaveOptions | None,
        metadata: Json,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        self.watch = Stopwatch()
        self._state_dict = state_dict
        self._path = path
        self._process_group = process_group
        self._asked = options
        self.options = options if isinstance(options, SaveOptions) else SaveOptions()
        self._metadata = metadata
        self._metrics = metrics
        self._root = _RootState()
        self._written_bytes = 0
        self._content: Content | None = None
        self._comparison: Comparison | None = None
        self._protected: Protected | None = None
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
        check_metrics(self._metrics)
        self._metrics = dict(self._metrics or {})
        self._place = Place.of(group.rank, group.size, self._process_group, self.options, self._store)
        if isinstance(self._store, NodeStore) and self.options.keeps_digests:
            raise BadArgumentError("previous and digests are for places that all ranks share: a node-local save has neither")
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
        # Of an incremental save it is not known yet how much is to be written.
        if self.options.check_free_space and self._previous is None and not isinstance(self._store, NodeStore):
            self._check_space(self._planner.planned_bytes())
        return new_save_id(dt.datetime.now(dt.UTC), secrets.token_hex(8)).encode("ascii")

    def _check_space(self, needed: int) -> None:
        free = self._store.free_bytes()
        if free is not None and free < needed:
            raise StoreError(
                f"{self.location} has {size_text(free)} of free space, and the save needs {size_text(needed)} "
                "(an earlier checkpoint stays until the new one is committed). Nothing was written: make room, or save "
                "elsewhere; SaveOptions(check_free_space=False) tries all the same"
            )

    # Incremental saves only: compare.

    def compare(self, check: Callable[[], None] = lambda: None, *, spared: int = 0) -> None:
        """Take digests of what is to be written, and find what the previous step holds of it. Only links are made.

        Args:
            check, spared: as of `write_and_commit`.
        """
        if self._previous is None:
            # Digests that are only kept are taken as the bytes are written.
            return
        threads = threads_for(self.options.writer_threads, self._group.size, spared=spared).memory
        comparison = Comparison(self._group, self._store, self._previous, self.options, self._planner.planned)
        with self.watch.phase("compare"):
            comparison.run(self._contents, threads, check)
        self._comparison = comparison

    def _contents(self) -> Content:
        if self._content is None:
            # Thousands of tensors, thousands of small objects: but only until the bytes begin to flow.
            with uncollected():
                chosen = PartSources(self._planner.part, self._planner.description, self.described, self.objects)
                layout = self._planner.layout_of(chosen.layout)
                self._content = Content(chosen, layout, chosen.sources(layout, self.options.buffer_bytes))
        return self._content

    # Stages 3 to 5: stage, write, commit.

    def write_and_commit(self, check: Callable[[], None] = lambda: None, *, spared: int = 0) -> None:
        """Write this rank's part; rank 0 commits once all have.

        Args:
            check: raises if the checkpoint must not be committed.
            spared: processor cores of each rank that have something else to do.
        """
        if isinstance(self._store, NodeStore):
            self._write_on_hosts(self._store, check, spared)
            return

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
            raise
        tensors, objects, total = (int(part) for part in answer.split())
        self._totals = (tensors, objects, total)

    def _write_on_hosts(self, store: NodeStore, check: Callable[[], None], spared: int) -> None:
        options, metrics = self.options, self._metrics or {}
        threads = threads_for(options.writer_threads, self._group.size, spared=spared)
        run = ProtectedWrite(self._group, store, self._save_id, options, self._planner, self._metadata, metrics)
        done = self._protected = run.run(self._taken_contents, self.described, threads, check)
        self._totals, self._written_bytes = (done.tensors, done.objects, done.bytes), done.bytes_written

    def _taken_contents(self) -> Content:
        content, self._content = self._contents(), None
        return content

    def _write(self, threads: Threads, check: Callable[[], None]) -> Parts:
        content = self._taken_contents()
        sources = content.sources
        plans = self._file_plans(content)
        self._store.prepare(DATA_DIR)
        place = self._store, self._save_id, self._group.rank
        kept: Parts = ()
        if self._keeps_digests_alone:
            written, digests = write_with_digests(*place, plans, content, self.options, threads, check)
            kept = digests.encode()
        else:
            written = write(*place, plans, sources, self.options, threads, check)
        self._written_bytes = sum(int(sources.bytes[plan.order].sum()) for plan in plans)
        return (*write_report(written, sources, list(content.chosen.objects)).encode(), *kept)

    @property
    def _keeps_digests_alone(self) -> bool:
        return self.options.keeps_digests and self._previous is None

    def _file_plans(self, content: Content) -> list[DataFilePlan]:
        metadata = file_metadata(self._save_id, self._group.rank)
        groups = None if self._comparison is None else self._comparison.groups()
        with uncollected():
            if groups is None:
                return content.chosen.plans(content.layout, self.options.max_file_bytes, metadata)
            return content.chosen.plans_of(groups, self.options.max_file_bytes, metadata)

    def _decide_commit(self, reports: Sequence[Parts]) -> list[Parts]:
        reused = None if self._comparison is None else self._comparison.reused
        if self._keeps_digests_alone:
            reused = digests_alone(self._planner.planned(), [report[-REPORT_PARTS:] for report in reports])
            reports = [report[:-REPORT_PARTS] for report in reports]
        told = [WriteReport.decode(report) for report in reports]
        index, files = build_index(self._planner.planned(), told, reused)
        record: CommitRecord = publish(
            self._store,
            self._save_id,
            index,
            files,
            world_size=self._group.size,
            block_bytes=self.options.block_bytes,
            content_metadata=self._metadata,
            metrics=self._metrics or {},
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
        if self._comparison is not None:
            self._comparison.give_up()
        try:
            discard(self._store, self._save_id, self._group.rank)
        except OSError as error:
            _LOG.warning("%s: files of a failed save could not be deleted: %s", self._store.location, error)

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
        verdict = None if self._comparison is None else self._comparison.verdict
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
            bytes_sent=0 if self._protected is None else self._protected.bytes_sent,
            bytes_spared=0 if self._protected is None else self._protected.bytes_spared,
        )
