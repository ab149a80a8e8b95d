"""What is stored of a flat layout beside buckets that load only under the same one, and how two layouts differ, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from giantstep.errors import BadArgumentError, CorruptionError
from giantstep.shards.flat_buffers import FlatLayout, FlatParameter

Position = Mapping[str, tuple[int, int]]
"""Axes of model parallelism: name -> (index, size), such as `{"tp": (0, 2), "pp": (1, 4)}`."""

_SHOWN = 3


def check_position(position: Position) -> None:
    """Raise `BadArgumentError` unless each axis has an index within its size."""
    for axis, place in position.items():
        fits = isinstance(axis, str) and axis.isidentifier() and isinstance(place, tuple) and len(place) == 2
        if not fits or not all(type(number) is int for number in place) or not 0 <= place[0] < place[1]:
            raise BadArgumentError(
                f"position: axis {axis!r} with {place!r} must be a name with (index, size), such as 'tp': (0, 2)"
            )


def fingerprint(layout: FlatLayout, position: Position) -> dict[str, Any]:
    """The value that is stored: sizes to be read by people, and the whole layout, compressed."""
    return {
        "axes": {axis: size for axis, (_, size) in position.items()},
        "ranks": layout.ranks,
        "buckets": len(layout.buckets),
        "parameters": len(layout.parameters),
        "layout": layout.packed,
    }


def differences(stored: Any, what: str, layout: FlatLayout, position: Position) -> list[str]:
    """What is stored and what is asked for, where they differ; empty if they are the same.

    Args:
        stored: a `fingerprint`.
        what: names it in errors.
        layout, position: what is asked for.

    Raises:
        CorruptionError: `stored` is no fingerprint.
    """
    asked = fingerprint(layout, position)
    if stored == asked:
        return []
    try:
        axes, before = dict(stored["axes"]), FlatLayout.unpacked(stored["layout"])
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptionError(f"{what} does not describe a layout of optimizer buckets: {error}") from error
    found = [
        f"{axis} was {axes.get(axis, 'absent')} and is {asked['axes'].get(axis, 'absent')}"
        for axis in sorted({*axes, *asked["axes"]})
        if axes.get(axis) != asked["axes"].get(axis)
    ]
    if before.ranks != layout.ranks:
        found.append(f"the number of data-parallel ranks was {before.ranks} and is {layout.ranks}")
    # Everything else follows from those.
    return (found or [*_parameters(before, layout), *_places(before, layout)])[:_SHOWN]


def _parameters(before: FlatLayout, after: FlatLayout) -> Iterator[str]:
    """The first place at which another parameter lies."""
    old, new = before.parameters, after.parameters
    for number, (one, other) in enumerate(zip(old, new, strict=False)):
        if one != other:
            yield f"parameter number {number} in the order of the buckets was {_text(one)} and is {_text(other)}"
            return
    if len(old) != len(new):
        longer, words = (old, "is gone") if len(old) > len(new) else (new, "is new")
        yield f"there were {len(old)} parameters and are {len(new)}: {_text(longer[min(len(old), len(new))])} {words}"


def _text(parameter: FlatParameter) -> str:
    return f"{parameter.name!r} ({parameter.dtype} {parameter.shape})"


def _places(before: FlatLayout, after: FlatLayout) -> Iterator[str]:
    """The first parameter that lies elsewhere; the first bucket that is longer, or cut elsewhere."""
    if before.parameters != after.parameters:
        return
    for one, other in zip(_starts(before), _starts(after), strict=True):
        if one != other:
            name, old, new = one[0], one[1:], other[1:]
            yield (
                f"parameter {name!r} began at element {old[1]} of bucket {old[0]} and begins at element {new[1]} of bucket "
                f"{new[0]} (other bucket sizes, alignment or padding)"
            )
            return
    for number, (bucket, now) in enumerate(zip(before.buckets, after.buckets, strict=False)):
        if bucket.elements != now.elements:
            yield (
                f"bucket {number} had {bucket.elements} elements, {bucket.padding} of padding, and has {now.elements}, "
                f"{now.padding} of padding"
            )
            return
        if bucket.cuts != now.cuts:
            yield f"bucket {number} was divided among ranks at {bucket.cuts} and is at {now.cuts}"
            return


def _starts(layout: FlatLayout) -> list[tuple[str, int, int]]:
    """(name, bucket, first element) of every parameter."""
    return [
        (parameter.name, number, start)
        for number, bucket in enumerate(layout.buckets)
        for parameter, start in zip(bucket.parameters, bucket.starts, strict=True)
    ]
