"""`Snapshot`: tensors as they are at one moment, copied to host memory that is used again from save to save.

Tensors in host memory are copied by the thread that takes the snapshot, or later by the one that finishes it. Copies from
CUDA devices are queued on a stream of their own when the snapshot is taken, behind what the caller's stream has queued so
far, and run beside its later kernels. Called by `async_saving`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from giantstep.errors import ChangedTooSoonError
from giantstep.storage.arenas import Arena, Arenas
from giantstep.words import words_of

# Copies begin on cache lines, and so where every kind of element may.
_ALIGNMENT = 64
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where copies lie.

    Attributes:
        place: for each tensor the first byte of its copy; tensors that are the same elements of the same memory share one.
        first: for each tensor, whether it is the first of those that share a copy.
        bytes: of all copies.
    """

    place: list[int]
    first: list[bool]
    bytes: int


def lay_out(tensors: Sequence[torch.Tensor], memory_of: Callable[[torch.Tensor], Hashable]) -> Layout:
    """Give every tensor a place; empty ones take none.

    Args:
        tensors: what is to be copied.
        memory_of: equal for tensors that are the same elements of the same memory; None for those that have none.
    """
    places: dict[Hashable, int] = {}
    place, first, end = [], [], 0
    for tensor in tensors:
        memory = memory_of(tensor)
        known = places.get(memory) if memory is not None else None
        first.append(known is None)
        if known is None:
            known = places[memory] = end
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        place.append(known)
    return Layout(place, first, end)


class StagingMemory:
    """The memory of one rank's snapshots, kept from save to save; page-locked for those with tensors of CUDA devices."""

    def __init__(self) -> None:
        self._plain, self._locked = Arenas(), Arenas(_locked_memory)

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
        self._plain.clear()
        self._locked.clear()


def _locked_memory(size_bytes: int) -> Arena:
    array: Arena = torch.empty(max(1, size_bytes), dtype=torch.uint8, pin_memory=True).numpy()
    return array[:size_bytes]


class Snapshot:
    """Copies of tensors.

    Args:
        tensors: dense, of any device and strides. Not kept once the snapshot is finished.
        names: of each, for errors.
        layout: from `lay_out`.
        memory: where copies are put.
        later: tensors in host memory are copied by `finish`.

    Attributes:
        copies: for each tensor its copy, contiguous in host memory, as words of its elements' size (see `words`); valid
            once `finish` has returned, until `release`.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], names: Sequence[str], layout: Layout, memory: StagingMemory, *, later: bool
    ) -> None:
        self._names = names
        self._tensors = tensors
        self._versions = [_version(tensor) for tensor in tensors]
        self._arenas = memory.arenas(locked=any(tensor.is_cuda for tensor in tensors))
        self._arena: Arena | None = self._arenas.take(layout.bytes)
        self._events: list[torch.cuda.Event] = []
        self._left: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            self.copies = _views(self._arena, tensors, layout)
            self._copy(layout, later=later)
        except BaseException:
            self.release()
            raise

    def _copy(self, layout: Layout, *, later: bool) -> None:
        pairs = [
            (copy, tensor)
            for copy, tensor, first in zip(self.copies, self._tensors, layout.first, strict=True)
            if first and tensor.numel()
        ]
        on_cuda = [pair for pair in pairs if pair[1].is_cuda]
        rest = [pair for pair in pairs if not pair[1].is_cuda] if on_cuda else pairs
        by_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for copy, tensor in on_cuda:
            by_device.setdefault(tensor.device, []).append((copy, tensor))
        for device, found in by_device.items():
            self._events.append(_queue_copies(device, found))
        if later:
            self._left = rest
        else:
            _copy_all(rest)

    @property
    def is_on_its_way(self) -> bool:
        """Whether copies are left that `finish` would wait for or make."""
        return bool(self._left or self._events)

    def finish(self) -> None:
        """Wait for, or make, the copies that are not made yet. The tensors may change afterwards.

        Raises:
            ChangedTooSoonError: a tensor was changed since the snapshot was taken, as its version counter shows.
        """
        left, self._left = self._left, []
        _copy_all(left)
        for event in self._events:
            event.synchronize()
        tensors, self._tensors = self._tensors, []
        for tensor, version, name in zip(tensors, self._versions, self._names, strict=False):
            if _version(tensor) != version:
                raise ChangedTooSoonError(
                    f"tensor {name!r} was changed in place before it was staged, so what would be stored of it is neither its "
                    "old value nor its new one. Call PendingSave.wait_staged before tensors change, or PendingSave.guard once "
                    "with the optimizer."
                )

    def release(self) -> None:
        """Give the memory back. Copies must not be used any more."""
        arena, self._arena = self._arena, None
        self.copies, self._left, self._tensors = [], [], []
        if arena is not None:
            # Copies that are still on their way would go into memory of the next snapshot.
            for event in self._events:
                event.synchronize()
            self._arenas.give(arena)


def _version(tensor: torch.Tensor) -> int | None:
    """How often the memory of a tensor was changed in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _views(arena: Arena, tensors: Sequence[torch.Tensor], layout: Layout) -> list[torch.Tensor]:
    """Where the copies are to be, as words."""
    whole = torch.from_numpy(arena[: arena.size // 16 * 16]) if arena.size else torch.empty(0, dtype=torch.uint8)
    kinds: dict[int, torch.Tensor] = {}
    strides: dict[torch.Size, tuple[int, ...]] = {}
    found = []
    for tensor, place in zip(tensors, layout.place, strict=True):
        shape, size = tensor.shape, tensor.element_size()
        kind = kinds.get(size)
        if kind is None:
            kind = kinds[size] = whole.view(_WORDS[size])
        stride = strides.get(shape)
        if stride is None:
            stride = strides[shape] = _row_major(shape)
        if tensor.numel():
            found.append(kind.as_strided(shape, stride, place // size))
        else:
            found.append(kind.new_empty(shape))
    return found


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    steps = itertools.accumulate(reversed(shape[1:]), lambda step, count: step * max(1, count), initial=1)
    return tuple(reversed(list(steps))) if len(shape) else ()


def _source(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as words."""
    return words_of(tensor.detach().resolve_conj().resolve_neg())


def _copy_all(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy tensors, to host memory. One call for all, which holds the interpreter's lock for none of it."""
    if pairs:
        torch._foreach_copy_([copy for copy, _ in pairs], [_source(tensor) for _, tensor in pairs])


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
