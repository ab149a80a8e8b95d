"""The safetensors container: laying out entries behind a header, and reading such a header.

A file is 8 bytes of header length (little endian), a JSON header padded with spaces, and the entries'
bytes without gaps. The public safetensors library opens what is laid out here. Not here: what entries
mean (`data_file`, `index`), writing or reading files.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import NamedTuple

import numpy as np

from giantstep.errors import BadArgumentError, CorruptionError
from giantstep.shards.region import Int64s

# The safetensors library refuses longer headers.
MAX_HEADER_BYTES = 100_000_000
DATA_ALIGNMENT = 4096


class Entry(NamedTuple):
    """One entry: its name, container dtype and shape as safetensors counts them, and its size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class PlacedEntry:
    """An entry found in a header: dtype, shape, and the bytes [start, stop) of the file that hold it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """Entries that lie one after another in a file.

    Attributes:
        text: their part of the header, without the braces around it.
        starts: first byte of each, counted from the first byte of data of the file.
        stop: where the last one ends.
    """

    text: bytes
    starts: Int64s
    stop: int


def section_of(names: Sequence[str], kinds: Sequence[str], sizes: Sequence[int], begin: int = 0) -> Section:
    """The section of entries with these names, `kind_text`s and sizes in bytes, from byte `begin` of the data on.

    Raises:
        BadArgumentError: two entries have one name.
    """
    _check_names(names)
    ends = list(itertools.accumulate(sizes, initial=begin))
    rows = zip(names, kinds, ends, ends[1:], strict=False)
    # Written piece by piece, as `json` would write it: dtype and shape, of which there are few, once.
    text = ",".join([f"{encode_basestring(name)}:{kind}{start},{stop}]}}" for name, kind, start, stop in rows])
    return Section(text.encode(), np.array(ends[:-1], dtype=np.int64), ends[-1])


def kind_text(dtype: str, shape: Sequence[int]) -> str:
    """The text of an entry in a header between its name and its place."""
    return f'{{"dtype":{_text(dtype)},"shape":{_text(shape)},"data_offsets":['


def header_of(sections: Sequence[Section], metadata: Mapping[str, str]) -> bytes:
    """The header of sections that follow one another, padded so that data begin at a multiple of 4096.

    Raises:
        BadArgumentError: it would be longer than safetensors allows.
    """
    texts = [f'"__metadata__":{_text(dict(metadata))}'.encode(), *(section.text for section in sections if section.text)]
    text = b"{" + b",".join(texts) + b"}"
    data_start = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    if data_start - 8 > MAX_HEADER_BYTES:
        raise BadArgumentError(
            f"a safetensors header of {data_start - 8} bytes is longer than the {MAX_HEADER_BYTES} allowed; "
            "lower max_file_bytes so that entries spread over more files"
        )
    return (data_start - 8).to_bytes(8, "little") + text.ljust(data_start - 8)


def lay_out(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, Int64s]:
    """The header of a file of these entries, and each entry's first byte in the file.

    Raises:
        BadArgumentError: two entries have one name, or the header would be longer than safetensors allows.
    """
    kinds = [kind_text(entry.dtype, entry.shape) for entry in entries]
    section = section_of([entry.name for entry in entries], kinds, [entry.bytes for entry in entries])
    header = header_of([section], metadata)
    return header, section.starts + len(header)


def _check_names(names: Sequence[str]) -> None:
    if len({"__metadata__", *names}) == len(names) + 1:
        return
    seen = {"__metadata__"}
    for name in names:
        if name in seen:
            raise BadArgumentError(f"two entries of one data file are named {name!r}")
        seen.add(name)


_text = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


# A character outside of the basic plane is written as two escapes of 6 bytes.
_CHARACTER_BYTES, _DIMENSION_BYTES, _ENTRY_BYTES = 12, 24, 122


def header_bytes_bound(entry: Entry) -> int:
    """At least the bytes that `entry` adds to a header."""
    return len(json.dumps(entry.name)) - 2 + _DIMENSION_BYTES * len(entry.shape) + _ENTRY_BYTES


def headers_bytes_bound(entries: Sequence[Entry]) -> int:
    """At least the sum of the bounds of single entries, found faster."""
    return names_bytes_bound([entry.name for entry in entries], max([len(entry.shape) for entry in entries], default=0))


def names_bytes_bound(names: Sequence[str], dims: int) -> int:
    """`headers_bytes_bound` of entries with these names and at most so many dimensions."""
    return _CHARACTER_BYTES * sum(map(len, names)) + (_DIMENSION_BYTES * dims + _ENTRY_BYTES) * len(names)


def _pairs_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def parse_header(data: bytes | memoryview, file_bytes: int, what: str) -> tuple[dict[str, PlacedEntry], dict[str, str], int]:
    """Entries by name, metadata, and the first byte of the data, from the leading bytes of a container.

    Args:
        data: leading bytes that hold the whole header.
        file_bytes: size of the whole file; no entry may reach beyond it.
        what: the file's name, for errors.

    Raises:
        CorruptionError: anything is not as `lay_out` writes it.
    """
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 0 <= length <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise CorruptionError(f"{what}: header of {length} bytes does not fit the {len(data)} bytes it must lie in")
    try:
        fields = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=_pairs_once)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{what}: header is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CorruptionError(f"{what}: header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptionError(f"{what}: metadata is not a mapping of strings")
    data_start = 8 + length
    return {name: _placed(name, field, data_start, file_bytes, what) for name, field in fields.items()}, metadata, data_start


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _placed(name: str, field: object, data_start: int, file_bytes: int, what: str) -> PlacedEntry:
    bad = CorruptionError(f"{what}: entry {name!r:.100} of the header is malformed: {field!r:.200}")
    if not isinstance(field, dict):
        raise bad
    dtype, shape, offsets = field.get("dtype"), field.get("shape"), field.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise bad
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise bad
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if not start <= stop <= file_bytes:
        raise bad
    return PlacedEntry(dtype, tuple(shape), start, stop)
