"""Copies from CUDA devices to page-locked host memory, beside what the devices do for the caller. Called by `snapshot`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch

from giantstep.storage.arenas import Arena
from giantstep.storage.buffers import address_of, device_buffer


def locked_memory(size_bytes: int) -> Arena:
    """New page-locked memory, exactly as much as is asked for; unlocked and freed with the array.

    torch's own allocator of such memory rounds up to the next power of two, and keeps what is freed.

    Raises:
        RuntimeError: the CUDA driver refuses, as when the host has too little memory.
    """
    whole = device_buffer(size_bytes)
    if not size_bytes:
        return whole
    runtime, address = torch.cuda.cudart(), address_of(whole)  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(runtime.cudaHostRegister(address, size_bytes, 0)))
    # The array on which all slices are based, so that nothing uses the memory any more when this runs.
    owner = whole
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    end = weakref.finalize(owner, _unlock, torch.cuda.current_device(), address)
    # The end of the process unlocks it anyway, and saves may be in flight until then.
    end.atexit = False
    return whole


def _unlock(device: int, address: int) -> None:
    # Whatever thread this runs in: its own device may be another one, on which nothing is to be set up.
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


class Streams:
    """One stream per device, on which copies run beside the caller's kernels."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def queue(self, device: torch.device, copies: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Copying:
        """Have tensors of a device copied, once what is queued on its current stream is done.

        Args:
            device: of all `tensors`.
            copies: contiguous, in page-locked host memory, of the tensors' shapes and dtypes.
            tensors: of any strides. They are kept alive until the copies are made, and must keep their memory.
        """
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                torch._foreach_copy_(list(copies), list(tensors), non_blocking=True)
                event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
        except BaseException:
            # Some may be on their way, and nobody would wait for them before the memory is used again.
            stream.synchronize()
            raise
        return Copying(device, event, tensors)


class Copying:
    """Copies on their way. Memory of the tensors is not given to others meanwhile, since they are referred to."""

    def __init__(self, device: torch.device, event: torch.cuda.Event, sources: Sequence[torch.Tensor]) -> None:
        self._device = device
        self._event = event
        self._sources = sources

    def wait(self) -> None:
        """Until the copies are made; the tensors are let go then."""
        # The thread that waits may have another current device, on which nothing is to be set up.
        with torch.cuda.device(self._device):
            self._event.synchronize()
        self._sources = []
