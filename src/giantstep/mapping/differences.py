"""Objects that are meant to be equal on several ranks, compared path by path."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from giantstep.format.codec import Codec
from giantstep.format.digests import ContentDigest
from giantstep.mapping.describe import StoredObject
from giantstep.mapping.tree import Tree, is_dict
from giantstep.shards.object_keys import COMMON_KEY
from giantstep.shards.paths import Path, dotted

_SHOWN = 20


def fingerprint(stored: StoredObject, codec: Codec) -> dict[str, list[str]]:
    """Every leaf of an object by where it stands: its dotted path, for people, and a digest of its value.

    Equal on two ranks if and only if their values are: the order of keys and empty containers do not count.
    """
    found: dict[str, list[str]] = {}

    def note(path: Path, place: str, leaf: Any) -> None:
        digest = ContentDigest()
        digest.update(codec.encode(leaf, (*stored.path, *path)))
        found[place] = [dotted(path), f"{digest.halves()[0]:016x}"]

    _each_leaf(stored.value, (), "", note)
    return found


def _each_leaf(tree: Tree, path: Path, place: str, note: Callable[[Path, str, Any], None]) -> None:
    """Note the leaves of a tree; the place says of each step also the kind of container and of key."""
    if is_dict(tree):
        kind = "o" if isinstance(tree, OrderedDict) else "d"
        for key, value in tree.items():
            _each_leaf(value, (*path, key), f"{place}/{kind}{type(key).__name__}:{key!r}", note)
    elif type(tree) in (list, tuple):
        kind = type(tree).__name__
        for position, value in enumerate(tree):
            _each_leaf(value, (*path, position), f"{place}/{kind}:{position}", note)
    else:
        note(path, place, tree)


# Values that can be encoded wherever they stand.
_SCALARS = {int, float, str, bool, type(None)}


def fingerprint_digest(stored: StoredObject, codec: Codec) -> tuple[int, int]:
    """A digest that is equal on two ranks if and only if `fingerprint` is; scalars are encoded all at once."""
    scalars: dict[str, Any] = {}
    others: dict[str, bytes] = {}

    def note(path: Path, place: str, leaf: Any) -> None:
        if type(leaf) in _SCALARS:
            scalars[place] = leaf
        else:
            others[place] = codec.encode(leaf, (*stored.path, *path))

    _each_leaf(stored.value, (), "", note)
    digest = ContentDigest()
    places, rest = sorted(scalars), sorted(others)
    sizes = [len(others[place]) for place in rest]
    digest.update(codec.encode([places, [scalars[place] for place in places], rest, sizes]))
    for place in rest:
        digest.update(others[place])
    return digest.halves()


def fingerprints(objects: Mapping[str, StoredObject], names: Sequence[str], codec: Codec) -> bytes:
    """The fingerprints of this rank's objects of these names, as JSON."""
    found = {name: fingerprint(objects[name], codec) for name in names if name in objects}
    return json.dumps(found, sort_keys=True).encode("ascii")


def describe_differences(reports: Sequence[bytes], writers: Mapping[str, int]) -> str:
    """From each rank's `fingerprints` to sentences naming objects, paths and ranks.

    Args:
        reports: by rank.
        writers: rank whose value is stored, by name of object.
    """
    maps: list[dict[str, dict[str, list[str]]]] = [json.loads(report) for report in reports]
    sentences = []
    for name, writer in writers.items():
        stored = maps[writer][name]
        paths: dict[str, list[int]] = {}
        for rank, objects in enumerate(maps):
            found = objects.get(name, stored)
            different = {**stored, **found}
            # Two places may read alike: a key 1 and a key "1".
            for path in dict.fromkeys(path for place, (path, _) in different.items() if stored.get(place) != found.get(place)):
                paths.setdefault(path, []).append(rank)
        shown = [(f"{path!r} " if path else "") + f"({_listed(ranks)})" for path, ranks in list(paths.items())[:_SHOWN]]
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        what = "common state" if name == COMMON_KEY else f"object {name!r}"
        where = " at " if any(paths) else " "
        sentences.append(f"{what} differs from rank {writer}'s{where}" + ", ".join(shown) + more)
    rest = f"; so do {len(sentences) - _SHOWN} more objects" if len(sentences) > _SHOWN else ""
    return "; ".join(sentences[:_SHOWN]) + rest


def _listed(ranks: list[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} " + ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
