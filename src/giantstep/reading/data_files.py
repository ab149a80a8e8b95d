"""Opening a checkpoint's data files, and noticing those that are missing or of another size."""

from __future__ import annotations

import threading
from typing import Self

from giantstep.errors import CorruptionError, IncompleteError
from giantstep.format.record import CommitRecord, FileEntry
from giantstep.storage.base import NotAFileError, ReadHandle, Store

_REMEDY = "Restore it from a copy, or load another step."


def check_data_files(store: Store, record: CommitRecord) -> None:
    """Look at every data file without opening it.

    Raises:
        IncompleteError: a file is missing.
        CorruptionError: a file is shorter or longer than it was written, or is none.
    """
    for entry in record.files:
        try:
            size = store.size(entry.name)
        except (FileNotFoundError, NotADirectoryError) as error:
            if record.nodes is not None:
                raise _elsewhere(store, record, entry) from error
            raise _missing(store, entry) from error
        except NotAFileError as error:
            raise _no_file(store, entry, error) from error
        _check_size(store, entry, size)


def _elsewhere(store: Store, record: CommitRecord, entry: FileEntry) -> IncompleteError:
    nodes = record.nodes
    host = nodes.hosts[nodes.host_of_rank[entry.rank]][0] if nodes is not None else ""
    return IncompleteError(
        f"{store.location} is one host's part of a node-local checkpoint: data file {entry.name} was written on host {host!r}. "
        "Load it with giantstep.LocalTier on all hosts."
    )


def _missing(store: Store, entry: FileEntry) -> IncompleteError:
    return IncompleteError(f"data file {entry.name}, written by rank {entry.rank}, is missing in {store.location}. {_REMEDY}")


def _no_file(store: Store, entry: FileEntry, error: NotAFileError) -> CorruptionError:
    return CorruptionError(
        f"data file {entry.name} in {store.location}, written by rank {entry.rank}, is {error.strerror}. {_REMEDY}"
    )


def _check_size(store: Store, entry: FileEntry, size: int) -> None:
    if size != entry.bytes:
        raise CorruptionError(
            f"data file {entry.name} in {store.location}, written by rank {entry.rank}, has {size} bytes, expected "
            f"{entry.bytes}. {_REMEDY}"
        )


class DataFiles:
    """Data files of a checkpoint, opened as they are read. Each thread keeps only its latest one open.

    A context manager; leaving it closes what is open, so no thread may read any more. `direct`: see `Store.open_read`.
    """

    def __init__(self, store: Store, record: CommitRecord, *, direct: bool = True) -> None:
        self._store = store
        self._record = record
        self._direct = direct
        self._lock = threading.Lock()
        self._open: dict[int, tuple[int, ReadHandle]] = {}

    def get(self, file: int) -> ReadHandle:
        """This thread's handle of a file, valid until the thread asks for another one.

        Raises:
            IncompleteError, CorruptionError: as `check_data_files`.
        """
        thread = threading.get_ident()
        held = self._open.get(thread)
        if held is not None and held[0] == file:
            return held[1]
        entry = self._record.files[file]
        try:
            handle = self._store.open_read(entry.name, direct=self._direct)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _missing(self._store, entry) from error
        except NotAFileError as error:
            raise _no_file(self._store, entry, error) from error
        try:
            _check_size(self._store, entry, handle.size)
        except CorruptionError:
            handle.close()
            raise
        with self._lock:
            self._open[thread] = (file, handle)
        if held is not None:
            held[1].close()
        return handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        for _, handle in self._open.values():
            handle.close()
