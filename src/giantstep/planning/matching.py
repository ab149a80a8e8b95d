"""What ranks request against what the checkpoint holds, judged once for all of them."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from giantstep.errors import DtypeMismatchError, KeyMismatchError, MismatchError, ShapeMismatchError
from giantstep.options import StrictHandling, longest_match

# Names shown per kind of mismatch, and lines of a whole message: nobody reads more.
_SHOWN = 20
_LINES = 46
_HINTED = 3
_HINTED_AMONG = 10_000


@dataclass(slots=True)
class Requests:
    """What one rank requests, compared with the index.

    Attributes:
        rows: rows of the requested tensors that the index has.
        objects: keys of the requested sharded objects that it has.
        unexpected: requested keys that it has not.
        shapes: (key, stored shape, requested shape) that differ.
        dtypes: (key, stored dtype, requested dtype) that differ and may not be cast.
        grids: (key, stored grid, requested grid) of sharded objects that differ and may not be resharded.
        wrappers: (key, stored kind, requested kind) of wrapper tensors that differ.
    """

    rows: list[int] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[tuple[str, str, str]] = field(default_factory=list)
    dtypes: list[tuple[str, str, str]] = field(default_factory=list)
    grids: list[tuple[str, str, str]] = field(default_factory=list)
    wrappers: list[tuple[str, str, str]] = field(default_factory=list)

    def encode(self) -> bytes:
        """As bytes; of the rows, runs without repetitions."""
        rows = np.sort(np.fromiter(self.rows, np.int64, len(self.rows)))
        rows = rows[np.append(rows[:-1] != rows[1:], np.ones(min(1, len(rows)), dtype=bool))]
        ends = np.flatnonzero(np.diff(rows) > 1)
        first, last = np.append(rows[:1], rows[ends + 1]), np.append(rows[ends], rows[-1:])
        runs = np.stack((first, last + 1), axis=1).tolist()
        fields = [runs, self.objects, self.unexpected, self.shapes, self.dtypes, self.grids, self.wrappers]
        return json.dumps(fields).encode("ascii")

    @classmethod
    def decode(cls, data: bytes) -> Requests:
        """Inverse of `encode`, but for the order of the rows."""
        runs, objects, unexpected, *triples = json.loads(data)
        rows = list(itertools.chain.from_iterable(itertools.starmap(range, runs)))
        return cls(rows, objects, unexpected, *([(a, b, c) for a, b, c in found] for found in triples))


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


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a checkpoint holds.

    Attributes:
        location: path or URL, for messages.
        tensors: keys of the index, by row.
        objects: keys of its sharded objects.
        wrapped: keys of wrapper tensors, whose parts are stored as tensors.
    """

    location: str
    tensors: list[str]
    objects: Collection[str] = ()
    wrapped: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Strictness:
    """Which differences of keys are met how: a policy, and others for keys with certain prefixes or endings."""

    default: StrictHandling
    overrides: Mapping[str, StrictHandling] = field(default_factory=dict)

    def of(self, key: str) -> StrictHandling:
        """The policy for a key."""
        prefix = longest_match(self.overrides, key)
        return self.default if prefix is None else self.overrides[prefix]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A request that may go on: the differences of keys, and what is to be logged of them (empty for nothing)."""

    differences: KeyDifferences
    warning: str


@dataclass(frozen=True, slots=True)
class _Section:
    """One kind of difference, as an error or a paragraph of a warning."""

    kind: type[MismatchError]
    title: str
    lines: list[str]


def judge(requests: Sequence[Requests], holdings: Holdings, strict: Strictness) -> Verdict:
    """Compare all ranks' requests with the checkpoint.

    Raises:
        KeyMismatchError, ShapeMismatchError, DtypeMismatchError, MismatchError: the first that applies; its message lists
            all differences of all kinds, at most 20 names of each and 50 lines in all.
    """
    differences = _differences(requests, holdings)
    missing, unexpected = differences.missing, differences.unexpected
    not_stored = "requested but not in the checkpoint"
    not_asked = "in the checkpoint but requested by no rank"
    errors = [
        _keys(not_stored, [key for key in unexpected if strict.of(key).raises_unexpected], holdings, set(missing)),
        _keys(not_asked, [key for key in missing if strict.of(key).raises_missing]),
        _triples(ShapeMismatchError, "tensor", "global shape", [r.shapes for r in requests]),
        _triples(ShapeMismatchError, "sharded object", "global shape", [r.grids for r in requests]),
        _triples(DtypeMismatchError, "tensor", "dtype", [r.dtypes for r in requests]),
        _triples(MismatchError, "wrapper tensor", "kind", [r.wrappers for r in requests]),
    ]
    found = [section for section in errors if section.lines]
    if found:
        kinds = [section.kind for section in found]
        head = f"{holdings.location} does not fit what is to be loaded. No tensor was changed."
        raise kinds[0](f"{head}\n{_listing(found)}\n{_remedy(found)}")
    logged = [
        _keys(not_stored, [key for key in unexpected if strict.of(key).logs_unexpected], holdings, set(missing)),
        _keys(not_asked, [key for key in missing if strict.of(key).logs_missing]),
    ]
    noted = [section for section in logged if section.lines]
    return Verdict(differences, f"{holdings.location}:\n{_listing(noted)}" if noted else "")


def _differences(requests: Sequence[Requests], holdings: Holdings) -> KeyDifferences:
    unasked = np.ones(len(holdings.tensors), dtype=bool)
    for request in requests:
        unasked[request.rows] = False
    objects = {key for request in requests for key in request.objects}
    missing = {holdings.tensors[row] for row in np.flatnonzero(unasked).tolist()}
    missing |= {key for key in holdings.objects if key not in objects}
    unexpected = {key for request in requests for key in request.unexpected}
    return KeyDifferences(tuple(sorted(missing)), tuple(sorted(unexpected)))


def _shown(key: str) -> str:
    """The key on one line."""
    return key if key.isprintable() else repr(key)


def _keys(title: str, keys: list[str], holdings: Holdings | None = None, missing: Collection[str] = ()) -> _Section:
    lines = [_shown(key) for key in keys] if holdings is None else _hinted(keys, holdings, missing)
    return _Section(KeyMismatchError, f"{len(keys)} {'key is' if len(keys) == 1 else 'keys are'} {title}", lines)


def _triples(kind: type[MismatchError], noun: str, what: str, found: Sequence[list[tuple[str, str, str]]]) -> _Section:
    triples = sorted({item for part in found for item in part})
    lines = [f"{_shown(key)}: stored {stored}, requested {wanted}" for key, stored, wanted in triples]
    are = f"{noun} is" if len(triples) == 1 else f"{noun}s are"
    return _Section(kind, f"{len(triples)} {are} stored with another {what}", lines)


def _listing(sections: Sequence[_Section]) -> str:
    shown = min(_SHOWN, _LINES // max(1, len(sections)) - 2)
    lines = []
    for section in sections:
        lines.append(f"  {section.title}:")
        lines += [f"    {line}" for line in section.lines[:shown]]
        if len(section.lines) > shown:
            lines.append(f"    ... and {len(section.lines) - shown} more")
    return "\n".join(lines)


def _hinted(unexpected: Sequence[str], holdings: Holdings, missing: Collection[str]) -> list[str]:
    """The keys, with what is stored under them otherwise, or the first few with the nearest stored keys.

    Keys that nobody requested come first.
    """
    if not unexpected:
        return []
    stored = [*holdings.tensors, *holdings.objects]
    candidates = [key for key in stored if key in missing] or stored
    tensors = set(holdings.tensors)
    lines = []
    for position, key in enumerate(unexpected):
        near: list[str] = []
        if position < _HINTED and len(candidates) <= _HINTED_AMONG:
            near = difflib.get_close_matches(key, candidates, n=2)
        if key in holdings.wrapped:
            hint = " (stored as a wrapper tensor; LoadOptions(dequantise=True) loads it into a floating-point one)"
        elif key in holdings.objects:
            hint = " (stored as a sharded object, not as a tensor)"
        elif key in tensors:
            hint = " (stored as a tensor, not as a sharded object)"
        else:
            hint = f" (nearest stored: {', '.join(map(_shown, near))})" if near else ""
        lines.append(_shown(key) + hint)
    return lines


def _remedy(sections: Sequence[_Section]) -> str:
    remedies = {
        KeyMismatchError: "pass strict=StrictHandling.RAISE_UNEXPECTED for a partial load, IGNORE_ALL to load "
        "what both have, LoadOptions(strict_overrides=...) for some prefixes, or rename=... if names changed",
        ShapeMismatchError: "build the model with the stored shapes, set allow_shape_mismatch on a padded ShardedTensor, or "
        "say with LoadOptions(on_object_reshard=...) what becomes of objects",
        DtypeMismatchError: "pass LoadOptions(cast='floating') or 'any' to convert",
        MismatchError: "load wrapper tensors into ones that are put together alike, or into floating-point tensors with "
        "LoadOptions(dequantise=True)",
    }
    return "To go on: " + "; ".join(remedies[kind] for kind in dict.fromkeys(section.kind for section in sections)) + "."
