"""What giantstep asks of a place that keeps bytes.

A store holds files under relative names with `/` between parts. The promises, which
`giantstep.testing.store_contract` checks for any store:

* A file made by `create` is readable at the latest after `sync` of its handle and `sync_names` return, and
  then survives a crash. Until then it may be missing, short or torn.
* `publish` is atomic: readers see the old bytes or the new ones, also after a crash at any moment, and once
  it returns the new ones are durable.
* `delete` of a name that is not there succeeds. Every other operation may be retried only by its caller.

Failures are `OSError`; `CheckpointNotFoundError` and other meanings are given by the callers. Methods are
called from several threads at once.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class NotAFileError(OSError):
    """Something else than a file has the name: a directory, a pipe, a device, or a link that leads in a circle."""


class WriteHandle(Protocol):
    """A new file being written by one rank, at any offsets, by several threads.

    Classes that derive from this one need neither `write_parts` nor `nearby`.
    """

    @property
    def direct_bytes(self) -> int:
        """0, or the alignment that makes writes bypass the page cache.

        A write whose offset, length and buffer address are multiples of it goes straight to the device; others are
        written all the same.
        """
        ...

    @property
    def nearby(self) -> bool:
        """Whether what bypasses nothing is written to this machine's memory: small writes then cost as much as large ones."""
        return False

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write all of `data`, which must stay unchanged until the call returns."""
        ...

    def write_parts(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Write all parts, one after another, as `write_at` does: in one operation, whoever implements it."""
        self.write_at(offset, parts[0] if len(parts) == 1 else b"".join(parts))

    def sync(self) -> None:
        """Return when the file's bytes and size are durable; its name is not until `Store.sync_names`."""
        ...

    def close(self) -> None:
        """Release the handle; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Access:
    """How bytes of a file are read fastest.

    Attributes:
        alignment_bytes: of offset, length and memory, with which they come past the page cache; 1 if any will do.
        nearby: they are in this machine's memory: small reads cost as much as large ones.
    """

    alignment_bytes: int = 1
    nearby: bool = False


class ReadHandle(Protocol):
    """An open file. Classes that derive from this one need neither `read_parts` nor `access_at`."""

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        ...

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target`; raises `OSError` (errno EIO) where the file ends earlier.

        What `target` holds after an error is undefined.
        """
        ...

    def read_parts(self, offset: int, targets: Sequence[memoryview], access: Access) -> None:
        """Fill all targets, one after another, as `read_into` does: in one operation, whoever implements it.

        `access` is what `access_at` said of these bytes, or of bytes just before them.
        """
        if len(targets) == 1:
            self.read_into(offset, targets[0])
            return
        data = memoryview(bytearray(sum(target.nbytes for target in targets)))
        self.read_into(offset, data)
        for target in targets:
            target.cast("B")[:] = data[: target.nbytes]
            data = data[target.nbytes :]

    def access_at(self, offset: int) -> Access:
        """How bytes from `offset` on are read fastest. They are read all the same another way.

        To be asked once before bytes are read, since asking may change the answer.
        """
        return Access()

    def close(self) -> None:
        """Release the handle; idempotent."""
        ...


class Store(Protocol):
    """A place that keeps files under names."""

    @property
    def location(self) -> str:
        """Path or URL, for people."""
        ...

    def exists(self) -> bool:
        """Whether the place itself is there, whatever it holds."""
        ...

    def prepare(self, folder: str) -> None:
        """Make the place and a folder in it, durably; succeeds where they are there already."""
        ...

    def create(self, name: str, size: int, *, direct: bool) -> WriteHandle:
        """A new file of `size` bytes; raises `FileExistsError` if the name is taken.

        `direct` asks for writes past the page cache where the store can.
        """
        ...

    def sync_names(self, folder: str) -> None:
        """Return when creations and deletions in the folder ("" for the place itself) are durable."""
        ...

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        """Atomically and durably make `name` hold `data`; `temporary` is a name free for use until then."""
        ...

    def open_read(self, name: str, *, direct: bool = False) -> ReadHandle:
        """Open for reading; raises `FileNotFoundError`, and `NotAFileError` without waiting for anybody.

        `direct` asks that large aligned reads of what is not in the page cache go past it, where the store can.
        """
        ...

    def size(self, name: str) -> int:
        """Bytes of a file; raises `FileNotFoundError` and `NotAFileError`."""
        ...

    def names(self, folder: str) -> Iterator[str]:
        """Names of the files directly in the folder ("" for the place itself), in any order, the folder included.

        Nothing if there is no such folder. Never looks further down, where others may keep large trees.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove a file; succeeds where there is none."""
        ...

    def link(self, name: str, source: Store, source_name: str) -> None:
        """Let `name` be a further name of a finished file of another place of the same kind; no bytes are copied.

        Each name is deleted by itself. As of a file made by `create`, the name is durable after `sync_names`.

        Raises `FileExistsError` if the name is taken, `FileNotFoundError` if there is no such source, and `OSError` (errno
        EXDEV or ENOTSUP) where the two places cannot share files: the caller then writes the bytes again.
        """
        ...

    def free_bytes(self) -> int | None:
        """How many bytes may still be written to the place, or to the nearest one above that is there; None if unknown."""
        ...

    # Places in places: the steps under a root.

    def folder(self, name: str) -> Store:
        """The place `name` directly inside this one, whether or not it is there."""
        ...

    def folders(self) -> Iterator[str]:
        """Names of the places directly inside this one, in any order; nothing if this one is not there."""
        ...

    def remove_empty(self, folder: str) -> None:
        """Durably remove a folder ("" for the place itself) that holds nothing; succeeds where there is none.

        Raises `OSError` (errno ENOTEMPTY) if it holds anything.
        """
        ...


def reading(store: Store, name: str) -> AbstractContextManager[ReadHandle]:
    """`store.open_read(name)` as a context manager that closes."""
    return _Closing(store.open_read(name))


class _Closing(AbstractContextManager[ReadHandle]):
    def __init__(self, handle: ReadHandle) -> None:
        self._handle = handle

    def __enter__(self) -> ReadHandle:
        return self._handle

    def __exit__(self, *_exc: object) -> None:
        self._handle.close()


def read_all(store: Store, name: str, max_bytes: int) -> bytes:
    """A whole small file; raises `OSError` (errno EFBIG) if it is larger than `max_bytes`."""
    with reading(store, name) as handle:
        if handle.size > max_bytes:
            raise OSError(errno.EFBIG, f"{name} has {handle.size} bytes, more than the {max_bytes} that it may have")
        data = bytearray(handle.size)
        handle.read_into(0, memoryview(data))
    return bytes(data)
