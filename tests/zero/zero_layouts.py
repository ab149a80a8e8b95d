"""Models and optimizers cut in any way, with values by global index: for saving under one layout and loading under another."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

import giantstep as gs
from giantstep.zero import BucketRules, FlatLayout, FlatParameter, empty_buffers, lay_out, lay_out_whole

STATES = ("exp_avg", "exp_avg_sq", "fp32_param")


def glu(key: str, data: torch.Tensor, replica_id: Any, rank: int, ranks: int, axis: int) -> Any:
    """Halves of a fused weight along an axis, each cut by tensor parallelism along it."""
    parts = torch.chunk(data, 2, dim=axis)
    return {
        name: gs.ShardedTensor.from_rank_offsets(f"{key}.{name}", part, (axis, rank, ranks), replica_id=replica_id)
        for name, part in zip(("gate", "up"), parts, strict=True)
    }


@dataclass(frozen=True)
class Spec:
    """A parameter of the model.

    Attributes:
        shape: of the global tensor; of one half where it is fused.
        axis: that tensor parallelism cuts; None for a parameter that all ranks have.
        kind: "plain"; "glu": the halves of two are fused along the axis; "turned": it is stored transposed.
        shared: on every pipeline stage, not on one.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None = None
    kind: str = "plain"
    dtype: torch.dtype = torch.float32
    shared: bool = False

    def halves(self) -> list[str]:
        """Keys that are stored for it."""
        return [f"{self.name}.gate", f"{self.name}.up"] if self.kind == "glu" else [self.name]

    def whole(self, state: str) -> dict[str, torch.Tensor]:
        """The global tensors of a state by key: distinct values by index, and by key and state."""
        found = {}
        for key in self.halves():
            base = zlib.crc32(f"{state} {key}".encode()) % 1000 * 4096
            found[key] = torch.arange(base, base + torch.Size(self.shape).numel(), dtype=torch.float32).view(self.shape)
        return found

    def cut(self, state: str, rank: int, ranks: int) -> torch.Tensor:
        """What one tensor-parallel rank has of it, computed without the library."""
        parts = list(self.whole(state).values())
        if self.axis is not None:
            parts = [part.chunk(ranks, dim=self.axis)[rank] for part in parts]
        local = torch.cat(parts, dim=self.axis or 0) if self.kind == "glu" else parts[0]
        return (local.t() if self.kind == "turned" else local).contiguous()

    def described(self, place: Place, ranks: int, given: torch.Tensor | None = None) -> Any:
        """How the model describes it; without a tensor, one with values by index."""
        data = self.cut("param", place.tp, ranks).to(self.dtype) if given is None else given
        replica = (place.pp if self.shared else 0, place.tp if self.axis is None else 0, place.dp + 100 * place.instance)
        if self.kind == "glu":
            axis = self.axis

            def build(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
                return glu(key, data, replica_id, place.tp, ranks, axis or 0)

            return gs.ShardedTensorFactory(self.name, data, build, lambda parts: torch.cat([*parts.values()], axis), replica)
        offsets = [] if self.axis is None else [(self.axis, place.tp, ranks)]
        if self.kind == "turned":

            def turn(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> Any:
                return gs.ShardedTensor.from_rank_offsets(key, data.t(), *offsets, replica_id=replica_id)

            return gs.ShardedTensorFactory(self.name, data, turn, lambda loaded: loaded.t().contiguous(), replica)
        return gs.ShardedTensor.from_rank_offsets(self.name, data, *offsets, replica_id=replica)


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    instance: int
    pp: int
    tp: int
    dp: int


@dataclass(frozen=True)
class Side:
    """A layout of a job: sizes, how its buckets are filled, and in which order."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    instances: int = 1
    rules: BucketRules = field(default_factory=BucketRules)
    seed: int = 0
    whole: bool = False

    @property
    def places(self) -> list[Place]:
        """All ranks."""
        sizes = (range(self.instances), range(self.pp), range(self.tp), range(self.dp))
        return [Place(i, p, t, d) for i in sizes[0] for p in sizes[1] for t in sizes[2] for d in sizes[3]]

    def held(self, specs: list[Spec], place: Place) -> list[Spec]:
        """The parameters of a pipeline stage, in the order of the buckets."""
        mine = [spec for n, spec in enumerate(specs) if spec.shared or n * self.pp // len(specs) == place.pp]
        if not self.seed:
            return mine
        generator = torch.Generator().manual_seed(self.seed)
        return [mine[n] for n in torch.randperm(len(mine), generator=generator).tolist()]

    def layout(self, specs: list[Spec], place: Place) -> FlatLayout:
        """The buckets of a rank."""
        held = self.held(specs, place)
        parameters = [
            FlatParameter(spec.name, tuple(spec.cut("param", place.tp, self.tp).shape), str(spec.dtype).removeprefix("torch."))
            for spec in held
        ]
        if self.whole:
            return lay_out_whole(parameters, self.dp, {one.name: n % self.dp for n, one in enumerate(parameters)})
        return lay_out(parameters, self.dp, self.rules)

    def position(self, place: Place) -> dict[str, tuple[int, int]]:
        """For the form that loads in the same layout only."""
        return {"tp": (place.tp, self.tp), "pp": (place.pp, self.pp)}


@dataclass
class Optimizer:
    """The buffers of one rank."""

    side: Side
    specs: list[Spec]
    place: Place

    def __post_init__(self) -> None:
        self.layout = self.side.layout(self.specs, self.place)
        self.by_name = {spec.name: spec for spec in self.side.held(self.specs, self.place)}
        self.model = {name: spec.described(self.place, self.side.tp) for name, spec in self.by_name.items()}
        self.states = {name: empty_buffers(self.layout, self.place.dp, torch.float32) for name in STATES}
        for buffers in self.states.values():
            for buffer in buffers:
                buffer.fill_(-1)

    def expected(self, state: str) -> list[torch.Tensor]:
        """What the buffers are to hold, with -1 as padding: whole buckets, of which the rank has its range."""
        found = []
        for bucket in self.layout.buckets:
            whole = torch.full((bucket.elements,), -1.0)
            for parameter, start in zip(bucket.parameters, bucket.starts, strict=True):
                local = self.by_name[parameter.name].cut(state, self.place.tp, self.side.tp).flatten()
                whole[start : start + len(local)] = local
            low, high = bucket.range_of(self.place.dp)
            found.append(whole[low:high])
        return found

    def fill(self) -> Optimizer:
        """Give the buffers their values."""
        for name, buffers in self.states.items():
            for buffer, values in zip(buffers, self.expected(name), strict=True):
                buffer.copy_(values)
        return self

    def check(self) -> None:
        """Every element has its value, and padding is as it was."""
        for name, buffers in self.states.items():
            for number, (buffer, values) in enumerate(zip(buffers, self.expected(name), strict=True)):
                assert torch.equal(buffer, values), (name, number, self.place)


def optimizers(side: Side, specs: list[Spec]) -> list[Optimizer]:
    """Of all ranks."""
    return [Optimizer(side, specs, place) for place in side.places]


KINDS = (("plain", None), ("plain", 0), ("plain", 1), ("glu", 0), ("glu", 1), ("turned", 0), ("turned", 1))


@st.composite
def models(draw: st.DrawFn) -> list[Spec]:
    """A few parameters; axes that are cut can be cut into 1, 2 or 3."""
    found = []
    for number in range(draw(st.integers(1, 6))):
        kind, axis = draw(st.sampled_from(KINDS))
        dims = 2 if kind != "plain" or axis == 1 else draw(st.integers(0 if axis is None else 1, 3))
        shape = [draw(st.integers(0 if kind == "plain" else 1, 5)) for _ in range(dims)]
        if axis is not None:
            shape[axis] = draw(st.sampled_from((6, 12)))
        dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
        found.append(Spec(f"p{number}", tuple(shape), axis, kind, dtype, draw(st.booleans()) and number == 0))
    return found


@st.composite
def sides(draw: st.DrawFn) -> Side:
    """Any layout of up to 12 ranks."""
    dp, tp, pp = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (3, 1, 1), (5, 1, 1), (2, 2, 1), (4, 1, 2), (2, 3, 1), (2, 2, 2)]))
    rules = BucketRules(
        max_elements=draw(st.sampled_from((None, 1, 17, 40))),
        parameter_alignment=draw(st.sampled_from((1, 4, 7))),
        bucket_alignment=draw(st.sampled_from((1, 8))),
        even=draw(st.booleans()),
        alone=frozenset(),
    )
    return Side(
        dp, tp, pp, draw(st.integers(1, 2)) if dp * tp * pp < 6 else 1, rules, draw(st.integers(0, 99)), draw(st.booleans())
    )
