"""`SavePlanner`: all ranks of a save come to one plan, or find that the one they have still holds. Called by `save`.

With a `PlanCache`, a rank that is described as when a plan was made reports a token instead of its description. If all do,
and the tokens agree, the plan is used again. If only some do, all are asked for their descriptions and a plan is made.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from giantstep.codecs import OBJECT_CODEC
from giantstep.describing import object_digests, structure_of, with_digests
from giantstep.errors import BadArgumentError, CoverageError, DisagreementError
from giantstep.format.data_file import ChunkLayout
from giantstep.group.base import Group, Parts, consult, consult_parts
from giantstep.group.subgroup import name_of
from giantstep.mapping.describe import NOTHING, Described
from giantstep.mapping.differences import describe_differences, fingerprints
from giantstep.mapping.flat_ranges import describe_flat, flat_shards
from giantstep.options import SaveOptions
from giantstep.phases import same_call, settings, with_call
from giantstep.planning.description import Description, decode_descriptions
from giantstep.planning.reuse import PLAN_ID_BYTES, all_as_before, fingerprint, token, weighted
from giantstep.planning.save_plan import SavePlan, plan_save
from giantstep.planning.stored_plan import StoredPlan
from giantstep.planning.twins import Replication
from giantstep.planning.write_part import WritePart
from giantstep.shards.object_keys import COMMON_KEY
from giantstep.storage.base import Store
from giantstep.stored_plans import find_plan, keep_plan, remember_plan
from giantstep.tiers.hosts import HostMap, Standing
from giantstep.tiers.node_store import NodeStore
from giantstep.tiers.parity_layout import ParityLayout
from giantstep.writers import Balanced, Caller

_LOG = logging.getLogger("giantstep")
_SHARED, _OTHER = b"s", b"-"
# First part of a report: a token, or a cell and a description.
_AS_BEFORE, _NEW = b"T", b"D"
# First part of an answer: what the plan is, that the one before holds, that descriptions are wanted, a refusal.
_PLANNED, _HOLDS, _TELL, _REFUSED = b"P", b"H", b"T", b"R"
# A file holds at least one chunk, so a chunk must leave room for the header.
_HEADER_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands among those that save.

    Attributes:
        cell: that the policy of writers names.
        group_name: name of the group.
        standing: where it stands among the hosts, if each has a place of its own; and how many copies its bytes are to
            have on others.
        copies, parity: see there.
    """

    cell: str
    group_name: str
    standing: Standing | None = None
    copies: int = 0
    parity: tuple[int, int] | None = None

    @classmethod
    def of(cls, rank: int, size: int, process_group: Any, options: SaveOptions, store: Store) -> Place:
        """Ask the policy. Needs the process group, which may be destroyed while a save goes on in the background."""
        policy = options.writers if options.writers is not None else Balanced()
        cell = policy.cell(Caller(rank, size, process_group))
        if not isinstance(cell, str):
            raise BadArgumentError(f"{type(policy).__name__}.cell must return a str, not {cell!r}")
        if isinstance(store, NodeStore):
            return cls(cell, name_of(process_group), store.standing, store.protection.replicas, store.protection.parity)
        return cls(cell, name_of(process_group))


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be planned on this rank.

    Attributes:
        described: its state taken apart.
        call: what must be equal on all ranks.
        object_bytes: sizes of the encoded objects that this rank may write, by name.
        place: where it is planned.
    """

    described: Described
    call: dict[str, Any]
    object_bytes: Mapping[str, int]
    place: Place


class SavePlanner:
    """One save's planning on one rank.

    Attributes:
        part: what this rank writes; after `agree`.
        description: from which the regions of the part are made.
        plan: the whole plan; on rank 0 alone.
        reused: whether a plan made by an earlier save is used.
    """

    part: WritePart
    description: Description

    def __init__(self, group: Group, options: SaveOptions) -> None:
        self.plan: SavePlan | None = None
        self.reused = False
        self._group = group
        self._options = options
        self._refusal: CoverageError | None = None
        self._known: StoredPlan | None = None

    def agree(self, describe: Callable[[], Subject], prepare: Callable[[], bytes]) -> bytes:
        """Come to a plan. Nothing is written.

        Args:
            describe: makes the subject; its errors reach all ranks.
            prepare: runs on rank 0 once there is a plan; what it returns, `agree` returns on all ranks.

        Raises:
            CoverageError, DisagreementError: the ranks' states do not fit together.
        """
        secs = self._options.timeout_secs

        def decide(reports: Sequence[Parts]) -> list[Parts]:
            return self._decide(same_call(reports), prepare)

        answer = consult_parts(self._group, "describe", secs, lambda: self._report(describe()), decide, "plan")
        if answer[0] == _TELL:
            answer = consult_parts(self._group, "describe", secs, self._tell, decide, "plan")
        if answer[0] == _REFUSED:
            self._explain_refusal(answer[1].decode("utf-8"))
        self.reused = answer[0] == _HOLDS
        if self._known is not None and self.reused:
            self.part, self.plan = self._known.part, self._known.plan
        else:
            self._adopt(answer[2], answer[3:])
        return answer[1]

    # This rank's report.

    def _report(self, subject: Subject) -> Parts:
        self._described = subject.described
        self._call = subject.call
        self._object_bytes = subject.object_bytes
        where = subject.place
        self._cell, self._standing, self._copies, self._parity = where.cell, where.standing, where.copies, where.parity
        self.description = structure_of(subject.described)
        place = [subject.place.group_name, self._cell, self._told_standing().decode("ascii"), self._copies]
        circumstances = [self._group.rank, self._group.size, *place, settings(self._options)]
        self._fingerprint = fingerprint(self.description, json.dumps(circumstances, sort_keys=True).encode("ascii"))
        if self._options.plan_cache is not None:
            self._known = find_plan(self._options.plan_cache, self._group.rank, self._fingerprint)
        if self._known is None:
            return self._tell()
        return with_call(self._call, _AS_BEFORE, self._token(self._known))

    def _told_standing(self) -> bytes:
        return b"" if self._standing is None else self._standing.encode()

    def _token(self, known: StoredPlan) -> bytes:
        names = weighted(known.part, self.description.object_keys)
        digests = np.zeros((len(self.description.object_keys), 2), dtype=np.uint64)
        rows = [row for row, weight in enumerate(known.part.weights.tolist()) if weight]
        digests[rows] = object_digests([self._described.stored[name] for name in names], self._group.size)
        return token(known.plan_id, self.description.object_keys, known.part.weights, digests)

    def _tell(self) -> Parts:
        self._known = None
        self.description = with_digests(self.description, self._described, self._group.size, self._options.buffer_bytes)
        sizes = [self._object_bytes.get(name, 0) for name in self.description.object_keys]
        self.description = replace(self.description, object_bytes=np.array(sizes, dtype=np.int64))
        where = (self._cell.encode("utf-8", "surrogatepass"), self._told_standing())
        return with_call(self._call, _NEW, *where, *self.description.encode())

    # Rank 0's decision.

    def _decide(self, reports: Sequence[Parts], prepare: Callable[[], bytes]) -> list[Parts]:
        count = len(reports)
        if any(report[0] == _AS_BEFORE for report in reports):
            holds = all(report[0] == _AS_BEFORE for report in reports) and all_as_before([report[1] for report in reports])
            if not holds:
                return [(_TELL,)] * count
            self.plan = None if self._known is None else self._known.plan
            return [(_HOLDS, prepare())] * count
        descriptions = decode_descriptions([report[3:] for report in reports])
        # Equal names are one object: they are numbered without being looked at.
        numbers: dict[bytes, int] = {}
        cells = np.array([numbers.setdefault(report[1], len(numbers)) for report in reports], dtype=np.int64)
        try:
            plan = plan_save(
                descriptions,
                split_bytes=self._options.split_bytes,
                max_chunk_bytes=max(1, self._options.max_file_bytes - _HEADER_BYTES),
                cells=cells if len(numbers) > 1 else None,
                steady=self._options.keeps_digests,
                replication=self._replication([report[2] for report in reports]),
            )
        except CoverageError as error:
            if error.tensor_key is None:
                raise
            # All ranks are asked what they hold of the tensor, so that the error can name flat ranges.
            self._refusal = error
            return [(_REFUSED, error.tensor_key.encode("utf-8"))] * count
        self.plan = plan
        head, plan_id = prepare(), secrets.token_bytes(PLAN_ID_BYTES)
        return [(_PLANNED, head, plan_id, *part.encode()) for part in plan.parts(descriptions)]

    def _replication(self, standings: Sequence[bytes]) -> Replication | None:
        if self._standing is None:
            return None
        hosts = HostMap.of([Standing.decode(told) for told in standings])
        hosts.check_copies(self._copies)
        if self._parity is not None:
            # Raises if hosts are too few.
            ParityLayout.of("", hosts, self._parity, ())
        return Replication(self._copies, hosts.domain_of_ranks(), hosts.circle_of_ranks()) if self._copies else None

    def _explain_refusal(self, key: str) -> None:
        def decide(reports: Sequence[bytes]) -> list[bytes]:
            raise CoverageError(
                (self._refusal.message if self._refusal else "") + describe_flat(key, reports)
            ) from self._refusal

        consult(self._group, "plan", self._options.timeout_secs, lambda: flat_shards(self._described.leaves, key), decide)

    # What follows from the plan.

    def _adopt(self, plan_id: bytes, parts: Parts) -> None:
        self.part = WritePart.decode(parts)
        if self.part.differing:
            self._meet_differing_objects(self.part.differing)
        if self._options.plan_cache is not None:
            stored = StoredPlan(self._fingerprint, plan_id, self.part, self.plan)
            keep_plan(self._options.plan_cache, self._group.rank, stored)
            self._known = stored

    def _meet_differing_objects(self, names: Sequence[str]) -> None:
        def decide(reports: Sequence[bytes]) -> list[bytes]:
            differing = self.planned().objects.differing()
            message = describe_differences([report[1:] for report in reports], differing)
            shared = any(report[:1] == _SHARED for report in reports)
            if shared or self._options.on_object_difference == "raise":
                raise DisagreementError(message + ". Make them equal, or give each rank a ShardedObject position of its own.")
            _LOG.warning("%s; what its main replica or the lowest rank that holds it has is stored", message)
            return [b""] * len(reports)

        def told() -> bytes:
            stored = self._described.stored
            # How a tensor is to be read, and the state of one parameter, are no matter of policy.
            shared = any(name in stored and stored[name].is_shared and name != COMMON_KEY for name in names)
            return (_SHARED if shared else _OTHER) + fingerprints(stored, names, OBJECT_CODEC)

        consult(self._group, "describe", self._options.timeout_secs, told, decide)

    def layout_of(self, make: Callable[[], ChunkLayout]) -> ChunkLayout:
        """The layout of this rank's chunks: that of an earlier save by the same plan, or a new one, which is kept."""
        if self._known is None or self._options.plan_cache is None:
            return make()
        layout = self._known.layout
        if layout is None:
            layout = make()
            self._known = replace(self._known, layout=layout)
            remember_plan(self._options.plan_cache, self._group.rank, self._known)
        return layout

    def forget(self) -> None:
        """Let go of the state that was planned for."""
        self._described = NOTHING

    def planned_bytes(self) -> int:
        """Payload that all ranks are to write, each byte once; on rank 0, once there is a plan."""
        plan = self.planned()
        return int(plan.bytes.sum() + plan.objects.bytes.sum())

    def planned(self) -> SavePlan:
        """The whole plan; on rank 0, after `agree`."""
        if self.plan is None:
            raise DisagreementError("no plan was made")
        return self.plan
