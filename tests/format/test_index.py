"""Record and index: what is written is read; what cannot be is refused, whoever wrote it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import giantstep as gs
from giantstep.errors import BadArgumentError, CorruptionError
from giantstep.format.container import Entry, header_bytes_bound, headers_bytes_bound, lay_out, parse_header
from giantstep.format.data_file import ChunkLayout, chunk_entry, object_entry, plan_data_files
from giantstep.format.index import COLUMNS, OPTIONAL_COLUMNS, Index, check_index, encode_index
from giantstep.format.names import data_file_name, is_data_file, is_index_file, save_id_of
from giantstep.format.record import CommitRecord, FileEntry, IndexEntry, Totals, decode_record, encode_record
from giantstep.shards.dtypes import BY_NAME
from giantstep.shards.region import Region

SAVE_ID = "20260101T000000-0123456789abcdef"
RECORD = CommitRecord(
    save_id=SAVE_ID,
    library="giantstep 9",
    created="2026-01-01T00:00:00+00:00",
    world_size=3,
    block_bytes=4096,
    index=IndexEntry(f"{SAVE_ID}.index.safetensors", 9000, 8192, "sha256:" + "0" * 64),
    files=(FileEntry(data_file_name(SAVE_ID, 2, 1), 5000, 2),),
    totals=Totals(1, 2, 3, 4),
    content_metadata={"é": [None, 1.5]},
)


def test_a_record_comes_back_equal() -> None:
    data = encode_record(RECORD)
    assert decode_record(data, "x") == RECORD
    assert json.loads(data)["digest"].startswith("sha256:")


@given(st.integers(0, 2000), st.integers(1, 255))
def test_any_changed_byte_of_a_record_is_corruption(position: int, change: int) -> None:
    data = bytearray(encode_record(RECORD))
    data[position % len(data)] ^= change
    with pytest.raises(CorruptionError):
        decode_record(bytes(data), "x")


def test_names_of_ours_and_of_others() -> None:
    name = data_file_name(SAVE_ID, 123_456, 7)
    assert is_data_file(name)
    assert save_id_of(name) == SAVE_ID
    assert save_id_of(f"checkpoint.json.{SAVE_ID}.tmp") == SAVE_ID
    assert is_index_file(f"{SAVE_ID}.index.safetensors")
    for foreign in (
        "data/x.safetensors",
        f"../{name}",
        f"{name}\n",
        "checkpoint.json",
        f"data/../{SAVE_ID}",
        "model.safetensors",
    ):
        assert save_id_of(foreign) is None
        assert not is_data_file(foreign)


def small_index(tmp_path: Any) -> tuple[Index, list[int]]:
    state = {"w": torch.zeros(4, 3), "s": torch.tensor(1.0), "e": torch.zeros(0, 2), "n": 1}
    gs.save(state, tmp_path)
    checkpoint = gs.open_checkpoint(tmp_path)
    return checkpoint.index_tables().load_all(), [file.bytes for file in checkpoint.record.files]


def check(index: Index, sizes: list[int]) -> None:
    check_index(index, len(sizes), np.array(sizes, dtype=np.int64), 256 * 1024, "x")


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("value", [-1, 1 << 40, 77])
@pytest.mark.parametrize("where", [0, -1])
def test_an_index_that_states_the_impossible_is_refused(tmp_path: Any, name: str, value: int, where: int) -> None:
    """Each number of each column replaced by nonsense: refused, unless it is a value that any number may be."""
    index, sizes = small_index(tmp_path)
    check(index, sizes)
    column = getattr(index, name).copy()
    column[where] = np.array(value).astype(column.dtype)
    changed = dataclasses.replace(index, **{name: column})
    if name in ("block_checksum", "tensor_key_bytes", "object_key_bytes") or (name.endswith("_start") and value == 77):
        check(changed, sizes)
        return
    with pytest.raises(CorruptionError):
        check(changed, sizes)


@pytest.mark.parametrize("name", COLUMNS)
def test_an_index_with_a_column_cut_short_is_refused(tmp_path: Any, name: str) -> None:
    index, sizes = small_index(tmp_path)
    with pytest.raises(CorruptionError):
        check(dataclasses.replace(index, **{name: getattr(index, name)[:-1]}), sizes)


@pytest.mark.parametrize("name", OPTIONAL_COLUMNS)
def test_an_optional_column_may_be_absent_but_not_cut_short(tmp_path: Any, name: str) -> None:
    gs.save({"w": torch.zeros(4, 3), "s": torch.tensor(1.0), "n": 1}, tmp_path, options=gs.SaveOptions(digests=True))
    checkpoint = gs.open_checkpoint(tmp_path)
    index, sizes = checkpoint.index_tables().load_all(), [file.bytes for file in checkpoint.record.files]
    check(index, sizes)
    assert index.version == "1.1"
    check(dataclasses.replace(index, **{name: None}), sizes)
    for wrong in (getattr(index, name)[:-1], getattr(index, name).reshape(-1)[:, None].repeat(3, axis=1)):
        with pytest.raises(CorruptionError, match=f"column '{name}'"):
            check(dataclasses.replace(index, **{name: wrong}), sizes)


def test_the_index_opens_with_the_safetensors_library(tmp_path: Any) -> None:
    from safetensors import safe_open

    index, _ = small_index(tmp_path)
    encoded = encode_index(index, SAVE_ID, 4096)
    path = tmp_path / "i.safetensors"
    path.write_bytes(encoded.data)
    with safe_open(path, framework="np") as found:
        assert found.metadata()["save_id"] == SAVE_ID
        assert (found.get_tensor("tensor_dims") == index.tensor_dims).all()


HEADERS = [
    b"",
    b"\0" * 7,
    (1 << 62).to_bytes(8, "little"),
    (4).to_bytes(8, "little") + b"[1]x",
    (2).to_bytes(8, "little") + b"[]",
    (13).to_bytes(8, "little") + b'{"a":1,"a":2}',
    *(
        len(text).to_bytes(8, "little") + text
        for text in (
            b'{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,99999]}}',
            b'{"a":{"dtype":"I64","shape":[-1],"data_offsets":[0,8]}}',
            b'{"a":{"dtype":1,"shape":[1],"data_offsets":[0,8]}}',
            b'{"a":{"dtype":"I64","shape":[1],"data_offsets":[8,0]}}',
            b'{"a":{"dtype":"I64","shape":[true],"data_offsets":[0,8]}}',
            b'{"__metadata__":{"a":1}}',
            b"[" * 100_000,
        )
    ),
]


@pytest.mark.parametrize("data", HEADERS, ids=lambda data: repr(data[:50]))
def test_malformed_headers_are_corruption(data: bytes) -> None:
    with pytest.raises(CorruptionError):
        parse_header(data, 1000, "x")


def test_a_header_comes_back_and_data_begin_on_4096() -> None:
    entries = [Entry("a[0:2]", "F32", (2,), 8), Entry('q"é{}', "U8", (0,), 0), Entry("b", "F4", (4,), 2)]
    header, starts = lay_out(entries, {"k": "v"})
    assert len(header) % 4096 == 0
    assert starts.tolist() == [len(header), len(header) + 8, len(header) + 8]
    placed, metadata, start = parse_header(header, len(header) + 10, "x")
    assert metadata == {"k": "v"}
    assert start == len(header)
    assert [(entry.start, entry.stop) for entry in placed.values()] == [(4096, 4104), (4104, 4104), (4104, 4106)]
    with pytest.raises(BadArgumentError, match="two entries"):
        lay_out([entries[0], entries[0]], {})


def test_a_header_is_the_json_text_of_its_fields() -> None:
    names = ["plain", 'quote " backslash \\ slash /', "line\n tab\t null\0", "\u00e9 \U0001f600 \u2028", "", "__metadata__ "]
    entries = [Entry(name, "F32", (2, number), 8 * number) for number, name in enumerate(names)]
    entries.append(Entry("scalar", "I64", (), 8))
    header, _ = lay_out(entries, {"key": 'value "\u00e9"'})
    ends = list(itertools.accumulate([entry.bytes for entry in entries], initial=0))
    fields: dict[str, object] = {"__metadata__": {"key": 'value "\u00e9"'}}
    for entry, start, stop in zip(entries, ends, ends[1:], strict=False):
        fields[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (start, stop)}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    assert header[8:].rstrip(b" ") == text
    assert len(text) <= 4096 + sum(map(header_bytes_bound, entries)) <= 4096 + headers_bytes_bound(entries)


def test_entries_are_aligned_named_and_spread_over_files() -> None:
    entries = [chunk_entry("w", BY_NAME[name], Region((0,), (3,))) for name in ("U8", "BF16", "F64", "C128", "F4X2")]
    entries.append(object_entry("common_state", 11))
    assert entries[3] == Entry("w[0:3]", "F64", (3, 2), 48)
    assert entries[4] == Entry("w[0:3]", "F4", (6,), 3)
    named = [entry._replace(name=f"{n}{entry.name}") for n, entry in enumerate(entries)]
    alignments = [1, 2, 8, 16, 1, 1]
    (plan,) = plan_data_files(named, alignments, 1 << 20, {})
    for position, start in zip(plan.order, plan.starts, strict=True):
        assert start % alignments[position] == 0
    assert plan.bytes == len(plan.header) + sum(entry.bytes for entry in entries)
    many = [Entry(f"t{n}[]", "U8", (400_000,), 400_000) for n in range(7)]
    plans = plan_data_files(many, [1] * 7, 1 << 20, {})
    assert [len(plan.order) for plan in plans] == [2, 2, 2, 1]


@given(
    st.lists(
        st.tuples(st.sampled_from(["U8", "BF16", "F64", "C128", "F4X2"]), st.integers(0, 5), st.integers(0, 4)), max_size=20
    ),
    st.lists(st.integers(1, 50), max_size=3),
)
def test_a_layout_that_is_kept_gives_the_file_that_a_fresh_plan_gives(
    chunks: list[tuple[str, int, int]], objects: list[int]
) -> None:
    keys = [f"layer.{number}\u00e9" for number in range(len(chunks))]
    dtypes = [BY_NAME[name] for name, _, _ in chunks]
    regions = [Region((row, 0), (rows, 2)) for _, row, rows in chunks]
    behind = [object_entry(f"object {number}", size) for number, size in enumerate(objects)]
    entries = [*map(chunk_entry, keys, dtypes, regions), *behind]
    alignments = [*(dtype.item_bytes for dtype in dtypes), *(1 for _ in behind)]
    layout = ChunkLayout.of(keys, dtypes, regions)
    kept = layout.with_objects(behind, 1 << 30, {"format": "giantstep"})
    fresh = plan_data_files(entries, alignments, 1 << 30, {"format": "giantstep"})
    assert kept is not None
    if not entries:
        assert not fresh
        return
    assert [(plan.header, plan.order.tolist(), plan.starts.tolist(), plan.bytes) for plan in fresh] == [
        (kept.header, kept.order.tolist(), kept.starts.tolist(), kept.bytes)
    ]
    assert layout.bytes.tolist() == [entry.bytes for entry in entries[: len(chunks)]]


def test_a_layout_is_of_one_file_only_where_all_surely_fit() -> None:
    layout = ChunkLayout.of(["w"], [BY_NAME["U8"]], [Region((0,), (1000,))])
    assert layout.with_objects([object_entry("o", 5000)], 6000, {}) is None
    assert layout.with_objects([object_entry("o", 5000)], 60_000, {}) is not None
