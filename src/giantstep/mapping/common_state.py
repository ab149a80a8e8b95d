"""Common state: plain Python values that are meant to be equal on all ranks, compared path by path."""

from __future__ import annotations

import json
from collections.abc import Sequence

from giantstep.format.codec import Codec
from giantstep.format.digests import ContentDigest
from giantstep.mapping.tree import Tree, map_leaves
from giantstep.shards.paths import Path, dotted


def fingerprints(common: Tree, codec: Codec) -> bytes:
    """A digest of every value by its dotted path, as JSON.

    Equal on two ranks if and only if their values are: the order of keys and empty containers do not count.
    """
    found: dict[str, str] = {}

    def note(path: Path, leaf: object) -> object:
        digest = ContentDigest()
        digest.update(codec.encode(leaf, path))
        found[dotted(path)] = f"{digest.halves()[0]:016x}"
        return leaf

    map_leaves(common, note)
    return json.dumps(found, sort_keys=True).encode("ascii")


def describe_differences(reports: Sequence[bytes]) -> str:
    """From each rank's `fingerprints` to a sentence naming ranks and paths."""
    maps: list[dict[str, str]] = [json.loads(report) for report in reports]
    first = maps[0]
    paths: dict[str, list[int]] = {}
    for rank, found in enumerate(maps):
        for path in [*first, *(path for path in found if path not in first)]:
            if first.get(path) != found.get(path):
                paths.setdefault(path, []).append(rank)
    shown = [f"{path!r} (ranks {_listed(ranks)})" for path, ranks in list(paths.items())[:20]]
    more = f" and {len(paths) - 20} more" if len(paths) > 20 else ""
    return "common state differs from rank 0's at " + ", ".join(shown) + more


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
