"""`publish`: from durable data files to a committed checkpoint. Runs on rank 0 alone."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

from giantstep.errors import IncompleteError, NotACheckpointError, StoreError
from giantstep.format.index import EncodedIndex, Index, encode_index, stored_chunks
from giantstep.format.names import RECORD_NAME, index_file_name
from giantstep.format.record import (
    MAX_RECORD_BYTES,
    CommitRecord,
    FileEntry,
    IndexEntry,
    Json,
    Nodes,
    Totals,
    encode_record,
    looks_like_a_record,
)
from giantstep.format.versions import WITH_DIGESTS, WITH_NODES
from giantstep.storage.base import NotAFileError, Store, read_all


def library_name() -> str:
    """Name and version of this library, as the commit record states it."""
    try:
        return f"giantstep {version('giantstep')}"
    except PackageNotFoundError:
        return "giantstep (not installed)"


def temporary_record_name(save_id: str) -> str:
    """The name under which a commit record is made durable before it is renamed."""
    return f"{RECORD_NAME}.{save_id}.tmp"


def current_record(store: Store) -> bytes | None:
    """The bytes of the commit record that is in force, damaged or not; None if there is none.

    Raises:
        NotACheckpointError: something of that name is there, but no commit record of ours.
    """
    try:
        found = read_all(store, RECORD_NAME, MAX_RECORD_BYTES)
    except FileNotFoundError:
        return None
    except NotAFileError as error:
        raise NotACheckpointError(
            f"{store.location}/{RECORD_NAME} is {error.strerror}: giantstep has not made it, and does not replace it. "
            "Remove it, or save elsewhere."
        ) from error
    if not looks_like_a_record(found):
        raise NotACheckpointError(
            f"{store.location} holds a {RECORD_NAME} that giantstep has not written. It is not replaced: save elsewhere."
        )
    return found


def publish(
    store: Store,
    save_id: str,
    index: Index,
    files: tuple[FileEntry, ...],
    *,
    world_size: int,
    block_bytes: int,
    content_metadata: Json,
    metrics: Mapping[str, float] = MappingProxyType({}),
    before: bytes | None,
) -> CommitRecord:
    """Commit. When it returns, the checkpoint exists and survives a crash; when it raises, see below.

    Args:
        index, files: what is to be in force: files of this save, and after a removal also of earlier ones. All are
            durable already.
        before: what `current_record` returned when the save began.

    Raises:
        IncompleteError: a data file, or the index, is not visible here or has another size. Nothing was published.
        StoreError: another save was committed to this place meanwhile. Nothing was published.
        OSError: a storage operation failed: if it was the last one, the new checkpoint may or may not be
            there after a power loss; either way the one in force is complete.
    """
    _check_place(store, files, before)
    encoded = encode_index(index, save_id, block_bytes)
    put_index(store, save_id, encoded.data)
    record = record_of(
        save_id,
        index,
        encoded,
        files,
        world_size=world_size,
        block_bytes=block_bytes,
        content_metadata=content_metadata,
        metrics=metrics,
    )
    # Again, as late as can be: what happens between this look and the rename is not noticed.
    _check_place(store, files, before)
    _check_index(store, record.index)
    store.publish(RECORD_NAME, encode_record(record), temporary_record_name(save_id))
    return record


def put_index(store: Store, save_id: str, data: bytes) -> None:
    """Write an index, durable when it returns."""
    handle = store.create(index_file_name(save_id), len(data), direct=False)
    try:
        handle.write_at(0, data)
        # Invariant: the index is durable before the record that names it.
        handle.sync()
    finally:
        handle.close()
    store.sync_names("")


def record_of(
    save_id: str,
    index: Index,
    encoded: EncodedIndex,
    files: tuple[FileEntry, ...],
    *,
    world_size: int,
    block_bytes: int,
    content_metadata: Json,
    metrics: Mapping[str, float],
    nodes: Nodes | None = None,
) -> CommitRecord:
    """The commit record of an index."""
    name = index_file_name(save_id)
    record = CommitRecord(
        save_id=save_id,
        library=library_name(),
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        world_size=world_size,
        block_bytes=block_bytes,
        index=IndexEntry(name, len(encoded.data), encoded.head_bytes, encoded.head_digest),
        files=files,
        totals=Totals(
            tensors=len(index.tensor_dtype),
            chunks=len(index.chunk_file),
            objects=len(index.object_file),
            bytes=int(index.chunk_bytes[stored_chunks(index)].sum() + index.object_bytes.sum()),
        ),
        content_metadata=content_metadata,
        version=WITH_DIGESTS if metrics else index.version,
        metrics=metrics,
    )
    return record if nodes is None else replace(record, version=WITH_NODES, nodes=nodes)


def publish_here(store: Store, save_id: str, index: bytes, record: bytes, files: tuple[FileEntry, ...]) -> None:
    """Commit a checkpoint of which this place holds some files: on every host, from the same bytes.

    Args:
        index, record: what is to be in force here.
        files: those of the data files that are to be here.

    Raises: as `publish`. It does not look for other saves: all hosts agree on one.
    """
    _check_files(store, files)
    # The host may have died here before: what it left of the same save is in the way.
    for name in (temporary_record_name(save_id), index_file_name(save_id)):
        store.delete(name)
    put_index(store, save_id, index)
    store.publish(RECORD_NAME, record, temporary_record_name(save_id))


def _check_index(store: Store, index: IndexEntry) -> None:
    """Nobody has taken it for what a crashed save left, and deleted it."""
    try:
        found = store.size(index.name)
    except FileNotFoundError as error:
        raise IncompleteError(
            f"index {index.name} is gone from {store.location}: somebody deleted it while this save was committing. Leave "
            "files of running saves alone, and save again."
        ) from error
    if found != index.bytes:
        raise IncompleteError(f"index {index.name} in {store.location} has {found} bytes, expected {index.bytes}")


def _check_place(store: Store, files: tuple[FileEntry, ...], before: bytes | None) -> None:
    """No other save was committed, and every data file is visible from here: on disks not shared they would be lost."""
    found_record = current_record(store)
    if found_record != before:
        if found_record is None:
            raise StoreError(f"{store.location} lost its {RECORD_NAME} while this save was writing; this one is given up")
        raise StoreError(f"another save was committed to {store.location} while this one was writing; this one is given up")
    _check_files(store, files)


def _check_files(store: Store, files: tuple[FileEntry, ...]) -> None:
    for file in files:
        try:
            found = store.size(file.name)
        except FileNotFoundError as error:
            raise IncompleteError(
                f"data file {file.name}, written by rank {file.rank}, is not visible from rank 0 in {store.location}. "
                "All ranks must save to one shared place."
            ) from error
        if found != file.bytes:
            raise IncompleteError(
                f"data file {file.name}, written by rank {file.rank}, has {found} bytes, expected {file.bytes}"
            )
