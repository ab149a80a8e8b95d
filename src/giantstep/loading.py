"""`load`: the flow from a committed checkpoint into the state of all ranks, one call per stage.

commit record -open-> index -judge-> what fits -plan_load-> reads -fetch-> verified bytes -> tensors
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from giantstep.codecs import OBJECT_CODEC
from giantstep.collection import uncollected
from giantstep.conditions import check_conditions
from giantstep.errors import BadArgumentError, GiantstepError
from giantstep.filling import Filling, compare_sinks, fill_sinks, plan_filling
from giantstep.format.names import RECORD_NAME
from giantstep.format.record import CommitRecord, decode_record
from giantstep.group.base import Group, Parts, consult, consult_parts
from giantstep.group.subgroup import ranks_within
from giantstep.group.torch_group import group_of
from giantstep.kept_index import KeptIndex, keep_index, kept_index
from giantstep.kept_outlines import keep_outline, kept_outlines
from giantstep.mapping.describe import Described, describe
from giantstep.node_load import NodeLoad, check_request, passing_over_damage
from giantstep.older_steps import PASSED_OVER, older_step, reason_of, root_of
from giantstep.options import LoadOptions, OnCorrupt, StrictHandling, Threads, threads_for
from giantstep.phases import Stopwatch, same_call, settings, with_call
from giantstep.planned_load import LoadPlanner, Subject
from giantstep.planning.exchange_part import ExchangePart
from giantstep.planning.matching import KeyDifferences, Requests, Strictness, judge
from giantstep.reading.arrange import Cell
from giantstep.reading.checkpoint import Checkpoint, Preface
from giantstep.reading.data_files import check_data_files
from giantstep.reading.exchange import Exchanged, Manner, exchange, telling, verify_part
from giantstep.reading.fetch import Source, fetch
from giantstep.reading.index_reader import IndexReader
from giantstep.reports import LoadedState, LoadReport
from giantstep.requesting import match
from giantstep.restoring import restore
from giantstep.steps import step_name
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, store_at
from giantstep.storage.record_file import read_record_bytes
from giantstep.stored_state import StoredState
from giantstep.stored_view import StoredView
from giantstep.tiers.node_store import NodeStore
from giantstep.unwrapping import Moved, fill_dequantised, read_objects, verify_parts

_LOG = logging.getLogger("giantstep")


def load(
    state_dict: dict[Any, Any],
    path: StoreLike,
    *,
    strict: StrictHandling = StrictHandling.RAISE_ALL,
    process_group: Any = None,
    options: LoadOptions | None = None,
    on_corrupt: OnCorrupt = "raise",
) -> LoadedState:
    """Load a checkpoint into the state of all ranks, whatever ranks and layout saved it.

    Collective: every rank of the group calls it with the same path, strictness and options.

    Args:
        state_dict: what is wanted, as for `save`. Tensors that have memory are filled in place; others
            (`ShardedTensor` without data, meta tensors) get memory on their device or the CPU, tied ones together.
            Factories are merged, and objects with `load_state_dict` are given their part, at the end. The dict itself
            is not changed.
        path: a directory, a `file://` or `memory://` URL, or a `Store`.
        strict: which differences of keys are errors; see `StrictHandling` and `LoadOptions.strict_overrides`.
        process_group: ranks that load together; default: the default group, or one process alone.
        options: see `LoadOptions`.
        on_corrupt: what to do if the checkpoint is damaged or not all there: `raise`; or, of a step such as
            `runs/7b/step_00000100`, `fallback` to the newest older step beside it that loads, on all ranks alike. The
            report's `passed_over` says which were not loaded and why.

    Returns:
        The stored common state, whole, with the loaded tensors and objects in the places that `state_dict` gives them
        (the local tensor in place of a `ShardedTensor`, the value in place of a `ShardedObject`, the local value in
        place of a `LocalNonpersistentObject`); its `report` says what was loaded.

    Raises (the same on all ranks):
        OpenError: there is no committed checkpoint at the path, or it is of a newer major version.
        MismatchError: keys, shapes or dtypes do not fit. No tensor was changed.
        CorruptionError: stored bytes are damaged. With `verify="before"` no tensor was changed; otherwise
            some may be: the state must not be used.
        BadArgumentError, DisagreementError: a leaf cannot be described, or the ranks' calls differ. No tensor
            was changed.
        StoreError, PeerError: reading failed, or a rank did; the state must not be used.
    """
    # Thousands of objects are made, and gone when the load is through.
    with uncollected():
        if isinstance(path, NodeStore):
            settings = options if isinstance(options, LoadOptions) else LoadOptions()
            return passing_over_damage(
                group_of(process_group),
                path,
                settings.timeout_secs,
                lambda damaged: _load(_Load(state_dict, path, strict, process_group, options, on_corrupt, damaged)),
            )
        if on_corrupt == "fallback":
            return _load_or_older(state_dict, path, strict, process_group, options)
        return _load(_Load(state_dict, path, strict, process_group, options, on_corrupt))


def _load_or_older(
    state_dict: dict[Any, Any], path: StoreLike, strict: StrictHandling, process_group: Any, options: LoadOptions | None
) -> LoadedState:
    settings = options if isinstance(options, LoadOptions) else LoadOptions()
    if isinstance(strict, StrictHandling) and not strict.raises_unexpected:
        # A step that need not fill everything must not come after one that has filled some of it before it was seen to be bad.
        settings = replace(settings, verify="before")
        options = settings if isinstance(options, LoadOptions | None) else options
    place = path
    passed: dict[int, str] = {}
    first: GiantstepError | None = None
    while True:
        try:
            state = _load(_Load(state_dict, place, strict, process_group, options, "fallback"))
        except PASSED_OVER as error:
            first = first or error
            root, step = root_of(place)
            passed[step] = reason_of(step, error)
            older = older_step(group_of(process_group), root, max(passed), passed, settings.timeout_secs)
            if older is None:
                first.add_note(f"No older step of {root.location} loads. Passed over: {'; '.join(passed.values())}")
                raise first from None
            place = root.folder(step_name(older))
            continue
        state.report = replace(state.report, passed_over=tuple(passed.values()))
        if passed:
            _LOG.warning("%s is loaded instead of %s: %s", state.report.location, path, "; ".join(passed.values()))
        return state


def _load(run: _Load) -> LoadedState:
    with run.watch.phase("open"):
        run.open()
    with run.watch.phase("match"):
        run.match()
    with run.watch.phase("read"):
        run.read()
    with run.watch.phase("restore"):
        return run.restore()


class _Load:
    """One load in progress on one rank."""

    def __init__(
        self,
        state_dict: dict[Any, Any],
        path: StoreLike,
        strict: StrictHandling,
        process_group: Any,
        options: LoadOptions | None,
        on_corrupt: OnCorrupt,
        damaged: Collection[str] = (),
    ) -> None:
        self.watch = Stopwatch()
        self._state_dict = state_dict
        self._path = path
        self._on_corrupt = on_corrupt
        self._strict = strict
        self._asked = options
        self._options = options if isinstance(options, LoadOptions) else LoadOptions()
        if isinstance(path, NodeStore):
            # Which files lie where differs from load to load.
            self._options = replace(self._options, plan_cache=None)
        self._damaged = damaged
        self._nodes: NodeLoad | None = None
        self._process_group = process_group
        self._group: Group = group_of(process_group)
        self._planner = LoadPlanner(self._group, self._options)
        self._moved = Exchanged(0)
        self._dequantised = Moved(0, 0)

    # Open: rank 0 reads the commit record, so that all ranks load the same save; and unless every rank is to read for
    # itself, the index and the common state.

    def open(self) -> None:
        """Describe what is wanted; agree on the commit record, and hear what is read once for all ranks."""
        if isinstance(self._path, NodeStore):
            self._nodes = NodeLoad(self._group, self._path, self._options.timeout_secs, self._damaged)
        data, *preface = consult_parts(
            self._group, "describe", self._options.timeout_secs, self._describe, self._decide_record, "open"
        )
        self._record: CommitRecord = decode_record(data, f"{self._store.location}/{RECORD_NAME}")
        self._preface = Preface(*preface) if preface else None

    def _describe(self) -> Parts:
        if not isinstance(self._strict, StrictHandling):
            raise BadArgumentError(f"strict must be a StrictHandling, not {self._strict!r}")
        if not isinstance(self._asked, LoadOptions | None):
            raise BadArgumentError(f"options must be LoadOptions, not {type(self._asked).__name__}")
        if self._on_corrupt not in get_args(OnCorrupt):
            raise BadArgumentError(f"on_corrupt={self._on_corrupt!r} cannot be: expected one of {get_args(OnCorrupt)}")
        if self._on_corrupt == "fallback":
            # Raises where there is nothing to fall back to.
            root_of(self._path)
        asked, group = self._options.exchange, self._group
        named = asked in ("auto", "none")
        self._cell: Cell = asked if named else ranks_within(asked, self._process_group, group.rank, group.size, "exchange")
        self._store: Store = store_at(self._path)
        if self._nodes is not None:
            check_request(self._cell, self._on_corrupt)
        # Who keeps plans loads again; others are spared the making of an outline.
        known = None if self._options.plan_cache is None else kept_outlines(group)
        self._described: Described = describe(self._state_dict, for_load=True, known=known)
        keep_outline(group, self._described.outline)
        call = {
            "call": "load",
            "path": self._store.location,
            "strict": self._strict.value,
            "on_corrupt": self._on_corrupt,
            "options": {**settings(self._options), "exchange": self._cell if isinstance(self._cell, str) else "a group"},
        }
        cache = self._options.plan_cache
        self._kept: KeptIndex | None = None if cache is None else kept_index(cache, self._store)
        return with_call(call, b"" if self._kept is None else self._kept.digest.encode("ascii"))

    def _decide_record(self, reports: Sequence[Parts]) -> list[Parts]:
        kept = {digest for (digest,) in same_call(reports)}
        data = read_record_bytes(self._store)
        record = decode_record(data, f"{self._store.location}/{RECORD_NAME}")
        if self._cell == "none" or len(reports) == 1 or kept == {record.index.head_digest.encode("ascii")}:
            return [(data,)] * len(reports)
        checkpoint = Checkpoint(self._store, record, OBJECT_CODEC)
        common = checkpoint.preface().common
        return [(data, checkpoint.index_tables().image(), common)] * len(reports)

    # Match: every rank compares its request with the index; rank 0 judges for all.

    def match(self) -> None:
        """Raise on all ranks unless request and checkpoint fit. No tensor has been touched yet."""
        if self._nodes is not None:
            self._nodes.before_match(self._described, lambda: IndexReader(self._store, self._record).load_all())
        answer = consult(self._group, "match", self._options.timeout_secs, self._match, self._judge)
        self._differences = KeyDifferences.decode(answer)

    def _match(self) -> bytes:
        kept = self._kept
        if kept is not None and kept.digest != self._record.index.head_digest:
            kept = None
        preface = self._preface if kept is None else kept.preface
        unknown = self._options.unknown_types
        self._checkpoint = Checkpoint(self._store, self._record, OBJECT_CODEC, unknown=unknown, preface=preface)
        # The checkpoint has taken over what it needs of it.
        self._preface = None
        self._stored = StoredState(self._checkpoint) if kept is None else kept.stored.of(self._checkpoint)
        if kept is None and self._options.plan_cache is not None:
            keep_index(self._options.plan_cache, self._stored)
        self._common = self._checkpoint.common
        view = self._view = StoredView(self._stored, self._options)
        if self._described.asks:
            self._described = describe(self._state_dict, for_load=True, stored=view)
        check_conditions(self._described, self._stored, self._options)
        self._matched = match(self._described, self._stored, self._common, self._options)
        view.note_settled(self._matched.requests)
        return self._matched.requests.encode()

    def _judge(self, reports: Sequence[bytes]) -> list[bytes]:
        # Many ranks request the same, and to be requested twice is no more than once.
        requests = [Requests.decode(report) for report in dict.fromkeys(reports)]
        strict = Strictness(self._strict, self._options.strict_overrides)
        verdict = judge(requests, self._stored.holdings(), strict)
        if self._nodes is None:
            check_data_files(self._store, self._record)
        if verdict.warning:
            _LOG.warning("%s", verdict.warning)
        return [verdict.differences.encode()] * len(reports)

    # Read: plan, fetch or exchange, verify, fill.

    def read(self) -> None:
        """Fill this rank's tensors; agree that all ranks have."""
        patience = self._options.timeout_secs
        access = None
        if self._nodes is not None:
            self._nodes.fetch(self._cell, self._matched, self._planner, self._filled)
            access = self._nodes.access
        self._planner.agree(self._prepare, self._cell, access)
        if self._options.verify == "before":
            consult(self._group, "verify", patience, self._verify)
        consult(self._group, "read", patience, self._fill)

    def _filled(self) -> tuple[Filling, Subject]:
        self._filling = plan_filling(self._matched, self._stored)
        return self._filling, Subject(self._record, self._stored, self._filling.filled)

    def _prepare(self) -> Subject:
        # Objects are decoded before the first tensor is touched.
        self._objects = read_objects(self._matched.objects, self._checkpoint)
        if self._nodes is None:
            self._filling = plan_filling(self._matched, self._stored)
        return Subject(self._record, self._stored, self._filling.filled)

    def _verify(self) -> bytes:
        source, threads, plan = self._source(verify=True), self._threads(), self._planner.plan
        if isinstance(plan.work, ExchangePart):
            verify_part(source, plan.work, threads.device)
        else:
            fetch(source, plan.work, None, threads)
        fetch(source, self._planner.plan_of(self._filling.compared), None, threads)
        for wrapped in self._matched.dequantised:
            verify_parts(wrapped, self._checkpoint)
        return b""

    def _fill(self) -> bytes:
        source = self._source(verify=self._options.verify == "reading")
        threads, plan = self._threads(), self._planner.plan
        filled, compared = self._filling.filled, self._filling.compared
        if isinstance(plan.work, ExchangePart):
            with telling(self._group, "read"):
                sinks = [*map(fill_sinks(filled, self._stored).__getitem__, range(len(filled)))]
                how = Manner(threads.device, "read", self._options.timeout_secs)
                self._moved = exchange(source, plan.work, sinks, self._group, how)
        else:
            self._moved = Exchanged(fetch(source, plan.work, fill_sinks(filled, self._stored), threads).bytes_read)
        if len(compared):
            fetch(source, self._planner.plan_of(compared), compare_sinks(compared, self._stored), threads)
        for wrapped in self._matched.dequantised:
            self._dequantised += fill_dequantised(wrapped, self._checkpoint)
        return b""

    def _threads(self) -> Threads:
        return threads_for(self._options.reader_threads, self._group.size)

    def _source(self, *, verify: bool) -> Source:
        chunks = self._planner.chunks

        def key_of(chunk: int) -> str:
            return self._stored.keys[int(np.searchsorted(chunks.ends, chunk, side="right")) - 1]

        def checksums(file: int, first: int, last: int) -> Any:
            base = int(self._stored.index.file_block_ends[file])
            return self._stored.index.block_checksum[base + first : base + last]

        return Source(
            self._store, self._record, checksums if verify else None, chunks, key_of, direct=self._planner.plan.direct
        )

    # After all ranks are done.

    def restore(self) -> LoadedState:
        """The loaded state, once all ranks have given their Stateful objects theirs."""
        consult(self._group, "restore", self._options.timeout_secs, self._restore)
        return LoadedState(self._tree, self._report())

    def _restore(self) -> bytes:
        self._tree = restore(self._described, self._objects, self._common, self._matched.absent)
        return b""

    def _report(self) -> LoadReport:
        matched = self._matched
        dequantised = {wrapped.leaf.key for wrapped in matched.dequantised}
        # Leaves that are not renamed have one key where they have one row; and what is dequantised has no row.
        renamed = self._options.rename is not None
        filled = {leaf.key for leaf in matched.leaves} - dequantised if renamed else set(matched.rows)
        return LoadReport(
            location=self._store.location,
            save_id=self._record.save_id,
            tensors=len(filled) + len(dequantised),
            objects=len({source.leaf.source.unique_key for source in matched.objects}),
            missing=self._differences.missing,
            unexpected=self._differences.unexpected,
            cast=tuple(sorted(matched.cast)),
            dequantised=tuple(sorted(dequantised)),
            skipped=tuple(sorted({*matched.skipped, *self._view.left})),
            dropped=tuple(sorted(matched.dropped)),
            bytes_filled=int(self._filling.filled.bytes.sum()) + self._dequantised.filled,
            bytes_read=self._moved.bytes_read + self._dequantised.read,
            exchange=self._planner.plan.kind,
            plan_reused=self._planner.reused,
            bytes_sent=self._moved.bytes_sent,
            bytes_received=self._moved.bytes_received,
            seconds=self.watch.seconds,
            bytes_fetched=0 if self._nodes is None else self._nodes.bytes_fetched,
            notes=() if self._nodes is None else self._nodes.notes,
        )
