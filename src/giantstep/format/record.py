"""The commit record `checkpoint.json`: written last; a checkpoint exists if and only if it is there and intact.

JSON that a person can read. Its last line but one is a digest of every byte before that line. Not here:
publishing it (`commit`), reading it from a store (`reading`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from giantstep.errors import BadArgumentError, CorruptionError
from giantstep.format.digests import anchor_digest
from giantstep.format.names import RECORD_NAME, is_data_file, is_index_file, is_save_id
from giantstep.format.versions import PLAIN, check_version

Json: TypeAlias = Any

FORMAT = "giantstep"
MAX_RECORD_BYTES = 1 << 30
_MAX_INT = 1 << 62
# A block is the least that can be verified, and so the least that must fit memory.
_MAX_BLOCK_BYTES = 64 << 20

_DIGEST_LINE = re.compile(rb'  "digest": "(sha256:[0-9a-f]{64})"\n\}\n')
_DIGEST_LINE_BYTES = len(b'  "digest": "sha256:') + 64 + len(b'"\n}\n')


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A data file: its name in the checkpoint directory, size, and the rank that wrote it."""

    name: str
    bytes: int
    rank: int


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """The index file. `head_bytes` leading bytes hold its header and the checksums of the rest."""

    name: str
    bytes: int
    head_bytes: int
    head_digest: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts for people: `bytes` is the payload of all chunks and objects, each stored once."""

    tensors: int
    chunks: int
    objects: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Nodes:
    """What a checkpoint in the nodes' own places says of them. Each holds record and index, and some of the data files.

    Attributes:
        run: name of the run.
        generation: of the run: greater each time that it has gone on from a checkpoint.
        replicas: copies of each data file, besides the first.
        parity: (data, parity) blocks of a stripe at most, or None.
        hosts: [hosts] name, failure domain and circle of each.
        host_of_rank: [world size] number of the host of each rank.
    """

    run: str
    generation: int
    replicas: int
    parity: tuple[int, int] | None
    hosts: tuple[tuple[str, str, str], ...]
    host_of_rank: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """Everything that `checkpoint.json` says.

    Attributes:
        save_id: id that all files of the save carry.
        library: name and version of the writer.
        created: UTC time of the commit, ISO 8601.
        world_size: ranks that saved.
        block_bytes: size of the checksummed blocks of data files and index.
        index, files, totals: see their classes.
        content_metadata: the user's own JSON value.
        metrics: numbers that the save was given, by name; NaN for those that were not finite.
        nodes: of a checkpoint in the nodes' own places: whose it is, and where ranks and copies were; else None.
        version: format version.
    """

    save_id: str
    library: str
    created: str
    world_size: int
    block_bytes: int
    index: IndexEntry
    files: tuple[FileEntry, ...]
    totals: Totals
    content_metadata: Json
    version: str = PLAIN
    metrics: Mapping[str, float] = field(default_factory=dict)
    nodes: Nodes | None = None


def check_metrics(value: Any) -> None:
    """Raise `BadArgumentError` unless `value` is a mapping of names to numbers, or None."""
    fits = value is None or (
        isinstance(value, Mapping)
        and all(isinstance(name, str) and name for name in value)
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value.values())
    )
    if not fits:
        raise BadArgumentError(
            f"metrics={value!r:.200} cannot be: expected a mapping of names to numbers (float(tensor) makes one)"
        )


def _plain_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no NaN and no infinities.
    return {name: float(number) if math.isfinite(number) else None for name, number in metrics.items()}


def check_content_metadata(value: Json) -> None:
    """Raise `BadArgumentError` unless `value` survives JSON unchanged."""
    try:
        survived = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadArgumentError(f"content_metadata must be a JSON value: {error}") from error
    if survived != value:
        raise BadArgumentError(
            f"content_metadata must be a JSON value that reads back equal (no tuples, no keys but strings): "
            f"{value!r} would read back as {survived!r}"
        )


def encode_record(record: CommitRecord) -> bytes:
    """The bytes of `checkpoint.json`."""
    body = {
        "format": FORMAT,
        "format_version": record.version,
        "save_id": record.save_id,
        "library": record.library,
        "created": record.created,
        "world_size": record.world_size,
        "block_bytes": record.block_bytes,
        "totals": {
            "tensors": record.totals.tensors,
            "chunks": record.totals.chunks,
            "objects": record.totals.objects,
            "bytes": record.totals.bytes,
        },
        "index": {
            "name": record.index.name,
            "bytes": record.index.bytes,
            "head_bytes": record.index.head_bytes,
            "head_digest": record.index.head_digest,
        },
        "content_metadata": record.content_metadata,
        **({"metrics": _plain_metrics(record.metrics)} if record.metrics else {}),
        **({"nodes": asdict(record.nodes)} if record.nodes else {}),
        "files": [{"name": file.name, "bytes": file.bytes, "rank": file.rank} for file in record.files],
    }
    text = json.dumps(body, indent=2, allow_nan=False).encode("ascii")
    signed = text.removesuffix(b"\n}") + b",\n"
    return signed + b'  "digest": "' + anchor_digest(signed).encode() + b'"\n}\n'


def save_id_in(data: bytes) -> str | None:
    """The save id that a commit record states, intact or not; None if none can be found."""
    match = re.search(rb'\n  "save_id": "([^"]*)"', data)
    found = match[1].decode("ascii", "replace") if match else ""
    return found if is_save_id(found) else None


def looks_like_a_record(data: bytes) -> bool:
    """Whether these are bytes of a commit record, intact or not: how it begins or how it ends is recognised."""
    return f'"format": "{FORMAT}"'.encode() in data[:64] or _DIGEST_LINE.search(data[-_DIGEST_LINE_BYTES:]) is not None


def decode_record(data: bytes, what: str) -> CommitRecord:
    """Inverse of `encode_record`; `what` names the file in errors.

    Raises:
        CorruptionError: the digest does not fit, or a field is not what it must be.
        VersionError: intact, but of a newer major version.
    """
    signed, digest_line = data[:-_DIGEST_LINE_BYTES], data[-_DIGEST_LINE_BYTES:]
    match = _DIGEST_LINE.fullmatch(digest_line)
    if match is None or match[1].decode() != anchor_digest(signed):
        raise CorruptionError(
            f"commit record {what} is damaged: its digest does not fit its {len(data)} bytes. "
            "Restore the file from a copy, or load another step."
        )
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"commit record {what} is not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CorruptionError(f"commit record {what} is not giantstep's: expected format {FORMAT!r}")
    check_version(fields.get("format_version"), f"commit record {what}")
    return _Fields(fields, what).record()


class _Fields:
    """Typed access to the decoded JSON; every surprise is a `CorruptionError` naming the field."""

    def __init__(self, fields: dict[str, Json], what: str) -> None:
        self._fields = fields
        self._what = what

    def _bad(self, name: str, value: object, expected: str) -> CorruptionError:
        return CorruptionError(f"commit record {self._what}: field {name!r} is {value!r:.100}, expected {expected}")

    def text(self, name: str) -> str:
        value = self._fields.get(name)
        if not isinstance(value, str):
            raise self._bad(name, value, "a string")
        return value

    def number(self, name: str) -> int:
        value = self._fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_INT:
            raise self._bad(name, value, "an integer from 0 to 2**62")
        return value

    def nested(self, name: str) -> _Fields:
        value = self._fields.get(name)
        if not isinstance(value, dict):
            raise self._bad(name, value, "an object")
        return _Fields(value, self._what)

    def file_entry(self) -> FileEntry:
        name = self.text("name")
        if not is_data_file(name):
            raise self._bad("name", name, f"a data file's name in the directory of {RECORD_NAME}")
        return FileEntry(name, self.number("bytes"), self.number("rank"))

    def files(self) -> tuple[FileEntry, ...]:
        value = self._fields.get("files")
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._bad("files", value, "a list of objects")
        entries = tuple(_Fields(item, self._what).file_entry() for item in value)
        if len({entry.name for entry in entries}) != len(entries):
            raise self._bad("files", "a name that appears twice", "distinct names")
        return entries

    def metrics(self) -> dict[str, float]:
        value = self._fields.get("metrics", {})
        fits = isinstance(value, dict) and all(
            number is None or (isinstance(number, int | float) and not isinstance(number, bool)) for number in value.values()
        )
        if not fits:
            raise self._bad("metrics", value, "an object of numbers and nulls")
        return {name: math.nan if number is None else float(number) for name, number in value.items()}

    def nodes(self, world_size: int, files: tuple[FileEntry, ...]) -> Nodes | None:
        if "nodes" not in self._fields:
            return None
        found = self.nested("nodes")
        hosts, ranks, parity = (found._fields.get(name) for name in ("hosts", "host_of_rank", "parity"))
        if (
            not isinstance(hosts, list)
            or not all(
                isinstance(host, list) and len(host) == 3 and all(isinstance(text, str) for text in host) for host in hosts
            )
            or len({host[0] for host in hosts}) != len(hosts)
        ):
            raise found._bad("hosts", hosts, "a list of [name, domain, circle], each name once")
        if not isinstance(ranks, list) or len(ranks) != world_size or not all(type(rank) is int for rank in ranks):
            raise found._bad("host_of_rank", ranks, f"{world_size} numbers of hosts")
        if list(dict.fromkeys(ranks)) != list(range(len(hosts))):
            raise found._bad("host_of_rank", ranks, f"numbers of {len(hosts)} hosts, in the order of their lowest ranks")
        pair = isinstance(parity, list) and len(parity) == 2 and all(type(part) is int and part > 0 for part in parity)
        if parity is not None and not (pair and sum(parity) < 256):
            raise found._bad("parity", parity, "null or two numbers from 1 on, together at most 255")
        if strange := [file.rank for file in files if file.rank >= world_size]:
            raise self._bad("rank", strange[0], f"one of the {world_size} ranks that saved")
        return Nodes(
            found.text("run"),
            found.number("generation"),
            found.number("replicas"),
            None if parity is None else (parity[0], parity[1]),
            tuple((host[0], host[1], host[2]) for host in hosts),
            tuple(ranks),
        )

    def index_entry(self) -> IndexEntry:
        name, size, head = self.text("name"), self.number("bytes"), self.number("head_bytes")
        if not is_index_file(name):
            raise self._bad("name", name, "an index file's name")
        if head > size:
            raise self._bad("head_bytes", head, f"at most the file's {size} bytes")
        return IndexEntry(name, size, head, self.text("head_digest"))

    def record(self) -> CommitRecord:
        save_id, block_bytes = self.text("save_id"), self.number("block_bytes")
        if not is_save_id(save_id):
            raise self._bad("save_id", save_id, "a save id")
        if not 1 <= block_bytes <= _MAX_BLOCK_BYTES:
            raise self._bad("block_bytes", block_bytes, f"a number from 1 to {_MAX_BLOCK_BYTES}")
        totals, world_size, files = self.nested("totals"), self.number("world_size"), self.files()
        return CommitRecord(
            save_id=save_id,
            library=self.text("library"),
            created=self.text("created"),
            world_size=world_size,
            block_bytes=block_bytes,
            index=self.nested("index").index_entry(),
            files=files,
            totals=Totals(totals.number("tensors"), totals.number("chunks"), totals.number("objects"), totals.number("bytes")),
            content_metadata=self._fields.get("content_metadata"),
            metrics=self.metrics(),
            nodes=self.nodes(world_size, files),
            version=self.text("format_version"),
        )
