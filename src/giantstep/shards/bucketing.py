"""How parameters are put into buckets: by size, aligned and padded, or whole parameters per rank. Pure.

Makes `FlatLayout`s for optimizers that have no layout of their own yet; one that has states it with `Bucket`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from giantstep.errors import BadArgumentError
from giantstep.shards.flat_buffers import Bucket, FlatLayout, FlatParameter


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRules:
    """How `lay_out` fills buckets.

    Attributes:
        max_elements: a bucket is closed before it would become longer, without padding at its end; a longer parameter has
            a bucket to itself. None: one bucket per dtype.
        parameter_alignment: parameters begin at multiples of it, in elements.
        bucket_alignment: lengths of buckets are multiples of it, in elements.
        even: buckets are padded so that all ranks own ranges of one length; else ranges differ by at most one element.
        alone: names of parameters that get a bucket to themselves, such as a shared embedding.
    """

    max_elements: int | None = None
    parameter_alignment: int = 1
    bucket_alignment: int = 1
    even: bool = True
    alone: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        for name in ("max_elements", "parameter_alignment", "bucket_alignment"):
            value = getattr(self, name)
            if not (value is None and name == "max_elements") and (type(value) is not int or value < 1):
                raise BadArgumentError(f"BucketRules: {name} {value!r} must be an int of at least 1")
        if type(self.even) is not bool:
            raise BadArgumentError(f"BucketRules: even {self.even!r} must be True or False")
        if not isinstance(self.alone, frozenset) or not all(isinstance(name, str) for name in self.alone):
            raise BadArgumentError(f"BucketRules: alone {self.alone!r} must be a frozenset of names")


def lay_out(parameters: Iterable[FlatParameter], ranks: int, rules: BucketRules | None = None) -> FlatLayout:
    """Buckets filled with parameters in the given order, those of each dtype for themselves.

    Args:
        parameters: in the order in which they are to lie; often the reverse of the model's, in which gradients come.
        ranks: number of data-parallel ranks that share the buckets.
        rules: see `BucketRules`.

    Raises:
        BadArgumentError: names repeat, or a rule names a parameter that does not exist.
    """
    rules = rules if rules is not None else BucketRules()
    if not isinstance(rules, BucketRules):
        raise BadArgumentError(f"rules must be BucketRules, not {type(rules).__name__}")
    _check_ranks(ranks)
    by_dtype: dict[str, list[FlatParameter]] = {}
    for parameter in parameters:
        if not isinstance(parameter, FlatParameter):
            raise BadArgumentError(f"parameters to lay out must be FlatParameters, not {type(parameter).__name__}")
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    unknown = rules.alone - {parameter.name for group in by_dtype.values() for parameter in group}
    if unknown:
        raise BadArgumentError(f"BucketRules: alone names {min(unknown)!r}, which is none of the parameters")
    groups = [part for group in by_dtype.values() for part in _parted(group, rules)]
    return FlatLayout(tuple(_bucket(part, ranks, rules) for part in groups), ranks)


def lay_out_whole(parameters: Iterable[FlatParameter], ranks: int, owner: Mapping[str, int]) -> FlatLayout:
    """A bucket per dtype in which each rank owns whole parameters, without padding: layer-wise optimizers such as Muon's.

    Args:
        parameters: in any order; those of one rank lie together, in this order.
        ranks: number of data-parallel ranks.
        owner: the rank that owns each parameter, by name.

    Raises:
        BadArgumentError: a parameter has no owner, or one that does not exist.
    """
    _check_ranks(ranks)
    by_dtype: dict[str, list[list[FlatParameter]]] = {}
    for parameter in parameters:
        rank = owner.get(parameter.name)
        if type(rank) is not int or not 0 <= rank < ranks:
            raise BadArgumentError(f"parameter {parameter.name!r}: owner {rank!r} must be a rank from 0 to {ranks - 1}")
        by_dtype.setdefault(parameter.dtype, [[] for _ in range(ranks)])[rank].append(parameter)
    buckets = []
    for groups in by_dtype.values():
        ordered = list(itertools.chain.from_iterable(groups))
        ends = [0, *itertools.accumulate(parameter.elements for parameter in ordered)]
        cuts = [0, *itertools.accumulate(sum(parameter.elements for parameter in group) for group in groups)]
        buckets.append(Bucket(tuple(ordered), tuple(ends[:-1]), ends[-1], tuple(cuts)))
    return FlatLayout(tuple(buckets), ranks)


def _check_ranks(ranks: int) -> None:
    if type(ranks) is not int or ranks < 1:
        raise BadArgumentError(f"ranks {ranks!r} must be an int of at least 1")


def _parted(parameters: Sequence[FlatParameter], rules: BucketRules) -> list[list[FlatParameter]]:
    """Parameters of one dtype bucket by bucket."""
    parts: list[list[FlatParameter]] = []
    reached, closed = 0, True
    for parameter in parameters:
        start = _rounded(reached, rules.parameter_alignment)
        alone = parameter.name in rules.alone
        full = rules.max_elements is not None and start + parameter.elements > rules.max_elements
        if closed or alone or full:
            parts.append([])
            start = 0
        parts[-1].append(parameter)
        reached, closed = start + parameter.elements, alone
    return parts


def _bucket(parameters: Sequence[FlatParameter], ranks: int, rules: BucketRules) -> Bucket:
    starts, reached = [], 0
    for parameter in parameters:
        starts.append(_rounded(reached, rules.parameter_alignment))
        reached = starts[-1] + parameter.elements
    elements = _rounded(reached, math.lcm(rules.bucket_alignment, ranks) if rules.even else rules.bucket_alignment)
    return Bucket(tuple(parameters), tuple(starts), elements, tuple(rank * elements // ranks for rank in range(ranks + 1)))


def _rounded(value: int, step: int) -> int:
    """The least multiple of `step` that is not less."""
    return -(-value // step) * step
