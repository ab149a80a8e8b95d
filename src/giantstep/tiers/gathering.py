"""`Gathering`: what is left of a node-local checkpoint is found, and what a host lacks of it is sent to it.

All ranks call its methods together. First hosts tell each other what they hold and agree on one save that is complete
somewhere; then all get its index and commit record, and the small files that every rank looks into. Later, when ranks know
what they will read, hosts get the files that a rank there reads by itself. Called by `loading`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from giantstep.commit.publish import publish_here
from giantstep.errors import CorruptionError, DisagreementError, GiantstepError, PeerFailureError
from giantstep.format.index import Index, decode_texts
from giantstep.format.names import DATA_DIR
from giantstep.format.record import MAX_RECORD_BYTES, CommitRecord, decode_record
from giantstep.group.base import Group, Parts, consult_parts
from giantstep.reading.index_reader import IndexReader
from giantstep.reading.verify import verify_files
from giantstep.shards.object_keys import position_of
from giantstep.storage.base import read_all
from giantstep.storage.record_file import read_record_bytes
from giantstep.tiers.courier import Carried, carry
from giantstep.tiers.file_numbers import parity_of_file
from giantstep.tiers.holdings import Candidate, Holding, candidates, is_enough, nothing_complete
from giantstep.tiers.hosts import HostMap
from giantstep.tiers.messages import moves_from, moves_to
from giantstep.tiers.node_store import NodeStore
from giantstep.tiers.parity_layout import ParityLayout, rebuild_jobs
from giantstep.tiers.parity_rebuilding import rebuild_files
from giantstep.tiers.rounds import Circumstances, piece_bytes_for

PHASE = "gather"


@dataclass(slots=True)
class _OnRankZero:
    """What rank 0 knows."""

    hosts: HostMap
    holdings: list[Holding]
    chosen: Candidate
    index: Index


class Gathering:
    """One rank's part.

    Args:
        group: the ranks.
        store: the place on this rank's host.
        timeout_secs: for each agreement.
        excluded: names of files on this host that are known to be damaged.

    Attributes:
        bytes_received: of files, by this rank from other hosts.
        notes: what was done and why, in words; the same on all ranks.
    """

    def __init__(self, group: Group, store: NodeStore, timeout_secs: float, excluded: Collection[str] = ()) -> None:
        self._group, self._store, self._secs, self._excluded = group, store, timeout_secs, excluded
        self._root: _OnRankZero | None = None
        self._record: CommitRecord | None = None
        self._bad: list[str] = []
        self.bytes_received = 0
        self.notes: tuple[str, ...] = ()

    # Find.

    def find(self) -> None:
        """Agree on a save, and give every host its record, its index and the objects that all ranks read.

        Raises (the same on all ranks):
            IncompleteError: no save of this run is complete; says what is missing where.
        """
        provider, record, *_ = consult_parts(self._group, PHASE, self._secs, self._report, self._decide)
        self._record = decode_record(record, self._store.location)
        rank = int(provider)
        answer = consult_parts(
            self._group, PHASE, self._secs, lambda: (self._index_bytes(),) if self._group.rank == rank else (), self._spread
        )
        lead, index, notes, plan = answer[0], answer[1], answer[2], answer[3:]
        self.notes = tuple(json.loads(notes))
        consult_parts(self._group, PHASE, self._secs, lambda: self._publish(index, record) if lead else ())
        rebuilding, plan = plan[0], plan[1:]
        if rebuilding:
            self._rebuild(json.loads(rebuilding))
        self._carry(plan)

    def _report(self) -> Parts:
        return (self._store.location.encode("utf-8", "surrogatepass"), *self._look().encode())

    def _look(self) -> Holding:
        store = self._store
        try:
            files: dict[str, int] = {}
            for name in store.names(DATA_DIR):
                if name not in self._excluded:
                    # One that cannot be looked at, or is gone meanwhile, is missing; the others are there.
                    with suppress(OSError):
                        files[name] = store.size(name)
            bad = f"damaged: {', '.join(sorted(self._excluded)[:3])}" if self._excluded else ""
            try:
                data = read_record_bytes(store)
            except (GiantstepError, FileNotFoundError):
                return Holding(store.standing, b"", False, files, bad)
            return Holding(store.standing, data, self._index_is_there(data), files, bad)
        except OSError as error:
            return Holding(store.standing, b"", False, {}, f"its place cannot be read: {error}")

    def _index_is_there(self, data: bytes) -> bool:
        try:
            IndexReader(self._store, decode_record(data, self._store.location)).load_all()
        except (GiantstepError, OSError):
            return False
        return True

    def _decide(self, reports: Sequence[Parts]) -> list[Parts]:
        places = [report[0].decode("utf-8", "surrogatepass") for report in reports]
        if (other := next((rank for rank, place in enumerate(places) if place != places[0]), None)) is not None:
            raise DisagreementError(
                f"ranks load from different places: {places[0]} on rank 0 and {places[other]} on rank {other}. All ranks of "
                "the group must make the same call."
            )
        told = [Holding.decode(report[1:]) for report in reports]
        hosts = HostMap.of([one.standing for one in told])
        leads = hosts.leads
        holdings = [told[lead] for lead in leads]
        found, refused = candidates(holdings, self._store.protection.run)
        complete = [one for one in found if is_enough(one) and self._provider(one, holdings, leads) is not None]
        if not complete:
            raise nothing_complete(self._store.location, found, refused, hosts)
        chosen = complete[0]
        self._refused = [*refused, *(f"save {one.record.save_id} is not complete" for one in found[: found.index(chosen)])]
        self._leads, self._hosts, self._holdings, self._chosen = leads, hosts, holdings, chosen
        provider = self._provider(chosen, holdings, leads)
        return [(str(provider).encode("ascii"), chosen.data)] * len(reports)

    @staticmethod
    def _provider(candidate: Candidate, holdings: Sequence[Holding], leads: Sequence[int]) -> int | None:
        """A lead that has the record and the index."""
        fits = (lead for lead, one in zip(leads, holdings, strict=True) if one.record == candidate.data and one.has_index)
        return next(fits, None)

    def _index_bytes(self) -> bytes:
        if self._record is None:
            raise PeerFailureError("no record was agreed on")
        return read_all(self._store, self._record.index.name, MAX_RECORD_BYTES)

    def _spread(self, reports: Sequence[Parts]) -> list[Parts]:
        image = next(report[0] for report in reports if report)
        chosen = self._chosen
        index = IndexReader(self._store, chosen.record, image).load_all()
        self._root = _OnRankZero(self._hosts, self._holdings, chosen, index)
        lacking = {
            lead
            for lead, one in zip(self._leads, self._holdings, strict=True)
            if one.record != chosen.data or not one.has_index
        }
        shared = _shared_object_files(index)
        names = [chosen.record.files[number].name for number in shared]
        rebuilding = self._plan_rebuilding()
        plans = self._plan(dict.fromkeys(range(len(self._leads)), names), len(reports))
        notes = json.dumps(self._told(lacking, rebuilding)).encode("ascii")
        told = b"" if rebuilding is None else json.dumps(rebuilding).encode("ascii")
        return [
            (b"1" if rank in lacking else b"", image if rank in lacking else b"", notes, told, *plans[rank])
            for rank in range(len(reports))
        ]

    def _told(self, lacking: Collection[int], rebuilding: dict[str, Any] | None) -> list[str]:
        new = [self._hosts.standings[self._hosts.host[lead]].host for lead in sorted(lacking)]
        notes = [f"hosts without this save: {', '.join(new[:20])}"] if new else []
        if rebuilding is not None:
            names = rebuilding["lost"]
            notes.append(f"rebuilt out of parity: {len(names)} files: {', '.join(names[:3])}" + (" ..." if names[3:] else ""))
        return [*notes, *self._refused[:20]]

    # Rebuild.

    def _plan_rebuilding(self) -> dict[str, Any] | None:
        """Who rebuilds which lost file; those are noted as held. The others read what they hold."""
        root = self._on_rank_zero()
        chosen, leads = root.chosen, root.hosts.leads
        lost = [name for name in chosen.lost if parity_of_file(name) is None]
        if not lost:
            return None
        load = dict.fromkeys(range(len(leads)), 0)
        sizes = {file.name: file.bytes for file in chosen.record.files}
        target: dict[str, int] = {}
        # Files of one lost host go to one host, where they follow each other in the stripes.
        by_rank = {file.name: file.rank for file in chosen.record.files}
        nodes = chosen.record.nodes
        home: dict[int, int] = {}
        for name in sorted(lost):
            owner = nodes.host_of_rank[by_rank[name]] if nodes is not None else 0
            host = home.setdefault(owner, min(load, key=lambda one: (load[one], one)))
            load[host] += sizes[name]
            target[name] = leads[host]
        source = {name: leads[hosts[0]] for name, hosts in chosen.holders.items() if hosts}
        all_lost = chosen.lost
        for name, rank in target.items():
            chosen.holders[name].append(root.hosts.host[rank])
        return {"lost": lost, "gone": all_lost, "source": source, "target": target}

    def _rebuild(self, told: dict[str, Any]) -> None:
        if self._record is None:
            raise PeerFailureError("no record was agreed on")
        how = Circumstances(self._group, self._store, self._record.block_bytes, PHASE, self._secs)

        def work() -> Parts:
            record = self._record
            layout = None if record is None else ParityLayout.of_record(record)
            if record is None or layout is None:
                raise PeerFailureError("files are to be rebuilt out of parity, and the save has none")
            rounds = rebuild_jobs(layout, told["gone"], told["source"], told["target"], piece_bytes_for(layout))
            sizes = {file.name: file.bytes for file in record.files}
            sums = _checksums(record, IndexReader(self._store, record).load_all())
            rebuild_files(rounds, sizes, sums, how)
            return ()

        consult_parts(self._group, PHASE, self._secs, work)

    def _publish(self, index: bytes, record: bytes) -> Parts:
        if self._record is None:
            raise PeerFailureError("no record was agreed on")
        self._store.prepare(DATA_DIR)
        publish_here(self._store, self._record.save_id, index, record, ())
        return ()

    # Fetch.

    def fetch(self, ask: Callable[[], Collection[int]]) -> NDArray[np.bool_] | None:
        """Send hosts the files that a rank there reads by itself. What ranks want besides is read where it is, and exchanged.

        Args:
            ask: gives the files that this rank reads by itself; its errors reach all ranks.

        Returns:
            On rank 0, [files, ranks] who can read what; None on other ranks.
        """

        def decide(reports: Sequence[Parts]) -> list[Parts]:
            return self._plan(self._wishes([json.loads(report[0]) for report in reports]), len(reports))

        plan = consult_parts(self._group, PHASE, self._secs, lambda: (json.dumps(sorted(ask())).encode("ascii"),), decide)
        self._carry(plan)
        return None if self._root is None else self._access(self._root)

    def _wishes(self, told: Sequence[list[int]]) -> dict[int, list[str]]:
        root = self._on_rank_zero()
        wishes: dict[int, dict[str, None]] = {}
        for rank, needed in enumerate(told):
            names = (root.chosen.record.files[number].name for number in needed)
            wishes.setdefault(root.hosts.host[rank], {}).update(dict.fromkeys(names))
        return {host: list(names) for host, names in wishes.items()}

    def _access(self, root: _OnRankZero) -> NDArray[np.bool_]:
        hosts = np.array(root.hosts.host)
        files = root.chosen.record.files
        found = np.zeros((len(files), len(hosts)), dtype=bool)
        for row, file in enumerate(files):
            found[row] = np.isin(hosts, root.chosen.holders[file.name])
        return found

    def _on_rank_zero(self) -> _OnRankZero:
        if self._root is None:
            raise PeerFailureError("nothing was found yet")
        return self._root

    # Carry: what both need.

    def _plan(self, wishes: dict[int, list[str]], ranks: int) -> list[Parts]:
        """Who sends what, from the hosts that hold it in turn; noted as held."""
        root = self._on_rank_zero()
        sums = _checksums(root.chosen.record, root.index)
        sizes = {file.name: file.bytes for file in root.chosen.record.files}
        load = [0] * ranks
        moves = []
        for host, names in wishes.items():
            for name in names:
                holders = root.chosen.holders[name]
                if host in holders:
                    continue
                source = min((rank for holder in holders for rank in root.hosts.ranks_of(holder)), key=lambda r: (load[r], r))
                target = min(root.hosts.ranks_of(host), key=lambda r: (load[r], r))
                load[source] += sizes[name]
                load[target] += sizes[name]
                moves.append((name, sizes[name], source, target, sums[name]))
        self._moves = moves
        for name, _, _, target, _ in moves:
            root.chosen.holders[name].append(root.hosts.host[target])
        return moves_to(moves, ranks, root.chosen.record.block_bytes)

    def _carry(self, plan: Parts) -> None:
        """Carry, and once more from other holders what did not arrive as it should."""
        while plan:
            plan = self._carried(plan)

    def _carried(self, plan: Parts) -> Parts:
        """What is to be carried again; nothing if all has arrived."""
        done = self._carry_once(plan)
        self.bytes_received += done.bytes_received
        bad = json.dumps(done.bad).encode("ascii")
        return consult_parts(self._group, PHASE, self._secs, lambda: (bad,), self._again)

    def _carry_once(self, plan: Parts) -> Carried:
        if self._record is None:
            raise PeerFailureError("no record was agreed on")
        piece_bytes, sends, receives = moves_from(plan)
        return carry(
            self._group,
            self._store,
            sends,
            receives,
            piece_bytes=piece_bytes,
            block_bytes=self._record.block_bytes,
            phase=PHASE,
            timeout_secs=self._secs,
        )

    def _again(self, reports: Sequence[Parts]) -> list[Parts]:
        told = [json.loads(report[0]) for report in reports]
        if not any(told):
            return [()] * len(reports)
        root = self._on_rank_zero()
        wishes: dict[int, list[str]] = {}
        for name, _, source, target, _ in self._moves:
            if name not in told[target]:
                continue
            holders, host = root.chosen.holders[name], root.hosts.host[target]
            for gone in (root.hosts.host[source], host):
                if gone in holders:
                    holders.remove(gone)
            if not holders:
                raise CorruptionError(f"{name} in {self._store.location} is damaged on every host that holds it")
            wishes.setdefault(host, []).append(name)
        return self._plan(wishes, len(reports))


def _checksums(record: CommitRecord, index: Index) -> dict[str, NDArray[np.uint64]]:
    ends = index.file_block_ends.tolist()
    return {file.name: index.block_checksum[ends[row] : ends[row + 1]] for row, file in enumerate(record.files)}


def _shared_object_files(index: Index) -> list[int]:
    """Files with objects that are not one of many positions: common state, and what describes tensors."""
    keys = decode_texts(index.object_key_ends, index.object_key_bytes)
    rows = [row for row, key in enumerate(keys) if position_of(key) is None]
    return sorted(set(index.object_file[rows].tolist()))


def files_of_objects(index: Index, keys: Iterable[str]) -> set[int]:
    """Files in which objects of these keys lie."""
    wanted = set(keys)
    names = decode_texts(index.object_key_ends, index.object_key_bytes)
    return {int(index.object_file[row]) for row, name in enumerate(names) if name in wanted and index.object_bytes[row]}


def damaged_here(store: NodeStore, record: CommitRecord) -> set[str]:
    """Files of a save in this host's place whose bytes are not what was written. Reads all of them."""
    here = {file.name for file in record.files} & set(store.names(DATA_DIR))
    return {damage.file for damage in verify_files(store, record, IndexReader(store, record), None).damages} & here
