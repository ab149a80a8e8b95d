"""Planning for thousands of ranks, in one process: what rank 0 computes, gathers and scatters, and what the index costs.

1,000 tensors are described by up to 16,384 ranks in several layouts; nothing is written but the index. Every case has a
process of its own. torch.distributed.checkpoint plans the same beside it, as far as it gets in a minute. `--index-rows`
measures something else: a checkpoint of a million chunks is opened and one key found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from dcp_plans import DcpFigures, measured_up_to
from index_access import BLOCK_BYTES, SAVE_ID, Opened, open_and_find, store_index
from rich.console import Console
from rich.table import Table
from scale_case import Figures
from shard_layouts import LAYOUTS

from giantstep.format.index import Index, encode_texts
from giantstep.format.names import data_file_name
from giantstep.format.record import FileEntry

_RANKS, _MOST_RANKS = (64, 256, 1024, 2048, 4096), 16_384
_KIB, _MIB = 1 << 10, 1 << 20
_WIDTH = 180
_MEMORY_FOLDER = "/dev/shm"  # noqa: S108 - no disk between the index and its reader
_CHUNK_BYTES, _CHUNKS_PER_TENSOR, _FILES = 1 << 20, 100, 1000
_LEGEND = (
    "s: CPU seconds of rank 0, the fastest of up to three runs: gather (bundles that came over the tree to messages), decode, "
    "plan (checks included), answer, scatter (answers to bundles); cold is all of them, system what of it the system took to "
    "provide memory. warm ms: rank 0 agrees that the plan holds; token ms: a rank finds that it holds what it held. extra MiB: "
    "peak memory beyond the bundles. gathered, scattered: messages of all ranks; in brackets what of it reaches and leaves "
    "rank 0, equal parts once. index s: from write reports to the index and its bytes. record, find ms: to read the commit "
    "record; to open the index and read one tensor's chunks. read: bytes of the index that this read. all ms: to read and "
    "check all of it. load ms: one rank plans its load on 3/4 of the ranks. DCP: torch.distributed.checkpoint, unpickling and "
    "pickling plans included; x DCP: its CPU seconds as a multiple of ours."
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(_RANKS), help=f"numbers of ranks (default: {_RANKS})")
    parser.add_argument("--all", action="store_true", help=f"also {_MOST_RANKS} ranks")
    parser.add_argument("--tensors", type=int, default=1000, help="number of tensors (default: 1000)")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="default: all")
    parser.add_argument("--no-dcp", action="store_true", help="leave out torch.distributed.checkpoint")
    parser.add_argument("--dcp-limit", type=float, default=60.0, help="seconds that one of its cases may take (default: 60)")
    parser.add_argument("--index-rows", type=int, help="only open a checkpoint of so many chunks")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def _measured(layout: str, ranks: int, tensors: int) -> Figures:
    print(f"  {layout}, {ranks} ranks", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).with_name("scale_case.py")), layout, str(ranks), str(tensors)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return Figures(**{**found, "opened": Opened(**found["opened"])})


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _print_plans(rows: Sequence[Figures], dcp: dict[str, dict[int, DcpFigures]], console: Console) -> None:
    names = (
        "ranks",
        "shards",
        "chunks",
        "gather s",
        "decode s",
        "plan s",
        "answer s",
        "scatter s",
        "cold s",
        "system s",
        "warm ms",
        "extra MiB",
    )
    table = _table("planning a save: rank 0", ["layout"], [*names, "DCP s", "x DCP"])
    for layout, group in itertools.groupby(rows, lambda row: row.layout):
        for row in group:
            theirs = dcp.get(layout, {}).get(row.ranks)
            table.add_row(
                layout,
                f"{row.ranks:,}",
                f"{row.shards:,}",
                f"{row.chunks:,}",
                *(f"{row.phases[name]:.3f}" for name in ("gather", "decode", "plan", "answer", "scatter")),
                f"{row.cold_secs:.3f}",
                f"{row.cold_system_secs:.2f}",
                f"{row.warm_secs * 1e3:.1f}",
                f"{row.extra_bytes / _MIB:.0f}",
                f"{theirs.secs:.1f}" if theirs else "",
                f"{theirs.secs / row.cold_secs:.0f}" if theirs else "",
            )
        table.add_section()
    console.print(table)


def _print_messages(rows: Sequence[Figures], dcp: dict[str, dict[int, DcpFigures]], console: Console) -> None:
    names = ("ranks", "describe ms", "gathered MiB", "KiB/rank", "scattered MiB", "KiB/rank", "token ms", "warm KiB")
    table = _table("planning a save: messages", ["layout"], [*names, "DCP gathered MiB", "KiB/rank"])
    for layout, group in itertools.groupby(rows, lambda row: row.layout):
        for row in group:
            theirs = dcp.get(layout, {}).get(row.ranks)
            table.add_row(
                layout,
                f"{row.ranks:,}",
                f"{row.describe_secs * 1e3:.2f}",
                *_sent_cells(row.gathered_bytes, row.gathered_once_bytes, row.ranks),
                *_sent_cells(row.scattered_bytes, row.scattered_once_bytes, row.ranks),
                f"{row.fingerprint_secs * 1e3:.2f}",
                f"{row.warm_gathered_bytes / _KIB:.0f}",
                f"{theirs.gathered_bytes / _MIB:.1f}" if theirs else "",
                f"{theirs.gathered_bytes / row.ranks / _KIB:.0f}" if theirs else "",
            )
        table.add_section()
    console.print(table)


def _sent_cells(sent: int, once: int, ranks: int) -> list[str]:
    return [f"{sent / _MIB:.1f} ({once / _MIB:.2f})", f"{sent / ranks / _KIB:.2f} ({once / ranks / _KIB:.2f})"]


def _opened_cells(opened: Opened) -> list[str]:
    return [
        f"{opened.index_bytes / _MIB:.1f}",
        f"{opened.record_secs * 1e3:.1f}",
        f"{opened.find_secs * 1e3:.1f}",
        f"{opened.read_bytes / _MIB:.2f} MiB, {100 * opened.read_bytes / opened.index_bytes:.1f} %",
        f"{opened.load_secs * 1e3:.0f}",
    ]


_OPENED = ("index MiB", "record ms", "find ms", "read", "all ms")


def _print_index(rows: Sequence[Figures], console: Console) -> None:
    table = _table("the index, and a load", ["layout"], ["ranks", "chunks", "index s", *_OPENED, "load ms"])
    for layout, group in itertools.groupby(rows, lambda row: row.layout):
        for row in group:
            cells = _opened_cells(row.opened) if row.opened else [""] * len(_OPENED)
            table.add_row(
                layout, f"{row.ranks:,}", f"{row.chunks:,}", f"{row.index_secs:.2f}", *cells, f"{row.load_plan_secs * 1e3:.0f}"
            )
        table.add_section()
    console.print(table)


def _print_growth(rows: Sequence[Figures], console: Console) -> None:
    """How much more a case costs than the one with fewer ranks, beside what n log n of the ranks would be."""
    names = ("ranks", "ranks x", "n log n", "cold s", "without system", "warm", "index s", "extra MiB", "gathered", "scattered")
    table = _table("growth from one number of ranks to the next, as factors; what reaches and leaves rank 0", ["layout"], names)
    for layout, group in itertools.groupby(rows, lambda row: row.layout):
        for less, more in itertools.pairwise(group):
            pairs = [
                (more.cold_secs, less.cold_secs),
                (more.cold_secs - more.cold_system_secs, less.cold_secs - less.cold_system_secs),
                (more.warm_secs, less.warm_secs),
                (more.index_secs, less.index_secs),
                (more.extra_bytes, less.extra_bytes),
                (more.gathered_once_bytes, less.gathered_once_bytes),
                (more.scattered_once_bytes, less.scattered_once_bytes),
            ]
            table.add_row(
                layout,
                f"{less.ranks:,} to {more.ranks:,}",
                f"{more.ranks / less.ranks:.1f}",
                f"{more.ranks * math.log(more.ranks) / (less.ranks * math.log(less.ranks)):.1f}",
                *(f"{a / b:.1f}" if b else "" for a, b in pairs),
            )
        table.add_section()
    console.print(table)


def _index_of(chunks: int) -> tuple[Index, list[FileEntry]]:
    """An index of so many chunks: matrices of 100 chunks each, spread over 1,000 files."""
    tensors = -(-chunks // _CHUNKS_PER_TENSOR)
    counts = np.full(tensors, _CHUNKS_PER_TENSOR)
    counts[-1] = chunks - _CHUNKS_PER_TENSOR * (tensors - 1)
    columns, item_bytes = 1024, 2
    rows = _CHUNK_BYTES // columns // item_bytes
    number = np.arange(chunks)
    within = number - np.repeat(np.cumsum(counts) - counts, counts)
    key_ends, key_bytes = encode_texts([f"model.layers.{tensor:07d}.weight".encode() for tensor in range(tensors)])
    per_file = np.bincount(number % _FILES, minlength=_FILES) * _CHUNK_BYTES
    blocks = -(-per_file // BLOCK_BYTES)
    zero = np.zeros(0, dtype=np.int64)
    index = Index(
        tensor_key_ends=key_ends,
        tensor_key_bytes=key_bytes,
        tensor_dtype=np.full(tensors, 11, dtype=np.uint8),
        tensor_dims_ends=2 * np.arange(tensors + 1),
        tensor_dims=np.stack([counts * rows, np.full(tensors, columns)], axis=1).reshape(-1),
        tensor_chunk_ends=np.concatenate(([0], np.cumsum(counts))),
        chunk_file=number % _FILES,
        chunk_start=number // _FILES * _CHUNK_BYTES,
        chunk_bytes=np.full(chunks, _CHUNK_BYTES),
        chunk_coordinate_ends=np.concatenate(([0], np.cumsum(2 * counts))),
        chunk_offset=np.stack([within * rows, np.zeros(chunks, dtype=np.int64)], axis=1).reshape(-1),
        chunk_size=np.tile([rows, columns], chunks),
        object_key_ends=np.zeros(1, dtype=np.int64),
        object_key_bytes=np.zeros(0, dtype=np.uint8),
        object_file=zero,
        object_start=zero,
        object_bytes=zero,
        file_block_ends=np.concatenate(([0], np.cumsum(blocks))),
        block_checksum=np.zeros(int(blocks.sum()), dtype=np.uint64),
    )
    return index, [FileEntry(data_file_name(SAVE_ID, rank, 0), int(size), rank) for rank, size in enumerate(per_file)]


def _open_large(chunks: int, console: Console) -> None:
    index, files = _index_of(chunks)
    with tempfile.TemporaryDirectory(dir=_MEMORY_FOLDER) as root:
        store_index(root, index, files)
        opened = open_and_find(root, f"model.layers.{len(index.tensor_dtype) // 3:07d}.weight")
    table = _table("open a checkpoint and find one key", ["chunks"], _OPENED)
    table.add_row(f"{chunks:,}", *_opened_cells(opened))
    console.print(table)


def main() -> None:
    """Measure all cases and print their tables."""
    arguments = _arguments()
    console = Console(width=_WIDTH)
    if arguments.index_rows:
        _open_large(arguments.index_rows, console)
        return
    console.print(
        f"NumPy {np.__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; {arguments.tensors} tensors"
    )
    console.print(_LEGEND)
    ranks = sorted({*arguments.ranks, *([_MOST_RANKS] if arguments.all else [])})
    rows = [_measured(layout, count, arguments.tensors) for layout in arguments.layouts for count in ranks]
    dcp: dict[str, dict[int, DcpFigures]] = {}
    if not arguments.no_dcp:
        dcp = {name: measured_up_to(name, ranks, arguments.tensors, arguments.dcp_limit) for name in arguments.layouts}
    _print_plans(rows, dcp, console)
    _print_messages(rows, dcp, console)
    _print_index(rows, console)
    _print_growth(rows, console)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
