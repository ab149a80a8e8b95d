"""`remove_sharded_tensors`: a checkpoint without some of its tensors, without saving the others again.

commit record, index -plan_removal-> plan -Rewrite-> checkpoint without them
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import BadArgumentError, GiantstepError, KeyMismatchError, StoreError
from giantstep.planning.removal_plan import plan_removal
from giantstep.reading.checkpoint import Checkpoint
from giantstep.reports import size_text
from giantstep.rewriting import Rewrite
from giantstep.shards.object_keys import COMMON_KEY, wrapped_tensor
from giantstep.storage.base import Store
from giantstep.storage.locate import StoreLike, store_at

# Among more keys than this no similar ones are looked for.
_HINTED_KEYS = 20_000


@dataclass(frozen=True, slots=True)
class RemovalReport:
    """A committed removal.

    Attributes:
        location: path or URL.
        save_id: new id of the checkpoint.
        tensors, objects: keys removed.
        freed_bytes: by how much the data files of the checkpoint became smaller.
        deleted: files deleted after the commit.
    """

    location: str
    save_id: str
    tensors: tuple[str, ...]
    objects: tuple[str, ...]
    freed_bytes: int
    deleted: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"removed {len(self.tensors)} tensors and {len(self.objects)} objects from {self.location}, "
            f"freed {size_text(self.freed_bytes)}"
        )


def remove_sharded_tensors(path: StoreLike, prefix: str) -> RemovalReport:
    """Remove from a checkpoint all tensors, and all objects but the common state, whose key begins with `prefix`.

    Not collective: one process calls it, while nobody saves to the path. The checkpoint of before stays loadable until the
    new one is committed; its superfluous files are then deleted. Data files that hold nothing to be removed stay as
    they are; of the others, what is kept is copied, block by block, and verified on the way.

    Args:
        path: a directory, a `file://` or `memory://` URL, or a `Store`.
        prefix: how the keys begin; "" means all.

    Raises:
        BadArgumentError: `prefix` is no str, or `path` none that can be.
        OpenError: there is no committed checkpoint at the path; it lacks files; or it is of a newer version, major or
            minor, than this library can write.
        KeyMismatchError: no key begins with `prefix`.
        CorruptionError: commit record, index, or bytes to be kept are damaged.
        StoreError: a storage operation failed; the message says whether the removal may have taken effect.

    Whatever is raised, but for that last case, the checkpoint is as it was.
    """
    if not isinstance(prefix, str):
        raise BadArgumentError(f"prefix must be a str, not {type(prefix).__name__}")
    removal = _Removal(store_at(path), prefix)
    return removal.carry_out()


class _Removal:
    """One removal in progress."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        task = f"removing {prefix!r} from {store.location}"
        self._rewrite = Rewrite(store, store, task=task, verb="remove from", undone="Nothing was removed.")

    def carry_out(self) -> RemovalReport:
        """Decide what stays, what goes and what is copied; then do it. Nothing is written before all is decided."""
        try:
            self._rewrite.open()
        except GiantstepError:
            raise
        except OSError as error:
            raise StoreError(f"{self._store.location} cannot be read: {error}. Nothing was removed.") from error
        keys, object_keys = self._rewrite.keys, self._rewrite.object_keys
        tensor_stays = np.array([not key.startswith(self._prefix) for key in keys], dtype=bool)
        object_stays = np.array([self._object_stays(key) for key in object_keys], dtype=bool)
        tensors = tuple(key for key, stays in zip(keys, tensor_stays, strict=True) if not stays)
        objects = tuple(key for key, stays in zip(object_keys, object_stays, strict=True) if not stays)
        if not tensors and not objects:
            raise _no_such_key(self._prefix, keys, object_keys, self._store.location)
        before = self._rewrite.record
        plan = plan_removal(self._rewrite.index, tensor_stays, object_stays, len(before.files))
        after = self._rewrite.copy_and_commit(plan)
        deleted = self._rewrite.clean()
        freed = sum(entry.bytes for entry in before.files) - sum(entry.bytes for entry in after.files)
        return RemovalReport(self._store.location, after.save_id, tensors, objects, freed, tuple(deleted))

    def _object_stays(self, name: str) -> bool:
        """The description of a wrapper tensor goes with its parts; a wrapper goes whole or not at all."""
        tensor = wrapped_tensor(name)
        if tensor is None or name == COMMON_KEY:
            return name == COMMON_KEY or not name.startswith(self._prefix)
        described = Checkpoint(self._store, self._rewrite.record, OBJECT_CODEC, unknown="keep").object(name)
        parts = [f"{tensor}.{part}" for part in described.get("parts", ())] if isinstance(described, dict) else []
        held = [part for part in parts if any(key == part or key.startswith(f"{part}.") for key in self._rewrite.keys)]
        gone = [part for part in held if part.startswith(self._prefix)]
        if gone and len(gone) < len(held):
            raise BadArgumentError(
                f"prefix {self._prefix!r} removes {gone[0]!r}, a part of the wrapper tensor {tensor!r}, and keeps others: "
                f"remove all of it with the prefix {tensor + '.'!r}. Nothing was removed."
            )
        return not gone if held else not name.startswith(self._prefix)


def _no_such_key(prefix: str, keys: Sequence[str], object_keys: Sequence[str], location: str) -> KeyMismatchError:
    stored = [*keys, *(key for key in object_keys if key != COMMON_KEY)]
    hint = ""
    if len(stored) <= _HINTED_KEYS:
        beginnings = {key[: len(prefix)]: key for key in reversed(stored)}
        near = [beginnings[found] for found in difflib.get_close_matches(prefix, beginnings, n=3)]
        hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
    return KeyMismatchError(
        f"no key in {location} begins with {prefix!r}, among {len(keys)} tensors and {len(stored) - len(keys)} objects."
        f"{hint} Nothing was removed."
    )
