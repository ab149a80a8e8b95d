"""Paths into nested state dicts: how a leaf is named in keys and messages."""

from __future__ import annotations

Path = tuple[str | int | bool | float | bytes | tuple[object, ...] | None, ...]
"""One step per level: a dict's key, or a position in a list or tuple."""


def dotted(path: Path) -> str:
    """The steps joined by dots: the key of a leaf that has none of its own."""
    return ".".join(map(str, path))
