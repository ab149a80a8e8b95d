"""Checkpoints that claim the enormous, by name: refused with a typed error, before memory is taken for the claim."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch

import giantstep as gs
from fuzz.draft import INDEX, RECORD, Chunk, Columns, Draft, Edits, StoredObject, Tensor, container_header, encode_header, seal
from fuzz.exercise import DictStore, exercise
from fuzz.json_tree import Node, Raw
from fuzz.mutations import put_object
from fuzz.seeds import small_draft
from fuzz.targets import warm_up
from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import BadArgumentError, CorruptionError, IncompleteError
from giantstep.format.container import parse_header
from giantstep.shards.region import check_shape

MOST_BYTES = 24 << 20


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No test of this module may take more than 24 MiB, whatever is claimed."""
    warm_up()
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES


def opened(files: dict[str, bytes]) -> gs.Checkpoint:
    return gs.open_checkpoint(DictStore(files))


def with_index_field(name: str, value: int) -> dict[str, bytes]:
    def change(root: list[Node]) -> None:
        root[0].get("index").put(name, value)

    return seal(small_draft(), Edits(record=change))


@pytest.mark.parametrize("name", ["bytes", "head_bytes"])
def test_a_record_that_claims_an_index_of_a_quintillion_bytes(name: str) -> None:
    with pytest.raises(CorruptionError, match=str(10**18)):
        opened(with_index_field(name, 10**18))


def test_a_record_that_claims_a_data_file_of_exabytes() -> None:
    draft = small_draft()
    files = seal(draft, Edits(record=lambda root: root[0].get("files")[0].put("bytes", 1 << 61)))
    checkpoint = opened(files)
    with pytest.raises(CorruptionError, match="expected 2305843009213693952"):
        checkpoint["cube"][...]
    with pytest.raises(CorruptionError):
        gs.load({"cube": torch.zeros(2, 3, 4)}, DictStore(files), strict=gs.StrictHandling.IGNORE_ALL)
    assert not checkpoint.verify().ok


def test_a_record_that_lists_nine_thousand_files_that_are_not_there() -> None:
    def change(root: list[Node]) -> None:
        entries = (
            b'{"name":"data/20260101T000000-0123456789abcdef-r%05d-1.safetensors","bytes":1,"rank":0}' % n for n in range(9_000)
        )
        root[0].put("files", Raw(b"[" + b",".join(entries) + b"]"))

    checkpoint = opened(seal(small_draft(), Edits(record=change)))
    assert not checkpoint.verify().ok
    with pytest.raises((CorruptionError, IncompleteError)):
        checkpoint["cube"][...]


@pytest.mark.parametrize("column", ["tensor_dtype", "tensor_key_ends", "chunk_file", "block_checksum", "rest_checksums"])
def test_an_index_whose_header_claims_a_trillion_rows(column: str) -> None:
    def change(root: list[Node]) -> None:
        root[0].get(column).put("shape", [10**12])

    with pytest.raises(CorruptionError, match=r"10{12}"):
        opened(seal(small_draft(), Edits(header=change)))


def test_an_index_whose_header_says_that_the_rows_lie_there_too() -> None:
    def change(root: list[Node]) -> None:
        root[0].put("tensor_dtype", Raw(b'{"dtype":"U8","shape":[1000000000000],"data_offsets":[0,1000000000000]}'))

    with pytest.raises(CorruptionError, match="malformed"):
        opened(seal(small_draft(), Edits(header=change)))


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, (1 << 63), 100_000_001])
def test_a_header_length_beyond_the_file(length: int) -> None:
    files = seal(small_draft())
    for name, data in files.items():
        if name != RECORD:
            with pytest.raises(CorruptionError, match="does not fit"):
                parse_header(length.to_bytes(8, "little") + data[8:], len(data), name)


@pytest.mark.parametrize("shape", [[1 << 61], [1 << 31, 1 << 31], [(1 << 62) - 1] * 64], ids=["one", "two", "sixty-four"])
def test_a_tensor_of_exabytes_without_chunks(shape: list[int]) -> None:
    draft = small_draft()
    draft.tensors[1] = Tensor(b"cube", 12, shape, [])
    checkpoint = opened(seal(draft))
    with pytest.raises(CorruptionError):
        checkpoint.info("cube")
    with pytest.raises(CorruptionError):
        list(checkpoint.infos())


def test_an_empty_tensor_beside_a_dimension_of_any_size() -> None:
    """torch has tensors of some shapes for which NumPy has no arrays; beyond 2**62 elements nobody has any."""
    draft = small_draft()
    cube = draft.tensors[1]
    cube.shape, cube.chunks = [1 << 62, 0], []
    store = DictStore(seal(draft))
    checkpoint = gs.open_checkpoint(store)
    assert checkpoint.info("cube").bytes == 0
    with pytest.raises(BadArgumentError, match="cannot be read as a NumPy array"):
        checkpoint["cube"][...]
    assert checkpoint["cube"][:3].shape == (3, 0)
    loaded = gs.load({"cube": gs.metadata.load_tensors_metadata(store)["cube"]}, store, strict=gs.StrictHandling.IGNORE_ALL)
    assert loaded["cube"].shape == (1 << 62, 0)
    cube.shape = [1 << 62, 2, 0]
    checkpoint = opened(seal(draft))
    with pytest.raises(CorruptionError, match="cannot have shape"):
        checkpoint.info("cube")
    with pytest.raises(CorruptionError, match="more elements than any can"):
        list(checkpoint.infos())
    with pytest.raises(BadArgumentError, match="2\\*\\*62 elements"):
        check_shape((1 << 62, 2, 0), "it")


def encoded(text: bytes, attachments: bytes = b"") -> bytes:
    return b"GSOBJ1\n" + struct.pack("<Q", len(text)) + text + attachments


HUGE_OBJECTS = {
    "array without data": b'{"$":"ndarray","v":["<f8",[1099511627776],[0,0]]}',
    "array that is empty but huge": b'{"$":"ndarray","v":["<f8",[0,4611686018427387904,4611686018427387904],[0,0]]}',
    "tensor without data": b'{"$":"torch.Tensor","v":["float32",[1099511627776],[0,0]]}',
    "tensor that is empty but huge": b'{"$":"torch.Tensor","v":["float32",[0,4611686018427387904,4611686018427387904],[0,0]]}',
    "attachment beyond the object": b'{"$":"bytes","v":[0,1099511627776]}',
    "attachment referred to often": b"[" + b",".join([b'{"$":"bytes","v":[0,8]}'] * 2_000) + b"]",
    "lists in lists": b"[" * 100_000 + b"]" * 100_000,
    "tuples in tuples": b'{"$":"tuple","v":[' * 100_000 + b"]}" * 100_000,
    "number of a million digits": b"9" * 1_000_000,
}


@pytest.mark.parametrize("name", HUGE_OBJECTS)
def test_an_object_that_claims_to_be_huge(name: str) -> None:
    with pytest.raises(CorruptionError):
        OBJECT_CODEC.decode(encoded(HUGE_OBJECTS[name], b"12345678"), "x")
    draft = small_draft()
    put_object(draft, "common_state", encoded(HUGE_OBJECTS[name], b"12345678"))
    store = DictStore(seal(draft))
    with pytest.raises(CorruptionError):
        gs.load({}, store, strict=gs.StrictHandling.IGNORE_ALL)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b'[{"a":' * 50_000], ids=["lists", "objects", "both"])
def test_json_nested_a_hundred_thousand_deep(text: bytes) -> None:
    nested = Raw(text + b"1")
    with pytest.raises(CorruptionError, match="not JSON"):
        opened(seal(small_draft(), Edits(record=lambda root: root[0].put("content_metadata", nested))))
    with pytest.raises(CorruptionError, match="not valid JSON"):
        opened(seal(small_draft(), Edits(header=lambda root: root[0].put("more", nested))))
    header = container_header([], {})
    header[0].put("more", nested)
    with pytest.raises(CorruptionError, match="not valid JSON"):
        parse_header(encode_header(header[0]), 1 << 30, "x")


# A little that is referred to often must not become much.

COPIES = 3_000


def grown_draft() -> Draft:
    """A checkpoint with a data file of some size, which many references make enormous."""
    draft = small_draft()
    draft.add_bytes(0, bytes(64 << 10))
    assert COPIES * len(draft.files[0]) > 8 * MOST_BYTES
    return draft


def test_a_tensor_of_many_chunks_that_are_all_of_one_file() -> None:
    draft = grown_draft()
    size = len(draft.files[0])
    chunks = [Chunk(0, 0, size, [copy * size], [size]) for copy in range(COPIES)]
    draft.tensors = [Tensor(b"bomb", 2, [COPIES * size], chunks)]
    checkpoint = opened(seal(draft))
    with pytest.raises(CorruptionError, match="share bytes"):
        checkpoint["bomb"]


def test_a_tensor_whose_chunks_are_all_the_same_part_of_it() -> None:
    """They add up to its size, but leave most of it unset."""
    draft = small_draft()
    start = draft.add_bytes(0, bytes(range(64)))
    draft.tensors = [Tensor(b"w", 2, [64], [Chunk(0, start + 8 * part, 8, [0], [8]) for part in range(8)])]
    files = seal(draft)
    with pytest.raises(CorruptionError, match="overlap"):
        opened(files)["w"]
    with pytest.raises(CorruptionError, match="overlap"):
        gs.load({"w": torch.zeros(64, dtype=torch.uint8)}, DictStore(files), strict=gs.StrictHandling.IGNORE_ALL)


def test_a_tensor_that_shares_its_first_chunk_and_no_more_with_another() -> None:
    """Tensors that share all chunks are tied, and loaded once for all of them; these are not."""
    draft = small_draft()
    tied, home = (next(row for row in draft.tensors if row.key == key) for key in (b"tied", b"w"))
    tied.chunks = deepcopy(home.chunks)
    tied.chunks[2].start = draft.add_bytes(tied.chunks[2].file, bytes(tied.chunks[2].bytes))
    store = DictStore(seal(draft))
    assert not gs.open_checkpoint(store)["tied"][3:].any()
    with pytest.raises(CorruptionError, match="first chunk"):
        gs.load(gs.metadata.load_tensors_metadata(store), store, strict=gs.StrictHandling.IGNORE_ALL)


def test_many_objects_that_are_all_of_one_file() -> None:
    draft = grown_draft()
    draft.objects = [StoredObject(b"%06d" % copy, 0, 0, len(draft.files[0])) for copy in range(COPIES)]
    with pytest.raises(CorruptionError, match="share bytes"):
        opened(seal(draft)).objects()


def test_many_keys_that_are_all_of_one_text() -> None:
    """Ends that go up and down make every other key as long as all of them."""

    def change(columns: Columns) -> None:
        columns["tensor_key_bytes"] = list(b"k" * 100_000)
        columns["tensor_key_ends"] = [0, 100_000] * 2_000
        columns["tensor_dtype"] = [2] * 3_999

    checkpoint = opened(seal(small_draft(), Edits(columns=change)))
    with pytest.raises(CorruptionError, match="decreases"):
        checkpoint.keys()


def test_blocks_of_few_bytes_read_each_byte_once() -> None:
    draft = small_draft()
    draft.block_bytes = 16
    store = DictStore(seal(draft))
    checkpoint = gs.open_checkpoint(store)
    assert checkpoint.verify().ok
    assert store.bytes_read <= 2 * store.stored_bytes


@pytest.mark.parametrize("block_bytes", [0, (64 << 20) + 1, 1 << 61])
def test_blocks_of_no_bytes_or_of_too_many(block_bytes: int) -> None:
    with pytest.raises(CorruptionError, match="block_bytes"):
        opened(seal(small_draft(), Edits(record=lambda root: root[0].put("block_bytes", block_bytes))))


def test_everything_at_once_is_refused_step_by_step() -> None:
    draft = small_draft()
    draft.tensors[1].shape = [1 << 40]
    draft.objects[1].bytes = 1 << 40
    refused = exercise(seal(draft), ("cube",))
    assert {"infos: CorruptionError", "info: CorruptionError", "load: CorruptionError"} <= set(refused)
    assert "verify: reported" in refused
    assert INDEX in seal(draft)
