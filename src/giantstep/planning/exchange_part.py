"""One rank's part of an exchange: what it reads, what it sends to whom, what it receives from whom, and in which round.

Sender and receiver make their messages independently, from the same regions and the same spans, so messages carry
bytes and nothing else. How large they are depends on what clients want that others want too, so only now is known whether
units are small enough: ranks halve theirs until all fit. Called by `arrange`; the plan comes from `exchange_plan`, and
`reading.exchange` carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.planning.block_sets import BlockTable
from giantstep.planning.columns import pack_column, unpack_column
from giantstep.planning.intersections import Intersections, intersections
from giantstep.planning.load_tables import ChunkTable, WantedTable
from giantstep.planning.pieces import Pieces, Runs, cut_pieces
from giantstep.shards.region import Int64s

# Where pieces begin in a message: every kind of element is aligned to it.
_ALIGNMENT = 16

Parts = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Spans:
    """Runs of blocks that a rank wants or reads, each within one unit of its reader; ascending.

    Attributes:
        first, count: [spans] blocks.
        reader: [spans] who reads them.
        unit: [spans] number of the reader's unit.
        place: [spans] byte of the unit at which the run begins.
        unit_bytes: size of a unit.
        turns: as in `exchange_plan.Assignment`.
    """

    first: Int64s
    count: Int64s
    reader: Int64s
    unit: Int64s
    place: Int64s
    unit_bytes: int
    turns: int

    def cuts(self, block_bytes: int) -> Runs:
        """The spans as cuts."""
        return Runs(self.first * block_bytes, (self.first + self.count) * block_bytes)

    def rounds(self) -> Int64s:
        """[spans] the round in which each is read and sent."""
        return self.unit * self.turns + self.reader % self.turns

    def of_reader(self, rank: int) -> Spans:
        """Those that one rank reads."""
        rows = self.reader == rank
        columns = (self.first[rows], self.count[rows], self.reader[rows], self.unit[rows], self.place[rows])
        return Spans(*columns, self.unit_bytes, self.turns)


def spans_of(answer: Parts, block_bytes: int, halvings: int = 0) -> Spans:
    """The spans that `exchange_plan.Assignment.answers` tells a rank, in units that are halved so many times."""
    head, first, count, reader, line = map(unpack_column, answer)
    planned, turns = head.tolist()
    size = max(1, planned >> halvings)
    parts = (line + count - 1) // size - line // size + 1
    share = np.repeat(np.arange(len(first)), parts)
    unit = np.arange(len(share)) - np.searchsorted(share, share, side="left") + (line // size)[share]
    begin = np.maximum(line[share], unit * size)
    end = np.minimum((line + count)[share], (unit + 1) * size)
    place = (begin - unit * size) * block_bytes
    return Spans(first[share] + begin - line[share], end - begin, reader[share], unit, place, size * block_bytes, turns)


def pack_regions(wanted: WantedTable) -> Parts:
    """A rank's regions as a report to `exchange_plan.Assignment.clients`."""
    return pack_column(wanted.tensor), pack_column(wanted.offset), pack_column(wanted.size)


@dataclass(frozen=True, slots=True)
class Clients:
    """Whom a reader serves.

    Attributes:
        ranks: of each client; the reader may be among them.
        wanted: their regions, client by client.
        client: [wanted] to which of them each region belongs.
    """

    ranks: list[list[int]]
    wanted: WantedTable
    client: Int64s

    @classmethod
    def of(cls, answer: Parts, width: int) -> Clients:
        """Decode the answer for a reader; it is empty for a rank that serves nobody."""
        if not answer:
            answer = (pack_column(np.zeros(0, dtype=np.int64)),) * 6
        lengths, listed, counts, *chosen = answer[:6]
        members = np.split(unpack_column(listed), np.cumsum(unpack_column(lengths)))[:-1]
        whole = [answer[start : start + 4] for start in range(6, len(answer), 4)]
        tables = [_wanted(chosen, width), *(_wanted(parts[1:], width) for parts in whole)]
        members += [unpack_column(parts[0]) for parts in whole]
        rows = np.array([*unpack_column(counts).tolist(), *(len(table.tensor) for table in tables[1:])], dtype=np.int64)
        wanted = WantedTable(
            *(np.concatenate([getattr(table, name) for table in tables]) for name in ("tensor", "offset", "size", "partial"))
        )
        return cls([found.tolist() for found in members], wanted, np.repeat(np.arange(len(rows)), rows))


def _wanted(columns: Sequence[bytes], width: int) -> WantedTable:
    """Packed regions; that a reader does not have all of them is fine."""
    tensor, offset, size = map(unpack_column, columns)
    return WantedTable(tensor, offset.reshape(-1, width), size.reshape(-1, width), np.ones(len(tensor), dtype=bool))


@dataclass(frozen=True, slots=True)
class Message:
    """Pieces that travel together.

    Attributes:
        peer: who reads them, or the client that wants them.
        first, last: rows of the pieces.
        bytes: size on the wire.
    """

    peer: int
    first: int
    last: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Messages:
    """Pieces in messages.

    Attributes:
        chunks: what the pieces refer to.
        pieces: message by message.
        slot: [pieces] byte of its message at which each begins. Equal pieces have one slot.
        place: [pieces] byte of its reader's unit at which each begins.
        by_round: messages of each round.
    """

    chunks: ChunkTable
    pieces: Pieces
    slot: Int64s
    place: Int64s
    by_round: dict[int, list[Message]]


def messages_of(chunks: ChunkTable, pieces: Pieces, peer: Int64s, spans: Spans, block_bytes: int) -> Messages:
    """Group pieces by round and peer.

    Args:
        chunks, pieces: cut by `spans`.
        peer: [pieces].
        spans: with the round of each.
        block_bytes: of the checkpoint.
    """
    turn = spans.rounds()[pieces.span]
    sizes = [pieces.size[:, axis] for axis in range(pieces.size.shape[1])]
    order = np.lexsort((pieces.wanted, *sizes, pieces.start, peer, turn))
    pieces, peer, turn = pieces.rows(order), peer[order], turn[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (turn[1:] != turn[:-1]) | (peer[1:] != peer[:-1])
    # The same bytes for several regions: they travel once.
    again = ~new
    again[1:] &= (pieces.start[1:] == pieces.start[:-1]) & (pieces.size[1:] == pieces.size[:-1]).all(axis=1)
    room = pieces.size.prod(axis=1) * chunks.chunk_item_bytes()[pieces.chunk]
    room = np.where(again, 0, -(-room // _ALIGNMENT) * _ALIGNMENT)
    ends = np.cumsum(room)
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(order))[: len(first)]
    begin = ends[first] - room[first]
    slot = ends - room - begin[np.cumsum(new) - 1]
    # A piece that is there already has the slot of the last one that is not.
    latest = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    slot = slot[latest]
    place = spans.place[pieces.span] + pieces.start - spans.first[pieces.span] * block_bytes
    by_round: dict[int, list[Message]] = {}
    columns = (turn[first], peer[first], first, last, ends[last - 1] - begin)
    for number, who, low, high, size in zip(*(column.tolist() for column in columns), strict=True):
        by_round.setdefault(number, []).append(Message(who, low, high, size))
    return Messages(chunks, pieces, slot, place, by_round)


@dataclass(frozen=True, slots=True)
class UnitRead:
    """Consecutive blocks that a reader reads: file, first byte, one past the last, and where in the unit they go."""

    file: int
    start: int
    stop: int
    place: int


@dataclass(frozen=True, slots=True)
class ExchangePart:
    """What one rank does.

    Attributes:
        unit_bytes: most bytes that it reads for one round.
        reads: by round.
        wanted: its own pieces; the peers are their readers, itself among them.
        sent: pieces for others; the peers are rows of `clients`.
        together: by round, the messages sent; those of equal bytes, which are packed once, in one list.
        clients: ranks by client.
        packed_bytes, received_bytes: most bytes that it packs, or receives from others, in one round.
    """

    unit_bytes: int
    reads: dict[int, list[UnitRead]]
    wanted: Messages
    sent: Messages
    together: dict[int, list[list[Message]]]
    clients: list[list[int]]
    packed_bytes: int
    received_bytes: int


def exchange_part(
    rank: int, chunks: ChunkTable, found: Intersections, spans: Spans, clients: Clients, blocks: BlockTable
) -> ExchangePart:
    """Work out what a rank reads, sends and receives.

    Args:
        rank: the rank.
        chunks: chunks of all tensors.
        found: what the rank wants of them.
        spans: all blocks that it wants or reads.
        clients: whom it serves.
        blocks: blocks of all files.
    """
    base, size = blocks.ends[:-1] * blocks.block_bytes, blocks.block_bytes
    own = cut_pieces(chunks, found, base, spans.cuts(size), size)
    wanted = messages_of(chunks, own, spans.reader[own.span], spans, size)
    duty = spans.of_reader(rank)
    # Of the chunks only those that it reads: clients want much besides.
    read = chunks.rows(_touched(chunks, base, duty.cuts(size)))
    served = cut_pieces(read, intersections(read, clients.wanted), base, duty.cuts(size), size)
    sent = messages_of(read, served, clients.client[served.wanted], duty, size)
    together = {number: _alike(sent, messages) for number, messages in sent.by_round.items()}
    packed = (sum(alike[0].bytes for alike in found) for found in together.values())
    received = (sum(found.bytes for found in messages if found.peer != rank) for messages in wanted.by_round.values())
    return ExchangePart(
        spans.unit_bytes,
        _reads(duty, blocks),
        wanted,
        sent,
        together,
        clients.ranks,
        max(packed, default=0),
        max(received, default=0),
    )


def _alike(sent: Messages, messages: Sequence[Message]) -> list[list[Message]]:
    """Messages of one round, those of equal bytes together: what several clients want alike, as all of some tensors."""
    found: dict[tuple[bytes, ...], list[Message]] = {}
    for message in messages:
        rows = slice(message.first, message.last)
        key = (sent.place[rows].tobytes(), sent.slot[rows].tobytes(), sent.pieces.size[rows].tobytes())
        found.setdefault(key, []).append(message)
    return list(found.values())


def _touched(chunks: ChunkTable, base: Int64s, spans: Runs) -> Int64s:
    """Chunks of which some byte lies in one of the spans."""
    start = base[chunks.file] + chunks.start
    first, last = spans.between(start, start + chunks.size.prod(axis=1) * chunks.chunk_item_bytes())
    return np.flatnonzero(first < last)


def _reads(duty: Spans, blocks: BlockTable) -> dict[int, list[UnitRead]]:
    """Spans that follow each other in one file, joined."""
    reads: dict[int, list[UnitRead]] = {}
    end = (-1, -1)
    for number, first, count, place in zip(
        *(column.tolist() for column in (duty.rounds(), duty.first, duty.count, duty.place)), strict=True
    ):
        file, start = blocks.place(first)
        stop = start + count * blocks.block_bytes
        found = reads.setdefault(number, [])
        if found and end == (file, start):
            found[-1] = UnitRead(file, found[-1].start, stop, found[-1].place)
        else:
            found.append(UnitRead(file, start, stop, place))
        end = (file, stop)
    return reads
