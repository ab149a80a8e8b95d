"""Names of layers: from a stage's own count to the global index, and back. Pure.

A stage counts its layers from 0, so that `decoder.layers.0.weight` is another layer on each of them. Saved under such names
they would be one key with several meanings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from giantstep.errors import BadArgumentError, DisagreementError
from giantstep.pipeline.language import DECODER, MTP, NAMES
from giantstep.pipeline.layout import PipelineLayout

Value = TypeVar("Value")

PREFIX = "decoder.layers."
MTP_PREFIX = "mtp.layers."


def globalise(
    state: Mapping[str, Value],
    layout: PipelineLayout,
    rank: int,
    virtual: int = 0,
    *,
    prefix: str = PREFIX,
    mtp_prefix: str = MTP_PREFIX,
) -> dict[str, Value]:
    """A stage's state dict with layers named by their global index: `layers.0.` of the second stage becomes `layers.4.`.

    No two stages then have the name of a layer in common.

    Args:
        state: by name, of the stage alone; values are taken over as they are, and so are names without a layer.
        layout: of the pipeline.
        rank, virtual: the stage.
        prefix, mtp_prefix: what names of decoder and of MTP layers begin with; the number follows.

    Raises:
        BadArgumentError: a layer has a number that the stage has not; perhaps it is named globally already. Or layers are
            named behind another prefix.
    """
    names = LayerNames(prefix, mtp_prefix)
    names.check_prefix(state, layout, rank, virtual)
    return {names.global_name(name, layout, rank, virtual): value for name, value in state.items()}


def localise(
    state: Mapping[str, Value],
    layout: PipelineLayout,
    rank: int,
    virtual: int = 0,
    *,
    prefix: str = PREFIX,
    mtp_prefix: str = MTP_PREFIX,
) -> dict[str, Value]:
    """Inverse of `globalise`, for `load_state_dict` of the stage's module: layers of other stages are left out."""
    names = LayerNames(prefix, mtp_prefix)
    found = {}
    for name, value in state.items():
        taken = names.taken_apart(name)
        if taken is None:
            found[name] = value
            continue
        kind, index, rest = taken
        held = layout.layers_of(rank, virtual, kind=kind)
        if index in held:
            found[f"{names.prefix_of(kind)}{held.index(index)}{rest}"] = value
    return found


def check_names(
    state: Iterable[str],
    layout: PipelineLayout,
    rank: int,
    virtual: int | None = None,
    *,
    prefix: str = PREFIX,
    mtp_prefix: str = MTP_PREFIX,
) -> None:
    """Raise unless every layer named is one that the rank holds: catches names that count from 0 on every stage.

    `save` finds such names where two stages differ in shape, dtype, or values; here they are found in any case.

    Args:
        state: a state dict by name, or its names.
        layout: of the pipeline.
        rank, virtual: the stage; all stages of the rank if `virtual` is None.
        prefix, mtp_prefix: see `globalise`.

    Raises:
        DisagreementError: a layer is named that is another stage's.
        BadArgumentError: layers are named behind another prefix.
    """
    names = LayerNames(prefix, mtp_prefix)
    state = list(state)
    names.check_prefix(state, layout, rank, virtual)
    for name in state:
        taken = names.taken_apart(name)
        if taken is None:
            continue
        kind, index, _ = taken
        held = layout.layers_of(rank, virtual, kind=kind)
        if index not in held:
            count = layout.layers if kind == DECODER else layout.mtp_layers
            owner = f"held by rank {layout.holder_of(index, kind=kind)[0]}" if index < count else f"not among the {count}"
            raise DisagreementError(
                f"{name!r} on pipeline rank {rank} names {NAMES[kind]} {index}, which is {owner}; this rank holds "
                f"{_ranges(held)}. If it counts its layers from 0, its names are stage-local: name layers by their global "
                "index, see giantstep.pipeline.globalise."
            )


@dataclass(frozen=True, slots=True)
class LayerNames:
    """What names of layers look like: a prefix for each kind, a number, and the rest behind a dot."""

    prefix: str = PREFIX
    mtp_prefix: str = MTP_PREFIX

    def __post_init__(self) -> None:
        if not self.prefix or self.prefix == self.mtp_prefix:
            raise BadArgumentError(
                f"prefixes {self.prefix!r} and {self.mtp_prefix!r} of layer names must be different, and that of decoder "
                "layers not empty"
            )

    def prefix_of(self, kind: str) -> str:
        """Of layers "t" or "m"."""
        return self.prefix if kind == DECODER else self.mtp_prefix

    def check_prefix(self, state: Iterable[str], layout: PipelineLayout, rank: int, virtual: int | None) -> None:
        """Raise `BadArgumentError` if the stage's layers are there, but all behind another prefix, as a wrapper puts it."""
        for kind in (DECODER, MTP):
            prefix = self.prefix_of(kind)
            if not prefix or not layout.layers_of(rank, virtual, kind=kind) or any(name.startswith(prefix) for name in state):
                continue
            inside = re.compile(rf"\.{re.escape(prefix)}[0-9]+(?![^.])")
            for name in state:
                if found := inside.search(name):
                    raise BadArgumentError(
                        f"{name!r}: no name of the stage begins with {prefix!r}, although it has {NAMES[kind]}s: give "
                        f"{name[: found.start() + 1] + prefix!r} as what they begin with"
                    )

    def taken_apart(self, name: str) -> tuple[str, int, str] | None:
        """Kind and number of the layer, and what follows; None for a name without a layer."""
        for kind in (DECODER, MTP):
            prefix = self.prefix_of(kind)
            if prefix and name.startswith(prefix):
                number, dot, rest = name[len(prefix) :].partition(".")
                # No layer is number 00: two names would become one.
                if number.isascii() and number.isdigit() and (number == "0" or number[0] != "0"):
                    return kind, int(number), dot + rest
        return None

    def layer_of(self, name: str) -> str:
        """The beginning of a name that says which layer; empty for a name without one."""
        taken = self.taken_apart(name)
        return "" if taken is None else f"{self.prefix_of(taken[0])}{taken[1]}"

    def global_name(self, name: str, layout: PipelineLayout, rank: int, virtual: int) -> str:
        """The name with the layer's global index."""
        taken = self.taken_apart(name)
        if taken is None:
            return name
        kind, local, rest = taken
        held = layout.layers_of(rank, virtual, kind=kind)
        if local >= len(held):
            raise BadArgumentError(
                f"{name!r}: rank {rank}, virtual stage {virtual} has {len(held)} {NAMES[kind]}s ({_ranges(held)}), and so no "
                f"number {local}. Give names as the stage itself counts; perhaps these are global already."
            )
        return f"{self.prefix_of(kind)}{held[local]}{rest}"


def _ranges(held: tuple[int, ...]) -> str:
    """Ascending numbers as ranges, for messages."""
    if not held:
        return "none"
    starts = [n for n, one in enumerate(held) if not n or held[n - 1] + 1 != one]
    ends = [*starts[1:], len(held)]
    return ", ".join(f"{held[a]}" if b - a == 1 else f"{held[a]} to {held[b - 1]}" for a, b in zip(starts, ends, strict=True))
