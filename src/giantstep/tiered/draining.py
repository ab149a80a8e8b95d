"""`drain`: a step from the hosts' own places to one that all share. No rank's state is needed, and no bytes are sent.

Every rank copies the files that it has written, checked against the index as they are read; rank 0 commits. Called by `tiers`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from giantstep.commit.clean import discard, remove_superseded
from giantstep.commit.publish import current_record, publish
from giantstep.errors import BadArgumentError, CorruptionError, GiantstepError, PeerError, StoreError
from giantstep.format.digests import block_checksums
from giantstep.format.index import Index
from giantstep.format.names import DATA_DIR
from giantstep.format.record import CommitRecord, FileEntry, decode_record
from giantstep.group.base import Group, Parts, consult_parts
from giantstep.reading.index_reader import IndexReader
from giantstep.reports import size_text
from giantstep.storage.base import Store, reading
from giantstep.storage.buffers import device_buffer
from giantstep.storage.record_file import read_record_bytes
from giantstep.tiers.file_numbers import parity_of_file
from giantstep.tiers.node_store import NodeStore

_LOG = logging.getLogger("giantstep")
_STEP_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Drained:
    """What one rank did.

    Attributes:
        location: where the step is now.
        save_id: of it.
        bytes_written: by this rank.
    """

    location: str
    save_id: str
    bytes_written: int


def drain(
    group: Group, source: NodeStore, target: Store, timeout_secs: float, check: Callable[[], None] = lambda: None
) -> Drained:
    """Collective. Copy a step; return when it is committed and durable at the target.

    A checkpoint that is there is replaced: after the run has gone back, it is of a course that was left. It stays loadable
    until the new one is committed.

    Args:
        group: the ranks that saved it.
        source: the step's place on this rank's host.
        target: where it is to be; the same for all ranks.
        timeout_secs: how long a rank may keep the others waiting.
        check: called now and then; raises if it is not to be gone on with.

    Raises (the same on all ranks):
        BadArgumentError: the step was saved by other ranks.
        NotACheckpointError, VersionError: what is at the target is somebody else's.
        CorruptionError: a file is not what was written. Nothing was committed.
        StoreError: a storage operation failed. Likewise.
    """
    return _Drain(group, source, target, timeout_secs, check).run()


class _Drain:
    def __init__(self, group: Group, source: NodeStore, target: Store, timeout_secs: float, check: Callable[[], None]) -> None:
        self._group, self._source, self._target = group, source, target
        self._secs, self._check = timeout_secs, check
        self._written = 0
        self._before: bytes | None = None

    def run(self) -> Drained:
        there = consult_parts(self._group, "drain", self._secs, self._open, self._prepare)
        if there:
            return Drained(self._target.location, self._record.save_id, 0)
        try:
            consult_parts(self._group, "drain", self._secs, self._copy, self._commit, "commit")
        except GiantstepError as error:
            if error.agreed and error.phase == "drain" and not isinstance(error, PeerError):
                self._discard()
            raise
        return Drained(self._target.location, self._record.save_id, self._written)

    def _open(self) -> Parts:
        self._record: CommitRecord = decode_record(read_record_bytes(self._source), self._source.location)
        self._index: Index = IndexReader(self._source, self._record).load_all()
        return (self._record.save_id.encode("ascii"),)

    def _prepare(self, reports: Sequence[Parts]) -> list[Parts]:
        record = self._record
        if record.world_size != len(reports) or len(set(reports)) > 1:
            raise BadArgumentError(
                f"{self._source.location} was saved by {record.world_size} ranks; these {len(reports)} hold "
                f"{len(set(reports))} different saves of it: only the ranks of one save can drain it"
            )
        self._before = current_record(self._target)
        if self._before is not None and self._is_this(self._before):
            return [(b"there",)] * len(reports)
        self._target.prepare(DATA_DIR)
        # What a try before has left.
        self._target.delete(record.index.name)
        free, needed = self._target.free_bytes(), sum(file.bytes for file in self._files())
        if free is not None and free < needed:
            raise StoreError(
                f"{self._target.location} has {size_text(free)} of free space, and the step needs {size_text(needed)}"
            )
        return [()] * len(reports)

    def _is_this(self, found: bytes) -> bool:
        try:
            return decode_record(found, self._target.location).save_id == self._record.save_id
        except CorruptionError:
            # Nobody can load it.
            return False

    def _files(self) -> list[FileEntry]:
        return [file for file in self._record.files if parity_of_file(file.name) is None]

    def _copy(self) -> Parts:
        self._target.prepare(DATA_DIR)
        ends = self._index.file_block_ends.tolist()
        for row, file in enumerate(self._record.files):
            if file.rank == self._group.rank and parity_of_file(file.name) is None:
                self._copy_file(file, self._index.block_checksum[ends[row] : ends[row + 1]])
        self._target.sync_names(DATA_DIR)
        self._check()
        return ()

    def _copy_file(self, file: FileEntry, checksums: np.ndarray) -> None:
        size = self._record.block_bytes
        step = max(1, _STEP_BYTES // size) * size
        buffer = device_buffer(min(step, file.bytes))
        # What an earlier try has left is not what was written now.
        self._target.delete(file.name)
        with (
            reading(self._source, file.name) as handle,
            closing(self._target.create(file.name, file.bytes, direct=True)) as out,
        ):
            for start in range(0, file.bytes, step):
                self._check()
                data = buffer[: min(step, file.bytes - start)].data
                handle.read_into(start, data)
                first, found = start // size, block_checksums(data, size)
                if not np.array_equal(found, checksums[first : first + len(found)]):
                    raise CorruptionError(
                        f"{file.name} in {self._source.location} on host {self._source.standing.host} is not what was written "
                        f"(bytes {start} to {start + len(data)}): it is not copied to {self._target.location}"
                    )
                out.write_at(start, data)
            out.sync()
        self._written += file.bytes

    def _commit(self, reports: Sequence[Parts]) -> list[Parts]:
        files, record, index = tuple(self._files()), self._record, self._index
        ends = index.file_block_ends[: len(files) + 1]
        # Parity is behind all other files.
        index = replace(index, file_block_ends=ends, block_checksum=index.block_checksum[: int(ends[-1])])
        committed = publish(
            self._target,
            record.save_id,
            index,
            files,
            world_size=record.world_size,
            block_bytes=record.block_bytes,
            content_metadata=record.content_metadata,
            metrics=record.metrics,
            before=self._before,
        )
        try:
            remove_superseded(self._target, committed, self._before)
        except OSError as error:
            _LOG.warning("%s: files of a replaced step could not be deleted: %s", self._target.location, error)
        return [()] * len(reports)

    def _discard(self) -> None:
        try:
            discard(self._target, self._record.save_id, self._group.rank)
        except (OSError, AttributeError) as error:
            _LOG.warning("%s: files of a failed drain could not be deleted: %s", self._target.location, error)
