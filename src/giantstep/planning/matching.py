"""What ranks request against what the checkpoint holds, judged once for all of them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from giantstep.errors import DtypeMismatchError, KeyMismatchError, MismatchError, ShapeMismatchError
from giantstep.options import StrictHandling

_SHOWN = 20
_HINTED = 3


@dataclass(slots=True)
class Requests:
    """What one rank requests, compared with the index.

    Attributes:
        rows: rows of the requested tensors that the index has.
        unexpected: requested keys that it has not.
        shapes: (key, stored shape, requested shape) that differ.
        dtypes: (key, stored dtype, requested dtype) that differ and may not be cast.
    """

    rows: list[int] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[tuple[str, str, str]] = field(default_factory=list)
    dtypes: list[tuple[str, str, str]] = field(default_factory=list)

    def encode(self) -> bytes:
        """As bytes."""
        return json.dumps([self.rows, self.unexpected, self.shapes, self.dtypes]).encode("ascii")

    @classmethod
    def decode(cls, data: bytes) -> Requests:
        """Inverse of `encode`."""
        rows, unexpected, shapes, dtypes = json.loads(data)
        return cls(rows, unexpected, [tuple(item) for item in shapes], [tuple(item) for item in dtypes])


@dataclass(frozen=True, slots=True)
class KeyDifferences:
    """Keys that request and checkpoint do not share, over all ranks; sorted."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def encode(self) -> bytes:
        """As bytes."""
        return json.dumps([self.missing, self.unexpected]).encode("ascii")

    @classmethod
    def decode(cls, data: bytes) -> KeyDifferences:
        """Inverse of `encode`."""
        missing, unexpected = json.loads(data)
        return cls(tuple(missing), tuple(unexpected))


def judge(requests: Sequence[Requests], stored_keys: list[str], strict: StrictHandling, location: str) -> KeyDifferences:
    """Compare all ranks' requests with the checkpoint.

    Args:
        requests: of all ranks, in order.
        stored_keys: keys of the index, by row.
        strict: which differences are errors.
        location: the checkpoint, for errors.

    Raises:
        KeyMismatchError, ShapeMismatchError, DtypeMismatchError: the first that applies; its message lists
            all differences of all kinds, at most 20 names of each.
    """
    requested = {row for request in requests for row in request.rows}
    missing = tuple(key for row, key in enumerate(stored_keys) if row not in requested)
    unexpected = tuple(sorted({key for request in requests for key in request.unexpected}))
    shapes = sorted({item for request in requests for item in request.shapes})
    dtypes = sorted({item for request in requests for item in request.dtypes})
    paragraphs: list[str] = []
    kinds: list[type[MismatchError]] = []
    if unexpected and strict in (StrictHandling.RAISE_ALL, StrictHandling.RAISE_UNEXPECTED):
        kinds.append(KeyMismatchError)
        title = f"{len(unexpected)} requested tensors are not in the checkpoint"
        paragraphs.append(_listing(title, _hinted(unexpected, stored_keys, set(missing))))
    if missing and strict is StrictHandling.RAISE_ALL:
        kinds.append(KeyMismatchError)
        title = f"{len(missing)} tensors of the checkpoint are requested by no rank"
        paragraphs.append(_listing(title, list(missing)))
    for kind, found, what in ((ShapeMismatchError, shapes, "global shape"), (DtypeMismatchError, dtypes, "dtype")):
        if found:
            kinds.append(kind)
            lines = [f"{key}: stored {stored}, requested {wanted}" for key, stored, wanted in found]
            paragraphs.append(_listing(f"{len(found)} tensors are stored with another {what}", lines))
    if kinds:
        raise kinds[0](
            f"{location} does not fit what is to be loaded. No tensor was changed.\n"
            + "\n".join(paragraphs)
            + "\n"
            + _remedy(kinds)
        )
    return KeyDifferences(missing, unexpected)


def _listing(title: str, lines: list[str]) -> str:
    more = [f"    ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([f"  {title}:", *(f"    {line}" for line in lines[:_SHOWN]), *more])


def _hinted(unexpected: Sequence[str], stored_keys: list[str], missing: set[str]) -> list[str]:
    """The keys, the first few with the stored keys nearest to them; those that nobody requested come first."""
    lines = []
    candidates = [key for key in stored_keys if key in missing] or stored_keys
    for position, key in enumerate(unexpected):
        near: list[str] = []
        if position < _HINTED and len(candidates) <= 10_000:
            near = difflib.get_close_matches(key, candidates, n=2)
        lines.append(key + (f" (nearest stored: {', '.join(near)})" if near else ""))
    return lines


def _remedy(kinds: Sequence[type[MismatchError]]) -> str:
    remedies = {
        KeyMismatchError: "pass strict=StrictHandling.RAISE_UNEXPECTED for a partial load, or IGNORE_ALL to load "
        "what both have",
        ShapeMismatchError: "build the model with the stored shapes, or set allow_shape_mismatch on a padded ShardedTensor",
        DtypeMismatchError: "pass LoadOptions(cast='floating') or 'any' to convert",
    }
    return "To go on: " + "; ".join(remedies[kind] for kind in dict.fromkeys(kinds)) + "."
