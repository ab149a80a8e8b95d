"""From bytes to mutants of the valid checkpoint: one function per part, each sealed behind its change.

Called by `targets`. Not here: what readers must make of them (`exercise`).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from copy import deepcopy

from giantstep.codecs import OBJECT_CODEC

from .draft import RECORD, SAVE_ID, Chunk, Columns, Draft, Edits, StoredObject, Tensor, file_name
from .json_tree import Node, change_tree, dump, parse
from .seeds import encoded_objects, seed_draft
from .steering import Steering

MOST_CHANGES = 5
_MAGIC = b"GSOBJ1\n"


TAGS = tuple(sorted(OBJECT_CODEC.tags()))
OBJECT_WORDS: tuple[Node, ...] = (
    *TAGS,
    *("$", "v", "os.system", "O", "<f8", "|b1", "|V8", "(9,)f8", "f4,f4", "<M8[s]", ">i4", "float32", "bfloat16", "bits8"),
    *("cpu", "cuda:99999", "meta", "0x" + "f" * 5_000, "7ff8000000000000", "9999-12-31T23:59:59.999999+23:59"),
    *([0, 0], [0, 1], [0, 2**40], [1, -1], [[1, 2]], [[[], 1]], [2**40, 2**40], [0, 2**62, 2**62]),
)
RECORD_WORDS: tuple[Node, ...] = (
    *(file_name(0), file_name(1), f"../{file_name(0)}", f"/{file_name(0)}", f"{SAVE_ID}.index.safetensors", RECORD),
    *("sha256:" + "0" * 64, "sha256:", "1.0", "1.999999999", "2.0", "01.0", SAVE_ID, "giantstep", "data/.."),
    *("bytes", "head_bytes", "name", "files", "index", "block_bytes", "rank", "format", "totals"),
)
HEADER_WORDS: tuple[Node, ...] = (
    *("I64", "U64", "U8", "F32", "I8", "__metadata__", "rest_checksums", "head_filler", "tensor_dtype", "dtype", "shape"),
    *("data_offsets", "chunk_start", [0, 0], [0, 2**62], [2**62, 2**62], [1], [0], []),
)


ChangeColumns = Callable[[Columns], None]


def change_record(steering: Steering, edits: Edits) -> None:
    """Changes to the commit record's fields, or to its text."""
    if steering.below(8) == 7:
        edits.record_text = lambda text: _changed_bytes(text, steering)
        return

    def change(root: list[Node]) -> None:
        for _ in range(1 + steering.below(3)):
            change_tree(root, steering, RECORD_WORDS)

    edits.record = change


def change_index(steering: Steering, draft: Draft, edits: Edits) -> None:
    """Changes to rows, columns or header of the index."""
    for _ in range(1 + steering.below(3)):
        kind = steering.below(8)
        if kind < 4:
            _change_rows(steering, draft)
        elif kind < 7:
            edits.columns = _then(edits.columns, steering)
        else:
            edits.header = lambda root: change_tree(root, steering, HEADER_WORDS)


def _then(first: ChangeColumns, steering: Steering) -> ChangeColumns:
    def change(columns: Columns) -> None:
        first(columns)
        if columns:
            _change_column(steering, columns)

    return change


def _change_rows(steering: Steering, draft: Draft) -> None:
    """One change after which all columns still fit each other, as a hostile writer would make it."""
    operation = steering.below(14)
    row = steering.pick(draft.tensors) if draft.tensors else None
    if operation == 0:
        draft.tensors.append(Tensor(steering.blob(), steering.below(256), _shape(steering), []))
    elif operation == 1:
        draft.objects.append(StoredObject(steering.blob(), 0, steering.number(), steering.number()))
    elif operation == 2 and draft.objects:
        stored = steering.pick(draft.objects)
        stored.start, stored.bytes = steering.number(stored.start), steering.number(stored.bytes)
    elif operation == 3:
        file = steering.below(len(draft.files))
        for copy in range(steering.pick((2, 50, 1_500))):
            draft.objects.append(StoredObject(b"x%05d" % copy, file, 0, len(draft.files[file])))
    elif operation == 4:
        draft.tensors.reverse()
        draft.objects.reverse()
    elif row is not None:
        _change_tensor(steering, draft, row, operation)
    if steering.below(4):
        draft.tensors.sort(key=lambda tensor: tensor.key)
        draft.objects.sort(key=lambda stored: stored.key)


def _change_tensor(steering: Steering, draft: Draft, row: Tensor, operation: int) -> None:
    if steering.below(2):
        row.chunks = deepcopy(row.chunks)  # no longer those of a tied tensor too
    if operation == 5:
        row.key = steering.blob()
    elif operation == 6:
        row.dtype = steering.below(256)
    elif operation == 7:
        row.shape, row.chunks = _shape(steering), []
    elif operation == 8:
        _whole_file(row, draft, steering)
    elif operation == 9:
        _pad_dims(row, steering.pick((1, 31, 62, 63, 64, 65)) - len(row.shape))
    elif operation == 10:
        draft.tensors.remove(row)
    elif row.chunks:
        _change_chunk(steering, steering.pick(row.chunks), operation)


def _change_chunk(steering: Steering, chunk: Chunk, operation: int) -> None:
    if operation == 11:
        chunk.file, chunk.start = steering.number(chunk.file), steering.number(chunk.start)
    elif operation == 12:
        chunk.bytes = steering.number(chunk.bytes)
    elif chunk.offset:
        axis = steering.below(len(chunk.offset))
        chunk.offset[axis] = steering.number(chunk.offset[axis])
        chunk.size[axis] = steering.number(chunk.size[axis])


def _shape(steering: Steering) -> list[int]:
    return [steering.number() for _ in range(steering.pick((0, 1, 2, 3, 20, 64, 65)))]


def _whole_file(row: Tensor, draft: Draft, steering: Steering) -> None:
    """Many chunks, each of which is all of one file, or the same box of the tensor."""
    file, copies = steering.below(len(draft.files)), steering.pick((1, 2, 60, 1_500))
    size = len(draft.files[file])
    step = 0 if steering.below(3) == 2 else size
    row.dtype, row.shape = 2, [size * copies]
    row.chunks = [Chunk(file, 0, size, [step * copy], [size]) for copy in range(copies)]


def _pad_dims(row: Tensor, count: int) -> None:
    """Further dimensions of 1 in front: as many bytes as before."""
    ones, zeros = [1] * max(0, count), [0] * max(0, count)
    row.shape = ones + row.shape
    for chunk in row.chunks:
        chunk.offset, chunk.size = zeros + chunk.offset, ones + chunk.size


def _change_column(steering: Steering, columns: Columns) -> None:
    name = steering.pick(sorted(columns))
    values = columns[name]
    place, operation = steering.below(len(values) or 1), steering.below(8)
    if operation == 0:
        values.insert(place, steering.number())
    elif operation == 1:
        columns[name] = values[:place]
    elif operation == 2:
        columns[name] = values * steering.pick((0, 2, 100))
    elif operation == 3 and name.endswith("_ends"):
        columns[name] = [0, *([values[-1], 0] * steering.pick((1, 2_000))), values[-1]] if values else [0]
    elif operation == 4:
        columns[name] = sorted(values, reverse=True)
    elif operation == 5:
        del columns[name]
    elif values:
        values[place] = steering.number(values[place])


@functools.cache
def _valid_header(file: int) -> bytes:
    data = bytes(seed_draft().files[file])
    return data[: 8 + int.from_bytes(data[:8], "little")]


def change_data_file(steering: Steering, draft: Draft) -> None:
    """Changes to a data file's header, bytes or length."""
    file = steering.below(len(draft.files))
    data, operation = draft.files[file], steering.below(6)
    if operation < 3:
        size = len(_valid_header(file)) - 8
        root = [parse(_valid_header(file)[8:])]
        for _ in range(1 + steering.below(3)):
            change_tree(root, steering, HEADER_WORDS)
        text = dump(root[0])
        grown = max(size, -(-(8 + len(text)) // 4096) * 4096 - 8) if steering.below(2) else size
        draft.files[file] = bytearray(grown.to_bytes(8, "little") + text[:grown].ljust(grown) + data[8 + size :])
    elif operation == 3:
        data[:8] = (steering.number(len(data)) % (1 << 64)).to_bytes(8, "little")
    elif operation == 4:
        draft.files[file] = bytearray(_changed_bytes(bytes(data), steering))
    else:
        draft.block_bytes = steering.pick((64, 513, 4096, 1 << 20, 64 << 20, 7))


def changed_object(steering: Steering) -> tuple[str, bytes]:
    """A key and the encoded object that is to stand there."""
    key = steering.pick(("common_state", *sorted(encoded_objects())))
    data = encoded_objects()[key]
    operation = steering.below(8)
    if operation == 0:
        text = steering.rest()
        return key, _MAGIC + struct.pack("<Q", len(text)) + text
    if operation == 1:
        return key, _changed_bytes(data, steering)
    text_bytes = struct.unpack("<Q", data[7:15])[0]
    root = [parse(data[15 : 15 + text_bytes])]
    for _ in range(1 + steering.below(MOST_CHANGES)):
        change_tree(root, steering, OBJECT_WORDS)
    text = dump(root[0])
    stated = steering.number(len(text)) % (1 << 64) if operation == 2 else len(text)
    return key, _MAGIC + struct.pack("<Q", stated) + text + data[15 + text_bytes :]


def put_object(draft: Draft, key: str, data: bytes) -> None:
    """Store other bytes as the object of a key."""
    row = next(row for row in draft.objects if row.key == key.encode())
    row.file, row.bytes = 0, len(data)
    row.start = draft.add_bytes(0, data)


def _changed_bytes(data: bytes, steering: Steering) -> bytes:
    """Some bytes overwritten, put in or taken out."""
    for _ in range(1 + steering.below(4)):
        place, new = steering.below(len(data) + 1), steering.blob(8)
        data = data[:place] + new + data[place + steering.pick((len(new), 0, 1, 64, 4096)) :]
    return data


def damage(files: dict[str, bytes], steering: Steering) -> dict[str, bytes]:
    """Changes behind the seals, of which every single one must be noticed."""
    found = dict(files)
    name = steering.pick(sorted(files))
    operation = steering.below(6)
    if operation == 0:
        del found[name]
    elif operation == 1:
        found[name] = files[steering.pick(sorted(files))]
    elif operation == 2:
        found[name] += steering.blob()
    elif operation == 3:
        found[name] = files[name][: steering.below(len(files[name]))]
    else:
        found[name] = _changed_bytes(files[name], steering)
    return found


def mixed(steering: Steering) -> tuple[Draft, Edits]:
    """Changes to several parts at once."""
    draft, edits = seed_draft(), Edits()
    for _ in range(1 + steering.below(MOST_CHANGES)):
        part = steering.below(4)
        if part == 0:
            change_record(steering, edits)
        elif part == 1:
            change_index(steering, draft, edits)
        elif part == 2:
            change_data_file(steering, draft)
        else:
            put_object_changed(steering, draft)
    return draft, edits


def put_object_changed(steering: Steering, draft: Draft) -> None:
    """A changed object in place of the valid one."""
    if any(row.key == b"common_state" for row in draft.objects):
        key, data = changed_object(steering)
        if any(row.key == key.encode() for row in draft.objects):
            put_object(draft, key, data)
