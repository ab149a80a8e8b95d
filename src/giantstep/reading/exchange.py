"""`exchange`: each rank reads its part once, verifies it, and sends everyone what they want of it. Called by `loading`.

It goes in rounds. In a round a reader sends from one unit; reader threads read and verify the units of the next rounds
meanwhile, put this rank's own pieces where they belong and pack those for others. What was received in a round is put in
place by another thread while the next one is on its way. So a rank holds the messages of two rounds at most; and of its
own units as many as there are reader threads, and packed for sending one more.

Bytes travel through host memory, as plain arrays; sinks copy them on to other devices.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import GiantstepError, located
from giantstep.group.base import Group, Parcel
from giantstep.planning.exchange_part import ExchangePart, Message, Messages, UnitRead
from giantstep.planning.load_plan import Box, boxes
from giantstep.reading.data_files import DataFiles
from giantstep.reading.fetch import WORDS, Bits, Sink, Source, bits, read_verified
from giantstep.shards.region import Int64s
from giantstep.storage.arenas import Arenas
from giantstep.storage.buffers import device_buffer

Wire = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What one rank did.

    Attributes:
        bytes_read: from the store.
        bytes_sent, bytes_received: to and from other ranks.
        peak_bytes: most bytes of buffers at a time.
    """

    bytes_read: int
    bytes_sent: int = 0
    bytes_received: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Manner:
    """How an exchange is carried out: threads that read, the phase for errors, and how long a rank may do nothing."""

    threads: int
    phase: str
    timeout_secs: float


def exchange(source: Source, part: ExchangePart, sinks: Sequence[Sink], group: Group, how: Manner) -> Exchanged:
    """Carry out this rank's part. Every rank of the exchange calls it, inside `telling`.

    Args:
        source: what to read from.
        part: from `exchange_part`.
        sinks: per wanted region.
        group: the ranks.
        how: threads and patience.

    Raises:
        CorruptionError: a block's checksum does not fit; names tensor, file, byte offset and writing rank.
        IncompleteError: a data file is missing.
        OSError: reading failed.
        GiantstepError: another rank failed, is lost or late; what it raised.
    """
    return _Rounds(source, part, sinks, group, how).run()


@contextmanager
def telling(group: Group, phase: str) -> Iterator[None]:
    """Tell the other ranks at once if the block fails, since they wait for what this rank would send.

    The error is then agreed on: no rank needs to report it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, GiantstepError) and error.agreed:
            raise
        ours = located(error, group.rank, phase)
        agreed = group.withdraw(ours)
        if agreed is error:
            raise
        raise agreed from error


_Prepare = Callable[[int], "_Packed"]


@dataclass(frozen=True, slots=True)
class _Packed:
    """What is sent in a round: bytes per client, within `arena`; clients of equal bytes share them."""

    messages: list[tuple[int, Wire]]
    arena: Wire
    bytes_read: int


def verify_part(source: Source, part: ExchangePart, threads: int) -> int:
    """Read and verify the blocks that a rank will read for an exchange, and drop them; return how many bytes.

    Raises: as `fetch`.
    """
    reads = [read for found in part.reads.values() for read in found]
    buffers: queue.SimpleQueue[Wire] = queue.SimpleQueue()
    for _ in range(threads if reads else 0):
        buffers.put(device_buffer(part.unit_bytes))
    with DataFiles(source.store, source.record, direct=source.direct) as files:

        def verify(read: UnitRead) -> int:
            buffer = buffers.get()
            try:
                return len(read_verified(source, files, read.file, read.start, read.stop, buffer))
            finally:
                buffers.put(buffer)

        with ThreadPoolExecutor(threads, thread_name_prefix="giantstep-read") as pool:
            return sum(pool.map(verify, reads))


class _Rounds:
    """One exchange in progress on one rank."""

    def __init__(self, source: Source, part: ExchangePart, sinks: Sequence[Sink], group: Group, how: Manner) -> None:
        self._source = source
        self._part = part
        self._sinks = sinks
        self._group = group
        self._how = how
        self._outbound, self._incoming = Arenas(), Arenas()
        self._failed = threading.Event()
        self._sent = self._received = self._read = 0
        # Units, and what is received, by round.
        self._units = sorted(part.reads)
        self._inbound = {
            number: [message for message in messages if message.peer != group.rank]
            for number, messages in part.wanted.by_round.items()
        }

    def run(self) -> Exchanged:
        """All rounds."""
        buffers: queue.SimpleQueue[Wire] = queue.SimpleQueue()
        workers = min(self._how.threads, max(1, len(self._units)))
        if self._units:
            for _ in range(workers):
                buffers.put(device_buffer(self._part.unit_bytes))
        with (
            DataFiles(self._source.store, self._source.record, direct=self._source.direct) as files,
            ThreadPoolExecutor(workers, thread_name_prefix="giantstep-read") as readers,
            ThreadPoolExecutor(1, thread_name_prefix="giantstep-unpack") as unpacker,
        ):
            try:
                self._run(_Units(self._units, readers, lambda number: self._prepare(number, files, buffers), workers), unpacker)
            except BaseException:
                # Whatever ends it, an interrupt too: threads that wait for their turn need not begin.
                self._failed.set()
                raise
        units = workers * self._part.unit_bytes if self._units else 0
        peak = units + self._outbound.peak_bytes + self._incoming.peak_bytes
        return Exchanged(self._read, self._sent, self._received, peak)

    def _run(self, units: _Units, unpacker: ThreadPoolExecutor) -> None:
        unpacking: deque[Future[None]] = deque()
        for number in sorted({*self._units, *(round_ for round_, messages in self._inbound.items() if messages)}):
            packed = units.take(number)
            # The messages of two rounds at most: those that are being put in place, and the next ones.
            while len(unpacking) > 1:
                unpacking.popleft().result()
            inbound = self._inbound.get(number, [])
            arena = self._incoming.take(self._part.received_bytes if inbound else 0)
            received = list(zip(inbound, _divided(arena, [message.bytes for message in inbound]), strict=True))
            self._transfer(packed, received)
            if packed is not None:
                self._read += packed.bytes_read
                self._outbound.give(packed.arena)
            unpacking.append(unpacker.submit(self._unpack, received, arena))
        for future in unpacking:
            future.result()

    def _transfer(self, packed: _Packed | None, received: list[tuple[Message, Wire]]) -> None:
        """Send and receive what belongs to a round."""
        rank, size = self._group.rank, self._group.size
        sends = [
            Parcel(peer, data)
            for client, data in (packed.messages if packed else [])
            for peer in self._part.clients[client]
            if peer != rank
        ]
        receives = [Parcel(message.peer, data) for message, data in received]
        if not sends and not receives:
            return
        # Everybody begins with the rank after its own, so that nobody is everybody's first.
        for parcels in (sends, receives):
            parcels.sort(key=lambda parcel: (parcel.peer - rank) % size)
        self._group.transfer(sends, receives, self._how.phase, self._how.timeout_secs)
        self._sent += sum(parcel.data.size for parcel in sends)
        self._received += sum(parcel.data.size for parcel in receives)

    # In the reader threads.

    def _prepare(self, number: int, files: DataFiles, buffers: queue.SimpleQueue[Wire]) -> _Packed:
        """Read a unit, fill this rank's own, and pack what others want."""
        if self._failed.is_set():
            return _Packed([], self._outbound.take(0), 0)
        buffer = buffers.get()
        try:
            count = sum(self._read_blocks(read, files, buffer) for read in self._part.reads[number])
            self._fill_own(number, buffer)
            return _Packed(*self._pack(number, buffer), count)
        except BaseException:
            # Whatever it is, units behind this one are not needed any more; the caller of the future sees it.
            self._failed.set()
            raise
        finally:
            buffers.put(buffer)

    def _read_blocks(self, read: UnitRead, files: DataFiles, buffer: Wire) -> int:
        return len(read_verified(self._source, files, read.file, read.start, read.stop, buffer[read.place :]))

    def _fill_own(self, number: int, buffer: Wire) -> None:
        wanted = self._part.wanted
        for message in wanted.by_round.get(number, []):
            if message.peer == self._group.rank:
                for box, place in _placed(wanted, message, wanted.place):
                    self._sinks[box.wanted].put(box.offset, box.size, bits(box, buffer, box.position - place))

    def _pack(self, number: int, buffer: Wire) -> tuple[list[tuple[int, Wire]], Wire]:
        """Messages of a round, each copied together, and the memory that holds them."""
        sent, alike = self._part.sent, self._part.together.get(number, [])
        sizes = [messages[0].bytes for messages in alike]
        arena = self._outbound.take(sum(sizes))
        found = []
        for messages, data in zip(alike, _divided(arena, sizes), strict=True):
            first = messages[0]
            slots = sent.slot[first.first : first.last].tolist()
            for (box, place), slot in zip(_placed(sent, first, sent.place), slots, strict=True):
                np.copyto(_on_wire(box, data, slot), bits(box, buffer, box.position - place), casting="no")
            found += [(message.peer, data) for message in messages]
        return found, arena

    # In the unpacking thread.

    def _unpack(self, received: list[tuple[Message, Wire]], arena: Wire) -> None:
        """Put what was received where it belongs, and give its memory back."""
        if self._failed.is_set():
            return
        wanted = self._part.wanted
        for message, data in received:
            for box, slot in _placed(wanted, message, wanted.slot):
                self._sinks[box.wanted].put(box.offset, box.size, _on_wire(box, data, slot))
        self._incoming.give(arena)


class _Units:
    """Units in the order of their rounds, prepared ahead by threads."""

    def __init__(self, numbers: Sequence[int], readers: ThreadPoolExecutor, prepare: _Prepare, ahead: int) -> None:
        self._left = deque(numbers)
        self._readers = readers
        self._prepare = prepare
        self._pending: deque[tuple[int, Future[_Packed]]] = deque()
        for _ in range(ahead):
            self._begin_next()

    def _begin_next(self) -> None:
        if self._left:
            number = self._left.popleft()
            self._pending.append((number, self._readers.submit(self._prepare, number)))

    def take(self, number: int) -> _Packed | None:
        """The unit of a round, once it is there; None if this rank has none in it. Another one is begun."""
        if not self._pending or self._pending[0][0] != number:
            return None
        packed = self._pending.popleft()[1].result()
        self._begin_next()
        return packed


def _divided(arena: Wire, sizes: Sequence[int]) -> list[Wire]:
    """Parts of an arena, one after another."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [arena[start:stop] for start, stop in itertools.pairwise(ends)]


def _placed(messages: Messages, message: Message, at: Int64s) -> Iterator[tuple[Box, int]]:
    """The pieces of a message, and where each lies."""
    rows = slice(message.first, message.last)
    return zip(boxes(messages.chunks, messages.pieces, message.first, message.last), at[rows].tolist(), strict=True)


def _on_wire(box: Box, data: Wire, slot: int) -> Bits:
    """A piece inside a message, in row-major order."""
    return np.ndarray(box.size, WORDS[box.item_bytes], data, slot)
