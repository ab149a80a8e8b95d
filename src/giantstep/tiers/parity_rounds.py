"""Parity is made, and lost files are rebuilt out of it: in bounded rounds, each rank with the part that is its own.

All ranks make the same rounds, from the same facts, and go through them in the same order. In a round the bytes that somebody
needs are read and sent; then the rank that gets them computes, and writes or sends on what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import CorruptionError, GiantstepError, located
from giantstep.format.digests import Checksums, block_checksums
from giantstep.format.names import DATA_DIR
from giantstep.group.base import Group, Parcel
from giantstep.planning.stripes import Stripe, block_bytes
from giantstep.storage.base import ReadHandle, Store, WriteHandle
from giantstep.tiers.parity import encode, rebuild
from giantstep.tiers.parity_layout import Job, ParityLayout, Part, Place

Wire = NDArray[np.uint8]

# What a rank holds in a round is a few times its stripe's pieces; these have together so many bytes.
_ROUND_BYTES = 32 << 20


def piece_bytes_for(layout: ParityLayout) -> int:
    """Bytes of a piece of each block, so that a round keeps its bound."""
    widest = max((len(stripe.hosts) for stripe in layout.stripes), default=1)
    return max(64 << 10, _ROUND_BYTES // (2 * widest) // 4096 * 4096)


@dataclass(frozen=True, slots=True)
class ParityFile:
    """A file of parity that this rank has written: name, size, and the checksum of each block."""

    name: str
    bytes: int
    checksums: Checksums


@dataclass(frozen=True, slots=True)
class Circumstances:
    """How rounds are carried out.

    Attributes:
        group: the ranks.
        store: the place on this rank's host.
        block_bytes: of the checksums.
        phase, timeout_secs: for errors, and how long a rank may do nothing.
        check: called in every round; raises if it is not to be gone on with.
    """

    group: Group
    store: Store
    block_bytes: int
    phase: str
    timeout_secs: float
    check: Callable[[], None] = lambda: None

    @contextmanager
    def telling(self) -> Iterator[None]:
        """The others wait for what this rank would send: they are told at once if the block fails."""
        try:
            yield
        except Exception as error:
            if isinstance(error, GiantstepError) and error.agreed:
                raise
            raise self.group.withdraw(located(error, self.group.rank, self.phase)) from error

    def transfer(self, sends: list[Parcel], receives: list[Parcel]) -> int:
        """Send and receive; return the bytes that were sent."""
        rank, size = self.group.rank, self.group.size
        for parcels in (sends, receives):
            parcels.sort(key=lambda parcel: (parcel.peer - rank) % size)
        if sends or receives:
            self.group.transfer(sends, receives, self.phase, self.timeout_secs)
        return sum(parcel.data.size for parcel in sends)


class _Files:
    """Files of the place that are read and written at any offsets, open as long as they are used."""

    def __init__(self, store: Store, stack: ExitStack) -> None:
        self._store = store
        self._read: dict[str, ReadHandle] = {}
        self._written: dict[str, WriteHandle] = {}
        stack.callback(self.close)

    def read(self, place: Place, target: Wire) -> None:
        """Fill `target`."""
        handle = self._read.get(place.name)
        if handle is None:
            handle = self._read[place.name] = self._store.open_read(place.name)
        handle.read_into(place.offset, target.data)

    def create(self, name: str, size: int) -> None:
        """A new file; what a try before has left is in the way."""
        self._store.delete(name)
        self._written[name] = self._store.create(name, size, direct=False)

    def write(self, name: str, offset: int, data: Wire) -> None:
        """Write to a file that was created."""
        self._written[name].write_at(offset, data.data)

    def sync(self) -> None:
        """All that was written is durable."""
        for handle in self._written.values():
            handle.sync()
        if self._written:
            self._store.sync_names(DATA_DIR)

    def close(self) -> None:
        """Close everything."""
        for source in self._read.values():
            source.close()
        for target in self._written.values():
            target.close()


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


class _Making:
    def __init__(self, layout: ParityLayout, how: Circumstances, leads: Sequence[int], stack: ExitStack) -> None:
        self._layout, self._how, self._leads = layout, how, leads
        self._files = _Files(how.store, stack)
        self._piece = piece_bytes_for(layout)
        self._host = leads.index(how.group.rank)
        mine = [stripe for stripe in layout.stripes if self._host in stripe.hosts]
        self._length = {stripe.number: block_bytes(stripe, layout.stream_bytes) for stripe in mine}
        self._stripes = mine
        self._lead_of = {name: leads[host] for host, names in enumerate(layout.names) for name in names}
        self._outputs: dict[tuple[int, int], tuple[str, int, int]] = {}

    def run(self) -> tuple[list[ParityFile], int]:
        """All rounds of the stripes of this host's group."""
        how, layout = self._how, self._layout
        how.store.prepare(DATA_DIR)
        sums: dict[tuple[int, int], _Sums] = {}
        for stripe in self._stripes:
            for block, host in enumerate(stripe.parity):
                if host == self._host:
                    file, header = layout.parity_file(stripe, block)
                    self._files.create(file.name, file.bytes)
                    self._files.write(file.name, 0, np.frombuffer(header, dtype=np.uint8))
                    self._outputs[stripe.number, block] = (file.name, len(header), file.bytes)
                    sums[stripe.number, block] = _Sums(how.block_bytes)
                    sums[stripe.number, block].add(np.frombuffer(header, dtype=np.uint8))
        sent = 0
        for start in range(0, max(self._length.values(), default=0), self._piece):
            how.check()
            sent += self._round(start, sums)
        self._files.sync()
        return [ParityFile(name, size, sums[key].finish()) for key, (name, _, size) in self._outputs.items()], sent

    def _round(self, start: int, sums: Mapping[tuple[int, int], _Sums]) -> int:
        stripes = [stripe for stripe in self._stripes if start < self._length[stripe.number]]
        blocks: dict[int, list[Wire]] = {}
        sends: list[Parcel] = []
        receives: list[Parcel] = []
        for stripe in stripes:
            size = min(self._piece, self._length[stripe.number] - start)
            encoder = stripe.parity[0]
            if encoder == self._host:
                blocks[stripe.number] = [np.zeros(size, dtype=np.uint8) for _ in stripe.data]
            for block, host in enumerate(stripe.data):
                if self._host not in {host, encoder}:
                    continue
                for part in self._layout.parts(stripe, block, start, start + size, self._lead_of):
                    if host == self._host:
                        data = np.empty(part.place.bytes, dtype=np.uint8)
                        self._files.read(part.place, data)
                        sends.append(Parcel(self._leads[encoder], data))
                    else:
                        room = blocks[stripe.number][block][part.at : part.at + part.place.bytes]
                        receives.append(Parcel(part.rank, room))
        sent = self._how.transfer(sends, receives)
        made = {
            stripe.number: encode(blocks[stripe.number], len(stripe.parity)) for stripe in stripes if stripe.number in blocks
        }
        return sent + self._spread(stripes, start, made, sums)

    def _spread(
        self, stripes: Sequence[Stripe], start: int, made: Mapping[int, list[Wire]], sums: Mapping[tuple[int, int], _Sums]
    ) -> int:
        """The encoders of stripes send the other hosts of their parity what is theirs; all write their own."""
        sends: list[Parcel] = []
        receives: list[Parcel] = []
        arrived: dict[tuple[int, int], Wire] = {}
        for stripe in stripes:
            for block, host in enumerate(stripe.parity):
                if stripe.number in made and host == self._host:
                    arrived[stripe.number, block] = made[stripe.number][block]
                elif stripe.number in made:
                    sends.append(Parcel(self._leads[host], made[stripe.number][block]))
                elif host == self._host:
                    size = min(self._piece, self._length[stripe.number] - start)
                    room = arrived[stripe.number, block] = np.empty(size, dtype=np.uint8)
                    receives.append(Parcel(self._leads[stripe.parity[0]], room))
        sent = self._how.transfer(sends, receives)
        for key, data in arrived.items():
            name, header, _ = self._outputs[key]
            self._files.write(name, header + start, data)
            sums[key].add(data)
        return sent


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


def rebuild_files(
    rounds: Sequence[Sequence[Job]], sizes: Mapping[str, int], checksums: Mapping[str, Checksums], how: Circumstances
) -> int:
    """Carry out this rank's part of rebuilding lost files. Every rank calls it.

    Args:
        rounds: from `rebuild_jobs`; the same on all ranks.
        sizes: by file, its bytes.
        checksums: by file, those of its blocks.

    Returns:
        Bytes that this rank has sent.

    Raises:
        CorruptionError: what was rebuilt is not what was written: something that it was made of is damaged.
        OSError: a file cannot be read or written.
        GiantstepError: another rank failed, is lost or late; what it raised.
    """
    with how.telling(), ExitStack() as stack:
        files = _Files(how.store, stack)
        rank = how.group.rank
        written = sorted({part.place.name for jobs in rounds for job in jobs if job.target == rank for part in job.made})
        if written:
            how.store.prepare(DATA_DIR)
        for name in written:
            files.create(name, sizes[name])
        sent = sum(_rebuild_round(jobs, rank, files, how) for jobs in rounds)
        files.sync()
        files.close()
        for name in written:
            _check(how.store, name, sizes[name], checksums[name], how.block_bytes)
        return sent


def _rebuild_round(jobs: Sequence[Job], rank: int, files: _Files, how: Circumstances) -> int:
    how.check()
    sends: list[Parcel] = []
    receives: list[Parcel] = []
    for job in jobs:
        if job.target != rank:
            sends += [Parcel(job.target, _bytes_of(part, files)) for part in job.helps if part.rank == rank]
    mine = next((job for job in jobs if job.target == rank), None)
    blocks: dict[int, Wire] = {}
    if mine is not None:
        blocks = {block: np.zeros(mine.bytes, dtype=np.uint8) for block in mine.used}
        for part in mine.helps:
            room = blocks[part.block][part.at : part.at + part.place.bytes]
            if part.rank == rank:
                files.read(part.place, room)
            else:
                receives.append(Parcel(part.rank, room))
    sent = how.transfer(sends, receives)
    if mine is not None:
        wanted = sorted({part.block for part in mine.made})
        found = rebuild(blocks, len(mine.stripe.data), len(mine.stripe.parity), wanted)
        for part in mine.made:
            files.write(part.place.name, part.place.offset, found[part.block][part.at : part.at + part.place.bytes])
    return sent


def _bytes_of(part: Part, files: _Files) -> Wire:
    data = np.empty(part.place.bytes, dtype=np.uint8)
    files.read(part.place, data)
    return data


def _check(store: Store, name: str, size: int, checksums: Checksums, block_bytes_: int) -> None:
    step = max(1, (8 << 20) // block_bytes_) * block_bytes_
    handle = store.open_read(name)
    try:
        for start in range(0, size, step):
            data = np.empty(min(step, size - start), dtype=np.uint8)
            handle.read_into(start, data.data)
            first, found = start // block_bytes_, block_checksums(data.data, block_bytes_)
            if not np.array_equal(found, checksums[first : first + len(found)]):
                store.delete(name)
                raise CorruptionError(f"{name} was rebuilt out of parity, and is not what was written: a part of it is damaged")
    finally:
        handle.close()
