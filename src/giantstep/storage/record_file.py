"""Reading the commit record of a store, with an error for everything that may be found instead."""

from __future__ import annotations

import errno

from giantstep.errors import CheckpointNotFoundError, CorruptionError, IncompleteError, NotACheckpointError
from giantstep.format.names import DATA_DIR, RECORD_NAME, save_id_of
from giantstep.format.record import MAX_RECORD_BYTES, CommitRecord, decode_record
from giantstep.storage.base import NotAFileError, Store, read_all, reading

# More than a digest and what surrounds it.
_SEAL_BYTES = 128


def files_of_ours(store: Store) -> list[str]:
    """Names of all files in a store that a save may have made, and of foreign ones beside them."""
    return [name for folder in ("", DATA_DIR) for name in store.names(folder)]


def read_record_bytes(store: Store) -> bytes:
    """The bytes of the commit record.

    Raises:
        CheckpointNotFoundError, NotACheckpointError, IncompleteError: there is no record; says what there is.
        CorruptionError: what bears its name is no file, or larger than any record.
        OSError: reading failed.
    """
    try:
        return read_all(store, RECORD_NAME, MAX_RECORD_BYTES)
    except NotADirectoryError as error:
        raise NotACheckpointError(
            f"{store.location} is a file; a checkpoint is a directory that holds {RECORD_NAME}"
        ) from error
    except FileNotFoundError as error:
        if not store.exists():
            raise CheckpointNotFoundError(f"{store.location} does not exist") from error
    except OSError as error:
        if not isinstance(error, NotAFileError) and error.errno != errno.EFBIG:
            raise
        raise CorruptionError(
            f"{store.location}/{RECORD_NAME} is no commit record: {error.strerror}. "
            "Restore it from a copy, or load another step."
        ) from error
    saves = sorted({found for found in map(save_id_of, files_of_ours(store)) if found})
    if saves:
        raise IncompleteError(
            f"{store.location} holds no {RECORD_NAME}, only files of saves that never committed ({', '.join(saves[:3])}). "
            "The save was interrupted, or is still running: load another step, or save again to this path."
        )
    raise NotACheckpointError(f"{store.location} holds no {RECORD_NAME}: it is not a checkpoint")


def record_seal(store: Store) -> bytes | None:
    """The end of the commit record, where its digest stands, and its size; None if there is none.

    Records of equal seals are the same one: to see that a step is as it was, a large record need not be read again.

    Raises:
        OSError: reading failed.
    """
    try:
        with reading(store, RECORD_NAME) as handle:
            end = bytearray(min(_SEAL_BYTES, handle.size))
            handle.read_into(handle.size - len(end), memoryview(end))
            return b"%d %b" % (handle.size, bytes(end))
    except (FileNotFoundError, NotADirectoryError, NotAFileError):
        return None


def read_record(store: Store) -> CommitRecord:
    """The decoded commit record; raises as `read_record_bytes` and `decode_record`."""
    return decode_record(read_record_bytes(store), f"{store.location}/{RECORD_NAME}")
