"""Parity is made in bounded rounds, each rank with the part that is its own. Called by `protected_save`.

All ranks make the same rounds, from the same facts, and go through them in the same order. In a round the bytes that somebody
needs are read and sent; then the rank that gets them computes, and writes or sends on what comes out. Rounds overlap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from giantstep.format.digests import Checksums, block_checksums
from giantstep.format.names import DATA_DIR
from giantstep.group.base import Parcel
from giantstep.planning.stripes import Stripe, block_bytes
from giantstep.storage.arenas import Arena, Arenas
from giantstep.tiers.parity import encode
from giantstep.tiers.parity_layout import ParityLayout
from giantstep.tiers.rounds import Circumstances, Files, Wire, piece_bytes_for


@dataclass(frozen=True, slots=True)
class ParityFile:
    """A file of parity that this rank has written: name, size, and the checksum of each block."""

    name: str
    bytes: int
    checksums: Checksums


def make_parity(layout: ParityLayout, how: Circumstances) -> tuple[list[ParityFile], int]:
    """Make the parity of a save whose data files are durable. Every rank calls it; the leads of the hosts do the work.

    The first host of a stripe's parity computes all of it, and sends the others theirs.

    Returns:
        The files of parity that this rank has written, durable; and how many bytes it has sent.

    Raises:
        OSError: a file cannot be read or written. The others are told.
        GiantstepError: another rank failed, is lost or late; what it raised.
    """
    leads = layout.hosts.leads
    if how.group.rank not in leads:
        return [], 0
    with how.telling(), ExitStack() as stack:
        return _Making(layout, how, leads, stack).run()


@dataclass(slots=True)
class _Round:
    """One piece of every stripe, on its way.

    Attributes:
        start: first byte within the blocks.
        stripes: those that have more bytes than that, with the length of their piece.
        sends, receives: of data.
        sent: memory of what is sent.
        blocks: by number of the stripes whose parity this rank computes, the memory of their data.
    """

    start: int
    stripes: list[tuple[Stripe, int]]
    sends: list[Parcel] = field(default_factory=list)
    receives: list[Parcel] = field(default_factory=list)
    sent: list[Arena] = field(default_factory=list)
    blocks: dict[int, list[Arena]] = field(default_factory=dict)


class _Making:
    def __init__(self, layout: ParityLayout, how: Circumstances, leads: Sequence[int], stack: ExitStack) -> None:
        self._layout, self._how, self._leads = layout, how, leads
        self._files = Files(how.store, stack)
        self._host = leads.index(how.group.rank)
        # Every host of a group has a block of each of its stripes: all go through the same rounds.
        self._stripes = [stripe for stripe in layout.stripes if self._host in stripe.hosts]
        self._length = {stripe.number: block_bytes(stripe, layout.stream_bytes) for stripe in self._stripes}
        self._longest = max(self._length.values(), default=0)
        self._piece = piece_bytes_for(layout)
        self._arenas = Arenas()
        self._lead_of = {name: leads[host] for host, names in enumerate(layout.names) for name in names}
        self._outputs: dict[tuple[int, int], tuple[str, int, int]] = {}
        self._sums: dict[tuple[int, int], _Sums] = {}
        # One thread each: what a file is given is written in order.
        self._reader, self._encoder, self._writer = (
            stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix=f"giantstep-parity-{name}"))
            for name in ("read", "encode", "write")
        )

    def run(self) -> tuple[list[ParityFile], int]:
        """All rounds of the stripes of this host's group.

        In one transfer data of a round and parity of the last but one travel. Meanwhile the next round is read, the last one
        encoded, and what came before is written.
        """
        self._create()
        starts = range(0, self._longest, self._piece)
        reading = [self._reader.submit(self._read, start) for start in starts[:1]]
        encoding: deque[Future[tuple[_Round, dict[int, list[Wire]]]]] = deque()
        writing: list[Future[None]] = []
        sent = 0
        for number in range(len(starts) + 2 if starts else 0):
            self._how.check()
            gathered = reading.pop().result() if reading else None
            reading = [self._reader.submit(self._read, start) for start in starts[number + 1 : number + 2]]
            sends, receives = ([*gathered.sends], [*gathered.receives]) if gathered else ([], [])
            arrived: dict[tuple[int, int], tuple[int, Wire, Arena | None]] = {}
            if number >= 2:
                arrived = self._spread(*encoding.popleft().result(), sends, receives)
            # If it fails, what gloo may still read and write is not used again.
            sent += self._how.transfer(sends, receives)
            if gathered:
                self._give(gathered.sent)
                encoding.append(self._encoder.submit(self._encode, gathered))
            for one in writing:
                one.result()
            writing = [self._writer.submit(self._write, arrived)]
        for one in writing:
            one.result()
        self._files.sync()
        made = [ParityFile(name, size, self._sums[key].finish()) for key, (name, _, size) in self._outputs.items()]
        return made, sent

    def _create(self) -> None:
        """The files of parity, with their headers."""
        self._how.store.prepare(DATA_DIR)
        for stripe in self._stripes:
            for block, host in enumerate(stripe.parity):
                if host == self._host:
                    file, header = self._layout.parity_file(stripe, block)
                    data = np.frombuffer(header, dtype=np.uint8)
                    self._files.create(file.name, file.bytes)
                    self._files.write(file.name, 0, data)
                    self._outputs[stripe.number, block] = (file.name, len(header), file.bytes)
                    self._sums[stripe.number, block] = _Sums(self._how.block_bytes)
                    self._sums[stripe.number, block].add(data)

    def _take(self) -> Arena:
        # All are equally long, so that any fits.
        return self._arenas.take(min(self._piece, self._longest))

    def _give(self, arenas: Iterable[Arena]) -> None:
        for arena in arenas:
            self._arenas.give(arena)

    # In the thread that reads.

    def _read(self, start: int) -> _Round:
        lengths = [(stripe, min(self._piece, self._length[stripe.number] - start)) for stripe in self._stripes]
        found = _Round(start, [(stripe, size) for stripe, size in lengths if size > 0])
        for stripe, size in found.stripes:
            encoder = stripe.parity[0]
            if encoder == self._host:
                found.blocks[stripe.number] = [self._take() for _ in stripe.data]
            for block, host in enumerate(stripe.data):
                if self._host not in {host, encoder}:
                    continue
                parts = self._layout.parts(stripe, block, start, start + size, self._lead_of)
                count = sum(part.place.bytes for part in parts)
                if encoder == self._host:
                    arena = found.blocks[stripe.number][block]
                    arena[count:size] = 0
                    found.receives.append(Parcel(self._leads[host], arena[:count]))
                else:
                    arena = self._take()
                    for part in parts:
                        self._files.read(part.place, arena[part.at : part.at + part.place.bytes])
                    found.sent.append(arena)
                    found.sends.append(Parcel(self._leads[encoder], arena[:count]))
        return found

    # In the thread that encodes.

    def _encode(self, gathered: _Round) -> tuple[_Round, dict[int, list[Wire]]]:
        made = {}
        for stripe, size in gathered.stripes:
            arenas = gathered.blocks.pop(stripe.number, [])
            if arenas:
                made[stripe.number] = encode([arena[:size] for arena in arenas], len(stripe.parity))
                self._give(arenas)
        return gathered, made

    # In the caller's thread.

    def _spread(
        self, gathered: _Round, made: Mapping[int, list[Wire]], sends: list[Parcel], receives: list[Parcel]
    ) -> dict[tuple[int, int], tuple[int, Wire, Arena | None]]:
        """Add what encoders send the other hosts of their parity; return what this rank is to write."""
        arrived: dict[tuple[int, int], tuple[int, Wire, Arena | None]] = {}
        for stripe, size in gathered.stripes:
            for block, host in enumerate(stripe.parity):
                if stripe.number in made and host == self._host:
                    arrived[stripe.number, block] = (gathered.start, made[stripe.number][block], None)
                elif stripe.number in made:
                    sends.append(Parcel(self._leads[host], made[stripe.number][block]))
                elif host == self._host:
                    arena = self._take()
                    arrived[stripe.number, block] = (gathered.start, arena[:size], arena)
                    receives.append(Parcel(self._leads[stripe.parity[0]], arena[:size]))
        return arrived

    # In the thread that writes.

    def _write(self, arrived: Mapping[tuple[int, int], tuple[int, Wire, Arena | None]]) -> None:
        for key, (start, data, arena) in arrived.items():
            name, header, _ = self._outputs[key]
            self._files.write(name, header + start, data)
            self._sums[key].add(data)
            if arena is not None:
                self._arenas.give(arena)


class _Sums:
    """Checksums of blocks of bytes that come piece by piece."""

    def __init__(self, block_bytes: int) -> None:
        self._size = block_bytes
        self._rest = np.zeros(0, dtype=np.uint8)
        self._found: list[Checksums] = []

    def add(self, data: Wire) -> None:
        """The next bytes."""
        joined = np.concatenate((self._rest, data))
        whole = len(joined) // self._size * self._size
        self._found.append(block_checksums(joined[:whole].data, self._size))
        self._rest = joined[whole:].copy()

    def finish(self) -> Checksums:
        """All of them."""
        return np.concatenate((*self._found, block_checksums(self._rest.data, self._size)))
