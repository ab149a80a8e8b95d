"""`carry`: whole files from rank to rank, in bounded rounds, checked as they arrive and durable when it returns.

Between two ranks files follow one another in a *line*. In a round each line moves one piece; meanwhile the pieces of the next
round are read, and those of the one before are checked and written. All ranks go through their rounds in the same order, so
nobody waits for somebody who waits for him.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import GiantstepError, located
from giantstep.format.digests import Checksums, block_checksums
from giantstep.format.names import DATA_DIR
from giantstep.group.base import Group, Parcel
from giantstep.storage.arenas import Arena, Arenas
from giantstep.storage.base import ReadHandle, Store, WriteHandle

Wire = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Move:
    """A file that goes from one rank's host to another's.

    Attributes:
        name, bytes: of the file.
        peer: the other rank.
        checksums: of its blocks, for the rank that receives it; None for the one that sends.
    """

    name: str
    bytes: int
    peer: int
    checksums: Checksums | None = None


@dataclass(slots=True)
class Carried:
    """What one rank did.

    Attributes:
        bytes_sent, bytes_received: of files.
        bad: names of files that did not arrive as they should: the sender has them damaged or not at all. They are deleted.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a file on a line."""

    move: Move
    start: int
    bytes: int


def carry(
    group: Group,
    store: Store,
    sends: Sequence[Move],
    receives: Sequence[Move],
    *,
    piece_bytes: int,
    block_bytes: int,
    phase: str,
    timeout_secs: float,
    check: Callable[[], None] = lambda: None,
) -> Carried:
    """Carry out this rank's part. Every rank that sends or receives calls it.

    Args:
        group: the ranks.
        store: files are sent from it and received into it, under the same names.
        sends, receives: between two ranks in the same order on both sides.
        piece_bytes: what a line moves in a round; a multiple of `block_bytes`, and the same on all ranks.
        block_bytes: of the checksums.
        phase, timeout_secs: for errors, and how long a rank may do nothing.
        check: called in every round; raises if nothing more is to be carried.

    Raises:
        OSError: a file cannot be written. The other ranks are told.
        GiantstepError: another rank failed, is lost or late; what it raised.
    """
    try:
        with ExitStack() as stack:
            return _Rounds(group, store, sends, receives, piece_bytes, block_bytes, stack).run(phase, timeout_secs, check)
    except Exception as error:
        if isinstance(error, GiantstepError) and error.agreed:
            raise
        raise group.withdraw(located(error, group.rank, phase)) from error


def _lines(moves: Sequence[Move], piece_bytes: int) -> dict[int, list[_Piece]]:
    lines: dict[int, list[_Piece]] = {}
    for move in moves:
        line = lines.setdefault(move.peer, [])
        line += [_Piece(move, start, min(piece_bytes, move.bytes - start)) for start in range(0, move.bytes, piece_bytes)]
    return lines


def _rounds(lines: dict[int, list[_Piece]]) -> Iterator[list[_Piece]]:
    yield from ([piece for piece in found if piece] for found in itertools.zip_longest(*lines.values()))


def _parcels(pieces: Sequence[_Piece], arenas: Sequence[Arena]) -> list[Parcel]:
    return [Parcel(piece.move.peer, arena[: piece.bytes]) for piece, arena in zip(pieces, arenas, strict=True)]


class _Rounds:
    def __init__(
        self,
        group: Group,
        store: Store,
        sends: Sequence[Move],
        receives: Sequence[Move],
        piece_bytes: int,
        block_bytes: int,
        stack: ExitStack,
    ) -> None:
        self._group, self._store, self._block_bytes = group, store, block_bytes
        self._out, self._in = _lines(sends, piece_bytes), _lines(receives, piece_bytes)
        self._receives = receives
        self._sources: dict[int, tuple[Move, ReadHandle | None]] = {}
        self._targets: dict[int, tuple[Move, WriteHandle]] = {}
        self._bad: dict[str, None] = {}
        self._done = Carried()
        # Buffers of pieces that are through are used for the next ones. All are as long as the longest piece, so that any fits.
        self._arenas = Arenas()
        lines = (*self._out.values(), *self._in.values())
        self._arena_bytes = max((piece.bytes for line in lines for piece in line), default=0)
        stack.callback(self._close)
        # One thread each: pieces of a line are to be read and written in their order.
        self._reader = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="giantstep-send"))
        self._writer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="giantstep-receive"))

    def run(self, phase: str, timeout_secs: float, check: Callable[[], None]) -> Carried:
        """All rounds, then the last flush."""
        if self._receives:
            self._store.prepare(DATA_DIR)
        rank, size = self._group.rank, self._group.size
        outgoing, incoming = list(_rounds(self._out)), list(_rounds(self._in))
        count = max(len(outgoing), len(incoming))
        outgoing += [[]] * (count - len(outgoing))
        incoming += [[]] * (count - len(incoming))
        reading: list[Future[list[Arena]]] = [self._reader.submit(self._read, pieces) for pieces in outgoing[:1]]
        writing: Future[None] | None = None
        for number in range(count):
            check()
            packed = reading.pop().result()
            if number + 1 < count:
                reading.append(self._reader.submit(self._read, outgoing[number + 1]))
            rooms = [self._arenas.take(self._arena_bytes) for _ in incoming[number]]
            parcels, arrivals = _parcels(outgoing[number], packed), _parcels(incoming[number], rooms)
            for found in (parcels, arrivals):
                found.sort(key=lambda parcel: (parcel.peer - rank) % size)
            if parcels or arrivals:
                # If it fails, what gloo may still read and write is not used again.
                self._group.transfer(parcels, arrivals, phase, timeout_secs)
            for arena in packed:
                self._arenas.give(arena)
            self._done.bytes_sent += sum(piece.bytes for piece in outgoing[number])
            self._done.bytes_received += sum(piece.bytes for piece in incoming[number])
            if writing is not None:
                writing.result()
            writing = self._writer.submit(self._write, incoming[number], rooms)
        if writing is not None:
            writing.result()
        self._finish()
        return self._done

    # In the thread that reads.

    def _read(self, pieces: list[_Piece]) -> list[Arena]:
        found = []
        for piece in pieces:
            arena = self._arenas.take(self._arena_bytes)
            self._fill(arena[: piece.bytes], piece)
            found.append(arena)
        return found

    def _fill(self, buffer: Wire, piece: _Piece) -> None:
        held = self._sources.get(piece.move.peer)
        if held is None or held[0] is not piece.move:
            if held is not None and held[1] is not None:
                held[1].close()
            held = self._sources[piece.move.peer] = (piece.move, self._opened(piece.move))
        source = held[1]
        if source is None:
            # The receiver sees that it is not the file, and says so.
            buffer[:] = 0
            return
        try:
            source.read_into(piece.start, buffer.data)
        except OSError:
            source.close()
            self._sources[piece.move.peer] = (piece.move, None)
            buffer[:] = 0

    def _opened(self, move: Move) -> ReadHandle | None:
        try:
            handle = self._store.open_read(move.name)
        except OSError:
            return None
        if handle.size != move.bytes:
            handle.close()
            return None
        return handle

    # In the thread that writes.

    def _write(self, pieces: list[_Piece], arenas: list[Arena]) -> None:
        for piece, arena in zip(pieces, arenas, strict=True):
            found = arena[: piece.bytes]
            if piece.move.name not in self._bad and not self._fits(piece, found):
                self._bad[piece.move.name] = None
            if piece.start == 0:
                self._open_target(piece.move)
            move, handle = self._targets[piece.move.peer]
            handle.write_at(piece.start, found.data)
            if piece.start + piece.bytes == move.bytes:
                handle.sync()
                handle.close()
            self._arenas.give(arena)

    def _open_target(self, move: Move) -> None:
        # What a transfer left that was cut off is in the way.
        self._store.delete(move.name)
        self._targets[move.peer] = (move, self._store.create(move.name, move.bytes, direct=False))

    def _fits(self, piece: _Piece, data: Wire) -> bool:
        if piece.move.checksums is None:
            return True
        first = piece.start // self._block_bytes
        found = block_checksums(data.data, self._block_bytes)
        return bool(np.array_equal(found, piece.move.checksums[first : first + len(found)]))

    def _finish(self) -> None:
        for name in self._bad:
            self._store.delete(name)
        self._done.bad = [*self._bad]
        if self._receives:
            self._store.sync_names(DATA_DIR)

    def _close(self) -> None:
        for _, source in self._sources.values():
            if source is not None:
                source.close()
        for _, target in self._targets.values():
            target.close()
