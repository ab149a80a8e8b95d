"""Other ways to save and load, most of which the extra `bench` installs. Used by `rank.py`.

They are given plain tensors, and save files per rank that only this rank can load. Those that do not flush what they write
are made to, within the measured time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from measure import Started
from methods import Method, Part, Plain, Waits, installed
from raw_io import flush_files


def _file_of(part: Part, place: Path, suffix: str) -> Path:
    return place.with_name(f"{place.name}-{part.rank}.{suffix}")


def _fill(part: Part, loaded: dict[str, torch.Tensor]) -> None:
    """What is loaded into new memory is copied into the tensors, as `load_state_dict` does."""
    for key, tensor in part.plain.items():
        tensor.copy_(loaded[key])


class TorchSave(Plain):
    """`torch.save` and `torch.load`."""

    name = "torch.save"

    def save(self, part: Part, place: Path) -> Any:
        path = _file_of(part, place, "pt")
        torch.save(part.plain, path)
        flush_files([path])

    def load(self, part: Part, place: Path) -> Any:
        _fill(part, torch.load(_file_of(part, place, "pt"), weights_only=True))


class Safetensors(Plain):
    """The safetensors library's `save_file` and `load_file`."""

    name = "safetensors"

    def save(self, part: Part, place: Path) -> Any:
        from safetensors.torch import save_file

        path = _file_of(part, place, "safetensors")
        save_file(part.plain, path)
        flush_files([path])

    def load(self, part: Part, place: Path) -> Any:
        from safetensors.torch import load_file

        _fill(part, load_file(_file_of(part, place, "safetensors")))


class TorchCheckpointing(Plain):
    """The package torch_checkpointing.

    Without its resharding, which communicates on GPUs alone, and without O_DIRECT, with which it writes pieces of any length
    and so fails on ext4. Its asynchronous saves are written by a process, whose CPU time and memory are not counted.
    """

    name = "torch_checkpointing"
    asynchronous = True

    def __init__(self) -> None:
        self._managers: dict[bool, Any] = {}
        # By default every tensor that is shared with the process keeps a file open: thousands are too many.
        torch.multiprocessing.set_sharing_strategy("file_system")

    def _manager(self, *, blocking: bool) -> Any:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        if blocking not in self._managers:
            kind = SyncCheckpointSaverConfig() if blocking else AsyncCheckpointSaverConfig()
            storage = LocalFileSystemStorageConfig(use_direct_io=False)
            self._managers[blocking] = CheckpointManager(CheckpointManager.Config(save=kind, storage_config=storage))
        return self._managers[blocking]

    def save(self, part: Part, place: Path) -> Any:
        self._manager(blocking=True).save(str(place), {"model": part.plain})
        self._flush(part, place)

    def load(self, part: Part, place: Path) -> Any:
        self._manager(blocking=True).load(str(place), into={"model": part.plain}, strict=True)

    def start(self, part: Part, place: Path) -> Started:
        manager = self._manager(blocking=False)
        future = manager.save(str(place), {"model": part.plain})
        return Waits(partial(self._enter, manager), partial(self._finish, part, place, future))

    @staticmethod
    def _flush(part: Part, place: Path) -> None:
        # Other ranks are told before rank 0 has renamed the folder.
        dist.barrier(part.group)
        flush_files([place / f"model_{part.rank}.pt"])

    @staticmethod
    def _enter(manager: Any) -> None:
        with manager.lock():
            """Back when everything is staged."""

    def _finish(self, part: Part, place: Path, future: Any) -> None:
        future.result()
        self._flush(part, place)

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()


class Torchsnapshot(Plain):
    """The package torchsnapshot."""

    name = "torchsnapshot"
    asynchronous = True

    def __init__(self) -> None:
        warnings.filterwarnings("ignore", module="torchsnapshot")

    def save(self, part: Part, place: Path) -> Any:
        from torchsnapshot import Snapshot

        Snapshot.take(str(place), self._state(part), pg=part.group)
        _flush_folder(place)

    def load(self, part: Part, place: Path) -> Any:
        from torchsnapshot import Snapshot

        Snapshot(str(place), pg=part.group).restore(self._state(part))

    def start(self, part: Part, place: Path) -> Started:
        from torchsnapshot import Snapshot

        pending = Snapshot.async_take(str(place), self._state(part), pg=part.group)
        # The call is back when everything is staged.
        return Waits(lambda: None, partial(self._finish, pending, place))

    @staticmethod
    def _state(part: Part) -> dict[str, Any]:
        from torchsnapshot import StateDict

        return {"model": StateDict(**part.plain)}

    @staticmethod
    def _finish(pending: Any, place: Path) -> None:
        pending.wait()
        _flush_folder(place)


def _flush_folder(place: Path) -> None:
    flush_files(path for path in place.rglob("*") if path.is_file())


PACKAGES: dict[str, Callable[[], Method]] = {
    "safetensors": Safetensors,
    "torch_checkpointing": TorchCheckpointing,
    "torchsnapshot": Torchsnapshot,
}


def missing_packages() -> list[str]:
    """Packages that would be measured if they were installed."""
    return [package for package in PACKAGES if not installed(package)]


def peers() -> list[Method]:
    """All that can be measured here."""
    return [TorchSave(), *(make() for package, make in PACKAGES.items() if installed(package))]
