"""Everything that a caller can do with a checkpoint, done to a hostile one: values or the expected errors, nothing else.

Called by `targets` and by the tests. A `FindingError` is whatever else happened.
"""

from __future__ import annotations

import errno
import math
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

import giantstep as gs
from giantstep.errors import (
    CorruptionError,
    IncompleteError,
    MismatchError,
    NotACheckpointError,
    UnsupportedTypeError,
    VersionError,
)
from giantstep.reading.checkpoint import Checkpoint, TensorInfo
from giantstep.storage.base import ReadHandle, Store

from .guard import no_effects
from .wrapper import wanted_wrapper

T = TypeVar("T")

# What stored bytes can be: damaged, of another version, of types unknown here, or not what was asked for. Neither a
# mistake of the caller's (BadArgumentError), nor the disk's (StoreError), nor ours (UnexpectedError).
EXPECTED = (
    *(CorruptionError, IncompleteError, NotACheckpointError, VersionError),
    *(MismatchError, UnsupportedTypeError),
)

MOST_KEYS = 24
# Bytes read per operation, as a multiple of all bytes stored: the index and its blocks, each file once or twice.
MOST_READS = 12
# Memory per operation, as a multiple of all bytes stored, and besides. Values take 3 times the bytes as a rule; JSON like
# `[[],[],[]` some 30 times.
MOST_MEMORY, MOST_MEMORY_BESIDES = 40, 512 << 10


class FindingError(Exception):
    """Readers did what they must not."""


class DictStore:
    """A store that holds given files, and counts the bytes read."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.stored_bytes = sum(map(len, files.values()))
        self.bytes_read = 0

    @property
    def location(self) -> str:
        return "dict://mutant"

    def exists(self) -> bool:
        return True

    def open_read(self, name: str, *, direct: bool = False) -> _Handle:
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, name)
        return _Handle(self, self.files[name])

    def size(self, name: str) -> int:
        return self.open_read(name).size

    def names(self, folder: str) -> Iterator[str]:
        yield from [name for name in self.files if name.rpartition("/")[0] == folder]

    def prepare(self, folder: str) -> None:
        raise FindingError(f"reading made the folder {folder!r}")

    def create(self, name: str, size: int, *, direct: bool) -> NoReturn:
        raise FindingError(f"reading created {name}")

    def sync_names(self, folder: str) -> None:
        raise FindingError(f"reading changed names in {folder!r}")

    def publish(self, name: str, data: bytes, temporary: str) -> None:
        raise FindingError(f"reading published {name}")

    def delete(self, name: str) -> None:
        raise FindingError(f"reading deleted {name}")

    def link(self, name: str, source: Store, source_name: str) -> None:
        raise FindingError(f"reading linked {name}")

    def free_bytes(self) -> int | None:
        raise FindingError("reading asked for space")

    def folder(self, name: str) -> Store:
        raise FindingError(f"reading looked into {name}")

    def folders(self) -> Iterator[str]:
        raise FindingError("reading listed places")

    def remove_empty(self, folder: str) -> None:
        raise FindingError(f"reading removed the folder {folder!r}")


class _Handle(ReadHandle):
    def __init__(self, store: DictStore, data: bytes) -> None:
        self._store = store
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read_into(self, offset: int, target: memoryview) -> None:
        view = target.cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise OSError(errno.EIO, f"read of {len(view)} bytes at {offset} of {self.size}")
        self._store.bytes_read += len(view)
        view[:] = self._data[offset : offset + len(view)]

    def close(self) -> None:
        """Nothing to release."""


class Steps:
    """Runs operations one by one, and turns what must not happen into a `FindingError` that names the operation."""

    def __init__(self, store: DictStore) -> None:
        self._store = store
        self.refused: list[str] = []

    def run(self, name: str, operation: Callable[[], T], times: int = 1) -> T | None:
        """The operation's value, or None if it was refused. `times` is how many reads of everything are fine."""
        before = self._store.bytes_read
        try:
            with no_effects(), _bounded_memory(name, self._store.stored_bytes):
                value = operation()
        except EXPECTED as error:
            self.refused.append(f"{name}: {type(error).__name__}")
            value = None
        except FindingError:
            raise
        except Exception as error:
            raise FindingError(f"{name} raised {type(error).__name__}: {error!s:.300}") from error
        read = self._store.bytes_read - before
        if read > MOST_READS * times * self._store.stored_bytes:
            raise FindingError(f"{name} read {read} bytes of a checkpoint of {self._store.stored_bytes}")
        return value


@contextmanager
def _bounded_memory(name: str, stored_bytes: int) -> Iterator[None]:
    """A `FindingError` if more memory was held at a time than the stored bytes explain. Only while tracemalloc runs."""
    if not tracemalloc.is_tracing():
        yield
        return
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
    finally:
        held = tracemalloc.get_traced_memory()[1] - before
        if held > MOST_MEMORY * stored_bytes + MOST_MEMORY_BESIDES:
            raise FindingError(f"{name} held {held} bytes for a checkpoint of {stored_bytes}")


def exercise(files: Mapping[str, bytes], seed_keys: tuple[str, ...], *, reads: bool = True) -> list[str]:
    """Open, look, and with `reads` read, verify and load; returns which operations were refused, as `operation: error`.

    Raises:
        FindingError: anything but a value or an error that stored bytes may cause; values that do not fit each other.
    """
    store = DictStore(files)
    steps = Steps(store)
    checkpoint = steps.run("open", lambda: gs.open_checkpoint(store))
    if checkpoint is None:
        return steps.refused
    keys = steps.run("keys", checkpoint.keys)
    steps.run("infos", lambda: list(checkpoint.infos()))
    steps.run("object_keys", checkpoint.object_keys)
    shown = (seed_keys if keys is None else keys)[:MOST_KEYS]
    known = [info for key in shown if (info := _look(steps, checkpoint, key)) is not None]
    if not reads:
        return steps.refused
    read = {info.key: _read(steps, checkpoint, info) for info in known}
    steps.run("common", lambda: checkpoint.common)
    stored = steps.run("object_keys", checkpoint.object_keys)
    steps.run("objects", checkpoint.objects, times=1 + len(stored or ()))
    report = steps.run("verify", checkpoint.verify)
    if report is not None and not report.ok:
        steps.refused.append("verify: reported")
    _load(steps, store, read)
    return steps.refused


def _look(steps: Steps, checkpoint: Checkpoint, key: str) -> TensorInfo | None:
    """What is said of a tensor, which cannot be more than the files hold."""
    info = steps.run("info", lambda: checkpoint.info(key))
    most = sum(file.bytes for file in checkpoint.record.files)
    if info is not None and info.bytes > most:
        raise FindingError(f"a tensor claims {info.bytes} bytes, all files hold {most}")
    return info


def _read(steps: Steps, checkpoint: Checkpoint, info: TensorInfo) -> Any:
    """The whole tensor, after a part of it; None if it was refused, or if NumPy has no array for it."""
    dims = len(info.shape)
    if dims + (info.dtype == "complex32") > 64 or math.prod(size or 1 for size in info.shape) > 1 << 58:
        return None
    part: Any = (slice(0, 1),) * dims if len(info.key) % 2 or not dims else (..., slice(None, None, -2))
    steps.run("slice", lambda: checkpoint[info.key][part])
    return steps.run("read", lambda: checkpoint[info.key][...])


def _load(steps: Steps, store: DictStore, read: dict[str, Any]) -> None:
    """Load everything, and compare tensors that were read before: two ways to the same bytes."""
    options, ignore = gs.LoadOptions(reader_threads=1, dequantise=True), gs.StrictHandling.IGNORE_ALL
    wanted = steps.run("load_sharded_metadata", lambda: gs.metadata.load_sharded_metadata(store)) or {}
    items = [item for item in wanted.values() if item.key][:MOST_KEYS]
    state: dict[Any, Any] = {"layers": [{}, 1], "step": 0, "all": dict(enumerate(items)), "quantised": wanted_wrapper()}
    loaded = steps.run("load", lambda: gs.load(state, store, strict=ignore, options=options))
    for row, item in enumerate(items):
        before = read.get(item.key) if isinstance(item, gs.ShardedTensor) else None
        if loaded is not None and before is not None and bytes_of(loaded["all"][row]) != before.tobytes():
            raise FindingError(f"tensor {item.key!r} has other bytes loaded than read")


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements of a CPU tensor, row-major."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else np.zeros(0).tobytes()
