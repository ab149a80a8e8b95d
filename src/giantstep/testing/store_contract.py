"""The promises of a `Store`, as functions that check one.

Run all of `CHECKS` on a store of your own, each on a new and empty one.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable

from giantstep.storage.base import Store, read_all, reading

_TEMPORARY = "checkpoint.json.tmp"


class ContractError(AssertionError):
    """A store does not keep a promise."""


def _require(condition: bool, promise: str) -> None:
    if not condition:
        raise ContractError(promise)


def _names(store: Store) -> list[str]:
    return sorted([*store.names(""), *store.names("data")])


def _raises(kind: type[Exception], call: Callable[[], object], promise: str) -> None:
    try:
        call()
    except kind:
        return
    raise ContractError(promise)


def _write(store: Store, name: str, data: bytes) -> None:
    handle = store.create(name, len(data), direct=True)
    handle.write_at(0, data)
    handle.sync()
    handle.close()


def check_absent_place(store: Store) -> None:
    """An empty store says that it is not there, and preparing it twice makes it be there."""
    _require(not store.exists(), "a store that was never prepared does not exist")
    _raises(FileNotFoundError, lambda: store.open_read("checkpoint.json"), "opening in an absent store is FileNotFoundError")
    _require(_names(store) == [], "a store that does not exist holds nothing")
    store.prepare("data")
    store.prepare("data")
    _require(store.exists(), "a prepared store exists")
    _require(_names(store) == [], "a prepared store is empty")


def check_files(store: Store) -> None:
    """What was written is read, listed, sized and deleted; a taken name is refused."""
    store.prepare("data")
    _write(store, "data/a", b"0123456789")
    store.sync_names("data")
    _raises(FileExistsError, lambda: store.create("data/a", 1, direct=False), "creating a taken name is FileExistsError")
    _require(read_all(store, "data/a", 10) == b"0123456789", "a file holds what was written")
    _raises(OSError, lambda: read_all(store, "data/a", 9), "a file larger than allowed is refused")
    _require(store.size("data/a") == 10, "size is the bytes created")
    _require(_names(store) == ["data/a"], "names are relative, with folders")
    store.delete("data/a")
    store.delete("data/a")
    store.sync_names("data")
    _require(_names(store) == [], "a deleted file is not listed")
    _raises(FileNotFoundError, lambda: store.size("data/a"), "size of a missing file is FileNotFoundError")
    _raises(FileNotFoundError, lambda: store.open_read("data/a"), "opening a missing file is FileNotFoundError")
    _write(store, "empty", b"")
    _require(read_all(store, "empty", 0) == b"", "a file may be empty")


def check_ranges(store: Store) -> None:
    """Bytes are written and read at any offsets; reading past the end is an error."""
    store.prepare("")
    data = bytes(range(256)) * 64
    handle = store.create("ranged", len(data), direct=True)
    for start in (8192, 0, 12288, 4096):
        handle.write_at(start, memoryview(data)[start : start + 4096])
    handle.sync()
    handle.close()
    handle.close()
    with reading(store, "ranged") as found:
        target = bytearray(5000)
        found.read_into(1234, memoryview(target))
        _require(bytes(target) == data[1234:6234], "a range holds its bytes")
        _raises(OSError, lambda: found.read_into(len(data) - 10, memoryview(target)), "reading past the end is OSError")


def check_parts(store: Store) -> None:
    """Parts of memory are written and read one after another, however many and however small they are."""
    store.prepare("")
    data = bytes(range(251)) * 80
    sizes = [0, 1, 4096, 3000, *[3] * 1500]
    starts = list(itertools.accumulate(sizes, initial=0))
    ranges = [*itertools.pairwise(starts), (starts[-1], len(data))]
    handle = store.create("parts", len(data), direct=True)
    handle.write_parts(0, [memoryview(data)[start:stop] for start, stop in ranges])
    handle.sync()
    handle.close()
    with reading(store, "parts") as found:
        target = bytearray(len(data))
        parts = [memoryview(target)[start:stop] for start, stop in ranges]
        found.read_parts(0, parts, found.access_at(0))
        _require(bytes(target) == data, "parts hold the bytes of their ranges")
        late = len(data) - 100
        _raises(OSError, lambda: found.read_parts(late, parts, found.access_at(late)), "parts past the end are OSError")


def check_concurrent_writes(store: Store) -> None:
    """Several threads write parts of one file."""
    store.prepare("")
    handle = store.create("shared", 8 * 4096, direct=True)
    threads = [threading.Thread(target=handle.write_at, args=(n * 4096, bytes([n]) * 4096)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.sync()
    handle.close()
    expected = b"".join(bytes([n]) * 4096 for n in range(8))
    _require(read_all(store, "shared", 8 * 4096) == expected, "all parts are there")


def check_publish(store: Store) -> None:
    """Publication replaces the old bytes and leaves no temporary name."""
    store.prepare("")
    for text in (b"first", b"second, longer", b"3"):
        store.publish("checkpoint.json", text, _TEMPORARY)
        _require(read_all(store, "checkpoint.json", 100) == text, "the published bytes are there")
    _require(_names(store) == ["checkpoint.json"], "nothing else is left")


def check_publish_under_readers(store: Store) -> None:
    """A reader sees the old bytes or the new ones, whole."""
    store.prepare("")
    versions = [bytes([65 + n]) * (2000 + 1000 * n) for n in range(4)]
    store.publish("checkpoint.json", versions[0], _TEMPORARY)
    torn: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            found = read_all(store, "checkpoint.json", 1 << 20)
            if found not in versions:
                torn.append(found)

    thread = threading.Thread(target=read)
    thread.start()
    for n in range(40):
        store.publish("checkpoint.json", versions[n % 4], _TEMPORARY)
    done.set()
    thread.join()
    _require(not torn, "publication is atomic")


def check_links(store: Store) -> None:
    """A file may have a further name in another place; each is deleted by itself."""
    store.prepare("data")
    other = store.folder("other")
    other.prepare("data")
    _write(store, "data/a", b"0123456789")
    try:
        other.link("data/b", store, "data/a")
    except OSError as error:
        _require(error.errno in (errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP), "a store without links says so")
        return
    other.sync_names("data")
    _raises(FileExistsError, lambda: other.link("data/b", store, "data/a"), "linking to a taken name is FileExistsError")
    _raises(FileNotFoundError, lambda: other.link("data/c", store, "data/x"), "linking a missing file is FileNotFoundError")
    store.delete("data/a")
    _require(read_all(other, "data/b", 10) == b"0123456789", "a linked file outlives its first name")
    other.delete("data/b")
    _require(list(other.names("data")) == [], "a deleted link is not listed")
    for place in (other, store):
        place.remove_empty("data")
        place.remove_empty("")


def check_places(store: Store) -> None:
    """Places inside a place are listed, hold files of their own, and are removed when they are empty."""
    _require(list(store.folders()) == [], "a place that is not there holds no places")
    inner = store.folder("step_1")
    _require(not inner.exists(), "a place that was never prepared does not exist")
    inner.prepare("data")
    store.prepare("")
    _require(list(store.folders()) == ["step_1"], "a prepared place is listed by its name")
    _write(inner, "data/a", b"1")
    _require(list(store.names("")) == [], "files of an inner place are not the outer one's")
    _require(list(inner.names("data")) == ["data/a"], "names are relative to their place")
    _raises(OSError, lambda: inner.remove_empty("data"), "a folder that holds a file is not removed")
    inner.delete("data/a")
    for _ in range(2):
        inner.remove_empty("data")
        inner.remove_empty("")
    _require(not inner.exists(), "a removed place does not exist")
    _require(list(store.folders()) == [], "a removed place is not listed")
    free = store.free_bytes()
    _require(free is None or free >= 0, "free bytes are a number that is not negative, or unknown")
    store.remove_empty("")


CHECKS: tuple[Callable[[Store], None], ...] = (
    check_absent_place,
    check_files,
    check_ranges,
    check_parts,
    check_concurrent_writes,
    check_publish,
    check_publish_under_readers,
    check_links,
    check_places,
)
