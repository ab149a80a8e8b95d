"""Which steps hosts have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from giantstep.errors import GiantstepError
from giantstep.steps import StepState, look_at_place, step_of
from giantstep.storage.base import Store


@dataclass(frozen=True, slots=True)
class HeldStep:
    """A committed step of which a host has the record."""

    step: int
    generation: int
    save_id: str
    run: str


@dataclass(frozen=True, slots=True)
class StepList:
    """Steps that were told of."""

    entries: list[HeldStep]

    def encode(self) -> bytes:
        """As a message."""
        return json.dumps([list(asdict(one).values()) for one in self.entries]).encode("ascii")

    @classmethod
    def decode(cls, data: bytes) -> StepList:
        """Inverse of `encode`."""
        return cls([HeldStep(*one) for one in json.loads(data)])


def own_steps(root: Store) -> StepList:
    """Steps in one host's place. What cannot be read is left out: other hosts may have it."""
    found = []
    try:
        names = list(root.folders())
    except OSError:
        return StepList([])
    for name in names:
        step = step_of(name)
        if step is None:
            continue
        try:
            entry = look_at_place(root.folder(name), step)
        except (OSError, GiantstepError):
            continue
        if entry.state is StepState.COMMITTED and entry.record is not None and entry.record.nodes is not None:
            nodes = entry.record.nodes
            found.append(HeldStep(step, nodes.generation, entry.record.save_id, nodes.run))
    return StepList(found)


def common_steps(told: Sequence[StepList], run: str) -> list[HeldStep]:
    """Steps of a run of which some host has a record: later generations first, and of one generation later steps."""
    best: dict[int, HeldStep] = {}
    for one in {entry for found in told for entry in found.entries if entry.run == run}:
        known = best.get(one.step)
        if known is None or (one.generation, one.save_id) > (known.generation, known.save_id):
            best[one.step] = one
    return sorted(best.values(), key=lambda one: (one.generation, one.step), reverse=True)
