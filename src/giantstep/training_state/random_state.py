"""`RandomState`: the random generators of a rank as a leaf, and what becomes of them when the number of ranks changes."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import BadArgumentError, MismatchError
from giantstep.mapping.replica import ReplicaId
from giantstep.training_state.generator_checks import check_state, check_stream, set_checked, set_checked_stream
from giantstep.training_state.generators import (
    STREAMS,
    Beginning,
    can_be_seeded,
    seed,
    seed_stream,
    state_of,
    state_of_stream,
)
from giantstep.training_state.ranked import Position, RankedState, Reshard

_LOG = logging.getLogger("giantstep")

OnReshard = Literal["raise", "by_rank", "derive"]
_OWN = "generators"


class RandomState(RankedState):
    """Random generators of this rank.

    Args:
        generators: generators of the job's own, by name: of `random`, NumPy or torch, or objects with `get_state` and
            `set_state`, or `get_states` and `set_states` (such as trackers of model-parallel generators).
        streams: which of the process's own are included: "python", "numpy" (the legacy global one), "torch" (of the CPU),
            "cuda" (of the current device, where there is one).
        grid, position, replica_id, process_group: see `RankedState`. Ranks that are to have the same numbers, such as
            tensor-parallel ones, share a position.
        on_reshard: when the checkpoint has another grid:

            * `raise`: a `ShapeMismatchError`, before anything is loaded;
            * `by_rank`: positions, counted row by row, keep their streams; those that the checkpoint has not begin new ones;
            * `derive`: all positions begin new streams;
            * a function, see `Reshard`, of values as they are stored.

            New streams are derived from all that is stored and the number of the position, by SHA-256 and SHAKE-256: the
            same each time that the same checkpoint is loaded, and another one at every position and of every generator.

    A stored state is checked before any generator is changed: one of another kind of generator is a `MismatchError`, one that
    no generator can have a `CorruptionError`. Objects with states of their own look at these themselves.

    Attributes:
        skipped: what the checkpoint has and this process does not, after a load, such as "cuda"; it is logged, too.
        kept: what this process has and the checkpoint does not: it goes on as it was.
    """

    def __init__(
        self,
        generators: Mapping[str, Any] | None = None,
        *,
        streams: Collection[str] = STREAMS,
        grid: int | Position | None = None,
        position: int | Position | None = None,
        replica_id: ReplicaId = 0,
        process_group: Any = None,
        on_reshard: OnReshard | Reshard = "raise",
        on_missing: Literal["strict", "keep"] = "strict",
    ) -> None:
        unknown = sorted(set(streams) - set(STREAMS))
        if unknown:
            raise BadArgumentError(f"streams: {unknown[0]!r} is none of {STREAMS}")
        if isinstance(on_reshard, str) and on_reshard not in ("raise", "by_rank", "derive"):
            raise BadArgumentError(f"on_reshard must be 'raise', 'by_rank', 'derive' or a function, not {on_reshard!r}")
        self._generators, self._streams = dict(generators or {}), tuple(streams)
        for generator in self._generators.values():
            state_of(generator)
        policies: dict[Any, Any] = {"by_rank": self._by_rank, "derive": self._derive}
        super().__init__(
            self._states,
            self._set,
            grid=grid,
            position=position,
            replica_id=replica_id,
            process_group=process_group,
            on_reshard=policies.get(on_reshard, on_reshard),
            on_missing=on_missing,
        )
        self.skipped: tuple[str, ...] = ()
        self.kept: tuple[str, ...] = ()

    def _states(self) -> dict[str, Any]:
        found = {name: state_of_stream(name) for name in self._streams}
        own = {name: state_of(generator) for name, generator in self._generators.items()}
        return {**{name: state for name, state in found.items() if state is not None}, _OWN: own}

    def _set(self, value: Any) -> None:
        if isinstance(value, Beginning):
            self._begin(value)
            return
        own = self._checked(value)
        here = {*self._streams, *(f"{_OWN}.{name}" for name in self._generators)}
        stored = {*(name for name in value if name != _OWN), *(f"{_OWN}.{name}" for name in own)}
        skipped = stored - here
        for name in self._streams:
            if name in value and not set_checked_stream(name, value[name]):
                skipped.add(name)
        for name, generator in self._generators.items():
            if name in own:
                set_checked(generator, own[name], name)
        # "cuda" is no loss where neither has it.
        kept = {name for name in here - stored if name != "cuda" or state_of_stream(name) is not None}
        self.skipped, self.kept = tuple(sorted(skipped)), tuple(sorted(kept))
        if skipped:
            _LOG.warning("random states that are stored, but that this process has no generators for: %s", self.skipped)

    def _checked(self, value: Any) -> dict[str, Any]:
        """The states of own generators of a stored value, all of which can be set."""
        own = value.get(_OWN, {}) if type(value) is dict else None
        if type(own) is not dict or not all(isinstance(name, str) for name in (*value, *own)):
            raise MismatchError(
                f"expected the value of a RandomState, a dict of states by name, found {value!r:.80}. Load what was saved from "
                "a RandomState, or give an on_reshard that makes such a value"
            )
        for name in self._streams:
            if name in value:
                check_stream(name, value[name])
        for name, generator in self._generators.items():
            if name in own:
                check_state(generator, own[name], name)
        return own

    # Another grid.

    def _by_rank(self, stored: Mapping[Position, Any], grid: Position, position: Position) -> Any:
        number = _number(grid, position)
        values = list(stored.values())
        return values[number] if number < len(values) else self._derive(stored, grid, position)

    def _derive(self, stored: Mapping[Position, Any], grid: Position, position: Position) -> Beginning:
        fixed = [name for name, generator in self._generators.items() if not can_be_seeded(generator)]
        if fixed:
            kind = type(self._generators[fixed[0]]).__name__
            raise BadArgumentError(
                f"generator {fixed[0]!r} ({kind}) cannot be seeded, as position {position} of {math.prod(grid)} needs: give "
                "on_reshard a function that makes its state"
            )
        digest = hashlib.sha256()
        for place, value in stored.items():
            encoded = OBJECT_CODEC.encode(value, ("random state",))
            digest.update(f"{place} {len(encoded)} ".encode())
            digest.update(encoded)
        return Beginning(digest.digest(), _number(grid, position))

    def _begin(self, beginning: Beginning) -> None:
        for name in self._streams:
            seed_stream(name, beginning)
        for name, generator in self._generators.items():
            seed(generator, beginning, f"{_OWN}.{name}")
        self.skipped = self.kept = ()


def _number(grid: Position, position: Position) -> int:
    """Of a position, counted row by row."""
    number = 0
    for place, count in zip(position, grid, strict=True):
        number = number * count + place
    return number
