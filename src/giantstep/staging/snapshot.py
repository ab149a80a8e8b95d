"""`Snapshot`: tensors as they are at one moment, copied to host memory that is used again from save to save.

Tensors in host memory are copied by the thread that takes the snapshot, or later by the one that finishes it. Copies from
CUDA devices are queued on a stream of their own when the snapshot is taken, behind what the caller's stream has queued so
far, and run beside its later kernels. Called by `async_saving`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from giantstep.staging.copying import as_copied, copy_all
from giantstep.staging.devices import Copying, Streams, locked_memory
from giantstep.staging.unchanged import Watch
from giantstep.storage.arenas import Arena, Arenas

# Copies begin on cache lines, and so where every kind of element may.
_ALIGNMENT = 64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
# What torch copies as it is, bit by bit; all else is copied as words.
_COPIED = frozenset(
    (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where copies lie.

    Attributes:
        place: for each tensor the first byte of its copy; tensors that are the same elements of the same memory share one.
        first: rows of the tensors that are copied: those with elements, the first of those that share a copy.
        bytes: of all copies.
        as_is: whether torch copies them as they are; else they are copied as words.
        is_plain: whether they also all lie in host memory.
    """

    place: list[int]
    first: list[int]
    bytes: int
    as_is: bool
    is_plain: bool


def lay_out(tensors: Sequence[torch.Tensor], memory_of: Callable[[torch.Tensor], Hashable]) -> Layout:
    """Give every tensor a place; empty ones take none.

    Args:
        tensors: what is to be copied.
        memory_of: equal for tensors that are the same elements of the same memory; None for those that have none.
    """
    # Few tensors begin where another does, and only those are looked at more closely.
    begun: dict[int, list[int]] = {}
    place, first, end = [], [], 0
    for row, tensor in enumerate(tensors):
        size = tensor.numel() * tensor.element_size()
        if not size:
            place.append(0)
            continue
        others = begun.setdefault(tensor.data_ptr(), [])
        same = next((other for other in others if memory_of(tensors[other]) == memory_of(tensor)), None) if others else None
        if same is None:
            place.append(end)
            first.append(row)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
            others.append(row)
        else:
            place.append(place[same])
    as_is = all(tensors[row].dtype in _COPIED and not tensors[row].is_neg() for row in first)
    return Layout(place, first, end, as_is, as_is and all(tensors[row].is_cpu for row in first))


@dataclass(frozen=True, slots=True)
class _Views:
    """Copies of one snapshot, kept for the next if that looks the same: to make thousands of them takes a while."""

    arena: Arena
    layout: Layout
    views: list[torch.Tensor]


class StagingMemory:
    """The memory of one rank's snapshots, kept from save to save; page-locked for those with tensors of CUDA devices.

    Attributes:
        streams: on which tensors of CUDA devices are copied.
    """

    def __init__(self) -> None:
        self._plain, self._locked = Arenas(), Arenas(locked_memory)
        self.streams = Streams()
        self._last: _Views | None = None

    @property
    def held_bytes(self) -> int:
        """What there is now, in use or not."""
        return self._plain.held_bytes + self._locked.held_bytes

    @property
    def taken_bytes(self) -> int:
        """What is in use."""
        return self._plain.taken_bytes + self._locked.taken_bytes

    def has_free(self, size: int) -> bool:
        """Whether there is memory for a snapshot, of either kind, that is not in use."""
        return self._plain.has_free(size) or self._locked.has_free(size)

    def arenas(self, *, locked: bool) -> Arenas:
        """Those of one kind."""
        return self._locked if locked else self._plain

    def clear(self) -> None:
        """Free what is not in use."""
        self._last = None
        self._plain.clear()
        self._locked.clear()

    def views(self, arena: Arena, tensors: Sequence[torch.Tensor], layout: Layout) -> list[torch.Tensor]:
        """Where in an arena the copies of tensors are to be: as words, if they are not plain."""
        last = self._last
        if last is None or last.arena is not arena or last.layout is not layout:
            last = self._last = _Views(arena, layout, _views(arena, tensors, layout))
        return last.views


class Snapshot:
    """Copies of tensors.

    Args:
        tensors: dense, of any device and strides. Kept only until they are copied.
        names: of each, for errors.
        layout: from `lay_out`, for these tensors or others that look the same.
        memory: where copies are put.
        outer: tensors, with names, of which `tensors` are parts, and which count changes themselves.
        later: tensors in host memory are copied by `finish`.
        threads: that copy, 1 or 2.

    Attributes:
        copies: for each tensor its copy, contiguous in host memory, of its dtype or as words of its elements' size (see
            `words`); valid once `finish` has returned, until `release`.

    Raises:
        ChangedTooSoonError: as `finish`.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        names: Sequence[str],
        layout: Layout,
        memory: StagingMemory,
        *,
        outer: Sequence[tuple[str, torch.Tensor]],
        later: bool,
        threads: int,
    ) -> None:
        self._threads = threads
        locked = not layout.is_plain and any(tensor.is_cuda for tensor in tensors)
        self._queued: list[Copying] = []
        arenas = memory.arenas(locked=locked)
        arena = arenas.take(layout.bytes)
        # Also where nobody comes to release it: a thread that could not be started, an interrupt.
        self._give_back = weakref.finalize(self, _give_back, arenas, arena, self._queued)
        self._give_back.atexit = False
        self._streams = memory.streams
        self._left: _Left | None = None
        # Tensors that must not change yet.
        self._watched: list[Watch] = []
        self._is_plain, self._as_is = layout.is_plain, layout.as_is
        try:
            # Copies outlive the mode in which the caller happens to be.
            with torch.inference_mode(mode=False), torch.no_grad():
                self.copies = memory.views(arena, tensors, layout)
                self._begin(_chosen(tensors, layout), _chosen(names, layout), _chosen(self.copies, layout), outer, later=later)
        except BaseException:
            self.release()
            raise

    def _begin(
        self,
        tensors: Sequence[torch.Tensor],
        names: Sequence[str],
        copies: Sequence[torch.Tensor],
        outer: Sequence[tuple[str, torch.Tensor]],
        *,
        later: bool,
    ) -> None:
        # Which of them are on a CUDA device: mostly, where there is one, all.
        away = [False] * len(tensors) if self._is_plain else [tensor.is_cuda for tensor in tensors]
        devices = {tensor.device for tensor in _those(tensors, away)}
        for device in devices:
            chosen = [tensor.device == device for tensor in tensors]
            # Detached: the caller may give its tensors other memory meanwhile.
            sources = self._sources([tensor.detach() for tensor in _those(tensors, chosen)])
            self._queued.append(self._streams.queue(device, _those(copies, chosen), sources))
        if devices:
            self._watched.append(Watch.of(_those(names, away), _those(tensors, away)))
            here = [not cuda for cuda in away]
            tensors, names, copies = _those(tensors, here), _those(names, here), _those(copies, here)
        if later:
            # The caller may give its tensors other memory meanwhile (`.data =`), but not these, which count the same changes.
            tensors = [tensor.detach() for tensor in tensors]
        watch = Watch.of(names, tensors)
        if later:
            self._left = _Left(copies, watch)
            self._watched.append(watch)
        else:
            copy_all(copies, self._sources(tensors), self._threads)
            watch.check()
        if self.is_on_its_way:
            self._watched.append(Watch.of([name for name, _ in outer], [tensor for _, tensor in outer]))

    def _sources(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Tensors as torch can copy them."""
        return tensors if self._as_is else list(map(as_copied, tensors))

    @property
    def is_on_its_way(self) -> bool:
        """Whether copies are left that `finish` would wait for or make."""
        return bool((self._left and self._left.copies) or self._queued)

    def finish(self) -> None:
        """Wait for, or make, the copies that are not made yet. The tensors may change afterwards.

        Raises:
            ChangedTooSoonError: a tensor was changed since the snapshot was taken, as its version counter shows.
        """
        left, watched, self._left, self._watched = self._left, self._watched, None, []
        # Before: memory that is gone cannot be read. After: what was changed meanwhile.
        for watch in watched:
            watch.check()
        if left is not None:
            left.watch.check_memory()
            with torch.inference_mode(mode=False), torch.no_grad():
                copy_all(left.copies, self._sources(left.watch.tensors), self._threads)
        for copying in self._queued:
            copying.wait()
        for watch in watched:
            watch.check()

    def release(self) -> None:
        """Give the memory back. Copies must not be used any more."""
        self.copies, self._left, self._watched = [], None, []
        self._give_back()


def _give_back(arenas: Arenas, arena: Arena, queued: Sequence[Copying]) -> None:
    try:
        # Copies that are still on their way would go into memory of the next snapshot.
        for copying in queued:
            copying.wait()
    finally:
        arenas.give(arena)


class _Left(NamedTuple):
    """Tensors that are still to be copied, and where to."""

    copies: Sequence[torch.Tensor]
    watch: Watch


_Item = TypeVar("_Item")


def _chosen(items: Sequence[_Item], layout: Layout) -> Sequence[_Item]:
    """Those of the tensors that are copied."""
    return items if len(layout.first) == len(items) else [items[row] for row in layout.first]


def _those(items: Sequence[_Item], chosen: Sequence[bool]) -> list[_Item]:
    return list(itertools.compress(items, chosen))


def _views(arena: Arena, tensors: Sequence[torch.Tensor], layout: Layout) -> list[torch.Tensor]:
    whole = torch.from_numpy(arena[: arena.size // 16 * 16]) if arena.size else torch.empty(0, dtype=torch.uint8, device="cpu")
    kinds = [tensor.dtype if layout.as_is else _WORDS[tensor.element_size()] for tensor in tensors]
    wholes = {kind: whole.view(kind) for kind in set(kinds)}
    shapes = [tensor.shape for tensor in tensors]
    strides = {shape: _row_major(shape) for shape in set(shapes)}
    return [
        wholes[kind].as_strided(shape, strides[shape], start // kind.itemsize)
        if shape.numel()
        else wholes[kind].new_empty(shape)
        for shape, kind, start in zip(shapes, kinds, layout.place, strict=True)
    ]


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    steps = itertools.accumulate(reversed(shape[1:]), lambda step, count: step * max(1, count), initial=1)
    return tuple(reversed(list(steps))) if len(shape) else ()
