"""`ProtectedWrite`: the end of a save into the hosts' own places: write, copy to other hosts, commit on every host.

Every rank writes its part, in files that say who else writes the same; files that nobody else has are sent to other hosts.
Only when every file lies in as many failure domains as were asked for is the commit record written, on every host: where one
is found, all of that save was durable everywhere. Called by `save`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.commit.clean import discard_save, remove_superseded
from giantstep.commit.publish import current_record, publish_here, record_of
from giantstep.errors import BadArgumentError, CorruptionError, GiantstepError, PeerError, StoreError, VersionError
from giantstep.format.data_file import DataFilePlan, file_metadata
from giantstep.format.index import encode_index
from giantstep.format.names import DATA_DIR
from giantstep.format.record import FileEntry, Json, Nodes, decode_record, encode_record
from giantstep.group.base import Group, Parts, consult_parts
from giantstep.mapping.describe import Described
from giantstep.options import SaveOptions, Threads
from giantstep.planned_save import SavePlanner
from giantstep.planning.index_plan import MoreFiles, WriteReport, build_index
from giantstep.planning.write_part import CopyPart, WritePart
from giantstep.reports import size_text
from giantstep.sources import Content, PartSources, write_report
from giantstep.tiers.copying import FACTS_PARTS, Copying, FileFacts, plan_copies
from giantstep.tiers.courier import carry
from giantstep.tiers.file_numbers import group_numbers
from giantstep.tiers.hosts import HostMap, Standing
from giantstep.tiers.messages import moves_from, moves_to
from giantstep.tiers.node_store import NodeStore
from giantstep.tiers.parity_layout import ParityLayout
from giantstep.tiers.parity_rounds import make_parity
from giantstep.tiers.room import needed_bytes
from giantstep.tiers.rounds import Circumstances
from giantstep.writing.write import Written, WrittenFile, write

_LOG = logging.getLogger("giantstep")


@dataclass(frozen=True, slots=True)
class Protected:
    """What came of it.

    Attributes:
        tensors, objects, bytes: of the whole checkpoint.
        bytes_written: payload that this rank wrote, as a twin of others too.
        bytes_sent: of files, by this rank.
        bytes_spared: by all ranks together: copies that were not sent, because a rank of another host held the same.
    """

    tensors: int
    objects: int
    bytes: int
    bytes_written: int
    bytes_sent: int
    bytes_spared: int


class ProtectedWrite:
    """One save in progress on one rank.

    Args:
        group: the ranks.
        store: the place on this rank's host.
        save_id: of the save.
        options: of the save.
        planner: after it has come to a plan.
        content_metadata, metrics: for the commit record.
    """

    def __init__(
        self,
        group: Group,
        store: NodeStore,
        save_id: str,
        options: SaveOptions,
        planner: SavePlanner,
        content_metadata: Json,
        metrics: Mapping[str, float],
    ) -> None:
        self._group, self._store, self._save_id = group, store, save_id
        self._options, self._planner = options, planner
        self._content_metadata, self._metrics = content_metadata, metrics
        self._parity = store.protection.parity
        self._bytes_written = self._bytes_sent = 0
        # The commit record that was in force here when the save began.
        self._before: bytes | None = None
        # On rank 0.
        self._told: list[WriteReport] = []
        self._copying = Copying([], 0, [])

    def run(
        self, contents: Callable[[], Content], described: Described, threads: Threads, check: Callable[[], None]
    ) -> Protected:
        """All of it. `check` raises if the checkpoint must not be committed."""
        secs = self._options.timeout_secs
        if self._options.check_free_space:
            consult_parts(self._group, "write", secs, self._space, self._check_space)
        try:
            plan = consult_parts(
                self._group, "write", secs, lambda: self._write(contents(), described, threads, check), self._decide_copies
            )
            answer = consult_parts(self._group, "copy", secs, lambda: self._copy(plan, check), self._decide_commit, "commit")
        except GiantstepError as error:
            # Nobody has published before all have heard what to publish.
            if error.agreed and not isinstance(error, PeerError):
                self._discard()
            raise
        consult_parts(self._group, "commit", secs, lambda: self._publish(*answer[:3]))
        self._clean(answer[1])
        tensors, objects, total, spared = map(int, answer[3].split())
        return Protected(tensors, objects, total, self._bytes_written, self._bytes_sent, spared)

    def _discard(self) -> None:
        try:
            discard_save(self._store, self._save_id)
        except OSError as error:
            _LOG.warning("%s: files of a failed save could not be deleted: %s", self._store.location, error)

    def _clean(self, record: bytes) -> None:
        """Where this rank is its host's lead: delete what earlier saves to the place have left on it."""
        if not record:
            return
        try:
            remove_superseded(self._store, decode_record(record, self._store.location), self._before)
        except OSError as error:
            _LOG.warning("%s: files of superseded saves could not be deleted: %s", self._store.location, error)

    # Is there room?

    def _space(self) -> Parts:
        free = self._store.free_bytes()
        return self._store.standing.encode(), b"" if free is None else str(free).encode("ascii")

    def _check_space(self, reports: Sequence[Parts]) -> list[Parts]:
        hosts = HostMap.of([Standing.decode(report[0]) for report in reports])
        needed = needed_bytes(self._planner.planned(), hosts, self._store.protection.replicas, self._parity)
        for number, lead in enumerate(hosts.leads):
            free = reports[lead][1]
            if free and int(free) < needed[number]:
                raise StoreError(
                    f"host {hosts.standings[number].host} has {size_text(int(free))} of free space in its place of "
                    f"{self._store.location}, and the save needs {size_text(needed[number])} there. Nothing was written: make "
                    "room, or keep fewer steps; SaveOptions(check_free_space=False) tries all the same"
                )
        return [()] * len(reports)

    # Write.

    def _write(self, content: Content, described: Described, threads: Threads, check: Callable[[], None]) -> Parts:
        check()
        # Raises too if a commit record of somebody else's is there, which would be replaced.
        self._check_run()
        self._store.prepare(DATA_DIR)
        own = self._write_own(content, threads, check)
        twins = self._write_as_twin(described, threads, check)
        check()
        report = write_report(own, content.sources, list(content.chosen.objects)).encode()
        facts = FileFacts([file.name for file in twins], [file.bytes for file in twins], [file.checksums for file in twins])
        return (self._store.standing.encode(), *facts.encode(), *report)

    def _check_run(self) -> None:
        """Raise if another run's checkpoint would be replaced."""
        before, run = current_record(self._store), self._store.protection.run
        self._before = before
        try:
            nodes = None if before is None else decode_record(before, self._store.location).nodes
        except (CorruptionError, VersionError):
            # Nobody can load it.
            return
        if nodes is not None and nodes.run != run:
            raise BadArgumentError(
                f"{self._store.location} on host {self._store.standing.host} holds a checkpoint of the run {nodes.run!r}, and "
                f"this save is of the run {run!r}: save elsewhere, or remove it"
            )

    def _write_own(self, content: Content, threads: Threads, check: Callable[[], None]) -> Written:
        part, sources = self._planner.part, content.sources
        chunks = content.chunks
        groups = part.group if len(part.group) else np.zeros(chunks, dtype=np.int64)
        rows = [np.flatnonzero(groups == number) for number in range(int(groups.max(initial=-1)) + 1)]
        # Objects may be encoded otherwise by whoever holds the same: theirs are files that are always sent.
        rows.append(np.arange(chunks, len(sources.bytes)))
        plans, numbers = self._plans(content.chosen, rows, self._group.rank, range(len(rows)))
        self._bytes_written += int(sources.bytes.sum())
        rank, store = self._group.rank, self._store
        return write(store, self._save_id, rank, plans, sources, self._options, threads, check, numbers=numbers)

    def _plans(
        self, chosen: PartSources, rows: Sequence[NDArray[np.intp]], owner: int, groups: Sequence[int]
    ) -> tuple[list[DataFilePlan], list[int]]:
        metadata = file_metadata(self._save_id, owner)
        plans, numbers = [], []
        for group, found in zip(groups, rows, strict=True):
            if len(found):
                made = chosen.plans_of([found], self._options.max_file_bytes, metadata)
                plans += made
                numbers += group_numbers(group, len(made))
        return plans, numbers

    def _write_as_twin(self, described: Described, threads: Threads, check: Callable[[], None]) -> list[WrittenFile]:
        copies = self._planner.part.copies
        if not len(copies.row):
            return []
        chosen = PartSources(_as_part(copies), self._planner.description, described, {})
        sources = chosen.sources(chosen.layout(), self._options.buffer_bytes)
        self._bytes_written += int(sources.bytes.sum())
        found: list[WrittenFile] = []
        for owner in np.unique(copies.owner).tolist():
            mine = np.flatnonzero(copies.owner == owner)
            groups = np.unique(copies.group[mine]).tolist()
            rows = [mine[copies.group[mine] == group] for group in groups]
            plans, numbers = self._plans(chosen, rows, owner, groups)
            found += write(
                self._store, self._save_id, owner, plans, sources, self._options, threads, check, numbers=numbers
            ).files
        return found

    # Copy.

    def _decide_copies(self, reports: Sequence[Parts]) -> list[Parts]:
        self._hosts = HostMap.of([Standing.decode(report[0]) for report in reports])
        twins = [FileFacts.decode(report[1 : 1 + FACTS_PARTS]) for report in reports]
        self._told = [WriteReport.decode(report[1 + FACTS_PARTS :]) for report in reports]
        own = [
            FileFacts(
                told.file_names, told.file_bytes.tolist(), np.split(told.block_checksum, np.cumsum(told.file_blocks)[:-1])
            )
            if told.file_names
            else FileFacts([], [], [])
            for told in self._told
        ]
        copying = self._copying = plan_copies(self._planner.planned(), self._hosts, self._store.protection.replicas, own, twins)
        if copying.diverged:
            _LOG.warning(
                "%s: ranks that should hold the same hold different values; the first writer's are stored: %s",
                self._store.location,
                ", ".join(copying.diverged[:5]) + (" ..." if len(copying.diverged) > 5 else ""),
            )
        files = [
            [name, size, rank] for rank, facts in enumerate(own) for name, size in zip(facts.names, facts.bytes, strict=True)
        ]
        told = json.dumps([[report[0].decode("ascii") for report in reports], files if self._parity else []]).encode("ascii")
        moves = moves_to(copying.moves, len(reports), self._options.block_bytes)
        return [(told if self._parity else b"", *parts) for parts in moves]

    def _copy(self, plan: Parts, check: Callable[[], None]) -> Parts:
        if self._parity is not None:
            return self._make_parity(json.loads(plan[0]), check)
        piece_bytes, sends, receives = moves_from(plan[1:])
        done = carry(
            self._group,
            self._store,
            sends,
            receives,
            piece_bytes=piece_bytes,
            block_bytes=self._options.block_bytes,
            phase="copy",
            timeout_secs=self._options.timeout_secs,
            check=check,
        )
        if done.bad:
            raise CorruptionError(f"{done.bad[0]} did not arrive in {self._store.location} as it was written")
        check()
        self._bytes_sent = done.bytes_sent
        return FileFacts([], [], []).encode()

    def _make_parity(self, told: Any, check: Callable[[], None]) -> Parts:
        hosts = HostMap.of([Standing.decode(one.encode("ascii")) for one in told[0]])
        layout = ParityLayout.of(self._save_id, hosts, self._parity or (1, 1), [FileEntry(*file) for file in told[1]])
        options = self._options
        how = Circumstances(self._group, self._store, options.block_bytes, "copy", options.timeout_secs, check)
        made, self._bytes_sent = make_parity(layout, how)
        check()
        return FileFacts([one.name for one in made], [one.bytes for one in made], [one.checksums for one in made]).encode()

    # Commit.

    def _decide_commit(self, reports: Sequence[Parts]) -> list[Parts]:
        made = [FileFacts.decode(report) for report in reports]
        index, files = build_index(self._planner.planned(), self._told, more=_more_files(made))
        encoded = encode_index(index, self._save_id, self._options.block_bytes)
        protection, hosts = self._store.protection, self._hosts
        record = record_of(
            self._save_id,
            index,
            encoded,
            files,
            world_size=self._group.size,
            block_bytes=self._options.block_bytes,
            content_metadata=self._content_metadata,
            metrics=self._metrics,
            nodes=Nodes(
                protection.run,
                protection.generation,
                protection.replicas,
                protection.parity,
                tuple((one.host, one.domain, one.circle) for one in hosts.standings),
                hosts.host,
            ),
        )
        totals = record.totals
        numbers = f"{totals.tensors} {totals.objects} {totals.bytes} {self._copying.spared_bytes}".encode("ascii")
        held = self._held(files)
        data = encode_record(record)
        # Only the leads write them; parts that are equal travel once.
        leads = set(hosts.leads)
        return [
            (encoded.data, data, json.dumps(held[hosts.host[rank]]).encode("ascii"), numbers)
            if rank in leads
            else (b"", b"", b"", numbers)
            for rank in range(len(reports))
        ]

    def _held(self, files: tuple[FileEntry, ...]) -> list[list[str]]:
        """By host, the files that it holds."""
        hosts = self._hosts
        held: list[dict[str, None]] = [{} for _ in hosts.standings]
        for file in files:
            held[hosts.host[file.rank]][file.name] = None
        for name, _, _, target, _ in self._copying.moves:
            held[hosts.host[target]][name] = None
        return [list(names) for names in held]

    def _publish(self, index: bytes, record: bytes, held: bytes) -> Parts:
        if record:
            names = set(json.loads(held))
            files = decode_record(record, self._store.location).files
            here = tuple(file for file in files if file.name in names)
            publish_here(self._store, self._save_id, index, record, here)
        return ()


def _more_files(made: Sequence[FileFacts]) -> MoreFiles | None:
    """Files of parity, as the index has them."""
    files = [
        FileEntry(name, size, rank)
        for rank, facts in enumerate(made)
        for name, size in zip(facts.names, facts.bytes, strict=True)
    ]
    sums = [found for facts in made for found in facts.checksums]
    if not files:
        return None
    return MoreFiles(tuple(files), np.array(list(map(len, sums)), dtype=np.int64), np.concatenate(sums))


def _as_part(copies: CopyPart) -> WritePart:
    return WritePart(copies.row, copies.cut, copies.offset, copies.size, [], [], np.zeros(0, dtype=np.int64))
