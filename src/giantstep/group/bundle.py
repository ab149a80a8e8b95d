"""The messages of a range of ranks as one: what is equal is kept and sent once.

Pure. A `Bundle` has each distinct part once, each distinct message as a row of numbers of parts, and the ranks as runs
of equal rows. So equal messages of any number of ranks take the room of one. Called by `torch_group.py`, which joins
bundles on the way to rank 0 and cuts them on the way back, and by `connections.py`, which sends them.

On the wire a bundle is a few messages: a first one of fixed size, with everything in it if that is small; else the head
(counts, runs, rows, sizes of parts), and then the parts, small ones together and large ones by themselves, so that they
are not copied.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import PeerFailureError
from giantstep.group.base import Parts

FIRST_BYTES = 1024
_ALONE_BYTES = 256 << 10
_TOGETHER_BYTES = 1 << 20
# Bytes of the head; 1 if everything is in the first message.
_PREFIX = struct.Struct("<QQ")
# Runs, rows, numbers in all rows, parts.
_COUNTS = struct.Struct("<IIII")

Buffer = bytes | bytearray


@dataclass(frozen=True, slots=True)
class Bundle:
    """Messages of consecutive ranks.

    Attributes:
        parts: distinct parts.
        rows: distinct messages, each as numbers of its parts.
        runs: (number of ranks, number of their row), in order of rank.
    """

    parts: tuple[bytes, ...]
    rows: tuple[tuple[int, ...], ...]
    runs: tuple[tuple[int, int], ...]

    @staticmethod
    def of(messages: Iterable[Parts]) -> Bundle:
        """The messages of consecutive ranks."""
        joiner = _Joiner()
        for message in messages:
            joiner.add_run(1, joiner.row(joiner.part(part) for part in message))
        return joiner.bundle()

    @staticmethod
    def join(bundles: Iterable[Bundle]) -> Bundle:
        """One bundle for the ranks of several, which follow each other."""
        joiner = _Joiner()
        for bundle in bundles:
            joiner.add(bundle, bundle.runs)
        return joiner.bundle()

    def cut(self, start: int, stop: int) -> Bundle:
        """The bundle of some of the ranks, counted from its first, with only what they need."""
        joiner = _Joiner()
        joiner.add(self, self._runs_between(start, stop))
        return joiner.bundle()

    def _runs_between(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        begin = 0
        for ranks, row in self.runs:
            end = begin + ranks
            if begin < stop and end > start:
                yield min(end, stop) - max(begin, start), row
            begin = end

    def messages(self) -> list[Parts]:
        """The messages by rank; equal ones, and equal parts of them, are one object."""
        rows = [tuple(self.parts[number] for number in row) for row in self.rows]
        return [rows[row] for ranks, row in self.runs for _ in range(ranks)]

    def to_wire(self) -> list[Buffer]:
        """What to send, message by message."""
        numbers = [number for row in self.rows for number in row]
        head = b"".join(
            (
                _COUNTS.pack(len(self.runs), len(self.rows), len(numbers), len(self.parts)),
                np.array(self.runs, dtype="<u4").tobytes(),
                np.array([len(row) for row in self.rows], dtype="<u4").tobytes(),
                np.array(numbers, dtype="<u4").tobytes(),
                np.array([len(part) for part in self.parts], dtype="<u8").tobytes(),
            )
        )
        total = _PREFIX.size + len(head) + sum(map(len, self.parts))
        if total <= FIRST_BYTES:
            return [bytearray(b"".join((_PREFIX.pack(len(head), 1), head, *self.parts, bytes(FIRST_BYTES - total))))]
        first = bytearray(_PREFIX.pack(len(head), 0) + bytes(FIRST_BYTES - _PREFIX.size))
        blocks = [
            self.parts[start] if stop - start == 1 else bytearray(b"".join(self.parts[start:stop]))
            for start, stop in _blocks([len(part) for part in self.parts])
        ]
        return [first, bytearray(head), *(block for block in blocks if block)]


def from_wire(receive: Callable[[int], bytes]) -> Bundle:
    """Inverse of `Bundle.to_wire`; `receive` gives the next message, which has as many bytes as it is told.

    Raises:
        PeerFailureError: the messages are not a bundle.
    """
    try:
        return _from_wire(receive)
    except (struct.error, ValueError, OverflowError) as error:
        raise PeerFailureError(
            f"another rank's message cannot be read ({error}): do all run one version of giantstep?"
        ) from error


def _from_wire(receive: Callable[[int], bytes]) -> Bundle:
    first = receive(FIRST_BYTES)
    head_bytes, inline = _PREFIX.unpack_from(first)
    body = first[_PREFIX.size :]
    head = body if inline else receive(head_bytes)
    runs, rows, numbers, parts = _COUNTS.unpack_from(head)
    small = np.frombuffer(head, dtype="<u4", count=2 * runs + rows + numbers, offset=_COUNTS.size)
    sizes = np.frombuffer(head, dtype="<u8", count=parts, offset=_COUNTS.size + small.nbytes).tolist()
    if inline:
        found = _sliced(body[head_bytes:], sizes)
    else:
        found = []
        for start, stop in _blocks(sizes):
            block = receive(sum(sizes[start:stop])) if any(sizes[start:stop]) else b""
            found += [block] if stop - start == 1 else _sliced(block, sizes[start:stop])
    return _checked(Bundle(tuple(found), _rows(small[2 * runs :], rows), _pairs(small[: 2 * runs])))


def _rows(numbers: NDArray[np.uint32], rows: int) -> tuple[tuple[int, ...], ...]:
    ends = list(itertools.accumulate(numbers[:rows].tolist(), initial=0))
    flat = numbers[rows:].tolist()
    return tuple(tuple(flat[start:stop]) for start, stop in itertools.pairwise(ends))


def _pairs(runs: NDArray[np.uint32]) -> tuple[tuple[int, int], ...]:
    return tuple((ranks, row) for ranks, row in runs.reshape(-1, 2).tolist())


def _checked(bundle: Bundle) -> Bundle:
    if any(row >= len(bundle.rows) for _, row in bundle.runs):
        raise ValueError("a run of a row that is not there")
    if any(number >= len(bundle.parts) for row in bundle.rows for number in row):
        raise ValueError("a row with a part that is not there")
    return bundle


def _sliced(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    ends = list(itertools.accumulate(sizes, initial=0))
    return [data[start:stop] for start, stop in itertools.pairwise(ends)]


def _blocks(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Which parts travel together: (first, past the last). Both sides know it from the sizes."""
    found: list[tuple[int, int]] = []
    start = together = 0
    for number, size in enumerate(sizes):
        if number > start and (size >= _ALONE_BYTES or together + size > _TOGETHER_BYTES):
            found.append((start, number))
            start, together = number, 0
        together += size
        if size >= _ALONE_BYTES:
            found.append((start, number + 1))
            start, together = number + 1, 0
    return [*found, (start, len(sizes))] if start < len(sizes) else found


class _Joiner:
    """A bundle in the making: what is added is compared with what is there."""

    def __init__(self) -> None:
        self._parts: dict[bytes, int] = {}
        self._rows: dict[tuple[int, ...], int] = {}
        self._runs: list[tuple[int, int]] = []

    def part(self, part: bytes) -> int:
        return self._parts.setdefault(part, len(self._parts))

    def row(self, numbers: Iterable[int]) -> int:
        return self._rows.setdefault(tuple(numbers), len(self._rows))

    def add_run(self, ranks: int, row: int) -> None:
        if self._runs and self._runs[-1][1] == row:
            ranks += self._runs.pop()[0]
        self._runs.append((ranks, row))

    def add(self, bundle: Bundle, runs: Iterable[tuple[int, int]]) -> None:
        known: dict[int, int] = {}
        for ranks, row in runs:
            if row not in known:
                known[row] = self.row(self.part(bundle.parts[number]) for number in bundle.rows[row])
            self.add_run(ranks, known[row])

    def bundle(self) -> Bundle:
        return Bundle(tuple(self._parts), tuple(self._rows), tuple(self._runs))
