"""`PlacedState`: objects with a state dict that want to know where they stand and, on load, what there is to be loaded.

An optimizer that has no state yet learns from the checkpoint which tensors it is to have. `expand` asks such objects;
`load` describes the state dict once more when the checkpoint is open. Not here: which objects these are.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from giantstep.mapping.tree import Tree
from giantstep.shards.object_keys import ObjectPosition


class StoredNames(Protocol):
    """What a checkpoint holds, under the names that are requested (see `LoadOptions.rename`). Reads no tensor data."""

    def tensor(self, key: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Global shape and dtype of a tensor; None if it is not stored."""
        ...

    def is_wrapper(self, key: str) -> bool:
        """Whether a wrapper tensor is stored under the key, as its parts."""
        ...

    def grid(self, key: str) -> tuple[int, ...] | None:
        """Shape of the grid of sharded objects of a key; None if none is stored."""
        ...

    def endings(self, middle: str) -> list[str]:
        """What follows `middle` in the stored keys of sharded objects that have it, sorted."""
        ...

    def objects(self, positions: Sequence[ObjectPosition]) -> list[Any]:
        """The stored objects of these positions, read together."""
        ...

    def leave(self, key: str) -> None:
        """Nothing is stored under the key, and what the caller has stays as it is: the report lists it as skipped."""
        ...

    def settle(self, key: str) -> None:
        """The caller accounts for what is stored under a key, or the key followed by a region: it is not missing."""
        ...


class PlacedState(abc.ABC):
    """An object with a state dict that depends on its place and, on load, on the checkpoint."""

    @abc.abstractmethod
    def state_at(self, place: str) -> Tree:
        """The state to be saved; `place` is the dotted path at which it stands."""

    @abc.abstractmethod
    def state_for_load(self, place: str, stored: StoredNames) -> Tree:
        """What is wanted of a checkpoint. Nothing of the object itself may change yet."""

    @abc.abstractmethod
    def load_state_dict(self, state_dict: Tree) -> None:
        """Take over what was loaded, in the structure that `state_for_load` gave."""
