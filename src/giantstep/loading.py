"""`load`: the flow from a committed checkpoint into the state of all ranks, one call per stage.

commit record -open-> index -judge-> what fits -plan_load-> reads -fetch-> verified bytes -> tensors
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import BadArgumentError
from giantstep.filling import Wanted, compare_sinks, fill_sinks, plan_filling
from giantstep.format.names import RECORD_NAME
from giantstep.format.record import CommitRecord, decode_record
from giantstep.group.base import Group, Parts, consult, consult_parts
from giantstep.group.subgroup import ranks_within
from giantstep.group.torch_group import group_of
from giantstep.mapping.describe import Described, describe
from giantstep.options import LoadOptions, StrictHandling
from giantstep.phases import Stopwatch, same_call, settings, with_call
from giantstep.planning.exchange_part import ExchangePart, pack_regions
from giantstep.planning.load_plan import LoadPlan, plan_load
from giantstep.planning.load_tables import tabulate_chunks, tabulate_wanted
from giantstep.planning.matching import KeyDifferences, Requests, Strictness, judge
from giantstep.reading.arrange import Arrangement, Cell, Limits
from giantstep.reading.checkpoint import Checkpoint, Preface
from giantstep.reading.data_files import check_data_files
from giantstep.reading.exchange import Exchanged, Manner, exchange, telling, verify_part
from giantstep.reading.fetch import Source, fetch
from giantstep.reports import LoadedState, LoadReport
from giantstep.requesting import StoredState, match
from giantstep.restoring import restore
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, store_at
from giantstep.storage.record_file import read_record_bytes
from giantstep.unwrapping import Moved, fill_dequantised, read_objects, verify_parts

_LOG = logging.getLogger("giantstep")


def load(
    state_dict: dict[Any, Any],
    path: StoreLike,
    *,
    strict: StrictHandling = StrictHandling.RAISE_ALL,
    process_group: Any = None,
    options: LoadOptions | None = None,
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
    run = _Load(state_dict, path, strict, process_group, options)
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
    ) -> None:
        self.watch = Stopwatch()
        self._state_dict = state_dict
        self._path = path
        self._strict = strict
        self._asked = options
        self._options = options if isinstance(options, LoadOptions) else LoadOptions()
        self._process_group = process_group
        self._group: Group = group_of(process_group)
        self._moved = Exchanged(0)
        self._dequantised = Moved(0, 0)

    # Open: rank 0 reads the commit record, so that all ranks load the same save; and unless every rank is to read for
    # itself, the index and the common state.

    def open(self) -> None:
        """Describe what is wanted; agree on the commit record, and hear what is read once for all ranks."""
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
        asked, group = self._options.exchange, self._group
        named = asked in ("auto", "none")
        self._cell: Cell = asked if named else ranks_within(asked, self._process_group, group.rank, group.size, "exchange")
        self._store: Store = store_at(self._path)
        self._described: Described = describe(self._state_dict, for_load=True)
        call = {
            "call": "load",
            "path": self._store.location,
            "strict": self._strict.value,
            "options": {**settings(self._options), "exchange": self._cell if isinstance(self._cell, str) else "a group"},
        }
        return with_call(call)

    def _decide_record(self, reports: Sequence[Parts]) -> list[Parts]:
        same_call(reports)
        data = read_record_bytes(self._store)
        record = decode_record(data, f"{self._store.location}/{RECORD_NAME}")
        if self._cell == "none" or len(reports) == 1:
            return [(data,)] * len(reports)
        preface = Checkpoint(self._store, record, OBJECT_CODEC).preface()
        return [(data, preface.index, preface.common)] * len(reports)

    # Match: every rank compares its request with the index; rank 0 judges for all.

    def match(self) -> None:
        """Raise on all ranks unless request and checkpoint fit. No tensor has been touched yet."""
        answer = consult(self._group, "match", self._options.timeout_secs, self._match, self._judge)
        self._differences = KeyDifferences.decode(answer)

    def _match(self) -> bytes:
        unknown = self._options.unknown_types
        self._checkpoint = Checkpoint(self._store, self._record, OBJECT_CODEC, unknown=unknown, preface=self._preface)
        # The checkpoint has taken over what it needs of it.
        self._preface = None
        self._stored = StoredState(self._checkpoint)
        self._common = self._checkpoint.common
        self._matched = match(self._described, self._stored, self._common, self._options)
        return self._matched.requests.encode()

    def _judge(self, reports: Sequence[bytes]) -> list[bytes]:
        # Many ranks request the same, and to be requested twice is no more than once.
        requests = [Requests.decode(report) for report in dict.fromkeys(reports)]
        strict = Strictness(self._strict, self._options.strict_overrides)
        verdict = judge(requests, self._stored.holdings(), strict)
        check_data_files(self._store, self._record)
        if verdict.warning:
            _LOG.warning("%s", verdict.warning)
        return [verdict.differences.encode()] * len(reports)

    # Read: plan, fetch or exchange, verify, fill.

    def read(self) -> None:
        """Fill this rank's tensors; agree that all ranks have."""
        patience = self._options.timeout_secs
        answer = consult_parts(self._group, "plan", patience, self._plan, self._decide_reading)
        self._arrangement.adopt(answer)
        if self._arrangement.exchanges:
            self._clients = consult_parts(
                self._group, "plan", patience, lambda: pack_regions(self._reads.wanted), self._arrangement.decide_clients
            )
        if self._options.verify == "before":
            consult(self._group, "verify", patience, self._verify)
        consult(self._group, "read", patience, self._fill)

    def _plan(self) -> Parts:
        # Objects are decoded before the first tensor is touched.
        self._objects = read_objects(self._matched.objects, self._checkpoint)
        self._filling = plan_filling(self._matched, self._stored)
        self._chunks = tabulate_chunks(self._stored.index)
        self._reads = self._plan_reads(self._filling.filled)
        limits = Limits(self._options.exchange_bytes, self._options.buffer_bytes)
        self._arrangement = Arrangement(self._record, self._stored.index, self._chunks, self._cell, limits)
        return self._arrangement.report(self._reads)

    def _decide_reading(self, reports: Sequence[Parts]) -> list[Parts]:
        # The arrangement is made in `_plan`.
        return self._arrangement.decide(reports)

    def _plan_reads(self, wanted: Sequence[Wanted]) -> LoadPlan:
        rows, regions = [item.row for item in wanted], [item.region for item in wanted]
        partial = [item.leaf.allow_shape_mismatch for item in wanted]
        return plan_load(
            self._chunks,
            tabulate_wanted(rows, regions, partial, self._chunks.width),
            block_bytes=self._record.block_bytes,
            buffer_bytes=self._options.buffer_bytes,
        )

    def _verify(self) -> bytes:
        source, threads = self._source(verify=True), self._options.reader_threads
        if self._arrangement.exchanges:
            verify_part(source, self._part(), threads)
        else:
            fetch(source, self._reads, None, threads)
        fetch(source, self._plan_reads(self._filling.compared), None, threads)
        for wrapped in self._matched.dequantised:
            verify_parts(wrapped, self._checkpoint)
        return b""

    def _fill(self) -> bytes:
        source = self._source(verify=self._options.verify == "reading")
        threads = self._options.reader_threads
        filled, compared = self._filling.filled, self._filling.compared
        if self._arrangement.exchanges:
            with telling(self._group, "read"):
                sinks = fill_sinks(filled, self._stored)
                how = Manner(threads, "read", self._options.timeout_secs)
                self._moved = exchange(source, self._part(), sinks, self._group, how)
        else:
            self._moved = Exchanged(fetch(source, self._reads, fill_sinks(filled, self._stored), threads).bytes_read)
        if compared:
            fetch(source, self._plan_reads(compared), compare_sinks(compared, self._stored), threads)
        for wrapped in self._matched.dequantised:
            self._dequantised += fill_dequantised(wrapped, self._checkpoint)
        return b""

    def _part(self) -> ExchangePart:
        return self._arrangement.part(self._group.rank, self._reads, self._clients)

    def _source(self, *, verify: bool) -> Source:
        chunks = self._chunks

        def key_of(chunk: int) -> str:
            return self._stored.keys[int(np.searchsorted(chunks.ends, chunk, side="right")) - 1]

        def checksums(file: int, first: int, last: int) -> Any:
            base = int(self._stored.index.file_block_ends[file])
            return self._stored.index.block_checksum[base + first : base + last]

        return Source(self._store, self._record, checksums if verify else None, chunks, key_of, direct=self._arrangement.direct)

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
        filled = sum(item.view.numel() * item.view.element_size() for item in self._filling.filled)
        return LoadReport(
            location=self._store.location,
            save_id=self._record.save_id,
            tensors=len({leaf.key for leaf, _ in matched.tensors} | {wrapped.leaf.key for wrapped in matched.dequantised}),
            objects=len({source.leaf.source.unique_key for source in matched.objects}),
            missing=self._differences.missing,
            unexpected=self._differences.unexpected,
            cast=tuple(sorted(matched.cast)),
            dequantised=tuple(sorted({wrapped.leaf.key for wrapped in matched.dequantised})),
            skipped=tuple(sorted(matched.skipped)),
            dropped=tuple(sorted(matched.dropped)),
            bytes_filled=filled + self._dequantised.filled,
            bytes_read=self._moved.bytes_read + self._dequantised.read,
            exchange=self._arrangement.kind,
            bytes_sent=self._moved.bytes_sent,
            bytes_received=self._moved.bytes_received,
            seconds=self.watch.seconds,
        )
