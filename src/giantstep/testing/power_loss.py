"""What a POSIX file system may show after a power loss: a model of files, folders, and what of them is durable.

The model promises what POSIX does, and no more. Bytes and size of a file are durable once the file was flushed, names once
their folder was. Until then, each name by itself may be anything that it was since the last flush of its folder: not yet
made, not yet removed, not yet renamed, and all of that also for folders. Each file by itself may have its bytes of the last
flush, the new ones, either of them sector by sector, zeros up to the new size, or some of the writes without others.

Not here: the store that runs on it (`journal_store`), and what is to be found (`crash_points`).
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_SECTOR_BYTES = 512
# Of more writes since the last flush, not every subset is looked at.
_MOST_WRITES = 3
ROOT = 0
"""Number of the topmost folder."""


@dataclass(slots=True)
class File:
    """Bytes as processes see them, as they were flushed, and the changes since: (offset, bytes) or (size, None)."""

    data: bytearray
    durable: bytes = b""
    changes: list[tuple[int, bytes | None]] = field(default_factory=list)


@dataclass(slots=True)
class Folder:
    """Names with the numbers of what they name; and per name all that it named since the last flush, None for nothing."""

    names: dict[str, int] = field(default_factory=dict)
    history: dict[str, list[int | None]] = field(default_factory=dict)

    def set(self, name: str, number: int | None) -> None:
        """Let a name be that of something else, or of nothing."""
        self.history.setdefault(name, [self.names.get(name)]).append(number)
        if number is None:
            del self.names[name]
        else:
            self.names[name] = number


class Disk:
    """Files and folders by number. Paths are names joined with `/`, seen from the topmost folder, which is ""."""

    def __init__(self) -> None:
        self.items: dict[int, File | Folder] = {ROOT: Folder()}

    def copy(self) -> Disk:
        """Another one with the same numbers."""
        found = Disk()
        for number, item in self.items.items():
            if isinstance(item, File):
                found.items[number] = File(bytearray(item.data), item.durable, list(item.changes))
            else:
                history = {name: list(values) for name, values in item.history.items()}
                found.items[number] = Folder(dict(item.names), history)
        return found

    # Looking.

    def number_at(self, path: str) -> int | None:
        """What is at a path; None if nothing is."""
        number = ROOT
        for part in path.split("/") if path else ():
            item = self.items[number]
            if not isinstance(item, Folder) or part not in item.names:
                return None
            number = item.names[part]
        return number

    def file_at(self, path: str) -> int:
        """Number of the file at a path; raises `FileNotFoundError`."""
        number = self.number_at(path)
        if number is None or isinstance(self.items[number], Folder):
            raise FileNotFoundError(errno.ENOENT, path)
        return number

    def file(self, number: int) -> File:
        """A file by its number."""
        item = self.items[number]
        if isinstance(item, Folder):
            raise IsADirectoryError(errno.EISDIR, str(number))
        return item

    def folder_at(self, path: str) -> Folder:
        """The folder at a path; raises `FileNotFoundError`."""
        number = self.number_at(path)
        item = None if number is None else self.items[number]
        if not isinstance(item, Folder):
            raise FileNotFoundError(errno.ENOENT, path)
        return item

    def _parent(self, path: str) -> tuple[Folder, str]:
        folder, _, name = path.rpartition("/")
        return self.folder_at(folder), name

    def _add(self, path: str, item: File | Folder) -> int:
        parent, name = self._parent(path)
        if name in parent.names:
            raise FileExistsError(errno.EEXIST, path)
        number = len(self.items)
        self.items[number] = item
        parent.set(name, number)
        return number

    # What processes do. One method per system call.

    def mkdir(self, path: str) -> int:
        """Make a folder."""
        return self._add(path, Folder())

    def create(self, path: str) -> int:
        """Make an empty file; its number."""
        return self._add(path, File(bytearray()))

    def resize(self, number: int, size: int) -> None:
        """Cut a file, or lengthen it with zeros."""
        file = self.file(number)
        _change(file.data, size, None)
        file.changes.append((size, None))

    def write(self, number: int, offset: int, data: bytes) -> None:
        """Write into a file."""
        file = self.file(number)
        _change(file.data, offset, data)
        file.changes.append((offset, data))

    def sync(self, number: int) -> None:
        """Make bytes and size of a file durable."""
        file = self.file(number)
        file.durable, file.changes = bytes(file.data), []

    def sync_names(self, path: str) -> None:
        """Make the names in a folder durable."""
        self.folder_at(path).history.clear()

    def rename(self, path: str, new: str) -> None:
        """Give a file another name, in the place of what has it."""
        number = self.file_at(path)
        parent, name = self._parent(new)
        parent.set(name, number)
        parent, name = self._parent(path)
        parent.set(name, None)

    def link(self, path: str, new: str) -> None:
        """Give a file a further name."""
        number = self.file_at(path)
        parent, name = self._parent(new)
        if name in parent.names:
            raise FileExistsError(errno.EEXIST, new)
        parent.set(name, number)

    def unlink(self, path: str) -> None:
        """Remove a file's name."""
        self.file_at(path)
        parent, name = self._parent(path)
        parent.set(name, None)

    def rmdir(self, path: str) -> None:
        """Remove an empty folder."""
        if self.folder_at(path).names:
            raise OSError(errno.ENOTEMPTY, path)
        parent, name = self._parent(path)
        parent.set(name, None)

    def settle(self) -> None:
        """Make everything durable, as time does."""
        for number, item in self.items.items():
            if isinstance(item, File):
                self.sync(number)
            else:
                item.history.clear()

    # What may be found.

    def choices(self) -> list[Choice]:
        """What a power loss decides at this moment: each by itself."""
        found: list[Choice] = []
        for number, item in self.items.items():
            if isinstance(item, Folder):
                for name, history in item.history.items():
                    values = list(dict.fromkeys([item.names.get(name), *reversed(history)]))
                    if len(values) > 1:
                        found.append(Choice(number, name, tuple(values)))
            elif item.changes:
                versions = _versions(item)
                if len(versions) > 1:
                    found.append(Choice(number, None, tuple(versions)))
        return found

    def left(self, choices: Sequence[Choice], decided: Sequence[int]) -> Disk:
        """What is found if each choice is decided so: 0 is what processes saw, the last alternative what is durable."""
        names: dict[tuple[int, str], int | None] = {}
        data: dict[int, bytes] = {}
        for choice, pick in zip(choices, decided, strict=True):
            value = choice.values[pick]
            if choice.name is None:
                data[choice.number] = value if isinstance(value, bytes) else b""
            else:
                names[choice.number, choice.name] = value if isinstance(value, int) else None
        found = Disk()
        numbers: dict[int, int] = {ROOT: ROOT}
        self._fill(found, ROOT, numbers, names, data)
        return found

    def _fill(
        self,
        found: Disk,
        number: int,
        numbers: dict[int, int],
        names: dict[tuple[int, str], int | None],
        data: dict[int, bytes],
    ) -> None:
        source, target = self.items[number], found.items[numbers[number]]
        if not isinstance(source, Folder) or not isinstance(target, Folder):
            return
        for name in sorted({*source.names, *source.history}):
            inner = names.get((number, name), source.names.get(name))
            if inner is None:
                continue
            if inner not in numbers:
                numbers[inner] = len(found.items)
                item = self.items[inner]
                if isinstance(item, File):
                    content = data.get(inner, bytes(item.data))
                    found.items[numbers[inner]] = File(bytearray(content), content)
                else:
                    found.items[numbers[inner]] = Folder()
                    self._fill(found, inner, numbers, names, data)
            target.names[name] = numbers[inner]

    def key(self) -> bytes:
        """Equal for disks on which processes see the same."""
        state = hashlib.blake2b(digest_size=16)
        for number, item in self.items.items():
            # Numbers are given in the order of the walk, so equal trees have equal numbers, further names of a file included.
            state.update(f"{number}:{isinstance(item, File)}:".encode("ascii"))
            content = bytes(item.data) if isinstance(item, File) else repr(sorted(item.names.items())).encode("utf-8")
            state.update(len(content).to_bytes(8, "little") + content)
        return state.digest()


@dataclass(frozen=True, slots=True)
class Choice:
    """Something that a power loss decides by itself.

    Attributes:
        number: of the folder whose name it is, or of the file.
        name: what is decided is what this name names; None: it is the bytes of the file.
        values: the alternatives: first what processes saw, last what is durable.
    """

    number: int
    name: str | None
    values: tuple[int | bytes | None, ...]


def decisions(choices: Sequence[Choice], most: int, chance: random.Random) -> tuple[list[tuple[int, ...]], bool]:
    """Ways to decide all choices, and whether these are all ways.

    If there are more than `most`: everything as processes saw it, everything as it is durable, both with each choice by itself
    decided otherwise, and drawn ones up to that number. The ways in which one thing alone is lost are never left out.
    """
    sizes = [len(choice.values) for choice in choices]
    if math.prod(sizes) <= most:
        return list(itertools.product(*map(range, sizes))), True
    newest, oldest = (0,) * len(sizes), tuple(size - 1 for size in sizes)
    found = dict.fromkeys([newest, oldest, *_flips(newest, sizes)])
    for flipped in _flips(oldest, sizes):
        if len(found) >= most:
            break
        found[flipped] = None
    for _ in range(4 * most):
        if len(found) >= most:
            break
        found[tuple(chance.randrange(size) for size in sizes)] = None
    return list(found), False


def _flips(base: tuple[int, ...], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for place, size in enumerate(sizes):
        for value in range(size):
            if value != base[place]:
                yield (*base[:place], value, *base[place + 1 :])


def _change(data: bytearray, start: int, new: bytes | None) -> None:
    if new is None:
        del data[start:]
        data.extend(bytes(start - len(data)))
    else:
        data.extend(bytes(max(0, start + len(new) - len(data))))
        data[start : start + len(new)] = new


def _versions(file: File) -> list[bytes]:
    """What a file may hold that was not flushed: first what processes saw, last what is durable."""
    now, durable = bytes(file.data), file.durable
    longer = durable + bytes(max(0, len(now) - len(durable)))
    found = [now, *_subsets(file)]
    for first in (0, _SECTOR_BYTES):
        torn = bytearray(longer[: len(now)])
        for start in range(first, len(now), 2 * _SECTOR_BYTES):
            torn[start : start + _SECTOR_BYTES] = now[start : start + _SECTOR_BYTES]
        found.append(bytes(torn))
    # The size came through and no byte; bytes and not the size; the first half.
    found += [longer[: len(now)], now[: len(durable)], now[: len(now) // 2], durable]
    kept = dict.fromkeys(found)
    if now != durable:
        del kept[durable]
        return [*kept, durable]
    return list(kept)


def _subsets(file: File) -> list[bytes]:
    """With some of the changes since the last flush and without others."""
    count = len(file.changes)
    if count > _MOST_WRITES:
        picks: list[tuple[int, ...]] = [(row,) for row in (0, count - 1)] + [tuple(range(1, count)), tuple(range(count - 1))]
    else:
        picks = [pick for size in range(1, count) for pick in itertools.combinations(range(count), size)]
    found = []
    for pick in picks:
        data = bytearray(file.durable)
        for row in pick:
            _change(data, *file.changes[row])
        found.append(bytes(data))
    return found
