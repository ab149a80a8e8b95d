"""Lost files are rebuilt out of parity: in bounded rounds, each rank with the part that is its own. Called by `gathering`.

While what a round needs travels, the next one is read, and the last one computed and written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from giantstep.errors import CorruptionError
from giantstep.format.digests import Checksums, block_checksums
from giantstep.format.names import DATA_DIR
from giantstep.group.base import Parcel
from giantstep.storage.arenas import Arena, Arenas
from giantstep.storage.base import Store
from giantstep.storage.buffers import device_buffer
from giantstep.tiers.parity import rebuild
from giantstep.tiers.parity_layout import Job, Part
from giantstep.tiers.rounds import Circumstances, Files

_CHECKED_BYTES = 8 << 20


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
        rank = how.group.rank
        written = sorted({part.place.name for jobs in rounds for job in jobs if job.target == rank for part in job.made})
        if written:
            how.store.prepare(DATA_DIR)
        files = Files(how.store, stack)
        for name in written:
            files.create(name, sizes[name])
        sent = _Rebuilding(rounds, files, how, stack).run()
        files.sync()
        files.close()
        for name in written:
            _check(how.store, name, sizes[name], checksums[name], how.block_bytes)
        return sent


@dataclass(slots=True)
class _Round:
    """Jobs of a round, as far as they are this rank's.

    Attributes:
        sends, receives: of data and parity.
        sent: memory of what is sent.
        mine: the job of which this rank is the target.
        blocks: memory of the blocks out of which it rebuilds.
    """

    sends: list[Parcel] = field(default_factory=list)
    receives: list[Parcel] = field(default_factory=list)
    sent: list[Arena] = field(default_factory=list)
    mine: Job | None = None
    blocks: dict[int, Arena] = field(default_factory=dict)


class _Rebuilding:
    def __init__(self, rounds: Sequence[Sequence[Job]], files: Files, how: Circumstances, stack: ExitStack) -> None:
        self._rounds, self._files, self._how = rounds, files, how
        self._rank = how.group.rank
        self._arenas = Arenas()
        self._arena_bytes = max((job.bytes for jobs in rounds for job in jobs), default=0)
        self._reader = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="giantstep-rebuild-read"))
        self._writer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="giantstep-rebuild-write"))

    def run(self) -> int:
        """All rounds; bytes that were sent."""
        sent = 0
        reading = [self._reader.submit(self._read, jobs) for jobs in self._rounds[:1]]
        writing: list[Future[None]] = []
        for number in range(len(self._rounds)):
            self._how.check()
            found = reading.pop().result()
            reading = [self._reader.submit(self._read, jobs) for jobs in self._rounds[number + 1 : number + 2]]
            # If it fails, what gloo may still read and write is not used again.
            sent += self._how.transfer(found.sends, found.receives)
            for arena in found.sent:
                self._arenas.give(arena)
            for one in writing:
                one.result()
            writing = [self._writer.submit(self._write, found)]
        for one in writing:
            one.result()
        return sent

    # In the thread that reads.

    def _read(self, jobs: Sequence[Job]) -> _Round:
        found = _Round()
        for job in jobs:
            if job.target != self._rank:
                self._read_helps(job, found)
                continue
            found.mine = job
            ends = dict.fromkeys(job.used, 0)
            found.blocks = {block: self._arenas.take(self._arena_bytes) for block in job.used}
            for part in job.helps:
                room = _room(found.blocks[part.block], part)
                ends[part.block] = part.at + part.place.bytes
                if part.rank == self._rank:
                    self._files.read(part.place, room)
                else:
                    found.receives.append(Parcel(part.rank, room))
            for block, end in ends.items():
                found.blocks[block][end : job.bytes] = 0
        return found

    def _read_helps(self, job: Job, found: _Round) -> None:
        # The parts of a block lie one after another: one arena holds them.
        blocks: dict[int, Arena] = {}
        for part in job.helps:
            if part.rank == self._rank:
                if part.block not in blocks:
                    blocks[part.block] = self._arenas.take(self._arena_bytes)
                room = _room(blocks[part.block], part)
                self._files.read(part.place, room)
                found.sends.append(Parcel(job.target, room))
        found.sent += blocks.values()

    # In the thread that writes.

    def _write(self, found: _Round) -> None:
        job = found.mine
        if job is None:
            return
        blocks = {block: arena[: job.bytes] for block, arena in found.blocks.items()}
        wanted = sorted({part.block for part in job.made})
        made = rebuild(blocks, len(job.stripe.data), len(job.stripe.parity), wanted)
        for part in job.made:
            self._files.write(part.place.name, part.place.offset, _room(made[part.block], part))
        for arena in found.blocks.values():
            self._arenas.give(arena)


def _room(block: Arena, part: Part) -> Arena:
    return block[part.at : part.at + part.place.bytes]


def _check(store: Store, name: str, size: int, checksums: Checksums, block_bytes: int) -> None:
    step = max(1, _CHECKED_BYTES // block_bytes) * block_bytes
    handle = store.open_read(name)
    try:
        buffer = device_buffer(min(step, size))
        for start in range(0, size, step):
            data = buffer[: min(step, size - start)]
            handle.read_into(start, data.data)
            first, found = start // block_bytes, block_checksums(data.data, block_bytes)
            if not np.array_equal(found, checksums[first : first + len(found)]):
                store.delete(name)
                raise CorruptionError(f"{name} was rebuilt out of parity, and is not what was written: a part of it is damaged")
    finally:
        handle.close()
