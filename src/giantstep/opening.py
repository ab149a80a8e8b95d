"""`open_checkpoint`: from a path to a `Checkpoint`."""

from __future__ import annotations

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import GiantstepError, StoreError
from giantstep.reading.checkpoint import Checkpoint
from giantstep.storage.locate import StoreLike, store_at
from giantstep.storage.record_file import read_record


def open_checkpoint(path: StoreLike) -> Checkpoint:
    """Open a committed checkpoint for looking into it. Needs no ranks, no device, and reads no tensor data.

    Raises:
        CheckpointNotFoundError, NotACheckpointError, IncompleteError: there is no committed checkpoint at the path.
        VersionError: it is of a newer major version of the format.
        CorruptionError: commit record or index are not what was written.
        StoreError: a storage operation failed.
    """
    store = store_at(path)
    try:
        # To look at what is stored must be possible where the user's types are not.
        return Checkpoint(store, read_record(store), OBJECT_CODEC, unknown="keep")
    except GiantstepError:
        raise
    except OSError as error:
        raise StoreError(f"{store.location} cannot be read: {error}") from error
