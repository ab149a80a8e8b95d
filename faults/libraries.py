"""The libraries under test, each with its documented settings for safety: how it saves, loads, and lays files out.

Imported by the worker processes alone: whatever a library does to its process, it does to a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

State = dict[str, torch.Tensor]


class Library(Protocol):
    """What a library must be able to do here."""

    settings: str
    """What was chosen, for the table."""
    overwrites: bool
    """Whether it is meant to save over a checkpoint."""

    def save(self, state: State, path: Path) -> None:
        """Return when the checkpoint is committed."""

    def load(self, state: State, path: Path) -> None:
        """Fill the tensors."""

    def start(self, state: State, path: Path) -> Callable[[], object]:
        """Begin to save in the background; what is returned waits until it is committed.

        When this returns, the library must have said that tensors may be changed.
        """

    def close(self) -> None:
        """At the end."""


class Giantstep:
    """This library."""

    settings = "defaults"
    overwrites = True

    def __init__(self) -> None:
        import giantstep

        self._gs = giantstep
        self._options = giantstep.SaveOptions(max_file_bytes=1 << 20)

    def save(self, state: State, path: Path) -> None:
        self._gs.save(state, path, options=self._options)

    def load(self, state: State, path: Path) -> None:
        self._gs.load(state, path)

    def start(self, state: State, path: Path) -> Callable[[], object]:
        pending = self._gs.async_save(state, path, options=self._options)
        pending.wait_staged()
        return pending.result

    def close(self) -> None:
        self._gs.finish_saves()


class Dcp:
    """`torch.distributed.checkpoint`."""

    settings = "FileSystemWriter(sync_files=True, overwrite=True, single_file_per_rank=False)"
    overwrites = True

    def __init__(self) -> None:
        import torch.distributed as dist
        import torch.distributed.checkpoint as dcp

        warnings.filterwarnings("ignore")
        self._dcp = dcp
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def _writer(self, path: Path) -> Any:
        return self._dcp.FileSystemWriter(path, sync_files=True, overwrite=True, single_file_per_rank=False)

    def save(self, state: State, path: Path) -> None:
        self._dcp.save(state, storage_writer=self._writer(path))

    def load(self, state: State, path: Path) -> None:
        self._dcp.load(state, checkpoint_id=path)

    def start(self, state: State, path: Path) -> Callable[[], object]:
        future: Any = self._dcp.async_save(state, storage_writer=self._writer(path))
        wait: Callable[[], object] = future.result
        return wait

    def close(self) -> None:
        """Nothing to do."""


class TorchCheckpointing:
    """The package torch_checkpointing: a manager that blocks, and one that writes in a process of its own."""

    settings = "LocalFileSystemStorageConfig(use_direct_io=False), as its O_DIRECT fails on ext4"
    overwrites = False

    def __init__(self) -> None:
        torch.multiprocessing.set_sharing_strategy("file_system")
        self._managers: dict[bool, Any] = {}

    def _manager(self, *, blocking: bool) -> Any:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        if blocking not in self._managers:
            kind = SyncCheckpointSaverConfig() if blocking else AsyncCheckpointSaverConfig()
            storage = LocalFileSystemStorageConfig(use_direct_io=False)
            self._managers[blocking] = CheckpointManager(CheckpointManager.Config(save=kind, storage_config=storage))
        return self._managers[blocking]

    def save(self, state: State, path: Path) -> None:
        self._manager(blocking=True).save(str(path), {"model": state})

    def load(self, state: State, path: Path) -> None:
        self._manager(blocking=True).load(str(path), into={"model": state}, strict=True)

    def start(self, state: State, path: Path) -> Callable[[], object]:
        manager = self._manager(blocking=False)
        future = manager.save(str(path), {"model": state})
        with manager.lock():
            """Back when everything is staged."""
        wait: Callable[[], object] = future.result
        return wait

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()


LIBRARIES: dict[str, tuple[str, Callable[[], Library]]] = {
    "giantstep": ("giantstep", Giantstep),
    "DCP": ("torch", Dcp),
    "torch_checkpointing": ("torch-checkpointing", TorchCheckpointing),
}
"""By name in the table: the package, and what makes one."""


def version_of(name: str) -> str | None:
    """Version of a library; None if it is not installed."""
    try:
        return importlib.metadata.version(LIBRARIES[name][0])
    except importlib.metadata.PackageNotFoundError:
        return None
