"""`remove_sharded_tensors`: a checkpoint without some of its tensors, without saving the others again.

commit record, index -plan_removal-> plan -StoredBytes, write-> new data files -publish-> checkpoint -remove_superseded-> space

One process does it alone. `docs/commit-protocol.md`, section 8, says why a crash at any moment leaves the checkpoint
of before or the one without them.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import difflib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.codecs import OBJECT_CODEC
from giantstep.commit.clean import discard_unless_published, remove_superseded
from giantstep.commit.publish import publish
from giantstep.errors import BadArgumentError, CorruptionError, GiantstepError, KeyMismatchError, StoreError, VersionError
from giantstep.format.container import DATA_ALIGNMENT, Entry, header_bytes_bound
from giantstep.format.data_file import file_metadata, plan_data_files
from giantstep.format.names import DATA_DIR, RECORD_NAME, data_file_name, is_data_file, new_save_id
from giantstep.format.record import CommitRecord, FileEntry, decode_record
from giantstep.format.versions import CURRENT, MINOR
from giantstep.options import MIB, SaveOptions, threads_for
from giantstep.planning.removal_plan import NewPlaces, RemovalPlan, entry_of, index_after, plan_removal
from giantstep.reading.checkpoint import Checkpoint
from giantstep.reading.data_files import check_data_files
from giantstep.reading.index_reader import IndexReader
from giantstep.reading.stored_bytes import Spans, StoredBytes
from giantstep.reports import size_text
from giantstep.shards.object_keys import COMMON_KEY, wrapped_tensor
from giantstep.shards.region import Int64s
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, store_at
from giantstep.storage.record_file import read_record_bytes
from giantstep.writing.write import Sources, WrittenFile, write

_LOG = logging.getLogger("giantstep")
_WINDOW_BYTES = 8 * MIB
# Among more keys than this no similar ones are looked for.
_HINTED_KEYS = 20_000


@dataclass(frozen=True, slots=True)
class RemovalReport:
    """A committed removal.

    Attributes:
        location: path or URL.
        save_id: new id of the checkpoint.
        tensors, objects: keys removed.
        freed_bytes: by how much the data files of the checkpoint became smaller.
        deleted: files deleted after the commit.
    """

    location: str
    save_id: str
    tensors: tuple[str, ...]
    objects: tuple[str, ...]
    freed_bytes: int
    deleted: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"removed {len(self.tensors)} tensors and {len(self.objects)} objects from {self.location}, "
            f"freed {size_text(self.freed_bytes)}"
        )


def remove_sharded_tensors(path: StoreLike, prefix: str) -> RemovalReport:
    """Remove from a checkpoint all tensors, and all objects but the common state, whose key begins with `prefix`.

    Not collective: one process calls it, while nobody saves to the path. The checkpoint of before stays loadable until the
    new one is committed; its superfluous files are then deleted. Data files that hold nothing to be removed stay as
    they are; of the others, what is kept is copied, block by block, and verified on the way.

    Args:
        path: a directory, a `file://` or `memory://` URL, or a `Store`.
        prefix: how the keys begin; "" means all.

    Raises:
        BadArgumentError: `prefix` is no str, or `path` none that can be.
        OpenError: there is no committed checkpoint at the path; it lacks files; or it is of a newer version, major or
            minor, than this library can write.
        KeyMismatchError: no key begins with `prefix`.
        CorruptionError: commit record, index, or bytes to be kept are damaged.
        StoreError: a storage operation failed; the message says whether the removal may have taken effect.

    Whatever is raised, but for that last case, the checkpoint is as it was.
    """
    if not isinstance(prefix, str):
        raise BadArgumentError(f"prefix must be a str, not {type(prefix).__name__}")
    removal = _Removal(store_at(path), prefix)
    removal.plan()
    removal.copy_and_commit()
    return removal.report(removal.clean())


class _Removal:
    """One removal in progress."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._save_id = new_save_id(dt.datetime.now(dt.UTC), secrets.token_hex(8))

    # Nothing is written here.

    def plan(self) -> None:
        """Read commit record and index; decide what stays, what goes and what is copied."""
        try:
            self._open()
        except GiantstepError:
            raise
        except OSError as error:
            raise StoreError(f"{self._store.location} cannot be read: {error}. Nothing was removed.") from error
        tensor_stays = np.array([not key.startswith(self._prefix) for key in self._keys], dtype=bool)
        object_stays = np.array([self._object_stays(key) for key in self._object_keys], dtype=bool)
        self._tensors = tuple(key for key, stays in zip(self._keys, tensor_stays, strict=True) if not stays)
        self._objects = tuple(key for key, stays in zip(self._object_keys, object_stays, strict=True) if not stays)
        if not self._tensors and not self._objects:
            raise _no_such_key(self._prefix, self._keys, self._object_keys, self._store.location)
        self._plan: RemovalPlan = plan_removal(self._index, tensor_stays, object_stays, len(self._record.files))

    def _object_stays(self, name: str) -> bool:
        """The description of a wrapper tensor goes with its parts; a wrapper goes whole or not at all."""
        tensor = wrapped_tensor(name)
        if tensor is None or name == COMMON_KEY:
            return name == COMMON_KEY or not name.startswith(self._prefix)
        described = Checkpoint(self._store, self._record, OBJECT_CODEC, unknown="keep").object(name)
        parts = [f"{tensor}.{part}" for part in described.get("parts", ())] if isinstance(described, dict) else []
        held = [part for part in parts if any(key == part or key.startswith(f"{part}.") for key in self._keys)]
        gone = [part for part in held if part.startswith(self._prefix)]
        if gone and len(gone) < len(held):
            raise BadArgumentError(
                f"prefix {self._prefix!r} removes {gone[0]!r}, a part of the wrapper tensor {tensor!r}, and keeps others: "
                f"remove all of it with the prefix {tensor + '.'!r}. Nothing was removed."
            )
        return not gone if held else not name.startswith(self._prefix)

    def _open(self) -> None:
        self._before = read_record_bytes(self._store)
        self._record: CommitRecord = decode_record(self._before, f"{self._store.location}/{RECORD_NAME}")
        if int(self._record.version.split(".")[1]) > MINOR:
            raise VersionError(
                f"{self._store.location} is written in format version {self._record.version}; this library writes {CURRENT} "
                "and would drop what it does not know. Upgrade giantstep to remove from it; nothing was changed."
            )
        reader = IndexReader(self._store, self._record)
        self._index = reader.load_all()
        self._keys, self._object_keys = reader.tensor_keys(), reader.object_keys()

    # From the first file written to the commit point.

    def copy_and_commit(self) -> None:
        """Copy what shares files with what goes; publish. If that fails, what was written is deleted."""
        try:
            self._check_files()
            self._store.prepare(DATA_DIR)
            places = self._copy()
            self._publish(places)
        except BaseException as error:
            # An interrupt, too, must not leave gigabytes behind.
            outcome = self._undo()
            if isinstance(error, OSError) and not isinstance(error, GiantstepError):
                raise StoreError(
                    f"removing {self._prefix!r} from {self._store.location} failed: {type(error).__name__}: {error}. {outcome}"
                ) from error
            raise

    def _check_files(self) -> None:
        """All files that hold something to be kept are there."""
        extents = self._plan.extents
        needed = np.unique(extents.file[extents.stays]).tolist()
        check_data_files(self._store, dataclasses.replace(self._record, files=tuple(self._record.files[n] for n in needed)))

    def _copy(self) -> NewPlaces:
        """Write the copied extents to files of their old ranks; say where all that stays lies then."""
        record, extents, index = self._record, self._plan.extents, self._index
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
        record, extents, index = self._record, self._plan.extents, self._index
        if not is_data_file(data_file_name(self._save_id, rank, 0)):
            raise CorruptionError(f"commit record of {self._store.location}: rank {rank} of a data file is none that can be")
        entries = [entry_of(index, self._keys, self._object_keys, row) for row in extents.row[rows].tolist()]
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
            written = write(self._store, self._save_id, rank, plans, sources, options, threads_for(None, 1))
        return written.files, written.file, written.start

    def _publish(self, places: NewPlaces) -> None:
        self._new_record = publish(
            self._store,
            self._save_id,
            index_after(self._index, self._plan, places),
            self._files,
            world_size=self._record.world_size,
            block_bytes=self._record.block_bytes,
            content_metadata=self._record.content_metadata,
            before=self._before,
        )

    def _undo(self) -> str:
        """Delete what was written, if it is not in force; what became of the removal, in words."""
        try:
            undone = discard_unless_published(self._store, self._save_id)
        except (OSError, GiantstepError) as error:
            _LOG.warning("%s: files of a failed removal could not be deleted: %s", self._store.location, error)
            return "Whether it took effect is not known; open_checkpoint shows it. The next save deletes what it left."
        if undone:
            return "Nothing was removed."
        return "It took effect, but may be undone by a power loss; either way the checkpoint is complete."

    # After the commit point.

    def clean(self) -> list[str]:
        """Delete what the new checkpoint does not need. A failure here is logged: the removal is committed."""
        try:
            return remove_superseded(self._store, self._new_record, self._before)
        except OSError as error:
            _LOG.warning("%s: files of the checkpoint before could not be deleted: %s", self._store.location, error)
            return []

    def report(self, deleted: Sequence[str]) -> RemovalReport:
        """What was removed."""
        freed = sum(entry.bytes for entry in self._record.files) - sum(entry.bytes for entry in self._new_record.files)
        return RemovalReport(self._store.location, self._save_id, self._tensors, self._objects, freed, tuple(deleted))


def _write_options(block_bytes: int, entries: Sequence[Entry], largest_bytes: int) -> SaveOptions:
    """Blocks as before; but for headers, no file is larger than the largest of those that are replaced."""
    # What entries of one file leave behind must fit one file again, and `write` reckons with longer headers than it makes.
    header_bytes = 2 * DATA_ALIGNMENT + sum(header_bytes_bound(entry) for entry in entries)
    return SaveOptions(
        block_bytes=block_bytes,
        buffer_bytes=max(1, _WINDOW_BYTES // block_bytes) * block_bytes,
        max_file_bytes=max(MIB, largest_bytes + header_bytes),
    )


def _no_such_key(prefix: str, keys: Sequence[str], object_keys: Sequence[str], location: str) -> KeyMismatchError:
    stored = [*keys, *(key for key in object_keys if key != COMMON_KEY)]
    hint = ""
    if len(stored) <= _HINTED_KEYS:
        beginnings = {key[: len(prefix)]: key for key in reversed(stored)}
        near = [beginnings[found] for found in difflib.get_close_matches(prefix, beginnings, n=3)]
        hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
    return KeyMismatchError(
        f"no key in {location} begins with {prefix!r}, among {len(keys)} tensors and {len(stored) - len(keys)} objects."
        f"{hint} Nothing was removed."
    )
