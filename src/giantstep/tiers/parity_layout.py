"""Which bytes of which files belong to which block of which stripe: from what a commit record says. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from giantstep.errors import BadArgumentError, CorruptionError
from giantstep.format.container import Entry, lay_out
from giantstep.format.data_file import file_metadata
from giantstep.format.names import data_file_name
from giantstep.format.record import CommitRecord, FileEntry
from giantstep.planning.stripe_losses import Losses, losses
from giantstep.planning.stripes import Stream, Stripe, block_bytes, data_range, parity_groups, stored_bytes, stripes_of
from giantstep.tiers.file_numbers import parity_number, parity_of_file
from giantstep.tiers.hosts import HostMap, Standing


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file, at most as many as a round carries."""

    name: str
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ParityLayout:
    """Stripes of one save.

    Attributes:
        hosts: all hosts and ranks of the save.
        stripes: of all groups.
        names: [hosts] names of the data files of each, in the order of its stream.
        streams: [hosts].
        save_id: of the save.
    """

    hosts: HostMap
    stripes: list[Stripe]
    names: list[list[str]]
    streams: list[Stream]
    save_id: str

    @classmethod
    def of(cls, save_id: str, hosts: HostMap, parity: tuple[int, int], files: Collection[FileEntry]) -> ParityLayout:
        """From the hosts of a save and its data files.

        Raises:
            BadArgumentError: there are too few hosts or failure domains for the parity.
        """
        k, m = parity
        groups: list[tuple[int, ...]] = []
        circles: dict[str, list[int]] = {}
        for number, standing in enumerate(hosts.standings):
            circles.setdefault(standing.circle, []).append(number)
        for members in circles.values():
            found = parity_groups([hosts.domain[host] for host in members], k, m)
            groups += [tuple(members[host] for host in group) for group in found]
        by_host: list[dict[str, int]] = [{} for _ in hosts.standings]
        for file in files:
            if parity_of_file(file.name) is None:
                by_host[hosts.host[file.rank]][file.name] = file.bytes
        names = [sorted(found) for found in by_host]
        streams = [Stream.of([found[name] for name in order]) for found, order in zip(by_host, names, strict=True)]
        return cls(hosts, stripes_of(groups, m), names, streams, save_id)

    @classmethod
    def of_record(cls, record: CommitRecord) -> ParityLayout | None:
        """That of a committed save; None if it has no parity.

        Raises:
            CorruptionError: no save with this parity writes such a record.
        """
        nodes = record.nodes
        if nodes is None or nodes.parity is None:
            return None
        standings = [Standing(*nodes.hosts[number]) for number in nodes.host_of_rank]
        try:
            layout = cls.of(record.save_id, HostMap.of(standings), nodes.parity, record.files)
        except BadArgumentError as error:
            raise CorruptionError(f"save {record.save_id} cannot have had the parity that its record says: {error}") from error
        expected = {layout.parity_file(stripe, block)[0] for stripe in layout.stripes for block in range(len(stripe.parity))}
        if expected != {file for file in record.files if parity_of_file(file.name) is not None}:
            raise CorruptionError(f"save {record.save_id} names other files of parity than its hosts and data files make")
        return layout

    @property
    def stream_bytes(self) -> list[int]:
        """[hosts] bytes of all data files."""
        return [stream.stream_bytes for stream in self.streams]

    def places(self, host: int, start: int, stop: int) -> list[Place]:
        """Where the bytes of a host's stream lie."""
        return [
            Place(self.names[host][piece.file], piece.offset, piece.length) for piece in self.streams[host].pieces(start, stop)
        ]

    def parity_file(self, stripe: Stripe, block: int) -> tuple[FileEntry, bytes]:
        """The file of a block of parity (the `block`-th of the stripe's), and its header."""
        host = stripe.parity[block]
        rank = self.hosts.leads[host]
        length = block_bytes(stripe, self.stream_bytes)
        entry = Entry(f"parity {block} of stripe {stripe.number} of group {stripe.group}", "U8", (length,), length)
        header, _ = lay_out([entry], file_metadata(self.save_id, rank))
        name = data_file_name(self.save_id, rank, parity_number(stripe.number, block))
        return FileEntry(name, len(header) + length, rank), header

    def parts(self, stripe: Stripe, block: int, start: int, stop: int, rank_of: Mapping[str, int]) -> list[Part]:
        """Bytes `start` to before `stop` of a block, as far as it has them; `rank_of` says by file who reads or writes it."""
        end = stored_bytes(stripe, block, self.stream_bytes)
        start, stop = min(start, end), min(stop, end)
        if block < len(stripe.data):
            host = stripe.data[block]
            first, _ = data_range(stripe, host, self.streams[host].stream_bytes)
            places = self.places(host, first + start, first + stop)
        else:
            file, header = self.parity_file(stripe, block - len(stripe.data))
            places = [Place(file.name, len(header) + start, stop - start)] if stop > start else []
        found, at = [], 0
        for place in places:
            found.append(Part(block, at, place, rank_of[place.name]))
            at += place.bytes
        return found

    def losses(self, lost: Collection[str]) -> Losses:
        """What becomes of lost files: which can be rebuilt out of what."""
        gone = set(lost)
        ranges: dict[int, list[tuple[int, int]]] = {}
        parity: dict[int, set[int]] = {}
        for host, (names, stream) in enumerate(zip(self.names, self.streams, strict=True)):
            found = [stream.range_of(row) for row, name in enumerate(names) if name in gone]
            if found:
                ranges[host] = found
        for stripe in self.stripes:
            for block, host in enumerate(stripe.parity):
                if self.parity_file(stripe, block)[0].name in gone:
                    parity.setdefault(host, set()).add(stripe.number)
        return losses(self.stripes, self.stream_bytes, (), ranges, parity)

    def is_enough(self, lost: Collection[str]) -> bool:
        """Whether all lost data can be rebuilt."""
        return not any(damage.lost_data(self.stream_bytes) for damage in self.losses(lost).missing)


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a block within a piece of its stripe.

    Attributes:
        block: number of the block.
        at: first byte within the piece.
        place: where they lie, or are to lie.
        rank: who reads them, or writes them.
    """

    block: int
    at: int
    place: Place
    rank: int


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of a stripe of which one rank rebuilds what is lost.

    Attributes:
        target: the rank.
        stripe: of which stripe.
        bytes: length of the piece.
        used: numbers of the blocks out of which the others are made: as many as the stripe has of data.
        helps: what is read of them, and sent; all other bytes of theirs count as zeros.
        made: what is made and written.
    """

    target: int
    stripe: Stripe
    bytes: int
    used: tuple[int, ...]
    helps: tuple[Part, ...]
    made: tuple[Part, ...]


def rebuild_jobs(
    layout: ParityLayout, lost: Collection[str], source: Mapping[str, int], target: Mapping[str, int], piece_bytes: int
) -> list[list[Job]]:
    """Rounds of jobs, in each one for every rank that rebuilds. All ranks make the same, from the same facts.

    Args:
        layout: of the save.
        lost: names of the files that no host has.
        source: by file, the rank that reads it.
        target: by lost data file, the rank that writes it.
        piece_bytes: most bytes of a piece.
    """
    queues: dict[int, list[Job]] = {}
    for repair in layout.losses(lost).repairs:
        stripe, used = repair.damage.stripe, tuple(one.block for one in repair.sources)
        data = [block for block in repair.damage.lost if block < len(stripe.data)]
        for start in range(repair.damage.start, repair.damage.stop, piece_bytes):
            stop = min(start + piece_bytes, repair.damage.stop)
            helps = tuple(part for block in used for part in layout.parts(stripe, block, start, stop, source))
            made = [part for block in data for part in layout.parts(stripe, block, start, stop, target)]
            for rank in sorted({part.rank for part in made}):
                own = tuple(part for part in made if part.rank == rank)
                queues.setdefault(rank, []).append(Job(rank, stripe, stop - start, used, helps, own))
    count = max(map(len, queues.values()), default=0)
    return [[queue[number] for _, queue in sorted(queues.items()) if number < len(queue)] for number in range(count)]
