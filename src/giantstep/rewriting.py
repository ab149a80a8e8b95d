"""`Rewrite`: another checkpoint out of a stored one, most of whose bytes stay where they are or are copied without decoding.

    commit record, index -(caller)-> plan -StoredBytes, write-> new data files -publish-> checkpoint -remove_superseded-> space

One process does it alone. `docs/commit-protocol.md`, section 8, says why a crash at any moment leaves the checkpoint
of before or the new one. Called by `removal` and `materializing`, which make the plans.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
import secrets
from collections.abc import Sequence

import numpy as np

from giantstep.commit.clean import discard_unless_published, remove_superseded
from giantstep.commit.publish import current_record, publish
from giantstep.errors import BadArgumentError, CorruptionError, GiantstepError, StoreError, VersionError
from giantstep.format.container import DATA_ALIGNMENT, Entry, header_bytes_bound
from giantstep.format.data_file import file_metadata, plan_data_files
from giantstep.format.index import Index
from giantstep.format.names import DATA_DIR, RECORD_NAME, data_file_name, is_data_file, new_save_id
from giantstep.format.record import CommitRecord, FileEntry, decode_record
from giantstep.format.versions import CURRENT, MINOR
from giantstep.options import MIB, SaveOptions, threads_for
from giantstep.planning.removal_plan import NewPlaces, RemovalPlan, entry_of, index_after
from giantstep.reading.data_files import check_data_files
from giantstep.reading.index_reader import IndexReader
from giantstep.reading.stored_bytes import Spans, StoredBytes
from giantstep.shards.region import Int64s
from giantstep.storage.base import Store
from giantstep.storage.record_file import read_record_bytes
from giantstep.writing.write import Sources, WrittenFile, write

_LOG = logging.getLogger("giantstep")
_WINDOW_BYTES = 8 * MIB


class Rewrite:
    """One rewriting in progress. Its methods are called in the order in which they stand here.

    Args:
        store: where the checkpoint is.
        target: where the new one is to be: the same place, or one without a checkpoint.
        task, verb, undone: for errors: what is being done, how one does it to a checkpoint, and what came of it if nothing did.

    Attributes:
        record, index, keys, object_keys: of the checkpoint before; after `open`.
    """

    record: CommitRecord
    index: Index
    keys: list[str]
    object_keys: list[str]

    def __init__(self, store: Store, target: Store, *, task: str, verb: str, undone: str) -> None:
        self._store = store
        self._target = target
        self._in_place = store.location == target.location
        self._task, self._verb, self._undone = task, verb, undone
        self._save_id = new_save_id(dt.datetime.now(dt.UTC), secrets.token_hex(8))

    # Nothing is written here.

    def open(self) -> None:
        """Read commit record and index.

        Raises:
            OpenError, CorruptionError: there is no intact checkpoint.
            BadArgumentError: there is one already where the new one is to be.
            OSError: reading failed.
        """
        before = read_record_bytes(self._store)
        self.record = decode_record(before, f"{self._store.location}/{RECORD_NAME}")
        if int(self.record.version.split(".")[1]) > MINOR:
            raise VersionError(
                f"{self._store.location} is written in format version {self.record.version}; this library writes {CURRENT} "
                f"and would drop what it does not know. Upgrade giantstep to {self._verb} it; nothing was changed."
            )
        reader = IndexReader(self._store, self.record)
        self.index = reader.load_all()
        self.keys, self.object_keys = reader.tensor_keys(), reader.object_keys()
        self._before = before if self._in_place else current_record(self._target)
        if self._before is not None and not self._in_place:
            raise BadArgumentError(f"{self._target.location} holds a checkpoint already. Give a place without one.")

    # From the first file written to the commit point.

    def copy_and_commit(self, plan: RemovalPlan) -> CommitRecord:
        """Copy what the plan says; publish. If that fails, what was written is deleted.

        Raises:
            CorruptionError, IncompleteError: bytes to be kept are damaged, or a file is missing.
            StoreError: a storage operation failed; the message says whether it may have taken effect.
        """
        self._plan = plan
        try:
            self._check_files()
            self._target.prepare(DATA_DIR)
            places = self._copy()
            return self._publish(places)
        except BaseException as error:
            # An interrupt, too, must not leave gigabytes behind.
            outcome = self._undo()
            if isinstance(error, OSError) and not isinstance(error, GiantstepError):
                raise StoreError(f"{self._task} failed: {type(error).__name__}: {error}. {outcome}") from error
            raise

    def _check_files(self) -> None:
        """All files that hold something to be kept are there."""
        extents = self._plan.extents
        needed = np.unique(extents.file[extents.stays]).tolist()
        check_data_files(self._store, dataclasses.replace(self.record, files=tuple(self.record.files[n] for n in needed)))

    def _copy(self) -> NewPlaces:
        """Write the copied extents to files of their old ranks; say where all that stays lies then."""
        record, extents, index = self.record, self._plan.extents, self.index
        staying = np.flatnonzero(self._plan.file_stays)
        files = [record.files[number] for number in staying.tolist()]
        number_of = np.full(len(record.files), -1, dtype=np.int64)
        number_of[staying] = np.arange(len(staying))
        file, start = number_of[extents.file], extents.start.copy()
        of_block = np.repeat(self._plan.file_stays, np.diff(index.file_block_ends))
        blocks, checksums = np.diff(index.file_block_ends)[staying].tolist(), [index.block_checksum[of_block]]
        ranks = np.array([entry.rank for entry in record.files], dtype=np.int64)[extents.file[self._plan.copied]]
        for rank in np.unique(ranks).tolist():
            rows = self._plan.copied[ranks == rank]
            copied, file_of_row, start[rows] = self._copy_rank(rank, rows)
            file[rows] = file_of_row + len(files)
            files += [FileEntry(found.name, found.bytes, rank) for found in copied]
            blocks += [len(found.checksums) for found in copied]
            checksums += [found.checksums for found in copied]
        self._files = tuple(files)
        return NewPlaces(file, start, np.array(blocks, dtype=np.int64), np.concatenate(checksums))

    def _copy_rank(self, rank: int, rows: Int64s) -> tuple[list[WrittenFile], Int64s, Int64s]:
        """Copy extents that one rank wrote: the new files, and per extent its row among them and its first byte."""
        record, extents, index = self.record, self._plan.extents, self.index
        if not is_data_file(data_file_name(self._save_id, rank, 0)):
            raise CorruptionError(f"commit record of {self._store.location}: rank {rank} of a data file is none that can be")
        entries = [entry_of(index, self.keys, self.object_keys, row) for row in extents.row[rows].tolist()]
        spans = Spans(extents.file[rows], extents.start[rows], extents.bytes[rows])

        def checksums_of(file: int, first: int, last: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
            base = int(index.file_block_ends[file])
            return index.block_checksum[base + first : base + last]

        with StoredBytes(
            self._store, record, checksums_of, spans, lambda span: repr(entries[span][0].name), _WINDOW_BYTES
        ) as stored:
            sizes = np.array([entry.bytes for entry, _ in entries], dtype=np.int64)
            largest = max(record.files[number].bytes for number in np.unique(spans.file).tolist())
            options = _write_options(record.block_bytes, [entry for entry, _ in entries], largest)
            alignments = [alignment for _, alignment in entries]
            metadata = file_metadata(self._save_id, rank)
            plans = plan_data_files([entry for entry, _ in entries], alignments, options.max_file_bytes, metadata)
            sources = Sources(sizes, np.zeros_like(sizes), None, stored.pieces)
            written = write(self._target, self._save_id, rank, plans, sources, options, threads_for(None, 1))
        return written.files, written.file, written.start

    def _publish(self, places: NewPlaces) -> CommitRecord:
        self._new_record = publish(
            self._target,
            self._save_id,
            index_after(self.index, self._plan, places),
            self._files,
            world_size=self.record.world_size,
            block_bytes=self.record.block_bytes,
            content_metadata=self.record.content_metadata,
            metrics=self.record.metrics,
            before=self._before,
        )
        return self._new_record

    def _undo(self) -> str:
        """Delete what was written, if it is not in force; what became of it all, in words."""
        try:
            undone = discard_unless_published(self._target, self._save_id)
        except (OSError, GiantstepError) as error:
            _LOG.warning("%s: files of what failed could not be deleted: %s", self._target.location, error)
            return "Whether it took effect is not known; open_checkpoint shows it. The next save deletes what it left."
        if undone:
            return self._undone
        return "It took effect, but may be undone by a power loss; either way the checkpoint is complete."

    # After the commit point.

    def clean(self) -> list[str]:
        """Delete what the new checkpoint does not need. A failure here is logged: the new one is committed."""
        try:
            return remove_superseded(self._target, self._new_record, self._before)
        except OSError as error:
            _LOG.warning("%s: files of the checkpoint before could not be deleted: %s", self._target.location, error)
            return []


def _write_options(block_bytes: int, entries: Sequence[Entry], largest_bytes: int) -> SaveOptions:
    """Blocks as before; but for headers, no file is larger than the largest of those that are replaced."""
    # What entries of one file leave behind must fit one file again, and `write` reckons with longer headers than it makes.
    header_bytes = 2 * DATA_ALIGNMENT + sum(header_bytes_bound(entry) for entry in entries)
    return SaveOptions(
        block_bytes=block_bytes,
        buffer_bytes=max(1, _WINDOW_BYTES // block_bytes) * block_bytes,
        max_file_bytes=max(MIB, largest_bytes + header_bytes),
    )
