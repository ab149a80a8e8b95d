"""`giantstep show`: one tensor or object of a checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from giantstep.cli.text import print_table, shape_text
from giantstep.reports import size_text

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
    """The tensor in bounded parts along its first dimension."""
    if not array.shape:
        yield np.asarray(array[...])
        return
    per_row = max(1, int(np.prod(array.shape[1:], dtype=np.int64)))
    step = max(1, _STRIPE_ELEMENTS // per_row)
    for start in range(0, array.shape[0], step):
        yield array[start : start + step]


def _statistics(array: LazyArray) -> str:
    """min, max, mean, standard deviation, and how many values are NaN, infinite or zero; reads the tensor in parts."""
    count = zeros = nans = infinities = 0
    total = squares = 0.0
    low, high = np.inf, -np.inf
    for part in _stripes(array):
        if not part.size:
            continue
        values = np.abs(part) if part.dtype.kind == "c" else part.astype(np.float64)
        finite = values[np.isfinite(values)]
        nans += int(np.isnan(values).sum())
        infinities += int(np.isinf(values).sum())
        zeros += int((values == 0).sum())
        count += finite.size
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            total += float(finite.sum(dtype=np.float64))
            squares += float(np.square(finite, dtype=np.float64).sum())
    if not count:
        return f"no finite values ({nans} NaN, {infinities} infinite)"
    mean = total / count
    deviation = max(0.0, squares / count - mean * mean) ** 0.5
    of = " of magnitudes" if array.dtype.kind == "c" else ""
    return (
        f"min{of} {low:.6g}, max {high:.6g}, mean {mean:.6g}, std {deviation:.6g}; "
        f"{nans} NaN, {infinities} infinite, {zeros} zero"
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
