"""`copy_all`: many tensors in host memory copied to others, with the interpreter's lock held for none of it.

Tensors that follow each other in memory, as the parameters in a flat buffer do, and whose copies do too, are copied as one:
a copy of 32 KiB costs half as much again, per byte, as one of many MiB. Called by `snapshot`.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from giantstep.errors import ChangedTooSoonError
from giantstep.shards.region import Int64s
from giantstep.storage.buffers import memory_between
from giantstep.words import words_of

# Below this a second thread takes longer to start than it saves.
_SHARED_FROM_BYTES = 16 << 20
# Runs of fewer tensors than this, on average, are copied tensor by tensor.
_WORTH_A_RUN = 4

_size, _begin, _on_host = operator.attrgetter("nbytes"), torch.Tensor.data_ptr, operator.attrgetter("is_cpu")


def as_copied(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as words."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return words_of(tensor)


def copy_all(targets: Sequence[torch.Tensor], origins: Sequence[torch.Tensor], threads: int) -> None:
    """Copy tensors to contiguous ones of the same dtypes and shapes.

    Args:
        targets: contiguous; no two share memory.
        origins: none lazily conjugated or negated. The caller keeps them alive.
        threads: 1 or 2; few bytes are copied by one.
    """
    copies, sources = list(targets), list(origins)
    if not copies:
        return
    sizes = np.fromiter(map(_size, sources), dtype=np.int64, count=len(sources))
    if (sizes != np.fromiter(map(_size, copies), dtype=np.int64, count=len(copies))).any():
        # Another thread has given a tensor other memory since it was described.
        raise ChangedTooSoonError(
            "a tensor was given another shape (.data, set_) while it was staged: wait until a save is staged"
        )
    in_two = threads > 1 and int(sizes.sum()) >= _SHARED_FROM_BYTES
    steps = _runs(copies, sources, sizes, in_two) or _tensors(copies, sources, sizes, in_two)
    if len(steps) == 1:
        steps[0]()
        return
    with ThreadPoolExecutor(1, thread_name_prefix="giantstep-stage") as helper:
        others = [helper.submit(step) for step in steps[1:]]
        steps[0]()
        for other in others:
            other.result()


_Step = Callable[[], object]


def _tensors(copies: list[torch.Tensor], sources: list[torch.Tensor], sizes: Int64s, in_two: bool) -> list[_Step]:
    """One step, or two of about as many bytes each."""
    ends = list(itertools.accumulate(sizes.tolist()))
    half = bisect.bisect_left(ends, ends[-1] // 2) + 1
    if not in_two or half == len(copies):
        return [lambda: torch._foreach_copy_(copies, sources)]
    return [
        lambda: torch._foreach_copy_(copies[:half], sources[:half]),
        lambda: torch._foreach_copy_(copies[half:], sources[half:]),
    ]


def _runs(copies: list[torch.Tensor], sources: list[torch.Tensor], sizes: Int64s, in_two: bool) -> list[_Step]:
    """The same by runs of neighbours; none if most tensors have no neighbours."""
    # Addresses are the host's only for tensors on the host.
    if len(sources) < _WORTH_A_RUN or not all(map(torch.Tensor.is_contiguous, sources)) or not all(map(_on_host, sources)):
        return []
    places = [np.fromiter(map(_begin, tensors), dtype=np.int64, count=len(tensors)) for tensors in (copies, sources)]
    apart = np.ones(len(sizes), dtype=bool)
    apart[1:] = np.logical_or.reduce([place[1:] != place[:-1] + sizes[:-1] for place in places])
    first = np.flatnonzero(apart)
    if len(first) * _WORTH_A_RUN > len(sizes):
        return []
    lengths = np.add.reduceat(sizes, first)
    spans = list(zip(places[0][first].tolist(), places[1][first].tolist(), lengths.tolist(), strict=True))
    total, owners = int(sizes.sum()), (copies, list(map(torch.Tensor.untyped_storage, sources)))
    if not in_two:
        return [partial(_copy_spans, spans, owners)]
    # To the byte: one run may be all there is.
    return [partial(_copy_spans, _within(spans, *part), owners) for part in ((0, total // 2), (total // 2, total))]


_Span = tuple[int, int, int]


def _within(spans: list[_Span], start: int, stop: int) -> list[_Span]:
    """What of the spans lies in a range of all their bytes together."""
    found, begin = [], 0
    for target, origin, length in spans:
        low, high = max(start - begin, 0), min(stop - begin, length)
        if low < high:
            found.append((target + low, origin + low, high - low))
        begin += length
    return found


def _copy_spans(spans: list[_Span], _owners: object) -> None:
    """Copy bytes from address to address; `_owners` keep them alive, whatever becomes of the caller."""
    for target, origin, length in spans:
        to, of = (np.frombuffer(memory_between(start, start + length), dtype=np.uint8) for start in (target, origin))
        np.copyto(to, of)
