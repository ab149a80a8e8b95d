"""The plan of an exchange: every wanted element comes once, from one reader; every wanted block is read once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.errors import DisagreementError
from giantstep.planning.block_sets import BlockTable
from giantstep.planning.columns import pack_column
from giantstep.planning.exchange_part import Clients, ExchangePart, Message, Messages, exchange_part, pack_regions, spans_of
from giantstep.planning.exchange_plan import (
    WORTH_BYTES,
    Assignment,
    assign,
    check_cells,
    demand_of,
    pack_blocks,
    worthwhile,
)
from giantstep.planning.intersections import intersections
from giantstep.planning.load_tables import ChunkTable, tabulate_wanted
from giantstep.planning.pieces import Grid, cut_pieces
from giantstep.shards.region import Region
from layouts import partitions, regions

SHAPE, BLOCK = (6, 5, 4), 32
Parts = tuple[bytes, ...]


def interned(reports: list[Parts]) -> list[Parts]:
    """Equal parts as one object, as a group hands them to rank 0."""
    kept: dict[bytes, bytes] = {}
    return [tuple(kept.setdefault(part, part) for part in report) for report in reports]


class Planned:
    """A plan for two tensors of 4 and 2 bytes per element, whose chunks lie in two files."""

    def __init__(
        self, chunks: list[list[Region]], wanted: list[list[tuple[int, Region]]], exchange_bytes: int, read: int
    ) -> None:
        items = [4, 2]
        place = [64, 64]
        files, starts, offsets, sizes = [], [], [], []
        for tensor, held in enumerate(chunks):
            for number, chunk in enumerate(held):
                file = number % 2
                files.append(file)
                starts.append(place[file])
                place[file] += chunk.elements * items[tensor]
                offsets.append(chunk.offset)
                sizes.append(chunk.size)
        self.chunks = ChunkTable(
            ends=np.cumsum([0, *map(len, chunks)]),
            item_bytes=np.array(items),
            file=np.array(files),
            start=np.array(starts),
            offset=np.array(offsets),
            size=np.array(sizes),
        )
        counts = [-(-size // BLOCK) for size in place]
        self.blocks = BlockTable(np.array([0, counts[0], sum(counts)]), np.array(place), BLOCK)
        self.wanted = [
            tabulate_wanted([row for row, _ in rows], [region for _, region in rows], [False] * len(rows), 3) for rows in wanted
        ]
        self.found = [intersections(self.chunks, table) for table in self.wanted]
        self.own_blocks = [self._blocks_of(rank) for rank in range(len(wanted))]
        reports = interned([self._report(held) for held in self.own_blocks])
        self.demand = demand_of(reports, range(len(wanted)))
        self.assignment: Assignment = assign(self.demand, self.blocks, exchange_bytes=exchange_bytes, read_bytes=read)
        self.parts = self._parts()

    def _blocks_of(self, rank: int) -> set[int]:
        base = self.blocks.ends[:-1] * BLOCK
        pieces = cut_pieces(self.chunks, self.found[rank], base, Grid(1 << 40), BLOCK)
        spans = zip(pieces.start.tolist(), pieces.stop.tolist(), strict=True)
        return {block for start, stop in spans for block in range(start // BLOCK, -(-stop // BLOCK))}

    def _report(self, held: set[int]) -> Parts:
        first = np.array(sorted(held), dtype=np.int64)
        new = np.flatnonzero(np.diff(first, prepend=-2) > 1)
        return pack_blocks(first[new], np.diff(np.append(new, len(first))))

    def _parts(self) -> list[ExchangePart]:
        answers: dict[int, Parts] = {}
        for ranks, parts in self.assignment.answers():
            answers |= dict.fromkeys(ranks.tolist(), parts)
        reports = interned([pack_regions(table) for table in self.wanted])
        clients = dict(self.assignment.clients(reports, self.chunks, self.blocks))
        return [
            exchange_part(
                rank,
                self.chunks,
                self.found[rank],
                spans_of(answers[rank], BLOCK),
                Clients.of(clients.get(rank, ()), 3),
                self.blocks,
            )
            for rank in range(len(self.wanted))
        ]


def contents(messages: Messages, message: Message) -> list[tuple[object, ...]]:
    """What a message holds, slot by slot."""
    pieces, chunks = messages.pieces, messages.chunks
    found = set()
    for row in range(message.first, message.last):
        place = int(chunks.file[pieces.chunk[row]]), int(chunks.start[pieces.chunk[row]])
        box = tuple(pieces.offset[row].tolist()), tuple(pieces.size[row].tolist())
        found.add((int(messages.slot[row]), place, box))
    return sorted(found)


@st.composite
def layouts(draw: st.DrawFn) -> Planned:
    ranks = draw(st.integers(1, 6))
    chunks = [draw(partitions(SHAPE)) for _ in range(2)]
    kinds = [
        draw(st.lists(st.tuples(st.integers(0, 1), regions(SHAPE)), max_size=3)) for _ in range(draw(st.integers(1, ranks)))
    ]
    # Some ranks want the same.
    wanted = [kinds[draw(st.integers(0, len(kinds) - 1))] for _ in range(ranks)]
    filled = [[(tensor, region) for tensor, region in rows if region.elements] for rows in wanted]
    return Planned(chunks, filled, draw(st.sampled_from([64, 256, 4096])), draw(st.sampled_from([1, 64, 4096])))


@settings(max_examples=400, deadline=None)
@given(layouts())
def test_each_wanted_element_comes_once_and_each_wanted_block_is_read_once(planned: Planned) -> None:
    read: list[int] = []
    for rank, part in enumerate(planned.parts):
        reads = [(number, item) for number, items in part.reads.items() for item in items]
        for number, item in reads:
            first = int(planned.blocks.ends[item.file]) + item.start // BLOCK
            mine = range(first, first + (item.stop - item.start) // BLOCK)
            # A reader reads nothing that it does not want itself, and no unit is larger than its buffer.
            assert planned.own_blocks[rank] >= set(mine)
            assert item.place + item.stop - item.start <= part.unit_bytes
            read += mine
            assert number in part.wanted.by_round
        table = planned.wanted[rank]
        seen = np.zeros((len(table.tensor), *SHAPE), dtype=int)
        pieces = part.wanted.pieces
        for wanted, offset, size in zip(pieces.wanted.tolist(), pieces.offset.tolist(), pieces.size.tolist(), strict=True):
            seen[wanted][Region(tuple(offset), tuple(size)).slices()] += 1
        for row in range(len(table.tensor)):
            expected = np.zeros(SHAPE, dtype=int)
            expected[Region(tuple(table.offset[row].tolist()), tuple(table.size[row].tolist())).slices()] = 1
            assert (seen[row] == expected).all()
    assert len(read) == len(set(read))
    assert set(read) == set().union(*planned.own_blocks)


@settings(max_examples=400, deadline=None)
@given(layouts())
def test_sender_and_receiver_make_the_same_messages_without_a_header(planned: Planned) -> None:
    sent: dict[tuple[int, int, int], tuple[int, object]] = {}
    for reader, part in enumerate(planned.parts):
        for number, messages in part.sent.by_round.items():
            assert number in part.reads
            for message in messages:
                for receiver in part.clients[message.peer]:
                    if receiver != reader:
                        assert (reader, receiver, number) not in sent
                        sent[reader, receiver, number] = (message.bytes, contents(part.sent, message))
    received = {
        (message.peer, receiver, number): (message.bytes, contents(part.wanted, message))
        for receiver, part in enumerate(planned.parts)
        for number, messages in part.wanted.by_round.items()
        for message in messages
        if message.peer != receiver
    }
    assert sent == received


def test_a_reader_is_told_only_the_regions_that_concern_it() -> None:
    """200 tensors of a block each, wanted by eight ranks that read 25 of them each; two of them by a ninth."""
    chunks = ChunkTable(
        ends=np.arange(201),
        item_bytes=np.full(200, 4),
        file=np.zeros(200, dtype=np.int64),
        start=np.arange(200) * 4096,
        offset=np.zeros((200, 1), dtype=np.int64),
        size=np.full((200, 1), 1024),
    )
    blocks = BlockTable(np.array([0, 200]), np.array([200 * 4096]), 4096)
    held = [*([np.arange(200)] * 8), np.array([3, 150])]
    tables = [tabulate_wanted(rows.tolist(), [Region((0,), (1024,))] * len(rows), [False] * len(rows), 1) for rows in held]
    # Ranks 0 to 3 are one client, the others differ in a region.
    for rank in range(4, 8):
        tables[rank].offset[rank, 0], tables[rank].size[rank, 0] = 1, 1023
    demand = demand_of(interned([pack_blocks(rows, np.ones(len(rows), dtype=np.int64)) for rows in held]), range(9))
    plan = assign(demand, blocks, exchange_bytes=1 << 20, read_bytes=1 << 16)
    told = dict(plan.clients(interned([pack_regions(table) for table in tables]), chunks, blocks))
    for reader in range(8):
        clients = Clients.of(told[reader], 1)
        shares = zip(plan.first.tolist(), plan.count.tolist(), plan.reader.tolist(), strict=True)
        mine = {block for first, count, who in shares if who == reader for block in range(first, first + count)}
        expected = [[0, 1, 2, 3], *([rank] for rank in range(4, 8) if rank != reader)]
        assert sorted(clients.ranks) == sorted([*expected, *([[8]] if mine & {3, 150} else [])])
        for number, ranks in enumerate(clients.ranks):
            chosen = clients.wanted.tensor[clients.client == number]
            assert set(chosen.tolist()) == (mine if ranks != [8] else {3, 150})
            assert len(chosen) == len(set(chosen.tolist()))
            if ranks[0] in chosen.tolist() and ranks != [8]:
                row = clients.wanted.size[clients.client == number][chosen.tolist().index(ranks[0])]
                assert row.tolist() == [1024 if ranks[0] == 0 else 1023]


def halves(count: int, ranks: int, exchange_bytes: int = 1 << 20) -> Planned:
    """Both tensors in few chunks; all ranks want everything, `count` blocks or so."""
    chunks = [[Region((0, 0, 0), (count, 1, 8))], [Region((0, 0, 0), (1, 1, 8))]]
    everything = [(0, Region((0, 0, 0), (count, 1, 8))), (1, Region((0, 0, 0), (1, 1, 8)))]
    return Planned(chunks, [everything] * ranks, exchange_bytes, 4096)


def test_replicas_read_equally_much() -> None:
    planned = halves(800, 8)
    loads = np.bincount(planned.assignment.reader, weights=planned.assignment.count)
    assert len(loads) == 8
    assert loads.max() / loads.mean() <= 1.05
    assert loads.sum() == len(set().union(*planned.own_blocks))


def test_what_a_rank_receives_in_two_rounds_is_bounded() -> None:
    for exchange_bytes in (640, 2048, 8192):
        planned = halves(400, 8, exchange_bytes)
        for rank, part in enumerate(planned.parts):
            inbound = [
                sum(message.bytes for message in part.wanted.by_round[number] if message.peer != rank)
                for number in sorted(part.wanted.by_round)
            ]
            assert max(inbound) > 0
            assert max(inbound) * 2 <= exchange_bytes


def test_equal_pieces_of_one_rank_travel_once() -> None:
    chunks = [[Region((0, 0, 0), (64, 1, 8))], [Region((0, 0, 0), (1, 1, 8))]]
    whole = (0, Region((0, 0, 0), (64, 1, 8)))
    once, twice = (Planned(chunks, [[whole] * times] * 2, 1 << 20, 4096) for times in (1, 2))
    sizes = [
        sum(message.bytes for messages in planned.parts[0].wanted.by_round.values() for message in messages)
        for planned in (once, twice)
    ]
    assert sizes[0] == sizes[1] > 0


def demand_of_blocks(wanted: list[int]) -> tuple[list[object], BlockTable]:
    """Every rank wants the first of so many blocks of 64 KiB."""
    table = BlockTable(np.array([0, 1 << 20]), np.array([1 << 36]), 1 << 16)
    reports = interned([pack_blocks(np.array([0]), np.array([count])) for count in wanted])
    return [demand_of(reports, range(len(wanted)))], table


def test_an_exchange_is_worth_it_only_above_both_thresholds() -> None:
    enough = WORTH_BYTES >> 16
    assert worthwhile(*demand_of_blocks([enough, enough]))
    assert not worthwhile(*demand_of_blocks([enough, enough - 1]))
    assert worthwhile(*demand_of_blocks([20 * enough, 3 * enough]))
    assert not worthwhile(*demand_of_blocks([20 * enough, 2 * enough]))
    assert not worthwhile(*demand_of_blocks([20 * enough]))


def test_groups_that_overlap_or_that_a_member_does_not_name_are_refused() -> None:
    def named(*groups: list[int]) -> list[bytes]:
        return [pack_column(np.array(group, dtype=np.int64)) for group in groups]

    assert check_cells(named([0, 2], [1], [0, 2])) == [(0, 2), (1,)]
    with pytest.raises(DisagreementError, match=r"0, 1 on rank 0, and 1, 2 on rank 1"):
        check_cells(named([0, 1], [1, 2], [1, 2]))
