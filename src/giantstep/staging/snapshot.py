"""`Snapshot`: tensors as they are at one moment, copied to host memory that is used again from save to save.

Tensors in host memory are copied by the thread that takes the snapshot, or later by the one that finishes it. Copies from
CUDA devices are queued on a stream of their own when the snapshot is taken, behind what the caller's stream has queued so
far, and run beside its later kernels. Called by `async_saving`.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from giantstep.errors import ChangedTooSoonError
from giantstep.storage.arenas import Arena, Arenas
from giantstep.words import words_of

# Copies begin on cache lines, and so where every kind of element may.
_ALIGNMENT = 64
# Below this a second thread takes longer to start than it saves.
_SHARED_FROM_BYTES = 16 << 20
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where copies lie.

    Attributes:
        place: for each tensor the first byte of its copy; tensors that are the same elements of the same memory share one.
        first: rows of the tensors that are copied: those with elements, the first of those that share a copy.
        bytes: of all copies.
    """

    place: list[int]
    first: list[int]
    bytes: int


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
    return Layout(place, first, end)


@dataclass(frozen=True, slots=True)
class _Views:
    """Copies of one snapshot, kept for the next if that looks the same: to make thousands of them takes a while."""

    arena: Arena
    place: list[int]
    shapes: list[torch.Size]
    sizes: list[int]
    views: list[torch.Tensor]


class StagingMemory:
    """The memory of one rank's snapshots, kept from save to save; page-locked for those with tensors of CUDA devices."""

    def __init__(self) -> None:
        self._plain, self._locked = Arenas(), Arenas(_locked_memory)
        self._last: _Views | None = None

    @property
    def held_bytes(self) -> int:
        """What there is now, in use or not."""
        return self._plain.held_bytes + self._locked.held_bytes

    @property
    def taken_bytes(self) -> int:
        """What is in use."""
        return self._plain.taken_bytes + self._locked.taken_bytes

    def arenas(self, *, locked: bool) -> Arenas:
        """Those of one kind."""
        return self._locked if locked else self._plain

    def clear(self) -> None:
        """Free what is not in use."""
        self._last = None
        self._plain.clear()
        self._locked.clear()

    def views(self, arena: Arena, tensors: Sequence[torch.Tensor], place: list[int]) -> list[torch.Tensor]:
        """Where in an arena the copies of tensors are to be, as words."""
        shapes, sizes = [tensor.shape for tensor in tensors], [tensor.element_size() for tensor in tensors]
        last = self._last
        if last is None or last.arena is not arena or (last.place, last.sizes, last.shapes) != (place, sizes, shapes):
            last = self._last = _Views(arena, place, shapes, sizes, _views(arena, shapes, sizes, place))
        return last.views


def _locked_memory(size_bytes: int) -> Arena:
    array: Arena = torch.empty(max(1, size_bytes), dtype=torch.uint8, device="cpu", pin_memory=True).numpy()
    return array[:size_bytes]


class Snapshot:
    """Copies of tensors.

    Args:
        tensors: dense, of any device and strides. Kept only until they are copied.
        names: of each, for errors.
        layout: from `lay_out`.
        memory: where copies are put.
        outer: tensors, with names, of which `tensors` are parts, and which count changes themselves.
        later: tensors in host memory are copied by `finish`.

    Attributes:
        copies: for each tensor its copy, contiguous in host memory, as words of its elements' size (see `words`); valid
            once `finish` has returned, until `release`.

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
    ) -> None:
        self._arenas = memory.arenas(locked=any(tensor.is_cuda for tensor in tensors))
        self._arena: Arena | None = self._arenas.take(layout.bytes)
        self._events: list[torch.cuda.Event] = []
        self._left: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Tensors that must not change yet, with the number of their changes so far.
        self._watched: list[_Watched] = []
        try:
            # Copies outlive the mode in which the caller happens to be.
            with torch.inference_mode(mode=False), torch.no_grad():
                self.copies = memory.views(self._arena, tensors, layout.place)
                self._begin(tensors, names, layout.first, [_Watched.of(*found) for found in outer], later=later)
        except BaseException:
            self.release()
            raise

    def _begin(
        self, tensors: Sequence[torch.Tensor], names: Sequence[str], rows: Sequence[int], outer: list[_Watched], *, later: bool
    ) -> None:
        watched = [_Watched.of(names[row], tensors[row]) for row in rows]
        pairs = [(self.copies[row], tensors[row]) for row in rows]
        on_cuda = [tensors[row].is_cuda for row in rows]
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for pair in itertools.compress(pairs, on_cuda):
            by_device.setdefault(pair[1].device, []).append(pair)
        for device, found in by_device.items():
            self._events.append(_queue_copies(device, found))
        here = [pair for pair, away in zip(pairs, on_cuda, strict=True) if not away]
        if later:
            self._left, self._watched = here, watched
        else:
            _copy_all(here)
            _check([found for found, away in zip(watched, on_cuda, strict=True) if not away])
            self._watched = list(itertools.compress(watched, on_cuda))
        if self.is_on_its_way:
            self._watched += outer

    @property
    def is_on_its_way(self) -> bool:
        """Whether copies are left that `finish` would wait for or make."""
        return bool(self._left or self._events)

    def finish(self) -> None:
        """Wait for, or make, the copies that are not made yet. The tensors may change afterwards.

        Raises:
            ChangedTooSoonError: a tensor was changed since the snapshot was taken, as its version counter shows.
        """
        left, watched, self._left, self._watched = self._left, self._watched, [], []
        # Before: memory that is gone cannot be read. After: what was changed meanwhile.
        _check(watched)
        _check_memory(left, watched)
        with torch.inference_mode(mode=False), torch.no_grad():
            _copy_all(left)
        for event in self._events:
            event.synchronize()
        _check(watched)

    def release(self) -> None:
        """Give the memory back. Copies must not be used any more."""
        arena, self._arena = self._arena, None
        self.copies, self._left, self._watched = [], [], []
        if arena is not None:
            # Copies that are still on their way would go into memory of the next snapshot.
            for event in self._events:
                event.synchronize()
            self._arenas.give(arena)


class _Watched(NamedTuple):
    """A tensor that is not to change; `version` is None where torch does not count changes."""

    name: str
    tensor: torch.Tensor
    version: int | None

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _Watched:
        return cls(name, tensor, _version(tensor))


def _version(tensor: torch.Tensor) -> int | None:
    """How often the memory of a tensor was changed in place."""
    return None if tensor.is_inference() else tensor._version


def _check(watched: Sequence[_Watched]) -> None:
    """Raise if a tensor was changed, or has lost its memory."""
    changed = [name for name, tensor, version in watched if _version(tensor) != version]
    if changed:
        raise ChangedTooSoonError(
            f"tensor {changed[0]!r} was changed in place before it was staged, so what would be stored is neither its old "
            "value nor its new one"
            + (f" (and so were {len(changed) - 1} more)" if len(changed) > 1 else "")
            + ". Call PendingSave.wait_staged before tensors change, or PendingSave.guard once with the optimizer."
        )


def _check_memory(left: Sequence[tuple[torch.Tensor, torch.Tensor]], watched: Sequence[_Watched]) -> None:
    """Raise if a tensor that is still to be read has lost its memory, as when a storage was resized."""
    for (_, tensor), found in zip(left, watched, strict=False):
        reach = sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        if (tensor.storage_offset() + reach) * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ChangedTooSoonError(f"the memory of tensor {found.name!r} was freed before it was staged")


def _views(arena: Arena, shapes: Sequence[torch.Size], sizes: Sequence[int], place: Sequence[int]) -> list[torch.Tensor]:
    whole = torch.from_numpy(arena[: arena.size // 16 * 16]) if arena.size else torch.empty(0, dtype=torch.uint8, device="cpu")
    kinds = {size: whole.view(_WORDS[size]) for size in set(sizes)}
    strides = {shape: _row_major(shape) for shape in set(shapes)}
    return [
        kinds[size].as_strided(shape, strides[shape], start // size) if shape.numel() else kinds[size].new_empty(shape)
        for shape, size, start in zip(shapes, sizes, place, strict=True)
    ]


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    steps = itertools.accumulate(reversed(shape[1:]), lambda step, count: step * max(1, count), initial=1)
    return tuple(reversed(list(steps))) if len(shape) else ()


def _source(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as words."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return words_of(tensor)


def _copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy tensors to host memory, in two threads if that pays. The interpreter's lock is held for none of it."""
    copies, sources = [copy for copy, _ in pairs], [_source(tensor) for _, tensor in pairs]
    ends = list(itertools.accumulate(source.numel() * source.element_size() for source in sources))
    if not ends:
        return
    if ends[-1] < _SHARED_FROM_BYTES:
        torch._foreach_copy_(copies, sources)
        return
    half = bisect.bisect_left(ends, ends[-1] // 2) + 1
    with ThreadPoolExecutor(1, thread_name_prefix="giantstep-stage") as helper:
        second = helper.submit(torch._foreach_copy_, copies[half:], sources[half:]) if half < len(copies) else None
        torch._foreach_copy_(copies[:half], sources[:half])
        if second is not None:
            second.result()


def _queue_copies(device: torch.device, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event:
    """Have copies from a CUDA device made on a stream of their own, after what is queued on the current one."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for copy, tensor in pairs:
            source = _source(tensor)
            copy.copy_(source, non_blocking=True)
            # The memory must not be given to another tensor before it was read, even if this one is freed.
            source.record_stream(stream)
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
    return event
