"""`giantstep show`: one tensor or object of a checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from giantstep.cli.text import print_table, shape_text
from giantstep.reports import size_text
from giantstep.shards.region import Region, split_region

if TYPE_CHECKING:
    from collections.abc import Iterator

    from giantstep.reading.checkpoint import Checkpoint, TensorInfo
    from giantstep.reading.lazy_array import LazyArray

_STRIPE_ELEMENTS = 1 << 22


@click.command("show")
@click.argument("path")
@click.argument("key")
@click.option("--values", default=8, show_default=True, type=click.IntRange(0, 10_000), help="How many first values to print.")
@click.option("--no-statistics", is_flag=True, help="Do not read the whole tensor.")
@click.option("--chunks", default=20, show_default=True, type=click.IntRange(0), help="How many chunks to list.")
def command(path: str, key: str, values: int, no_statistics: bool, chunks: int) -> None:
    """Show tensor KEY (or an object, as common_state) of the checkpoint at PATH."""
    from giantstep.opening import open_checkpoint

    checkpoint = open_checkpoint(path)
    if key not in checkpoint and key in checkpoint.object_keys():
        _show_object(checkpoint, key)
        return
    info = checkpoint.info(key)
    click.echo(f"{info.key}\n  {info.dtype} {shape_text(info.shape)}, {size_text(info.bytes)}, {len(info.chunks)} chunks")
    _print_chunks(info, chunks)
    array = checkpoint[key]
    if not no_statistics:
        click.echo(f"  {_statistics(array)}")
    if values:
        first = _first_values(array, values)
        click.echo(f"  first values: {' '.join(map(str, first)) or '(none)'}")


def _show_object(checkpoint: Checkpoint, key: str) -> None:
    value = checkpoint.object(key)
    try:
        click.echo(json.dumps(value, indent=2, default=repr))
    except (TypeError, ValueError):
        click.echo(repr(value))


def _print_chunks(info: TensorInfo, limit: int) -> None:
    rows = [
        ("  " + str(chunk.region), chunk.file, str(chunk.start), size_text(chunk.bytes), str(chunk.rank))
        for chunk in info.chunks[:limit]
    ]
    if rows:
        print_table(("  region", "file", "first byte", "size", "written by rank"), rows, right=(2, 3, 4))
    if len(info.chunks) > limit:
        click.echo(f"  ... and {len(info.chunks) - limit} more chunks")


def _stripes(array: LazyArray) -> Iterator[np.ndarray[Any, Any]]:
    """The tensor in bounded parts."""
    for part in split_region(Region.whole(array.shape), _STRIPE_ELEMENTS):
        yield np.asarray(array[part.slices()])


class _Statistics:
    """Count, extremes, mean and deviation of values that come in parts.

    Means and squared deviations of parts are merged as Chan, Golub and LeVeque (1979) do, so that nothing cancels.
    """

    def __init__(self) -> None:
        self.count = self.zeros = self.nans = self.infinities = 0
        self.low, self.high, self.mean, self.deviations = np.inf, -np.inf, 0.0, 0.0

    def add(self, part: np.ndarray[Any, Any]) -> None:
        """Take the values of a part into account."""
        values = np.abs(part) if part.dtype.kind == "c" else part.astype(np.float64)
        finite = values[np.isfinite(values)].astype(np.float64)
        self.nans += int(np.isnan(values).sum())
        self.infinities += int(np.isinf(values).sum())
        self.zeros += int((values == 0).sum())
        if not finite.size:
            return
        self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        mean, total = float(finite.mean()), self.count + finite.size
        distance = mean - self.mean
        self.deviations += float(np.square(finite - mean).sum()) + distance * distance * self.count * finite.size / total
        self.mean += distance * finite.size / total
        self.count = total


def _statistics(array: LazyArray) -> str:
    """min, max, mean, standard deviation, and how many values are NaN, infinite or zero; reads the tensor in parts."""
    found = _Statistics()
    for part in _stripes(array):
        found.add(part)
    if not found.count:
        return f"no finite values ({found.nans} NaN, {found.infinities} infinite)"
    of = " of magnitudes" if array.dtype.kind == "c" else ""
    return (
        f"min{of} {found.low:.6g}, max {found.high:.6g}, mean {found.mean:.6g}, "
        f"std {(found.deviations / found.count) ** 0.5:.6g}; "
        f"{found.nans} NaN, {found.infinities} infinite, {found.zeros} zero"
    )


def _first_values(array: LazyArray, count: int) -> list[str]:
    """The first `count` values in row-major order, reading little more than them."""
    shape = array.shape
    if 0 in shape:
        return []
    index: list[slice] = []
    wanted = count
    for size in reversed(shape):
        index.insert(0, slice(0, min(size, max(1, wanted))))
        wanted = -(-wanted // size)
    values = array[tuple(index)].reshape(-1)[:count]
    return [_value_text(value) for value in values]


def _value_text(value: Any) -> str:
    if isinstance(value, complex | np.complexfloating):
        return f"{complex(value):.6g}"
    if isinstance(value, bool | np.bool_ | int | np.integer):
        return str(value)
    return f"{float(value):.6g}"
