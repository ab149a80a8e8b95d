"""`load`: the flow from a committed checkpoint into the state of all ranks, one call per stage.

commit record -open-> index -judge-> what fits -plan_load-> reads -fetch-> verified bytes -> tensors
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import BadArgumentError
from giantstep.format.index import Index
from giantstep.format.names import RECORD_NAME
from giantstep.format.record import CommitRecord, decode_record
from giantstep.group.base import Group, consult
from giantstep.group.torch_group import group_of
from giantstep.mapping.describe import Described, TensorLeaf, describe
from giantstep.mapping.tree import DROPPED, map_leaves, merge
from giantstep.options import LoadOptions, StrictHandling
from giantstep.phases import Stopwatch, same_call, with_call
from giantstep.planning.load_plan import plan_load, tabulate_chunks, tabulate_wanted
from giantstep.planning.matching import KeyDifferences, Requests, judge
from giantstep.reading.checkpoint import Checkpoint
from giantstep.reading.data_files import check_data_files
from giantstep.reading.fetch import Fetched, Sink, Source, fetch
from giantstep.reading.tensor_sink import sink_for
from giantstep.reports import LoadedState, LoadReport
from giantstep.shards.dtypes import BY_CODE, DType
from giantstep.shards.region import Region
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, store_at
from giantstep.storage.record_file import read_record_bytes
from giantstep.words import words_of

# Up to this many times the stored bytes, all ranks together, bytes count as read once.
_READ_ONCE = 1.25


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
            (`ShardedTensor` without data, meta tensors) get memory on their device or the CPU. Objects with
            `load_state_dict` are given their part at the end. The dict itself is not changed.
        path: a directory, a `file://` or `memory://` URL, or a `Store`.
        strict: which differences of keys are errors; see `StrictHandling`.
        process_group: ranks that load together; default: the default group, or one process alone.
        options: see `LoadOptions`.

    Returns:
        The stored common state, whole, with the loaded tensors in the places that `state_dict` gives them (the local
        tensor in place of a `ShardedTensor`); its `report` says what was loaded.

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


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A region of a leaf that is to be filled from row `row` of the index."""

    leaf: TensorLeaf
    piece: int
    row: int
    region: Region


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
        self._group: Group = group_of(process_group)
        self._cast: list[str] = []
        self._fetched = Fetched(0)
        self._filled_bytes = 0

    # Open: rank 0 reads the commit record, so that all ranks load the same save.

    def open(self) -> None:
        """Describe what is wanted; agree on the commit record."""
        answer = consult(self._group, "describe", self._options.timeout_secs, self._describe, self._decide_record, "open")
        self._record: CommitRecord = decode_record(answer, f"{self._store.location}/{RECORD_NAME}")

    def _describe(self) -> bytes:
        if not isinstance(self._strict, StrictHandling):
            raise BadArgumentError(f"strict must be a StrictHandling, not {self._strict!r}")
        if not isinstance(self._asked, LoadOptions | None):
            raise BadArgumentError(f"options must be LoadOptions, not {type(self._asked).__name__}")
        self._store: Store = store_at(self._path)
        self._described: Described = describe(self._state_dict, for_load=True)
        call = {"call": "load", "path": self._store.location, "strict": self._strict.value, "options": asdict(self._options)}
        return with_call(call, b"")

    def _decide_record(self, reports: Sequence[bytes]) -> list[bytes]:
        same_call(reports)
        data = read_record_bytes(self._store)
        decode_record(data, f"{self._store.location}/{RECORD_NAME}")
        return [data] * len(reports)

    # Match: every rank compares its request with the index; rank 0 judges for all.

    def match(self) -> None:
        """Raise on all ranks unless request and checkpoint fit. No tensor has been touched yet."""
        answer = consult(self._group, "match", self._options.timeout_secs, self._compare, self._judge)
        self._differences = KeyDifferences.decode(answer)

    def _compare(self) -> bytes:
        self._checkpoint = Checkpoint(self._store, self._record, OBJECT_CODEC)
        self._index: Index = self._checkpoint.index_tables().load_all()
        self._keys = self._checkpoint.keys()
        self._row = {key: row for row, key in enumerate(self._keys)}
        requests = Requests()
        for leaf in self._described.leaves:
            row = self._row.get(leaf.key)
            if row is None:
                requests.unexpected.append(leaf.key)
            else:
                requests.rows.append(row)
                self._compare_leaf(leaf, row, requests)
        return requests.encode()

    def _compare_leaf(self, leaf: TensorLeaf, row: int, requests: Requests) -> None:
        shape, dtype = self._shape(row), BY_CODE[int(self._index.tensor_dtype[row])]
        if leaf.global_shape != shape and not (leaf.allow_shape_mismatch and len(shape) == len(leaf.global_shape)):
            requests.shapes.append((leaf.key, str(shape), str(leaf.global_shape)))
        if leaf.dtype != dtype:
            if _may_cast(dtype, leaf.dtype, self._options.cast):
                self._cast.append(f"{leaf.key}: {dtype.torch_name} -> {leaf.dtype.torch_name}")
            else:
                requests.dtypes.append((leaf.key, dtype.torch_name, leaf.dtype.torch_name))

    def _shape(self, row: int) -> tuple[int, ...]:
        start, stop = self._index.tensor_dims_ends[row : row + 2]
        return tuple(self._index.tensor_dims[start:stop].tolist())

    def _judge(self, reports: Sequence[bytes]) -> list[bytes]:
        requests = [Requests.decode(report) for report in reports]
        differences = judge(requests, self._keys, self._strict, self._store.location)
        check_data_files(self._store, self._record)
        return [differences.encode()] * len(reports)

    # Read: plan, fetch, verify, fill.

    def read(self) -> None:
        """Fill this rank's tensors; agree that all ranks have."""
        answer = consult(self._group, "plan", self._options.timeout_secs, self._plan, self._decide_direct)
        self._direct = answer == b"direct"
        if self._options.verify == "before":
            consult(self._group, "verify", self._options.timeout_secs, self._verify)
        consult(self._group, "read", self._options.timeout_secs, self._fill)

    def _plan(self) -> bytes:
        self._common = self._checkpoint.common
        self._wanted = self._find_wanted()
        self._chunks = tabulate_chunks(self._index)
        rows, regions = [item.row for item in self._wanted], [item.region for item in self._wanted]
        partial = [item.leaf.allow_shape_mismatch for item in self._wanted]
        self._reads = plan_load(
            self._chunks,
            tabulate_wanted(rows, regions, partial, self._chunks.width),
            block_bytes=self._record.block_bytes,
            buffer_bytes=self._options.buffer_bytes,
        )
        return str(sum(read.stop - read.start for read in self._reads)).encode("ascii")

    def _decide_direct(self, reports: Sequence[bytes]) -> list[bytes]:
        # Ranks that read the same bytes get them from the page cache after the first of them; reading past it would
        # fetch them from the device again and again.
        total, stored = sum(int(report) for report in reports), sum(file.bytes for file in self._record.files)
        return [b"direct" if total <= _READ_ONCE * stored else b"cached"] * len(reports)

    def _verify(self) -> bytes:
        fetch(self._source(verify=True), self._reads, None, self._options.reader_threads)
        return b""

    def _fill(self) -> bytes:
        source = self._source(verify=self._options.verify == "reading")
        self._fetched = fetch(source, self._reads, self._sinks(), self._options.reader_threads)
        return b""

    def _find_wanted(self) -> list[_Wanted]:
        """Non-empty regions of leaves that the checkpoint has."""
        found = []
        for leaf in self._described.leaves:
            row = self._row.get(leaf.key)
            if row is None:
                continue
            for piece, (region, _) in enumerate(leaf.pieces):
                if region.elements:
                    found.append(_Wanted(leaf, piece, row, region))
        return found

    def _source(self, *, verify: bool) -> Source:
        chunks = self._chunks

        def key_of(chunk: int) -> str:
            return self._keys[int(np.searchsorted(chunks.ends, chunk, side="right")) - 1]

        def checksums(file: int, first: int, last: int) -> Any:
            base = int(self._index.file_block_ends[file])
            return self._index.block_checksum[base + first : base + last]

        return Source(self._store, self._record, checksums if verify else None, chunks, key_of, direct=self._direct)

    def _sinks(self) -> list[Sink]:
        sinks = []
        for item in self._wanted:
            item.leaf.allocate()
            view = item.leaf.pieces[item.piece][1]
            if view is None:
                raise BadArgumentError(f"tensor {item.leaf.key!r} has no memory")
            if item.leaf.allow_shape_mismatch:
                words_of(view).zero_()
            self._filled_bytes += view.numel() * view.element_size()
            stored = BY_CODE[int(self._index.tensor_dtype[item.row])]
            sinks.append(sink_for(view, stored, item.region.offset))
        return sinks

    # After all ranks are done.

    def restore(self) -> LoadedState:
        """The loaded state, once all ranks have given their Stateful objects theirs."""
        consult(self._group, "restore", self._options.timeout_secs, self._give_to_statefuls)
        return LoadedState(self._tree, self._report())

    def _give_to_statefuls(self) -> bytes:
        for leaf in self._described.leaves:
            if leaf.key in self._row:
                leaf.allocate()
        results = {leaf.path: leaf.result for leaf in self._described.leaves}
        tree = merge(map_leaves(self._described.tree, lambda path, _: results.get(path, DROPPED)), self._common)
        tree = {} if tree is DROPPED else tree
        for path, stateful in self._described.statefuls:
            tree = _with_stateful(tree, path, stateful)
        self._tree = tree
        return b""

    def _report(self) -> LoadReport:
        return LoadReport(
            location=self._store.location,
            save_id=self._record.save_id,
            tensors=len({leaf.key for leaf in self._described.leaves if leaf.key in self._row}),
            missing=self._differences.missing,
            unexpected=self._differences.unexpected,
            cast=tuple(sorted(set(self._cast))),
            bytes_filled=self._filled_bytes,
            bytes_read=self._fetched.bytes_read,
            seconds=self.watch.seconds,
        )


def _with_stateful(tree: Any, path: Sequence[Any], stateful: Any) -> Any:
    """Load an object from its place in the tree, and put the object there."""
    if not path:
        _load_into(stateful, tree)
        return stateful
    step, rest = path[0], path[1:]
    if isinstance(tree, dict):
        tree[step] = _with_stateful(tree.get(step, {}), rest, stateful)
        return tree
    if type(tree) in (list, tuple) and isinstance(step, int):
        items = list(tree) + [{}] * (step + 1 - len(tree))
        items[step] = _with_stateful(items[step], rest, stateful)
        return type(tree)(items)
    return _with_stateful({}, path, stateful)


def _load_into(stateful: Any, state: Any) -> None:
    if isinstance(stateful, torch.nn.Module):
        held = itertools.chain(stateful.parameters(), stateful.buffers())
        # A module without memory cannot copy into its parameters; it takes the loaded tensors as its own.
        stateful.load_state_dict(state, assign=any(tensor.is_meta for tensor in held))
    else:
        stateful.load_state_dict(state)


def _may_cast(stored: DType, wanted: DType, cast: str) -> bool:
    kinds = [getattr(torch, dtype.torch_name) for dtype in (stored, wanted)]
    if "F4X2" in (stored.name, wanted.name) or cast == "never":
        return False
    if cast == "floating":
        return all(kind.is_floating_point for kind in kinds)
    return not (kinds[0].is_complex and not kinds[1].is_complex)
