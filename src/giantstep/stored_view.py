"""`StoredView`: a checkpoint under the names that a load requests, for objects that ask what there is. Made by `load`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from giantstep.errors import CorruptionError
from giantstep.options import LoadOptions
from giantstep.planning.matching import Requests
from giantstep.shards.object_keys import ObjectPosition
from giantstep.stored_state import StoredState
from giantstep.words import torch_dtype


class StoredView:
    """See `giantstep.mapping.placed.StoredNames`.

    Args:
        stored: names, shapes and dtypes.
        options: how requested names become stored ones.

    Attributes:
        left: keys of what stays as it is, since nothing is stored for it.
    """

    def __init__(self, stored: StoredState, options: LoadOptions) -> None:
        self._stored = stored
        self._options = options
        self._settled: set[str] = set()
        self.left: set[str] = set()

    def tensor(self, key: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        row = self._stored.row.get(self._options.stored_key(key))
        return None if row is None else (self._stored.shape(row), torch_dtype(self._stored.dtype(row)))

    def is_wrapper(self, key: str) -> bool:
        return self._options.stored_key(key) in self._stored.wrapped

    def grid(self, key: str) -> tuple[int, ...] | None:
        name = self._options.stored_key(key)
        grids = {} if name is None else self._stored.grids.get(name, {})
        if len(grids) > 1:
            raise CorruptionError(
                f"object {name!r} in {self._stored.checkpoint.location} has grids {', '.join(map(str, grids))}"
            )
        return next(iter(grids), None)

    def endings(self, middle: str) -> list[str]:
        return sorted({key.rpartition(middle)[2] for key in self._stored.grids if middle in key})

    def objects(self, positions: Sequence[ObjectPosition]) -> list[Any]:
        names = []
        for position in positions:
            key = self._options.stored_key(position.key)
            held = self._stored.grids.get("" if key is None else key, {}).get(position.shape, {}).get(position.offset)
            if held is None:
                raise CorruptionError(f"object {position.unique_key!r} is not in {self._stored.checkpoint.location}")
            names.append(held.unique_key)
        with self._stored.checkpoint.reading_ahead(names):
            # Objects that several positions name are decoded once.
            found = {name: self._stored.checkpoint.object(name) for name in dict.fromkeys(names)}
        return [found[name] for name in names]

    def leave(self, key: str) -> None:
        self.left.add(key)

    def settle(self, key: str) -> None:
        name = self._options.stored_key(key)
        if name is not None:
            self._settled.add(name)

    def note_settled(self, requests: Requests) -> None:
        """Count what was settled as requested."""
        if not self._settled:
            return

        def settled(key: str) -> bool:
            return key in self._settled or (key.endswith("]") and key.rpartition("[")[0] in self._settled)

        requests.rows.extend(row for row, key in enumerate(self._stored.keys) if settled(key))
        requests.objects.extend(key for key in self._stored.grids if settled(key))
