"""`PipelineLayout`: which pipeline rank and virtual stage holds which layers. Pure."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import SupportsIndex

from giantstep.errors import BadArgumentError
from giantstep.pipeline.language import DECODER, EMBEDDING, LOSS, MTP, NAMES, format_stages, parse_stages

Place = tuple[int, int]
"""(pipeline rank, virtual stage)."""

_SYMBOLS = {"embedding": EMBEDDING, "decoder": DECODER, "mtp": MTP, "loss": LOSS} | {symbol: symbol for symbol in NAMES}


@dataclass(frozen=True, slots=True)
class PipelineLayout:
    """The stages of a pipeline, in the order in which data pass through them, and the ranks that hold them.

    Stage `s` belongs to rank `s % ranks` and is its virtual stage `s // ranks`, as interleaved schedules have it. Layers
    are counted from 0 through all stages; MTP layers (multi-token prediction) have a count of their own.

    Attributes:
        stages: the symbols of each: E embedding, t decoder layer, m MTP layer, L loss and output layer.
        ranks: number of pipeline ranks.

    `str` gives the canonical layout string, of which `parse` makes an equal layout.
    """

    stages: tuple[str, ...]
    ranks: int
    _firsts: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        self._check()
        counts = {kind: [stage.count(kind) for stage in self.stages] for kind in (DECODER, MTP)}
        object.__setattr__(self, "_firsts", {kind: tuple(accumulate(found, initial=0)) for kind, found in counts.items()})

    @classmethod
    def parse(cls, layout: str | Sequence[Sequence[object]], ranks: int) -> PipelineLayout:
        """From a layout string such as `Et*3|(tt|)*29,m|L`, or from a list of names or symbols for each stage.

        Args:
            layout: as for Megatron-Core's `pipeline_model_parallel_layout`. Names are embedding, decoder, mtp, loss;
                members of an enum go by theirs.
            ranks: pipeline ranks; the number of stages must be a multiple of it.

        Raises:
            BadArgumentError: it is no layout; of a string, with the position and what was expected there.
        """
        if isinstance(layout, str):
            return cls(tuple(parse_stages(layout)), ranks)
        if not isinstance(layout, Sequence) or not all(isinstance(stage, Sequence) for stage in layout):
            raise BadArgumentError(f"pipeline layout {layout!r} must be a string, or a list of names for each stage")
        stages = []
        for number, stage in enumerate(layout):
            found = [_symbol(layer) for layer in stage]
            if None in found:
                wrong = stage[found.index(None)]
                raise BadArgumentError(f"stage {number} of the pipeline: {wrong!r} is none of {', '.join(_SYMBOLS)}")
            stages.append("".join(filter(None, found)))
        return cls(tuple(stages), ranks)

    @classmethod
    def from_counts(cls, counts: Sequence[int], ranks: int | None = None, *, mtp: int = 0) -> PipelineLayout:
        """From the number of decoder layers of each stage; the embedding is on the first stage, MTP and loss on the last.

        Args:
            counts: by stage; 0 is allowed, for an embedding or a loss as stages of their own.
            ranks: pipeline ranks; None: as many as stages.
            mtp: number of MTP layers.
        """
        if not isinstance(counts, Sequence) or not counts or not all(_is_count(count) for count in (*counts, mtp)):
            raise BadArgumentError(
                f"layers per stage {counts!r} and MTP layers {mtp!r} must be numbers from 0 on, one at least"
            )
        stages = [DECODER * count for count in counts]
        stages[0] = EMBEDDING + stages[0]
        stages[-1] += MTP * mtp + LOSS
        return cls(tuple(stages), len(stages) if ranks is None else ranks)

    @classmethod
    def even(
        cls,
        layers: int,
        ranks: int,
        *,
        virtual: int = 1,
        first: int | None = None,
        last: int | None = None,
        count_embedding: bool = False,
        count_loss: bool = False,
        mtp: int = 0,
    ) -> PipelineLayout:
        """Equally many layers on each stage.

        Args:
            layers: decoder layers of the model.
            ranks, virtual: pipeline ranks, and stages of each.
            first, last: layers of the first and the last rank, all virtual stages together, where they are to have
                another number than the ranks between them.
            count_embedding, count_loss: count the embedding, or the loss, as a layer of its stage, which gets one
                decoder layer less. Not together with `first` or `last`.
            mtp: number of MTP layers, on the last stage, not counted.

        Raises:
            BadArgumentError: they cannot be divided so; says by what, and what to use instead.
        """
        if not all(_is_count(number) for number in (layers, ranks, virtual)) or ranks < 1 or virtual < 1:
            raise BadArgumentError(f"{layers} layers on {ranks} ranks of {virtual} virtual stages: no such pipeline")
        if (first is not None or last is not None) and (count_embedding or count_loss):
            raise BadArgumentError("give either first and last, or count_embedding and count_loss")
        by_rank = _layers_by_rank(layers + count_embedding + count_loss, ranks, first, last)
        uneven = [count for count in by_rank if count % virtual]
        if uneven:
            raise BadArgumentError(
                f"{uneven[0]} layers of a rank cannot be divided evenly among its {virtual} virtual stages: use from_counts "
                "or a layout string"
            )
        counts = [count // virtual for _ in range(virtual) for count in by_rank]
        counts[0] -= count_embedding
        counts[-1] -= count_loss
        return cls.from_counts(counts, ranks, mtp=mtp)

    def _check(self) -> None:
        if not isinstance(self.ranks, int) or self.ranks < 1 or not self.stages or len(self.stages) % self.ranks:
            raise BadArgumentError(
                f"pipeline layout of {len(self.stages)} stages for {self.ranks} ranks: the number of stages must be a multiple "
                "of the ranks. Stages are separated by '|', and one behind the last '|' counts, empty or not."
            )
        order = "".join(self.stages)
        strange = set(order) - set(NAMES)
        if strange:
            raise BadArgumentError(f"pipeline layout with {min(strange)!r}: layers are {', '.join(NAMES)}")
        wrong = None
        if order.count(EMBEDDING) != 1 or order[0] != EMBEDDING:
            wrong = f"one {EMBEDDING} (embedding), before everything else, found {order.count(EMBEDDING)}"
        elif order[-1] != LOSS or order.count(LOSS) not in (1, 1 + order.count(MTP)):
            wrong = f"one {LOSS} (loss) at the end, or one more than {MTP}, found {order.count(LOSS)}"
        elif DECODER in order[order.find(MTP) :] and MTP in order:
            wrong = f"every {MTP} (MTP layer) behind the last {DECODER} (decoder layer)"
        if wrong:
            raise BadArgumentError(f"pipeline layout '{format_stages(self.stages)}': expected {wrong}")

    def __str__(self) -> str:
        return format_stages(self.stages)

    @property
    def virtual(self) -> int:
        """Virtual stages of each rank."""
        return len(self.stages) // self.ranks

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self._firsts[DECODER][-1]

    @property
    def mtp_layers(self) -> int:
        """Number of MTP layers."""
        return self._firsts[MTP][-1]

    def stage_of(self, rank: int, virtual: int = 0) -> int:
        """Number of a rank's virtual stage among all stages."""
        if not (0 <= rank < self.ranks and 0 <= virtual < self.virtual):
            raise BadArgumentError(
                f"rank {rank}, virtual stage {virtual}: the layout '{self}' has {self.ranks} ranks with {self.virtual} virtual "
                "stages each"
            )
        return virtual * self.ranks + rank

    def place_of(self, stage: int) -> Place:
        """The rank, and which of its virtual stages, stage number `stage` is."""
        if not 0 <= stage < len(self.stages):
            raise BadArgumentError(f"stage {stage}: the layout '{self}' has {len(self.stages)}")
        return stage % self.ranks, stage // self.ranks

    def layers_of(self, rank: int, virtual: int | None = None, *, kind: str = DECODER) -> tuple[int, ...]:
        """Global indices of the layers of a rank's virtual stage, ascending; of all its stages if `virtual` is None.

        Args:
            rank, virtual: the stage.
            kind: "t" for decoder layers, "m" for MTP layers.
        """
        firsts = self._firsts_of(kind)
        wanted = range(self.virtual) if virtual is None else (virtual,)
        stages = [self.stage_of(rank, one) for one in wanted]
        return tuple(index for stage in stages for index in range(firsts[stage], firsts[stage + 1]))

    def layer_offset(self, rank: int, virtual: int = 0, *, kind: str = DECODER) -> int:
        """Global index of the first layer of a stage; of the next one there is, if it has none."""
        return self._firsts_of(kind)[self.stage_of(rank, virtual)]

    def global_index(self, rank: int, virtual: int, local: int, *, kind: str = DECODER) -> int:
        """Global index of a stage's layer number `local`."""
        held = self.layers_of(rank, virtual, kind=kind)
        if not 0 <= local < len(held):
            raise BadArgumentError(
                f"layer {local} of rank {rank}, virtual stage {virtual}: that stage has {len(held)} {NAMES[kind]}s"
            )
        return held[local]

    def local_index(self, layer: int, *, kind: str = DECODER) -> tuple[int, int, int]:
        """Where a layer is: rank, virtual stage, and number within the stage."""
        firsts = self._firsts_of(kind)
        if not 0 <= layer < firsts[-1]:
            raise BadArgumentError(f"{NAMES[kind]} {layer}: the layout '{self}' has {firsts[-1]}")
        stage = max(number for number in range(len(self.stages)) if firsts[number] <= layer)
        return (*self.place_of(stage), layer - firsts[stage])

    def holder_of(self, layer: int, *, kind: str = DECODER) -> Place:
        """Rank and virtual stage that hold a layer."""
        return self.local_index(layer, kind=kind)[:2]

    @property
    def embedding_place(self) -> Place:
        """Rank and virtual stage that hold the embedding."""
        return self._places(EMBEDDING)[0]

    @property
    def loss_places(self) -> tuple[Place, ...]:
        """Ranks and virtual stages that hold the output layer: one, or several if MTP layers have losses of their own."""
        return self._places(LOSS)

    def embedding_holders(self, *, tied: bool) -> tuple[Place, ...]:
        """All that hold the embedding weight, the main replica first.

        Args:
            tied: the output layer has the same weight. Stages with MTP layers have a copy in any case.
        """
        places = [*self._places(EMBEDDING), *self._places(MTP), *(self._places(LOSS) if tied else ())]
        return tuple(dict.fromkeys(places))

    def _places(self, symbol: str) -> tuple[Place, ...]:
        return tuple(self.place_of(number) for number, stage in enumerate(self.stages) if symbol in stage)

    def _firsts_of(self, kind: str) -> tuple[int, ...]:
        if kind not in self._firsts:
            raise BadArgumentError(f"layers of kind {kind!r}: expected {DECODER!r} (decoder) or {MTP!r} (MTP)")
        return self._firsts[kind]


def _is_count(value: object) -> bool:
    """Whether it is a whole number from 0 on, of any kind."""
    return isinstance(value, SupportsIndex) and operator.index(value) >= 0


def _symbol(layer: object) -> str | None:
    """The symbol of a layer in a list; None for what is none."""
    name = layer if isinstance(layer, str) else getattr(layer, "name", None)
    return _SYMBOLS.get(name, _SYMBOLS.get(name.strip().lower())) if isinstance(name, str) else None


def _layers_by_rank(layers: int, ranks: int, first: int | None, last: int | None) -> list[int]:
    """How many layers each rank has, all but those given equally many."""
    if ranks == 1:
        given = {found for found in (first, last) if found is not None}
        if given - {layers}:
            raise BadArgumentError(f"first={first}, last={last}: the only rank has all {layers} layers")
        return [layers]
    between = ranks - (first is not None) - (last is not None)
    rest = layers - (first or 0) - (last or 0)
    if min(first or 0, last or 0, rest) < 0 or (rest % between if between else rest):
        raise BadArgumentError(
            f"{layers} layers cannot be divided evenly among {ranks} pipeline ranks (first={first}, last={last}: {rest} layers "
            f"for {between} ranks). Give first and last other numbers, or use from_counts or a layout string."
        )
    by_rank = [rest // between if between else 0] * ranks
    if first is not None:
        by_rank[0] = first
    if last is not None:
        by_rank[-1] = last
    return by_rank
