"""Files are written from where their bytes lie, in bounded memory, with the checksums of what was written."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from giantstep.errors import GiantstepError
from giantstep.storage.base import Buffer, Store, WriteHandle, read_all
from giantstep.storage.buffers import address_of, device_buffer
from giantstep.storage.local import LocalStore
from giantstep.storage.memory import MemoryStore
from giantstep.testing.faults import CrashingStore
from giantstep.writing.stream import BlockStream, BufferPool

Bytes = NDArray[np.uint8]
BLOCK = 4096


def random_bytes(size: int) -> Bytes:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def pieces_of(data: Bytes, sizes: Sequence[int]) -> list[Bytes]:
    """The bytes cut into pieces of these sizes, again and again."""
    found, start, number = [], 0, 0
    while start < len(data):
        found.append(data[start : start + sizes[number % len(sizes)]])
        start += len(found[-1])
        number += 1
    return found


def written(store: Store, pieces: Sequence[Bytes], buffer_bytes: int) -> tuple[bytes, list[int]]:
    store.prepare("")
    total = sum(map(len, pieces))
    handle = store.create("f", total, direct=True)
    with BufferPool(buffer_bytes, 2) as pool, BlockStream(handle, pool, BLOCK) as stream:
        stream.append(pieces[:1])
        stream.append(pieces[1:])
        checksums = stream.finish()
    handle.sync()
    handle.close()
    found = read_all(store, "f", total)
    store.delete("f")
    return found, checksums.tolist()


@pytest.mark.parametrize("sizes", [(10**7,), (1,), (4095, 0, 2), (BLOCK,), (8 * BLOCK,), (5, 9 * BLOCK, 700), (BLOCK, 3)])
@pytest.mark.parametrize("total", [1, BLOCK, 37 * BLOCK, 40 * BLOCK + 77])
@pytest.mark.parametrize("kind", ["disk", "memory", "crashing"])
def test_any_pieces_make_the_file_and_its_checksums(tmp_path: Path, kind: str, total: int, sizes: tuple[int, ...]) -> None:
    total = min(total, 9000) if sizes == (1,) else total
    store = {"disk": LocalStore(tmp_path / "d"), "memory": MemoryStore(f"stream-{tmp_path}"), "crashing": CrashingStore()}[kind]
    for shift in (0, 3):
        data = device_buffer(total + shift)[shift:]
        data[:] = random_bytes(total)
        found, checksums = written(store, pieces_of(data, sizes), 8 * BLOCK)
        assert found == data.tobytes()
        assert checksums == [xxhash.xxh3_64_intdigest(data[at : at + BLOCK].data) for at in range(0, total, BLOCK)]


class Noting(WriteHandle):
    """Notes where in memory the bytes lie that it is given, and waits or fails if told to."""

    def __init__(self, direct_bytes: int, fail_at: int | None = None) -> None:
        self._direct_bytes = direct_bytes
        self._fail_at = fail_at
        self.addresses: dict[int, int] = {}
        self.writes = 0
        self.open = threading.Event()
        self.open.set()

    @property
    def direct_bytes(self) -> int:
        return self._direct_bytes

    def write_at(self, offset: int, data: Buffer) -> None:
        self.open.wait()
        self.writes += 1
        if self._fail_at is not None and offset >= self._fail_at:
            raise OSError(errno.EIO, "injected")
        self.addresses[offset] = address_of(np.frombuffer(data, dtype=np.uint8))

    def sync(self) -> None:
        """Nothing to flush."""

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize(
    ("direct_bytes", "shift", "in_place"), [(0, 0, True), (0, 3, True), (4096, 0, True), (4096, 64, False)]
)
def test_bytes_are_copied_only_if_the_device_cannot_take_them(direct_bytes: int, shift: int, in_place: bool) -> None:
    data = device_buffer(32 * BLOCK + shift)[shift:]
    handle = Noting(direct_bytes)
    with BufferPool(8 * BLOCK, 2) as pool, BlockStream(handle, pool, BLOCK) as stream:
        stream.append([data])
        stream.finish()
    assert sorted(handle.addresses) == [0, 8 * BLOCK, 16 * BLOCK, 24 * BLOCK]
    found = [address == address_of(data) + offset for offset, address in handle.addresses.items()]
    assert found == [in_place] * 4
    if direct_bytes:
        assert all(address % direct_bytes == 0 for address in handle.addresses.values())


def test_pieces_are_asked_for_only_as_fast_as_they_are_written() -> None:
    asked = threading.Semaphore(0)
    taken: list[int] = []

    def pieces() -> Iterator[Bytes]:
        for number in range(50):
            taken.append(number)
            asked.release()
            yield random_bytes(BLOCK)

    handle = Noting(0)
    handle.open.clear()
    with BufferPool(BLOCK, 2) as pool, BlockStream(handle, pool, BLOCK) as stream:
        thread = threading.Thread(target=stream.append, args=(pieces(),))
        thread.start()
        for _ in range(5):
            assert asked.acquire(timeout=10)
        # Two are being written, two wait, and the fifth cannot be handed over.
        assert not asked.acquire(timeout=0.2)
        assert len(taken) == 5
        handle.open.set()
        thread.join()
        assert len(stream.finish()) == 50


def test_a_failed_write_ends_the_stream_and_leaves_the_pool_usable() -> None:
    def endless() -> Iterator[Bytes]:
        while True:
            yield random_bytes(BLOCK)

    with BufferPool(BLOCK, 2) as pool:
        failing = Noting(0, fail_at=10 * BLOCK)
        with pytest.raises(OSError, match="injected"), BlockStream(failing, pool, BLOCK) as stream:
            stream.append(endless())
        before = failing.writes
        with BlockStream(Noting(0), pool, BLOCK) as stream:
            stream.append([random_bytes(20 * BLOCK)])
            assert len(stream.finish()) == 20
        assert failing.writes == before


def test_nothing_is_written_after_the_stream_is_left() -> None:
    handle = Noting(0)

    def interrupted() -> Any:
        with BlockStream(handle, pool, BLOCK) as stream:
            stream.append([random_bytes(8 * BLOCK)])
            raise KeyboardInterrupt

    with BufferPool(BLOCK, 2) as pool:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        before = handle.writes
        with BlockStream(Noting(0), pool, BLOCK) as stream:
            stream.append([random_bytes(8 * BLOCK)])
            stream.finish()
        assert handle.writes == before


def test_what_is_checked_before_each_stretch_ends_the_stream_when_it_raises() -> None:
    handle, checked = Noting(0), 0

    def check() -> None:
        nonlocal checked
        checked += 1
        if checked > 5:
            raise GiantstepError("enough")

    with BufferPool(BLOCK, 2) as pool:
        with pytest.raises(GiantstepError, match="enough"), BlockStream(handle, pool, BLOCK, check) as stream:
            stream.append([random_bytes(40 * BLOCK)])
        assert handle.writes <= 5
        assert checked == 6
