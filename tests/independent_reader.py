"""A reader of giantstep checkpoints that shares no code with giantstep: docs/format.md, json, struct and NumPy.

It takes the bytes of all files by name, and returns every tensor's bytes and every object's. It checks what the
format promises on the way, except xxh3 checksums, for which NumPy has no function.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


class FormatViolationError(Exception):
    """The checkpoint is not what docs/format.md says."""


# code: (name, bytes per element, container dtype, container values per element), copied from the table of docs/format.md.
DTYPES = {
    1: ("BOOL", 1, "BOOL", 1),
    2: ("U8", 1, "U8", 1),
    3: ("I8", 1, "I8", 1),
    4: ("U16", 2, "U16", 1),
    5: ("I16", 2, "I16", 1),
    6: ("U32", 4, "U32", 1),
    7: ("I32", 4, "I32", 1),
    8: ("U64", 8, "U64", 1),
    9: ("I64", 8, "I64", 1),
    10: ("F16", 2, "F16", 1),
    11: ("BF16", 2, "BF16", 1),
    12: ("F32", 4, "F32", 1),
    13: ("F64", 8, "F64", 1),
    14: ("C64", 8, "C64", 1),
    15: ("C128", 16, "F64", 2),
    16: ("C32", 4, "F16", 2),
    17: ("F8_E4M3", 1, "F8_E4M3", 1),
    18: ("F8_E5M2", 1, "F8_E5M2", 1),
    19: ("F8_E8M0", 1, "F8_E8M0", 1),
    20: ("F8_E4M3FNUZ", 1, "F8_E4M3FNUZ", 1),
    21: ("F8_E5M2FNUZ", 1, "F8_E5M2FNUZ", 1),
    22: ("F4X2", 1, "F4", 2),
}
NUMPY = {"I64": "<i8", "U64": "<u8", "U8": "|u1"}


@dataclass
class StoredTensor:
    """dtype name, global shape, and all elements as [*shape, bytes per element]."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass
class StoredCheckpoint:
    record: dict
    tensors: dict[str, StoredTensor]
    objects: dict[str, bytes]


def require(condition: bool, problem: str) -> None:
    if not condition:
        raise FormatViolationError(problem)


def header_of(data: bytes) -> tuple[dict, int]:
    """Entries of a safetensors file and where its data begin."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def read_record(data: bytes) -> dict:
    start = data.rindex(b'  "digest"')
    record = json.loads(data)
    require(record["digest"] == "sha256:" + hashlib.sha256(data[:start]).hexdigest(), "digest of the commit record")
    require(data[start:] == b'  "digest": "' + record["digest"].encode() + b'"\n}\n', "last line of the commit record")
    require(record["format"] == "giantstep" and record["format_version"].split(".")[0] == "1", "format version")
    return record


def read_columns(record: dict, data: bytes) -> dict[str, np.ndarray]:
    entry = record["index"]
    require(len(data) == entry["bytes"], "size of the index")
    head = data[: entry["head_bytes"]]
    require("sha256:" + hashlib.sha256(head).hexdigest() == entry["head_digest"], "digest of the index's head")
    header, start = header_of(data)
    require(start % 4096 == 0 and entry["head_bytes"] % 4096 == 0, "alignment of the index")
    metadata = header.pop("__metadata__")
    require(metadata["save_id"] == record["save_id"], "save id of the index")
    columns = {}
    for name, field in header.items():
        low, high = (start + offset for offset in field["data_offsets"])
        columns[name] = np.frombuffer(data[low:high], dtype=NUMPY[field["dtype"]])
    return columns


def texts(columns: Mapping[str, np.ndarray], name: str) -> list[str]:
    ends, blob = columns[f"{name}_ends"].tolist(), columns[f"{name}_bytes"].tobytes()
    return [blob[low:high].decode("utf-8") for low, high in itertools.pairwise(ends)]


def read_checkpoint(files: Mapping[str, bytes]) -> StoredCheckpoint:
    """All tensors and objects of the checkpoint whose files are given by name."""
    record = read_record(files["checkpoint.json"])
    columns = read_columns(record, files[record["index"]["name"]])
    data = [files[file["name"]] for file in record["files"]]
    require([len(found) for found in data] == [file["bytes"] for file in record["files"]], "sizes of data files")
    blocks = [math.ceil(len(found) / record["block_bytes"]) for found in data]
    require(np.diff(columns["file_block_ends"]).tolist() == blocks, "number of blocks")
    headers = [header_of(found) for found in data]
    require(all(start % 4096 == 0 for _, start in headers), "alignment of data files")
    keys = texts(columns, "tensor_key")
    require(keys == sorted(set(keys), key=str.encode), "order of keys")
    places = Counter(zip(columns["chunk_file"].tolist(), columns["chunk_start"].tolist(), strict=True))
    tensors = {key: read_tensor(row, key, columns, data, headers, record, places) for row, key in enumerate(keys)}
    objects = {}
    for row, key in enumerate(texts(columns, "object_key")):
        file, start, size = (int(columns[f"object_{name}"][row]) for name in ("file", "start", "bytes"))
        check_entry(headers[file], f"{{{key}}}", "U8", [size], start, size)
        objects[key] = data[file][start : start + size]
    totals = record["totals"]
    require(totals["tensors"] == len(tensors) and totals["objects"] == len(objects), "totals")
    chunks = set(zip(*(columns[f"chunk_{part}"].tolist() for part in ("file", "start", "bytes")), strict=True))
    require(len({(file, start) for file, start, _ in chunks}) == len(chunks), "chunks at one place are one chunk")
    payload = sum(size for _, _, size in chunks) + int(columns["object_bytes"].sum())
    require(totals["bytes"] == payload and totals["chunks"] == len(columns["chunk_file"]), "totals")
    return StoredCheckpoint(record, tensors, objects)


def read_tensor(
    row: int, key: str, columns: Mapping[str, np.ndarray], data: list[bytes], headers: list, record: dict, places: Counter
) -> StoredTensor:
    """One tensor. Chunks that tied tensors share (and any whose save was rewritten) may bear another tensor's name."""
    name, item, container, values = DTYPES[int(columns["tensor_dtype"][row])]
    low, high = columns["tensor_dims_ends"][row : row + 2]
    shape = tuple(columns["tensor_dims"][low:high].tolist())
    result = np.zeros((*shape, item), dtype=np.uint8)
    covered = np.zeros(shape, dtype=np.int8)
    first, last = columns["tensor_chunk_ends"][row : row + 2].tolist()
    base = int(columns["chunk_coordinate_ends"][row])
    for chunk in range(first, last):
        place = base + (chunk - first) * len(shape)
        offset = columns["chunk_offset"][place : place + len(shape)].tolist()
        size = columns["chunk_size"][place : place + len(shape)].tolist()
        file, start, length = (int(columns[f"chunk_{part}"][chunk]) for part in ("file", "start", "bytes"))
        require(length == math.prod(size) * item, "length of a chunk")
        region = ",".join(f"{o}:{o + s}" for o, s in zip(offset, size, strict=True))
        stored = list(size)
        if container == "F4" and stored:
            stored[-1] *= 2
        elif values == 2:
            stored.append(2)
        tied = places[file, start] > 1 or not record["files"][file]["name"].startswith(f"data/{record['save_id']}-")
        check_entry(
            headers[file], f"[{region}]" if tied else f"{key}[{region}]", container, stored, start, length, by_place=tied
        )
        where = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
        result[where] = np.frombuffer(data[file][start : start + length], dtype=np.uint8).reshape(*size, item)
        covered[where] += 1
    require(bool((covered == 1).all()), f"chunks of {key!r} do not partition it")
    return StoredTensor(name, shape, result)


def check_entry(
    header: tuple[dict, int], name: str, dtype: str, shape: list[int], start: int, length: int, *, by_place: bool = False
) -> None:
    """The header has an entry of this name (or, by place, one whose name ends so) for these bytes."""
    entries, data_start = header
    place = [start - data_start, start - data_start + length]
    if by_place:
        names = [found for found in entries if found.endswith(name) and entries[found].get("data_offsets") == place]
        require(len(names) == 1, f"one entry '...{name}' lies at {place}, found {names}")
        (name,) = names
    found = entries.get(name)
    require(found is not None, f"entry {name!r} is not in the data file's header")
    require(found["dtype"] == dtype and found["shape"] == shape, f"entry {name!r} is {found}")
    require(found["data_offsets"] == place, f"place of {name!r}")
