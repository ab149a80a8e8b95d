"""Who reads what, when ranks share the reading: each block has one reader, and goes to the ranks that want some of it.

Made on rank 0, in two steps. First ranks report the blocks that they want; rank 0 decides whether to exchange, and
tells each rank who reads its blocks. A block's reader is one of the ranks that want it, so nobody reads what it does
not need (unless none of these has the file on its host), and readers have equally many bytes as far as that permits.
Then ranks report their regions, and each reader is told those of the ranks that it serves. Ranks that want the same
blocks form one *request*, and those of them that want the same regions one *client*; both are handled once.

A reader's blocks in the order of the files are its *line*, which is cut into *units* of equal size: what is read and sent
as a whole. Called by `loading`; what ranks make of the answers is `exchange_part`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from giantstep.errors import DisagreementError
from giantstep.planning.balance import Regions, balance
from giantstep.planning.block_sets import BlockTable, SharedRuns, cut_runs, shared_runs
from giantstep.planning.columns import pack_column, unpack_column
from giantstep.planning.load_tables import ChunkTable
from giantstep.shards.region import Int64s

Parts = tuple[bytes, ...]

# Ranks exchange unless told otherwise if together they would read more than this times the bytes that they want, ...
WORTH_RATIO = 1.1
# ... and at least this many bytes more: for fewer, agreeing on an exchange takes longer than reading them.
WORTH_BYTES = 4 << 20

# A reader that serves a client in less than one in so many of its regions is told those only.
_FEW = 4


@dataclass(frozen=True, slots=True)
class Request:
    """What some ranks want alike: the blocks, as runs."""

    ranks: Int64s
    first: Int64s
    count: Int64s


@dataclass(frozen=True, slots=True)
class Demand:
    """What the ranks that share their reading want.

    Attributes:
        requests: all ranks, each in one.
        runs: the blocks, by the requests that want them.
    """

    requests: list[Request]
    runs: SharedRuns

    def request_of(self, ranks: Int64s) -> Int64s:
        """Rows of the requests of ranks."""
        members = np.concatenate([request.ranks for request in self.requests])
        rows = np.repeat(np.arange(len(self.requests)), [len(request.ranks) for request in self.requests])
        order = np.argsort(members)
        found: Int64s = rows[order[np.searchsorted(members, ranks, sorter=order)]]
        return found

    def total_bytes(self, blocks: BlockTable) -> int:
        """Bytes that are read if every rank reads for itself."""
        sums = (int(blocks.bytes_of(found.first, found.count).sum()) * len(found.ranks) for found in self.requests)
        return sum(sums)

    def unique_bytes(self, blocks: BlockTable) -> int:
        """Bytes that are read if each block is read once."""
        return int(blocks.bytes_of(self.runs.first, self.runs.count).sum())


def pack_blocks(first: Int64s, count: Int64s) -> Parts:
    """Runs of blocks that a rank wants, as a report."""
    return pack_column(first), pack_column(count)


def check_cells(named: Sequence[bytes]) -> list[tuple[int, ...]]:
    """The groups of ranks that share their reading.

    Args:
        named: by rank, the packed ranks of the group that it gave.

    Raises:
        DisagreementError: a member gave another group.
    """
    found = {part: tuple(unpack_column(part).tolist()) for part in named}
    for rank, part in enumerate(named):
        for member in found[part]:
            if named[member] != part:
                raise DisagreementError(
                    f"exchange is the ranks {_listed(found[part])} on rank {rank}, and {_listed(found[named[member]])} on rank "
                    f"{member}, which is one of them. All ranks of a group must give the same one, and groups must not overlap."
                )
    return sorted(set(found.values()))


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks[:20])) + (" ..." if len(ranks) > 20 else "")


def demand_of(reports: Sequence[Parts], cell: Sequence[int]) -> Demand:
    """What the ranks of `cell` want; `reports` are those of all ranks, from `pack_blocks`, equal parts one object."""
    requests = []
    for ranks in _alike(reports, cell):
        first, count = map(unpack_column, reports[ranks[0]])
        requests.append(Request(np.array(ranks, dtype=np.int64), first, count))
    return Demand(requests, shared_runs([(request.first, request.count) for request in requests]))


def worthwhile(demands: Sequence[Demand], blocks: BlockTable) -> bool:
    """Whether sharing the reading is worth the effort; see `WORTH_RATIO`."""
    total = sum(demand.total_bytes(blocks) for demand in demands)
    unique = sum(demand.unique_bytes(blocks) for demand in demands)
    return total > WORTH_RATIO * unique and total - unique >= WORTH_BYTES


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who reads what for whom.

    Attributes:
        demand: what is wanted.
        first, count: [shares] runs of blocks within one file, ascending.
        reader: [shares] who reads each.
        line: [shares] where it begins on the reader's line.
        set_of: [shares] who wants it: a row of the demand's sets.
        unit_blocks: blocks of a unit, a power of two; ranks may agree on smaller units, see `exchange_part`.
        turns: readers take turns in so many groups: in a round, those of one group send a unit.
    """

    demand: Demand
    first: Int64s
    count: Int64s
    reader: Int64s
    line: Int64s
    set_of: Int64s
    unit_blocks: int
    turns: int

    def answers(self) -> Iterator[tuple[Int64s, Parts]]:
        """For ranks, the shares that they want or read; decoded by `exchange_part.spans_of`."""
        head = pack_column(np.array([self.unit_blocks, self.turns], dtype=np.int64))
        order, ends = self._by_set()
        sets, request = _pairs(self.demand.runs.sets)
        at, pair = _expanded(ends[sets], ends[sets + 1])
        # A reader is told of its blocks even if it wants nothing of them.
        wanting, reading = self.demand.request_of(self.reader), np.arange(len(self.first))
        request, share, _ = _distinct(np.append(request[pair], wanting), np.append(order[at], reading), np.zeros(1, np.int64))
        borders = np.searchsorted(request, np.arange(len(self.demand.requests) + 1))
        for number, (low, high) in enumerate(itertools.pairwise(borders.tolist())):
            rows = share[low:high]
            columns = (self.first[rows], self.count[rows], self.reader[rows], self.line[rows])
            yield self.demand.requests[number].ranks, (head, *map(pack_column, columns))

    def _by_set(self) -> tuple[Int64s, Int64s]:
        """Shares in the order of their sets, and where those of each set begin."""
        order = np.argsort(self.set_of, kind="stable")
        return order, np.searchsorted(self.set_of[order], np.arange(len(self.demand.runs.sets) + 1))

    def clients(self, regions: Sequence[Parts], chunks: ChunkTable, blocks: BlockTable) -> Iterator[tuple[int, Parts]]:
        """For each reader that serves others, who they are and what they want; decoded by `exchange_part.Clients`.

        Ranks with equal regions are one client. A reader gets all of a client's regions, as the client sent them, which
        many readers share; or only those of tensors of which it reads something for the client, if these are few.

        Args:
            regions: by rank: tensor, offset and size of its regions, packed; equal parts one object.
            chunks: chunks of all tensors.
            blocks: blocks of all files.
        """
        alike = [_alike(regions, found.ranks.tolist()) for found in self.demand.requests]
        ranks = [np.array(members, dtype=np.int64) for found in alike for members in found]
        ends = np.cumsum([0, *map(len, alike)])
        wanted = _Regions.of([regions[int(members[0])] for members in ranks], chunks.width)
        reader, request, tensor = self._served(chunks, blocks)
        new = np.flatnonzero(np.diff(reader, prepend=-1) | np.diff(request, prepend=-1))
        served = np.diff(np.append(new, len(reader)))
        # Pairs of a reader and a client, and where the reader's tensors for it begin.
        client, pair = _expanded(ends[request[new]], ends[request[new] + 1])
        alone = np.array([int(members[0]) if len(members) == 1 else -1 for members in ranks], dtype=np.int64)
        others = alone[client] != reader[new][pair]
        few = (served[pair] * _FEW < wanted.counts[client]) & others
        at, row = _expanded(new[pair[few]], (new + served)[pair[few]])
        chosen = _Chosen.of(wanted, reader[at], client[few][row], tensor[at])
        packed = [pack_column(members) for members in ranks]
        whole: dict[int, list[bytes]] = {}
        for number, found in zip(reader[new][pair[others & ~few]].tolist(), client[others & ~few].tolist(), strict=True):
            whole.setdefault(number, []).extend((packed[found], *regions[int(ranks[found][0])]))
        for number in sorted({*whole, *chosen.rows}):
            yield number, (*chosen.parts(number, wanted, ranks), *whole.get(number, ()))

    def _served(self, chunks: ChunkTable, blocks: BlockTable) -> tuple[Int64s, Int64s, Int64s]:
        """Distinct (reader, request, tensor) such that the reader reads blocks of the tensor that the request wants."""
        start, stop, tensor = _chunk_blocks(chunks, blocks)
        at, share = _expanded(
            np.searchsorted(stop, self.first, side="right"), np.searchsorted(start, self.first + self.count, side="left")
        )
        reader, sets, tensor = _distinct(self.reader[share], self.set_of[share], tensor[at])
        ends = np.cumsum([0, *map(len, self.demand.runs.sets)])
        _, request = _pairs(self.demand.runs.sets)
        at, row = _expanded(ends[sets], ends[sets + 1])
        return _distinct(reader[row], request[at], tensor[row])


def _alike(reports: Sequence[Parts], ranks: Sequence[int]) -> list[list[int]]:
    """Ranks with equal reports, whose parts are the same objects."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in ranks:
        found.setdefault(tuple(map(id, reports[rank])), []).append(rank)
    return list(found.values())


def assign(
    demand: Demand,
    blocks: BlockTable,
    *,
    exchange_bytes: int,
    read_bytes: int,
    access: NDArray[np.bool_] | None = None,
) -> Assignment:
    """Give every wanted block a reader.

    Args:
        demand: what is wanted.
        blocks: blocks of all files.
        exchange_bytes: most bytes that a rank receives in two rounds, but for units of one block.
        read_bytes: most bytes of a unit, at least a block.
        access: [files, ranks] who can read which file, at least one; None: all can read all. Blocks that nobody can read who
            wants them are read by others.
    """
    runs = demand.runs
    holders = [np.sort(np.concatenate([demand.requests[row].ranks for row in members])) for members in runs.sets]
    held_by = runs.set_of
    if access is not None:
        everyone = np.sort(np.concatenate([request.ranks for request in demand.requests]))
        runs, holders, held_by = _accessible(runs, holders, blocks, access, everyone)
    ranks = 1 + max(int(request.ranks.max()) for request in demand.requests)
    regions = Regions(runs.count, np.full(len(runs.count), blocks.block_bytes, dtype=np.int64))
    shares = balance(regions, holders, held_by, ranks, blocks.block_bytes)
    order = np.argsort(runs.first[shares.group] + shares.first)
    group = shares.group[order]
    first, count, share = cut_runs(runs.first[group] + shares.first[order], shares.count[order], blocks.ends)
    reader, set_of = shares.rank[order][share], runs.set_of[group][share]
    by_reader = np.argsort(reader, kind="stable")
    line = np.empty(len(first), dtype=np.int64)
    ends = np.cumsum(count[by_reader])
    begins = np.searchsorted(reader[by_reader], reader[by_reader], side="left")
    line[by_reader] = ends - count[by_reader] - (ends - count[by_reader])[begins]
    sources = _most_readers(runs.sets, set_of, reader)
    half = max(1, exchange_bytes // 2)
    # A power of two: units of half the size nest in it.
    unit_blocks = 1 << (max(1, min(half // max(1, sources), read_bytes) // blocks.block_bytes).bit_length() - 1)
    turns = max(1, -(-sources * unit_blocks * blocks.block_bytes // half)) if unit_blocks == 1 else 1
    return Assignment(demand, first, count, reader, line, set_of, unit_blocks, min(turns, max(1, sources)))


def _accessible(
    runs: SharedRuns, holders: Sequence[Int64s], blocks: BlockTable, access: NDArray[np.bool_], everyone: Int64s
) -> tuple[SharedRuns, list[Int64s], Int64s]:
    """Runs within one file each, sets of ranks that want them and can read them, and which of these each run has.

    Where nobody who wants a run can read it, the set is all of `everyone` who can.
    """
    first, count, row = cut_runs(runs.first, runs.count, blocks.ends)
    file = np.searchsorted(blocks.ends, first, side="right") - 1
    pairs, held_by = np.unique(runs.set_of[row] * len(access) + file, return_inverse=True)
    sets = [holders[pair // len(access)] for pair in pairs.tolist()]
    able = []
    for ranks, pair in zip(sets, pairs.tolist(), strict=True):
        can = access[pair % len(access)]
        found = ranks[can[ranks]]
        able.append(found if len(found) else everyone[can[everyone]])
    return SharedRuns(first, count, runs.set_of[row], runs.sets), able, held_by.reshape(-1)


def _most_readers(sets: Sequence[Int64s], set_of: Int64s, reader: Int64s) -> int:
    """Most readers that serve one request."""
    set_row, reader, _ = _distinct(set_of, reader, np.zeros_like(reader))
    ends = np.cumsum([0, *(len(members) for members in sets)])
    _, request = _pairs(sets)
    at, row = _expanded(ends[set_row], ends[set_row + 1])
    found, _, _ = _distinct(request[at], reader[row], np.zeros_like(row))
    return int(np.bincount(found).max(initial=0))


@dataclass(frozen=True, slots=True)
class _Regions:
    """The regions of all clients, one client after another; `order` sorts the rows of each by tensor, `key` is sorted."""

    counts: Int64s
    tensor: Int64s
    offset: Int64s
    size: Int64s
    order: Int64s
    key: Int64s
    tensors: int

    @classmethod
    def of(cls, packed: Sequence[Parts], width: int) -> _Regions:
        tensors = [unpack_column(parts[0]) for parts in packed]
        offset = np.concatenate([unpack_column(parts[1]).reshape(-1, width) for parts in packed])
        size = np.concatenate([unpack_column(parts[2]).reshape(-1, width) for parts in packed])
        tensor = np.concatenate(tensors)
        counts = np.array([len(rows) for rows in tensors], dtype=np.int64)
        most = int(tensor.max(initial=0)) + 1
        key = np.repeat(np.arange(len(tensors)), counts) * most + tensor
        order = np.argsort(key, kind="stable")
        return cls(counts, tensor, offset, size, order, key[order], most)

    def rows_of(self, client: Int64s, tensor: Int64s) -> tuple[Int64s, Int64s]:
        """Rows that some clients have of tensors, and to which of these each belongs."""
        key = client * self.tensors + tensor
        known = tensor < self.tensors
        low = np.searchsorted(self.key, key, side="left")
        high = np.where(known, np.searchsorted(self.key, key, side="right"), low)
        at, pair = _expanded(low, high)
        return self.order[at], pair


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Some regions of clients for readers, sorted by reader and client; `rows` are those of each reader."""

    client: Int64s
    at: Int64s
    rows: dict[int, slice]

    @classmethod
    def of(cls, wanted: _Regions, reader: Int64s, client: Int64s, tensor: Int64s) -> _Chosen:
        at, row = wanted.rows_of(client, tensor)
        reader, client = reader[row], client[row]
        order = np.lexsort((at, client, reader))
        readers, begins = np.unique(reader[order], return_index=True)
        ends = np.append(begins, len(order))[1:]
        columns = (readers.tolist(), begins.tolist(), ends.tolist())
        return cls(client[order], at[order], {number: slice(low, high) for number, low, high in zip(*columns, strict=True)})

    def parts(self, reader: int, wanted: _Regions, ranks: Sequence[Int64s]) -> Parts:
        """For one reader: sizes and ranks of the clients, how many regions of each, and these."""
        rows = self.rows.get(reader, slice(0, 0))
        served, counts = np.unique(self.client[rows], return_counts=True)
        members = [ranks[row] for row in served.tolist()]
        lengths = np.array(list(map(len, members)), dtype=np.int64)
        at = self.at[rows]
        listed = np.concatenate([np.zeros(0, dtype=np.int64), *members])
        return tuple(map(pack_column, (lengths, listed, counts, wanted.tensor[at], wanted.offset[at], wanted.size[at])))


def _chunk_blocks(chunks: ChunkTable, blocks: BlockTable) -> tuple[Int64s, Int64s, Int64s]:
    """Chunks in the order of the files: first and one past the last of their blocks, and their tensors."""
    order = np.lexsort((chunks.start, chunks.file))
    start = chunks.start[order]
    stop = start + (chunks.size.prod(axis=1) * chunks.chunk_item_bytes())[order]
    base = blocks.ends[chunks.file[order]]
    size = blocks.block_bytes
    return base + start // size, base - (-stop // size), chunks.tensors()[order]


def _pairs(sets: Sequence[Int64s]) -> tuple[Int64s, Int64s]:
    """(set, member) of all sets."""
    lengths = [len(members) for members in sets]
    return np.repeat(np.arange(len(sets)), lengths), np.concatenate([np.zeros(0, dtype=np.int64), *sets])


def _expanded(low: Int64s, high: Int64s) -> tuple[Int64s, Int64s]:
    """All numbers of ranges, and the range of each."""
    counts = np.maximum(high - low, 0)
    row = np.repeat(np.arange(len(low)), counts)
    return np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + low[row], row


def _distinct(a: Int64s, b: Int64s, c: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Distinct triples, sorted."""
    c = np.broadcast_to(c, a.shape)
    order = np.lexsort((c, b, a))
    a, b, c = a[order], b[order], c[order]
    new = np.ones(len(a), dtype=bool)
    new[1:] = (np.diff(a) != 0) | (np.diff(b) != 0) | (np.diff(c) != 0)
    return a[new], b[new], c[new]
