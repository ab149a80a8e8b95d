"""All stores keep the contract; the local one really flushes, and uses O_DIRECT where it can."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

import giantstep as gs
from giantstep.storage.base import Access, Store, read_all
from giantstep.storage.buffers import device_buffer
from giantstep.storage.local import LocalStore
from giantstep.storage.locate import store_at
from giantstep.storage.medium import is_memory_backed
from giantstep.storage.memory import MemoryStore
from giantstep.storage.record_file import files_of_ours
from giantstep.testing import store_contract
from giantstep.testing.faults import CrashingStore

_NAMES = itertools.count()


def make(kind: str, tmp_path: Path) -> Store:
    if kind == "shm":
        return LocalStore(Path("/dev/shm", f"giantstep-{os.getpid()}-{next(_NAMES)}"))
    return {
        "local": lambda: LocalStore(tmp_path / "a" / "b"),
        "memory": lambda: MemoryStore(f"contract-{next(_NAMES)}"),
        "crashing": CrashingStore,
    }[kind]()


@pytest.mark.parametrize("check", store_contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", ["local", "shm", "memory", "crashing"])
def test_contract(kind: str, check: Any, tmp_path: Path) -> None:
    if kind == "shm" and not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm here")
    store = make(kind, tmp_path)
    try:
        check(store)
    finally:
        if kind == "shm" and store.exists():
            for name in list(files_of_ours(store)):
                store.delete(name)
            for folder in ("data", ""):
                if Path(store.location, folder).exists():
                    Path(store.location, folder).rmdir()


def test_a_contract_that_is_broken_is_noticed() -> None:
    class Forgetful(CrashingStore):
        def delete(self, name: str) -> None:
            """Forgets to."""

    with pytest.raises(store_contract.ContractError, match="deleted file is not listed"):
        store_contract.check_files(Forgetful())


def test_aligned_and_unaligned_writes_past_the_page_cache(tmp_path: Path) -> None:
    import mmap

    store = LocalStore(tmp_path)
    store.prepare("")
    handle = store.create("f", 3 * 4096 + 100, direct=True)
    buffer = mmap.mmap(-1, 4 * 4096)
    buffer[:] = os.urandom(4 * 4096)
    view = memoryview(buffer)
    handle.write_at(0, view[:8192])
    handle.write_at(8192, view[8192:12288])
    handle.write_at(12288, view[12288 : 12288 + 100])
    handle.sync()
    handle.close()
    assert read_all(store, "f", 1 << 20) == bytes(view[: 3 * 4096 + 100])
    view.release()
    buffer.close()


@pytest.mark.parametrize("cached", [True, False])
def test_reads_past_the_page_cache_give_the_same_bytes(tmp_path: Path, cached: bool) -> None:
    """Large aligned reads of uncached bytes go to the device; cached, small and unaligned ones do not."""
    import mmap

    data = os.urandom(3 << 20) + b"tail"
    (tmp_path / "f").write_bytes(data)
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    os.fsync(descriptor)
    if not cached:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    handle = LocalStore(tmp_path).open_read("f", direct=True)
    buffer = mmap.mmap(-1, 4 << 20)
    view = memoryview(buffer)
    for start, size in ((0, 3 << 20), (0, len(data)), (4096, 1 << 20), (5, 1 << 20), (1 << 20, 4096), (len(data) - 4, 4)):
        for shift in (0, 1):
            target = view[shift : shift + size]
            handle.read_into(start, target)
            assert bytes(target) == data[start : start + size]
            target.release()
    with pytest.raises(OSError, match="ends at byte"):
        handle.read_into(0, view)
    handle.close()
    view.release()
    buffer.close()


def test_flushes_reach_the_files_and_their_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd))[1])
    import torch

    path = tmp_path / "new" / "step"
    gs.save({"w": torch.zeros(3)}, path)
    names = [str(Path(name).relative_to(tmp_path)) for name in synced]
    assert names[:3] == ["new/step", "new", "."]
    data, index = (next(n for n in names if part in n and "safetensors" in n) for part in ("data/", ".index."))
    record = next(name for name in names if "checkpoint.json" in name)
    order = [names.index(name) for name in (data, "new/step/data", index, record)]
    assert order == sorted(order)
    assert names[-1] == "new/step"


def test_file_systems_in_memory_are_known_and_not_allocated_beforehand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.EIO, "posix_fallocate was called")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    mounts = tmp_path / "mountinfo"
    device = tmp_path.stat().st_dev
    place = f"{os.major(device)}:{os.minor(device)}"
    for kind, known in (("ext4", False), ("tmpfs", True)):
        mounts.write_text(f"1 0 9:9 / / rw - tmpfs x rw\n2 1 {place} / /a rw shared:1 - {kind} x rw\n")
        monkeypatch.setattr("giantstep.storage.medium._MOUNTS", mounts)
        store = LocalStore(tmp_path / kind)
        store.prepare("")
        if known:
            for name, direct in (("f", True), ("g", False)):
                handle = store.create(name, 5000, direct=direct)
                assert handle.direct_bytes == 0
                handle.close()
                assert store.size(name) == 5000
            assert store.open_read("f", direct=True).access_at(0) == Access(nearby=True)
        else:
            with pytest.raises(OSError, match="posix_fallocate was called"):
                store.create("f", 5000, direct=True)
    monkeypatch.setattr("giantstep.storage.medium._MOUNTS", tmp_path / "absent")
    assert not is_memory_backed(os.major(device), os.minor(device))


def test_looking_whether_bytes_are_cached_does_not_make_them_look_so(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(os.urandom(1 << 20))
    with (tmp_path / "f").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    handle = LocalStore(tmp_path).open_read("f", direct=True)
    buffer = device_buffer(1 << 20)
    first = handle.access_at(0)
    if first.nearby:
        pytest.skip("no reads past the page cache here")
    handle.read_parts(0, [buffer.data], first)
    assert handle.access_at(0) == first
    handle.close()


def test_write_errors_name_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(gs.errors.StoreError, match=r"\[rank 0, phase write\].*No space left"):
        gs.save({"w": torch.zeros(3)}, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    pwritev, preadv = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: pwritev(fd, [memoryview(views[0])[:1000]], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, *where: preadv(fd, [memoryview(views[0])[:777]], *where))
    value = torch.arange(20_000)
    gs.save({"w": value}, tmp_path)
    assert torch.equal(gs.load({"w": torch.zeros_like(value)}, tmp_path)["w"], value)


@pytest.mark.parametrize(
    ("path", "location"),
    [("/a/b", "/a/b"), (Path("/a/b"), "/a/b"), ("file:///a/b%20c", "/a/b c"), ("memory://x/y", "memory://x/y")],
)
def test_paths_and_urls(path: Any, location: str) -> None:
    assert store_at(path).location == location


def test_a_store_is_taken_as_it_is() -> None:
    store = CrashingStore()
    assert store_at(store) is store
