"""Linking files of an earlier step: what is linked, what is left out, and taking links back."""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from giantstep.commit.link import Links, link_files, unlink_files
from giantstep.format.record import FileEntry
from giantstep.storage.base import Store, read_all
from giantstep.storage.local import LocalStore
from giantstep.storage.memory import MemoryStore

NAMES = [f"data/20260101T000000-0123456789abcdef-r00000-{number}.safetensors" for number in range(3)]
ENTRIES = [FileEntry(name, 5, 0) for name in NAMES]
_COUNT = itertools.count()


def places() -> tuple[MemoryStore, MemoryStore]:
    """A new place, and one with three files."""
    root = MemoryStore(f"link-{next(_COUNT)}")
    new, old = root.folder("new"), root.folder("old")
    for store in (new, old):
        store.prepare("data")
    for number, name in enumerate(NAMES):
        old.create(name, 5, direct=False).write_at(0, b"file%d" % number)
    return new, old


def failing(code: int, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., None] = MemoryStore.link
    calls = itertools.count()

    def link(self: MemoryStore, name: str, source: Store, source_name: str) -> None:
        if next(calls) == position:
            raise OSError(code, "injected")
        original(self, name, source, source_name)

    monkeypatch.setattr(MemoryStore, "link", link)


def test_files_are_there_under_the_same_names_and_can_be_taken_back() -> None:
    new, old = places()
    links = Links()
    link_files(new, old, ENTRIES, links)
    assert (links.there, links.made, links.problem) == (set(NAMES), NAMES, "")
    assert read_all(new, NAMES[2], 5) == b"file2"
    unlink_files(new, links)
    assert (list(new.names("data")), links.there, links.made) == ([], set(), [])
    assert sorted(old.names("data")) == NAMES


def test_names_that_are_there_already_count_and_are_not_taken_back() -> None:
    new, old = places()
    new.link(NAMES[0], old, NAMES[0])
    links = Links()
    link_files(new, old, ENTRIES, links)
    assert (links.there, links.made) == (set(NAMES), NAMES[1:])
    unlink_files(new, links)
    assert list(new.names("data")) == NAMES[:1]
    same = Links()
    link_files(old, old, ENTRIES, same)
    assert (same.there, same.made) == (set(NAMES), [])


def test_files_that_are_gone_or_of_another_size_are_left_out() -> None:
    new, old = places()
    old.delete(NAMES[0])
    links = Links()
    link_files(new, old, [*ENTRIES[:2], FileEntry(NAMES[2], 6, 0)], links)
    assert links.there == set(NAMES[1:2])
    assert "has 5 bytes, expected 6" in links.problem
    assert list(new.names("data")) == NAMES[1:2]


@pytest.mark.parametrize(("code", "count"), [(errno.EXDEV, 1), (errno.EPERM, 1), (errno.ENOTSUP, 1), (errno.EMLINK, 2)])
def test_places_that_cannot_share_files_are_asked_once(code: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = places()
    failing(code, 1, monkeypatch)
    links = Links()
    link_files(new, old, ENTRIES, links)
    assert len(links.there) == count
    assert "cannot share files" in links.problem


def test_what_else_fails_is_raised_and_what_was_made_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = places()
    failing(errno.EIO, 2, monkeypatch)
    links = Links()
    with pytest.raises(OSError, match="injected"):
        link_files(new, old, ENTRIES, links)
    assert links.made == NAMES[:2]
    unlink_files(new, links)
    assert list(new.names("data")) == []


# Data files that somebody has moved elsewhere, and left symbolic links in their place.


@pytest.mark.parametrize("depth", ["new", "deeper/new"])
def test_of_a_symbolic_link_what_it_points_to_is_linked(tmp_path: Path, depth: str) -> None:
    old, new = LocalStore(tmp_path / "old"), LocalStore(tmp_path / depth)
    for store in (old, new):
        store.prepare("data")
    for name in NAMES:
        (tmp_path / "old" / name).write_bytes(b"moved")
    (tmp_path / "old" / "data").rename(tmp_path / "far")
    (tmp_path / "old" / "data").mkdir()
    for name in NAMES[1:]:
        (tmp_path / "old" / name).symlink_to(Path("../../far") / Path(name).name)
    (tmp_path / "far" / Path(NAMES[2]).name).unlink()
    links = Links()
    link_files(new, old, ENTRIES, links)
    assert (links.there, links.made) == ({NAMES[1]}, [NAMES[1]])
    assert "is gone" in links.problem
    shutil.rmtree(tmp_path / "far")
    assert not (tmp_path / depth / NAMES[1]).is_symlink()
    assert read_all(new, NAMES[1], 5) == b"moved"


def test_a_name_that_is_taken_by_a_symbolic_link_to_nowhere_is_left_out(tmp_path: Path) -> None:
    old, new = LocalStore(tmp_path / "old"), LocalStore(tmp_path / "new")
    for store in (old, new):
        store.prepare("data")
    for name in NAMES:
        (tmp_path / "old" / name).write_bytes(b"12345")
    (tmp_path / "new" / NAMES[0]).symlink_to("nowhere")
    links = Links()
    link_files(new, old, ENTRIES, links)
    assert (links.there, links.made) == (set(NAMES[1:]), NAMES[1:])
    assert "cannot be had" in links.problem
