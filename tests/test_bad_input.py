"""Bad input gets its own clear error, on all ranks, with nothing lost or half filled."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import giantstep as gs
from giantstep.errors import (
    CoverageError,
    DisagreementError,
    DtypeMismatchError,
    KeyMismatchError,
    NotACheckpointError,
    ShapeMismatchError,
    UnsupportedTypeError,
)
from giantstep.format.digests import anchor_digest
from giantstep.storage.local import LocalStore
from giantstep.testing.ranks import run_ranks, run_ranks_collecting

Error = type[gs.GiantstepError]


def all_raise(size: int, function: Callable[[Any], object], error: Error) -> str:
    """All ranks raise this very class with the same message, which is returned."""
    _, errors = run_ranks_collecting(size, function)
    assert {type(found) for found in errors} == {error}, errors
    (message,) = {str(found) for found in errors}
    return message


def save_rows(path: Any, ranks: int = 2) -> None:
    def rank(group: Any) -> None:
        data = torch.arange(8.0).reshape(2, 4) + 8 * group.rank
        gs.save(
            {"w": gs.ShardedTensor.from_rank_offsets("w", data, (0, group.rank, ranks)), "step": 1}, path, process_group=group
        )

    run_ranks(ranks, rank)


# Paths.


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(gs.errors.CheckpointNotFoundError, match="does not exist"):
        gs.open_checkpoint(tmp_path / "no")
    message = all_raise(3, lambda g: gs.load({}, tmp_path / "no", process_group=g), gs.errors.CheckpointNotFoundError)
    assert "phase open" in message
    assert not (tmp_path / "no").exists()


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(NotACheckpointError):
            gs.open_checkpoint(path)
    all_raise(2, lambda g: gs.load({}, tmp_path, process_group=g), NotACheckpointError)


def test_a_checkpoint_that_is_only_half_written(tmp_path: Path) -> None:
    save_rows(tmp_path)
    (tmp_path / "checkpoint.json").unlink()
    with pytest.raises(gs.errors.IncompleteError, match="never committed"):
        gs.open_checkpoint(tmp_path)
    target = torch.zeros(4, 4)
    all_raise(2, lambda g: gs.load({"w": target}, tmp_path, process_group=g), gs.errors.IncompleteError)
    assert not target.any()


def rewrite_record(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """An intact record that says something else."""
    fields = json.loads(path.read_bytes())
    del fields["digest"]
    change(fields)
    signed = json.dumps(fields, indent=2).encode().removesuffix(b"\n}") + b",\n"
    path.write_bytes(signed + b'  "digest": "' + anchor_digest(signed).encode() + b'"\n}\n')


def test_a_newer_major_version_is_refused_and_a_newer_minor_version_read(tmp_path: Path) -> None:
    save_rows(tmp_path)
    rewrite_record(tmp_path / "checkpoint.json", lambda fields: fields.update(format_version="1.7", surprise=[1]))
    assert gs.open_checkpoint(tmp_path).keys() == ["w"]
    rewrite_record(tmp_path / "checkpoint.json", lambda fields: fields.update(format_version="2.0", files="other"))
    with pytest.raises(gs.errors.VersionError, match=r"version 2\.0; this library reads 1\.x"):
        gs.open_checkpoint(tmp_path)
    all_raise(2, lambda g: gs.load({"w": torch.zeros(4, 4)}, tmp_path, process_group=g), gs.errors.VersionError)


@pytest.mark.parametrize(
    "change",
    [
        {"save_id": "../../etc"},
        {"files": [{"name": "../secret", "bytes": 1, "rank": 0}]},
        {"files": [{"name": "/etc/passwd", "bytes": 1, "rank": 0}]},
        {"files": "x"},
        {"block_bytes": 0},
        {"block_bytes": -4096},
        {"block_bytes": 1 << 61},
        {"world_size": True},
        {"index": {"name": "../x", "bytes": 1, "head_bytes": 1, "head_digest": ""}},
        {"totals": None},
        {"format_version": 1},
        {"format": "other"},
    ],
)
def test_a_record_that_states_the_impossible_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    save_rows(tmp_path)
    rewrite_record(tmp_path / "checkpoint.json", lambda fields: fields.update(change))
    with pytest.raises(gs.errors.CorruptionError):
        gs.open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["", "s3://bucket/key", "memory://", "file://host/x", 3, None, b"bytes"])
def test_a_path_of_an_unknown_kind(path: Any) -> None:
    with pytest.raises(gs.errors.BadArgumentError):
        gs.save({"w": torch.zeros(1)}, path)
    with pytest.raises(gs.errors.BadArgumentError):
        gs.open_checkpoint(path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = all_raise(2, lambda g: gs.save({"w": torch.zeros(1)}, tmp_path / "file", process_group=g), gs.errors.StoreError)
    assert "phase plan" in message
    assert (tmp_path / "file").read_text() == "in the way"


# Keys.


def test_a_key_that_is_not_there_with_the_nearest_one(tmp_path: Path) -> None:
    gs.save({"model": {"layers.0.weight": torch.ones(2)}}, tmp_path)
    with pytest.raises(KeyMismatchError, match=r"no tensor 'model\.layer\.0\.weight'.*Nearest: 'model\.layers\.0\.weight'"):
        gs.open_checkpoint(tmp_path)["model.layer.0.weight"]
    target = torch.zeros(2)
    wanted = {"model": {"layer.0.weight": target}}
    with pytest.raises(KeyMismatchError, match=r"nearest stored: model\.layers\.0\.weight") as caught:
        gs.load(wanted, tmp_path)
    assert "1 key is in the checkpoint but requested by no rank" in str(caught.value)
    assert not target.any()
    loaded = gs.load(wanted, tmp_path, strict=gs.StrictHandling.IGNORE_ALL)
    assert loaded.report.unexpected == ("model.layer.0.weight",)
    assert loaded.report.missing == ("model.layers.0.weight",)
    assert loaded["model"]["layer.0.weight"] is target
    assert not target.any()


def test_missing_keys_are_missing_only_if_no_rank_requests_them(tmp_path: Path) -> None:
    gs.save({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path)

    def rank(group: Any) -> None:
        gs.load({"ab"[group.rank]: torch.zeros(1)}, tmp_path, process_group=group)

    run_ranks(2, rank)
    message = all_raise(2, lambda g: gs.load({"a": torch.zeros(1)}, tmp_path, process_group=g), KeyMismatchError)
    assert "    b" in message
    partial = gs.StrictHandling.RAISE_UNEXPECTED
    assert gs.load({"a": torch.zeros(1)}, tmp_path, strict=partial).report.missing == ("b",)


def test_one_readable_report_for_ten_thousand_mismatches(tmp_path: Path) -> None:
    gs.save({f"old.{n}": torch.zeros(1) for n in range(10_000)}, tmp_path)
    with pytest.raises(KeyMismatchError) as caught:
        gs.load({f"new.{n}": torch.zeros(1) for n in range(10_000)}, tmp_path)
    assert len(str(caught.value).splitlines()) < 50
    assert "10000 keys are requested but not in the checkpoint" in str(caught.value)


@pytest.mark.parametrize(
    "state",
    [
        None,
        [torch.zeros(1)],
        {"": torch.zeros(1)},
        {"\ud800": torch.zeros(1)},
        {"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}},
        {1: torch.zeros(1), "1": torch.zeros(1)},
        {"s": torch.zeros(3).to_sparse()},
        {"m": torch.zeros(3, device="meta")},
        {"q": torch.zeros(2, dtype=torch.complex64, device="meta")},
    ],
)
def test_state_dicts_that_cannot_be_saved(tmp_path: Path, state: Any) -> None:
    with pytest.raises(gs.errors.BadArgumentError):
        gs.save(state, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_state_dict_that_contains_itself(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.zeros(1)}
    state["self"] = state
    with pytest.raises(gs.errors.BadArgumentError, match="contains itself"):
        gs.save(state, tmp_path / "c")


def test_an_object_of_unknown_type_fails_at_save_with_path_and_remedy(tmp_path: Path) -> None:
    class Scheduler:
        pass

    def rank(group: Any) -> None:
        gs.save({"w": torch.zeros(1), "train": {"sched": [1, Scheduler()]}}, tmp_path / "c", process_group=group)

    message = all_raise(2, rank, UnsupportedTypeError)
    assert "'train.sched.1' has type" in message
    assert "state_dict()" in message
    assert not (tmp_path / "c").exists()


def test_content_metadata_that_json_would_change(tmp_path: Path) -> None:
    for metadata in ({"a": (1, 2)}, {1: 2}, float("nan"), object()):
        with pytest.raises(gs.errors.BadArgumentError, match="content_metadata"):
            gs.save({"w": torch.zeros(1)}, tmp_path / "c", content_metadata=metadata)
    gs.save({"w": torch.zeros(1)}, tmp_path / "c", content_metadata={"tokens": 5, "names": ["é"]})
    assert gs.open_checkpoint(tmp_path / "c").content_metadata == {"tokens": 5, "names": ["é"]}


# Shapes, dtypes, layouts.


def test_shape_and_dtype_mismatches_are_reported_together_before_anything_is_touched(tmp_path: Path) -> None:
    gs.save({"a": torch.ones(2, 3), "b": torch.ones(2), "c": torch.ones(2)}, tmp_path)
    target = {"a": torch.zeros(3, 2), "b": torch.zeros(2, dtype=torch.float64), "c": torch.zeros(2)}
    with pytest.raises(ShapeMismatchError) as caught:
        gs.load(target, tmp_path)
    assert "a: stored (2, 3), requested (3, 2)" in str(caught.value)
    assert "b: stored float32, requested float64" in str(caught.value)
    assert not any(tensor.any() for tensor in target.values())
    del target["a"]
    with pytest.raises(DtypeMismatchError, match="cast='floating'"):
        gs.load(target, tmp_path, strict=gs.StrictHandling.RAISE_UNEXPECTED)


@pytest.mark.parametrize(
    ("stored", "wanted", "cast", "allowed"),
    [
        (torch.float32, torch.bfloat16, "floating", True),
        (torch.bfloat16, torch.float64, "floating", True),
        (torch.float32, torch.float8_e4m3fn, "floating", True),
        (torch.float32, torch.int32, "floating", False),
        (torch.float32, torch.int32, "any", True),
        (torch.int32, torch.float32, "any", True),
        (torch.float32, torch.complex64, "any", True),
        (torch.complex64, torch.float32, "any", False),
        (torch.float32, torch.float64, "never", False),
    ],
)
def test_casting_on_load_is_as_copy_and_only_as_allowed(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, cast: Any, allowed: bool
) -> None:
    value = torch.arange(12).reshape(3, 4).to(stored)
    gs.save({"w": value}, tmp_path)
    target = torch.empty(4, 3, dtype=wanted).t()
    if not allowed:
        with pytest.raises(DtypeMismatchError):
            gs.load({"w": target}, tmp_path, options=gs.LoadOptions(cast=cast))
        return
    report = gs.load({"w": target}, tmp_path, options=gs.LoadOptions(cast=cast)).report
    expected = torch.empty(3, 4, dtype=wanted).copy_(value)
    assert torch.equal(target.to(torch.complex64), expected.to(torch.complex64))
    assert report.cast == (f"w: {str(stored)[6:]} -> {str(wanted)[6:]}",)


@pytest.mark.parametrize(
    "arguments",
    [
        {"key": 3},
        {"local_shape": (3, 4)},
        {"global_offset": (0,)},
        {"global_offset": (-1, 0)},
        {"global_offset": (3, 0)},
        {"global_shape": (1, 4)},
        {"axis_fragmentations": (3, 1)},
        {"axis_fragmentations": (2,)},
        {"replica_id": -1},
        {"replica_id": (0, "a")},
        {"prepend_axis_num": 1},
        {"dtype": torch.float64},
        {"data": [1, 2]},
        {"flattened_range": slice(0, 9)},
        {"dtype": torch.quint8},
        {"global_offset": (2.9, 0)},
        {"local_shape": (2.0, 4)},
    ],
)
def test_a_sharded_tensor_that_cannot_be(arguments: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "key": "w",
        "data": torch.zeros(2, 4),
        "dtype": torch.float32,
        "local_shape": (2, 4),
        "global_shape": (4, 4),
        "global_offset": (2, 0),
        "axis_fragmentations": (2, 1),
    }
    gs.ShardedTensor(**good)
    with pytest.raises(gs.errors.BadArgumentError):
        gs.ShardedTensor(**{**good, **arguments})


@pytest.mark.parametrize("offsets", [[(2, 0, 2)], [(0, 2, 2)], [(0, -1, 2)], [(0, 0, 2), (0, 1, 2)], [(-1, 0, 1)]])
def test_rank_offsets_that_cannot_be(offsets: list[tuple[int, int, int]]) -> None:
    with pytest.raises(gs.errors.BadArgumentError):
        gs.ShardedTensor.from_rank_offsets("w", torch.zeros(2, 4), *offsets)


def shards(group: Any, *regions: tuple[int, int], replica_ids: tuple[int, ...] = (0, 0, 0, 0)) -> gs.ShardedTensor:
    """Rows [start, stop) of a (10, 2) tensor, one pair per rank."""
    start, stop = regions[group.rank]
    data = torch.zeros(stop - start, 2)
    return gs.ShardedTensor("w", data, data.dtype, (stop - start, 2), (10, 2), (start, 0), None, replica_ids[group.rank])


def test_a_gap_is_named_with_its_region_on_all_ranks(tmp_path: Path) -> None:
    def rank(group: Any) -> None:
        gs.save({"w": shards(group, (0, 3), (5, 10))}, tmp_path / "c", process_group=group)

    message = all_raise(2, rank, CoverageError)
    assert "'w'" in message
    assert "[3:5,0:2]" in message
    assert "4 elements" in message
    assert not (tmp_path / "c").exists()


def test_an_overlap_is_named_with_regions_and_ranks(tmp_path: Path) -> None:
    def rank(group: Any) -> None:
        gs.save({"w": shards(group, (0, 6), (5, 10))}, tmp_path / "c", process_group=group)

    message = all_raise(2, rank, CoverageError)
    assert "[0:6,0:2] of rank 0 and [5:10,0:2] of rank 1 overlap" in message


def test_two_main_replicas_and_none_are_told_apart(tmp_path: Path) -> None:
    def two(group: Any) -> None:
        gs.save({"w": shards(group, (0, 10), (0, 10), (0, 10))}, tmp_path / "c", process_group=group)

    assert "3 main replicas, on rank 0, 1, 2" in all_raise(3, two, CoverageError)

    def none(group: Any) -> None:
        state = {"w": shards(group, (0, 5), (5, 10), replica_ids=(0, 1))}
        gs.save(state, tmp_path / "c", process_group=group)

    assert "Rank 1 holds part of it, but with a replica_id other than 0" in all_raise(2, none, CoverageError)


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 1)])
def test_one_key_with_two_meanings(tmp_path: Path, other: torch.Tensor) -> None:
    def rank(group: Any) -> None:
        gs.save({"layer": {"w": torch.zeros(2) if group.rank < 2 else other}}, tmp_path / "c", process_group=group)

    message = all_raise(3, rank, DisagreementError)
    assert "'layer.w' is F32 (2,) on rank 0 but" in message
    assert "on rank 2" in message
    assert not (tmp_path / "c").exists()


def test_a_plain_tensor_that_differs_between_ranks_says_wrap_it(tmp_path: Path) -> None:
    def rank(group: Any) -> None:
        gs.save({"w": torch.full((4,), float(group.rank == 2))}, tmp_path / "c", process_group=group)

    message = all_raise(4, rank, DisagreementError)
    assert "rank 0 and rank 2 hold different values" in message
    assert "wrap them in ShardedTensor" in message


def test_an_earlier_checkpoint_survives_every_refused_save(tmp_path: Path) -> None:
    save_rows(tmp_path)
    before = sorted((tmp_path / "data").iterdir())

    def gap(group: Any) -> None:
        gs.save({"w": shards(group, (0, 3), (5, 10))}, tmp_path, process_group=group)

    all_raise(2, gap, CoverageError)
    assert sorted((tmp_path / "data").iterdir()) == before
    assert gs.open_checkpoint(tmp_path).verify().ok


def test_ranks_that_save_to_different_paths_or_with_different_options(tmp_path: Path) -> None:
    def paths(group: Any) -> None:
        gs.save({"w": torch.zeros(1)}, tmp_path / str(group.rank), process_group=group)

    assert "path is" in all_raise(2, paths, DisagreementError)

    def options(group: Any) -> None:
        chosen = gs.SaveOptions(block_bytes=4096 << group.rank)
        gs.save({"w": torch.zeros(1)}, tmp_path / "c", process_group=group, options=chosen)

    assert "options.block_bytes is 4096 on rank 0 and 8192 on rank 1" in all_raise(2, options, DisagreementError)
    assert list(tmp_path.iterdir()) == []


def test_common_state_that_differs_warns_by_default_and_raises_on_request(tmp_path: Path, caplog: Any) -> None:
    def rank(group: Any, how: Any) -> None:
        state = {"w": torch.zeros(1), "args": {"seed": group.rank, "lr": 0.1}, "rank3": 3 if group.rank == 3 else 0}
        gs.save(state, tmp_path, process_group=group, options=gs.SaveOptions(on_object_difference=how))

    run_ranks(4, lambda group: rank(group, "warn"))
    assert "'args.seed' (ranks 1, 2, 3), 'rank3' (rank 3)" in caplog.text
    assert gs.open_checkpoint(tmp_path).common == {"args": {"seed": 0, "lr": 0.1}, "rank3": 0}
    assert "'args.seed' (ranks 1, 2, 3)" in all_raise(4, lambda group: rank(group, "raise"), DisagreementError)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (gs.SaveOptions, {"timeout_secs": 0}),
        (gs.SaveOptions, {"timeout_secs": "5"}),
        (gs.SaveOptions, {"block_bytes": 1000}),
        (gs.SaveOptions, {"block_bytes": 8192, "buffer_bytes": 12288}),
        (gs.SaveOptions, {"writer_threads": 0}),
        (gs.SaveOptions, {"writer_threads": True}),
        (gs.SaveOptions, {"max_file_bytes": 10}),
        (gs.SaveOptions, {"direct_io": "yes"}),
        (gs.SaveOptions, {"on_object_difference": None}),
        (gs.LoadOptions, {"cast": "all"}),
        (gs.LoadOptions, {"verify": False}),
        (gs.LoadOptions, {"reader_threads": -1}),
        (gs.LoadOptions, {"buffer_bytes": 1}),
    ],
)
def test_options_that_cannot_be(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(gs.errors.BadArgumentError, match=next(iter(settings)).split("_")[0]):
        kind(**settings)


def test_strictness_and_groups_of_the_wrong_kind(tmp_path: Path) -> None:
    gs.save({"w": torch.zeros(1)}, tmp_path)
    with pytest.raises(gs.errors.BadArgumentError, match="strict must be a StrictHandling"):
        gs.load({"w": torch.zeros(1)}, tmp_path, strict="raise_all")  # type: ignore[arg-type]
    with pytest.raises(gs.errors.BadArgumentError, match="process_group must be"):
        gs.load({"w": torch.zeros(1)}, tmp_path, process_group=3)


def test_a_tensor_whose_elements_share_memory_cannot_be_loaded_into(tmp_path: Path) -> None:
    value = torch.ones(1, 3).expand(4, 3)
    gs.save({"w": value}, tmp_path)
    with pytest.raises(gs.errors.BadArgumentError, match="expanded"):
        gs.load({"w": torch.zeros(1, 3).expand(4, 3)}, tmp_path)
    assert torch.equal(gs.load({"w": torch.zeros(4, 3)}, tmp_path)["w"], value)


def test_the_order_of_keys_and_empty_containers_are_no_difference(tmp_path: Path) -> None:
    def rank(group: Any) -> None:
        state = {"a": 1, "b": [2, {}]} if group.rank else {"b": [2], "a": 1, "empty": {}}
        options = gs.SaveOptions(on_object_difference="raise")
        gs.save({"w": torch.zeros(1), **state}, tmp_path, process_group=group, options=options)

    run_ranks(2, rank)


def test_options_of_the_wrong_kind_are_told_to_all_ranks(tmp_path: Path) -> None:
    for call, wrong in ((gs.save, {"timeout_secs": 1}), (gs.save, gs.LoadOptions()), (gs.load, gs.SaveOptions())):

        def rank(group: Any, call: Any = call, wrong: Any = wrong) -> None:
            call({"w": torch.zeros(1)}, tmp_path / "c", process_group=group, options=wrong if group.rank else None)

        assert "options must be" in all_raise(2, rank, gs.errors.BadArgumentError)


def test_a_checkpoint_json_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text('{"mine": 1}')
    message = all_raise(2, lambda g: gs.save({"w": torch.zeros(1)}, tmp_path, process_group=g), NotACheckpointError)
    assert "has not written" in message
    assert (tmp_path / "checkpoint.json").read_text() == '{"mine": 1}'


def test_a_damaged_record_of_ours_can_be_saved_over(tmp_path: Path) -> None:
    save_rows(tmp_path)
    record = tmp_path / "checkpoint.json"
    for damage in (slice(0, 100), slice(200, None)):
        data = bytearray(record.read_bytes())
        data[damage] = b"#" * len(data[damage])
        record.write_bytes(data)
        save_rows(tmp_path)
        assert gs.open_checkpoint(tmp_path).verify().ok


def test_a_place_with_large_trees_below_is_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    seen: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (seen.append(str(path)), scandir(path))[1])
    with pytest.raises(NotACheckpointError):
        gs.open_checkpoint(tmp_path)
    assert seen == [str(tmp_path), str(tmp_path / "data")]


def test_superseded_files_behind_a_linked_folder_are_deleted_too(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "data").symlink_to(tmp_path / "elsewhere")
    for _ in range(3):
        save_rows(tmp_path / "c")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


def test_what_the_system_says_against_reading_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gs.save({"w": torch.zeros(3)}, tmp_path)
    checkpoint = gs.open_checkpoint(tmp_path)

    def refuse(_store: LocalStore, name: str, *, direct: bool = False) -> NoReturn:
        raise OSError(errno.ESTALE, "Stale file handle", name)

    monkeypatch.setattr(LocalStore, "open_read", refuse)
    with pytest.raises(gs.errors.StoreError, match="Stale file handle"):
        checkpoint["w"][...]


def test_a_link_in_a_circle_in_the_place_of_a_file_is_damage(tmp_path: Path) -> None:
    gs.save({"w": torch.zeros(3)}, tmp_path)
    (file,) = (tmp_path / "data").iterdir()
    checkpoint = gs.open_checkpoint(tmp_path)
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(gs.errors.CorruptionError, match="a link that leads in a circle"):
        checkpoint["w"][...]


def test_many_shards_of_one_key_are_matched_without_trying_all_pairs(tmp_path: Path) -> None:
    count = 3000
    layers = {
        n: gs.ShardedTensor.from_rank_offsets("experts", torch.full((4,), float(n)), (0, n, count), prepend_axis_num=1)
        for n in range(count)
    }
    gs.save(layers, tmp_path)
    wanted = {n: gs.ShardedTensor("experts", None, torch.float32, (4,), (count, 4), (n, 0), None, 0, 1) for n in range(count)}
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = gs.load(wanted, tmp_path)
    assert all(loaded[n].tolist() == [n] * 4 for n in range(count))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
