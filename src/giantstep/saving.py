"""`save`: the flow from a state dict to a committed checkpoint, one call per stage.

state -describe-> leaves -plan_save-> part -host_pieces-> bytes -write-> data files -publish-> checkpoint
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
from giantstep.errors import BadArgumentError, GiantstepError, PeerError, StoreError
from giantstep.format.data_file import file_metadata
from giantstep.format.names import DATA_DIR, new_save_id
from giantstep.format.record import CommitRecord, Json, check_content_metadata
from giantstep.group.base import Group, Parts, consult_parts
from giantstep.group.torch_group import group_of
from giantstep.kept_outlines import keep_outline, kept_outlines
from giantstep.mapping.describe import NOTHING, Described, describe
from giantstep.options import SaveOptions, Threads, threads_for
from giantstep.phases import Stopwatch, settings
from giantstep.planned_save import Place, SavePlanner, Subject
from giantstep.planning.index_plan import WriteReport, build_index
from giantstep.planning.save_plan import SavePlan
from giantstep.reports import SaveReport, size_text
from giantstep.sources import PartSources, encoded, write_report
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, store_at
from giantstep.writing.write import write

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
        self._totals = (0, 0, 0)

    # Stage 1: describe.

    def describe(self, group: Group) -> None:
        """Take this rank's state apart, and encode its objects."""
        if not isinstance(self._asked, SaveOptions | None):
            raise BadArgumentError(f"options must be SaveOptions, not {type(self._asked).__name__}")
        self._store: Store = store_at(self._path)
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

    def subject(self, name: str = "save") -> Subject:
        """What is to be planned; `name` is that of the call that all ranks must make."""
        call = {"call": name, "path": self._store.location, "options": settings(self.options)}
        return Subject(self.described, call, {name: len(data) for name, data in self.objects.items()}, self._place)

    # Stage 2: plan.

    def plan(self, group: Group, describe: Callable[[], Subject]) -> None:
        """Learn what to write. Nothing is written."""
        self._group = group
        self._planner = SavePlanner(group, self.options)
        self._save_id = self._planner.agree(describe, self._prepare).decode("ascii")

    def _prepare(self, plan: SavePlan) -> bytes:
        self._check_free_space(plan.total_bytes())
        self._store.prepare(DATA_DIR)
        self._root.before = current_record(self._store)
        return new_save_id(dt.datetime.now(dt.UTC), secrets.token_hex(8)).encode("ascii")

    def _check_free_space(self, needed: int) -> None:
        """What does not fit is better told now than when most of it is written."""
        free = self._store.free_bytes()
        if free is not None and free < needed:
            raise StoreError(
                f"{self._store.location} has too little space: this save needs {needed} bytes ({size_text(needed)}) and a little "
                f"more for headers and index, and {free} bytes ({size_text(free)}) are free. Nothing was written. Delete what is "
                "not needed there, or save elsewhere. A checkpoint at the path stays until the new one is complete."
            )

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
            raise
        tensors, objects, total = (int(part) for part in answer.split())
        self._totals = (tensors, objects, total)

    def _write(self, threads: Threads, check: Callable[[], None]) -> Parts:
        # Thousands of tensors, thousands of small objects: but only until the bytes begin to flow.
        with uncollected():
            part = self._planner.part
            chosen = PartSources(part, self._planner.description, self.described, self.objects)
            layout = self._planner.layout_of(chosen.layout)
            plans = chosen.plans(layout, self.options.max_file_bytes, file_metadata(self._save_id, self._group.rank))
            sources = chosen.sources(layout, self.options.buffer_bytes)
        self._store.prepare(DATA_DIR)
        written = write(self._store, self._save_id, self._group.rank, plans, sources, self.options, threads, check)
        self._written_bytes = int(sources.bytes.sum())
        return write_report(written, sources, list(chosen.objects)).encode()

    def _decide_commit(self, reports: Sequence[Parts]) -> list[Parts]:
        index, files = build_index(self._planner.planned(), [WriteReport.decode(report) for report in reports])
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

    def forget(self) -> None:
        """Let go of the state."""
        self.described, self.objects, self._state_dict = NOTHING, {}, {}
        # There is none if the save came to nothing before.
        planner: SavePlanner | None = getattr(self, "_planner", None)
        if planner is not None:
            planner.forget()

    def report(self, removed: list[str]) -> SaveReport:
        """The report of this rank."""
        tensors, objects, total = self._totals
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
        )
