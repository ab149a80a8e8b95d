"""From what a caller passes as `path` to a store."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from giantstep.errors import BadArgumentError
from giantstep.format.names import DATA_DIR
from giantstep.storage.base import Store
from giantstep.storage.local import LocalStore
from giantstep.storage.memory import MemoryStore

StoreLike = str | os.PathLike[str] | Store


def store_at(path: StoreLike) -> Store:
    """The store at a path, a `file://` or `memory://` URL, or the given store itself.

    Raises:
        BadArgumentError: the path is empty, holds a null character, or is of a scheme that this version does not know.
    """
    if not isinstance(path, str | os.PathLike):
        if not all(hasattr(path, name) for name in ("create", "publish", "open_read", "names")):
            raise BadArgumentError(f"path must be a str, os.PathLike or Store, not {type(path).__name__}")
        return path
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://") if isinstance(text, str) else ("", "", "")
    if not isinstance(text, str) or not text or "\0" in (unquote(text) if scheme == "file" and separator else text):
        raise BadArgumentError(f"path {text!r} cannot be: expected a non-empty str without null characters")
    if not separator:
        return LocalStore(text)
    if scheme == "memory" and rest:
        return MemoryStore(rest)
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc in ("", "localhost") and parts.path:
            return LocalStore(unquote(parts.path))
    raise BadArgumentError(
        f"path {text!r} cannot be opened: expected a path, file:///absolute/path or memory://name; "
        "object stores are not supported in this version"
    )


def parent_at(path: StoreLike) -> tuple[Store, str] | None:
    """The place that a place lies in, and its name there; None where that cannot be known. Links are followed."""
    store = store_at(path)
    if isinstance(store, LocalStore):
        above, name = os.path.split(os.path.realpath(store.location))
        return (LocalStore(above), name) if name else None
    if isinstance(store, MemoryStore):
        above, _, name = store.location.removeprefix("memory://").rpartition("/")
        return (MemoryStore(above), name) if above and name else None
    return None


def is_file_at(path: StoreLike) -> bool:
    """Whether a path leads to a file, a pipe or a device, where the place of a store is expected."""
    store = store_at(path)
    place = Path(store.location)
    return isinstance(store, LocalStore) and place.exists() and not place.is_dir()


def lies_elsewhere(store: Store) -> bool:
    """Whether a place, or its data, is a link to a directory: what that holds may be known elsewhere under its own name."""
    place = Path(store.location)
    return isinstance(store, LocalStore) and (place.is_symlink() or (place / DATA_DIR).is_symlink())
