"""All that a POSIX file system may show after a power loss, of what a `CrashingStore` was told and had not flushed.

Until a file is flushed, of its bytes may be there: none (and a size of 0, or the new size and zeros), every other sector, or
all. Until a folder is flushed, each name in it may mean what it meant at the last flush or anything that it meant since,
whatever other names do: names made may be missing, names deleted may be back, of a rename either half may be lost. Each
name and each file goes its own way, so that later changes may survive and earlier ones not.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from giantstep.testing.faults import CrashingStore, _File, _torn

_NONE, _ZEROS, _TORN, _ALL = "durable bytes only", "zeros", "torn", "all bytes"


@dataclass(frozen=True, slots=True)
class Survivors:
    """One of the states: the store, and in words what had not been flushed and has survived or not."""

    store: CrashingStore
    words: str


def states_after(crashed: CrashingStore, most: int, seed: int = 0) -> Iterator[Survivors]:
    """The states in which the disk may be found.

    Args:
        crashed: is only looked at.
        most: if there are more, so many of them: the extremes, and others drawn at random.
        seed: of what is drawn.
    """
    disk = crashed._disk
    names = {path: _distinct(meanings) for path, meanings in sorted(disk.meanings.items())}
    names = {path: choices for path, choices in names.items() if len(choices) > 1}
    reachable = {id(file): file for file in (*disk.durable_names.values(), *disk.files.values())}
    reachable |= {id(file): file for choices in names.values() for file in choices if file is not None}
    files = {key: _contents_of(file) for key, file in reachable.items()}
    open_files = [key for key, contents in files.items() if len(contents) > 1]
    sizes = [*(len(choices) for choices in names.values()), *(len(files[key]) for key in open_files)]
    for choice in _choices(sizes, most, random.Random(seed)):  # noqa: S311 - no secret
        kept = dict(zip(names, choice, strict=False))
        content = dict(zip(open_files, choice[len(names) :], strict=True))
        yield _survivors(crashed, names, files, kept, content)


def _distinct(meanings: Sequence[_File | None]) -> list[_File | None]:
    """Oldest first, each once."""
    return list({id(file): file for file in meanings}.values())


def _contents_of(file: _File) -> dict[str, bytes]:
    """What may be found in a file, by what that is called; one if all of it is durable."""
    whole = bytes(file.data)
    found = {_NONE: file.durable, _ZEROS: file.durable.ljust(len(whole), b"\0")[: len(whole)], _TORN: _torn(file), _ALL: whole}
    return {
        name: content for number, (name, content) in enumerate(found.items()) if content not in list(found.values())[:number]
    }


def _choices(sizes: Sequence[int], most: int, draw: random.Random) -> Iterator[tuple[int, ...]]:
    if math.prod(sizes) <= most:
        yield from itertools.product(*map(range, sizes))
        return
    # Everything lost, everything there; then each thing alone lost or there; then at random.
    lost, there = tuple(0 for _ in sizes), tuple(size - 1 for size in sizes)
    wanted = [lost, there]
    for number, size in enumerate(sizes):
        for value in range(size):
            wanted += [(*base[:number], value, *base[number + 1 :]) for base in (lost, there)]
    wanted = list(dict.fromkeys(wanted))
    if len(wanted) > most:
        wanted = [*wanted[:2], *draw.sample(wanted[2:], max(0, most - 2))]
    seen = set(wanted)
    yield from wanted
    while len(seen) < most:
        chosen = tuple(draw.randrange(size) for size in sizes)
        if chosen not in seen:
            seen.add(chosen)
            yield chosen


def _survivors(
    crashed: CrashingStore,
    names: dict[str, list[_File | None]],
    files: dict[int, dict[str, bytes]],
    kept: dict[str, int],
    content: dict[int, int],
) -> Survivors:
    found = CrashingStore()
    disk, left = crashed._disk, found._disk
    left.folders = set(disk.folders)
    found._base = crashed._base
    made: dict[int, _File] = {}
    words = []
    settled = {path: file for path, file in disk.durable_names.items() if path not in names}
    chosen = {path: choices[kept[path]] for path, choices in names.items()}
    for path, file in {**settled, **chosen}.items():
        if path in names:
            words.append(f"{path} {'is not there' if file is None else 'is as of step ' + str(kept[path])}")
        if file is None:
            continue
        if id(file) not in made:
            name, data = list(files[id(file)].items())[content.get(id(file), 0)]
            made[id(file)] = _File(bytearray(data), data)
            if len(files[id(file)]) > 1:
                words.append(f"{path} has {name}")
        left.files[path] = left.durable_names[path] = made[id(file)]
    return Survivors(found, "; ".join(words) or "nothing was open")
