"""`giantstep ls`: what a checkpoint holds."""

from __future__ import annotations

import fnmatch
import json
import math
from typing import TYPE_CHECKING

import click

from giantstep.cli.text import print_table, shape_text
from giantstep.reports import size_text
from giantstep.shards.object_keys import position_of

if TYPE_CHECKING:
    from giantstep.reading.checkpoint import Checkpoint, TensorInfo


@click.command("ls")
@click.argument("path")
@click.option("--match", metavar="PATTERN", help="Only keys that match this shell pattern, as 'decoder.*.weight'.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(path: str, match: str | None, as_json: bool) -> None:
    """List the tensors and objects of the checkpoint at PATH."""
    from giantstep.opening import open_checkpoint

    checkpoint = open_checkpoint(path)
    infos = [info for info in checkpoint.infos() if match is None or fnmatch.fnmatchcase(info.key, match)]
    if as_json:
        click.echo(json.dumps(_as_json(checkpoint, infos), indent=1))
    else:
        _print(checkpoint, infos)


def _as_json(checkpoint: Checkpoint, infos: list[TensorInfo]) -> dict[str, object]:
    record = checkpoint.record
    return {
        "location": checkpoint.location,
        "save_id": record.save_id,
        "created": record.created,
        "library": record.library,
        "world_size": record.world_size,
        "content_metadata": record.content_metadata,
        "metrics": {name: value if math.isfinite(value) else None for name, value in record.metrics.items()},
        "tensors": [
            {"key": info.key, "dtype": info.dtype, "shape": info.shape, "bytes": info.bytes, "chunks": info.chunk_count}
            for info in infos
        ],
        "objects": checkpoint.object_keys(),
    }


def _print(checkpoint: Checkpoint, infos: list[TensorInfo]) -> None:
    record = checkpoint.record
    rows = [(info.key, info.dtype, shape_text(info.shape), size_text(info.bytes), str(info.chunk_count)) for info in infos]
    if rows:
        print_table(("tensor", "dtype", "shape", "size", "chunks"), rows, right=(3, 4))
        click.echo()
    objects = checkpoint.object_keys()
    if objects:
        click.echo(f"objects: {_objects_text(objects)}")
    if record.content_metadata is not None:
        click.echo(f"content metadata: {json.dumps(record.content_metadata)}")
    if record.metrics:
        click.echo("metrics: " + ", ".join(f"{name} {value:g}" for name, value in record.metrics.items()))
    shown = "" if len(infos) == record.totals.tensors else f"{len(infos)} of "
    click.echo(
        f"{shown}{record.totals.tensors} tensors, {size_text(record.totals.bytes)} in {len(record.files)} data files; saved by "
        f"{record.world_size} ranks at {record.created} with {record.library} (format {record.version})"
    )


def _objects_text(names: list[str]) -> str:
    """Names of objects; those of one grid together."""
    grids: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    texts: list[str] = []
    for name in names:
        position = position_of(name)
        if position is None:
            texts.append(name)
        else:
            grids.setdefault((position.key, position.shape), []).append(name)
    for (key, shape), held in grids.items():
        if len(held) == 1:
            texts.append(held[0])
        else:
            texts.append(f"{key}/shard_*_{'.'.join(map(str, shape))} ({len(held)})")
    return ", ".join(sorted(texts))
