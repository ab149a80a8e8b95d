"""Wrapper tensors: stored as their parts, cut only where no part is split, dequantised on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DeviceMesh, DTensor, Shard
from wrapped import BLOCK, Flattening, Opaque, RowScaled, put_together, take_apart

import giantstep as gs
from giantstep.errors import (
    BadArgumentError,
    CorruptionError,
    DisagreementError,
    DtypeMismatchError,
    KeyMismatchError,
    MismatchError,
    ShapeMismatchError,
    UnsupportedTypeError,
)
from giantstep.mapping import wrappers
from giantstep.mapping.wrappers import aligned_hull, part_of
from giantstep.shards.region import Region
from giantstep.testing.ranks import run_ranks, run_ranks_collecting

ROWS, WIDTH = 24, 6


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    # What other tests have registered comes back.
    monkeypatch.setattr(wrappers, "_BY_TYPE", {})
    monkeypatch.setattr(wrappers, "_BY_NAME", {})
    gs.register_wrapper(RowScaled, name="rows", take_apart=take_apart, put_together=put_together)


def values() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))


def empty(kind: type[RowScaled] = RowScaled, rows: int = ROWS) -> Any:
    return kind(torch.zeros(rows, WIDTH, dtype=torch.int8), torch.zeros(rows // BLOCK))


def same(a: RowScaled, b: RowScaled) -> bool:
    return torch.equal(a.data8, b.data8) and torch.equal(a.scale, b.scale)


def rows_of(tensor: RowScaled, start: int, count: int) -> RowScaled:
    return type(tensor)(
        tensor.data8[start : start + count], tensor.scale[start // BLOCK : start // BLOCK + max(1, count // BLOCK)]
    )


def sharded(tensor: RowScaled, start: int, count: int) -> gs.ShardedTensor:
    part = rows_of(tensor, start, count)
    return gs.ShardedTensor("w", part, torch.float32, (count, WIDTH), (ROWS, WIDTH), (start, 0), None)


@pytest.mark.parametrize("kind", [RowScaled, Flattening])
def test_a_wrapper_is_stored_as_its_parts_and_filled_in_place(tmp_path: Path, kind: type[RowScaled]) -> None:
    saved = kind.quantised(values())
    gs.save({"m": {"w": saved, "b": torch.ones(2)}}, tmp_path)
    assert gs.open_checkpoint(tmp_path).keys() == ["m.b", "m.w.data8", "m.w.scale"]
    target = empty(kind)
    data, scale = target.data8, target.scale
    loaded = gs.load({"m": {"w": target, "b": torch.zeros(2)}}, tmp_path)
    assert loaded["m"]["w"] is target
    assert same(target, saved)
    assert (target.data8 is data, target.scale is scale) == (True, True)
    assert loaded.report.missing == ()


@pytest.mark.parametrize("kind", [RowScaled, Flattening])
def test_a_wrapper_without_memory_is_put_together_of_new_parts(tmp_path: Path, kind: type[RowScaled]) -> None:
    saved = kind.quantised(values())
    gs.save({"w": saved}, tmp_path)
    meta: Any = kind(torch.empty(ROWS, WIDTH, dtype=torch.int8, device="meta"), torch.empty(ROWS // BLOCK, device="meta"))
    loaded = gs.load({"w": meta}, tmp_path)["w"]
    assert type(loaded) is (kind if kind is Flattening else RowScaled)
    assert loaded.scale.dim() == 1
    assert same(loaded, saved)


@pytest.mark.parametrize(("saving", "loading"), [(1, 3), (2, 3), (3, 2), (6, 1)])
def test_wrappers_reshard_between_blocks(tmp_path: Path, saving: int, loading: int) -> None:
    whole = RowScaled.quantised(values())
    size = ROWS // saving

    def save(group: Any) -> None:
        gs.save({"w": sharded(whole, group.rank * size, size)}, tmp_path, process_group=group)

    def load(group: Any) -> None:
        count = ROWS // loading
        wanted = sharded(empty(), group.rank * count, count)
        loaded = gs.load({"w": wanted}, tmp_path, process_group=group)["w"]
        assert loaded is wanted.data
        assert same(loaded, rows_of(whole, group.rank * count, count))

    run_ranks(saving, save)
    run_ranks(loading, load)


def test_a_cut_inside_a_scale_block_or_a_packed_byte_is_refused(tmp_path: Path) -> None:
    whole = RowScaled.quantised(values())
    part = RowScaled(whole.data8[:6], whole.scale[:2])
    inside = gs.ShardedTensor("w", part, torch.float32, (6, WIDTH), (ROWS, WIDTH), (0, 0), None)
    gs.save({"w": inside.__class__("w", whole, torch.float32, (ROWS, WIDTH), (ROWS, WIDTH), (0, 0), None)}, tmp_path)
    odd = gs.ShardedTensor("w", part, torch.float32, (6, WIDTH), (ROWS, WIDTH), (2, 0), None)
    with pytest.raises(BadArgumentError, match=r"part 'scale' of tensor 'w': position 2 .* lies inside an element"):
        gs.save({"w": odd}, tmp_path)

    class Packed(RowScaled):
        """Two columns per byte: half as many columns as it shows."""

        @staticmethod
        def __new__(cls, data8: torch.Tensor, scale: torch.Tensor) -> Any:
            shape = (data8.shape[0], data8.shape[1] * 2)
            self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)  # type: ignore[attr-defined]
            self.data8, self.scale = data8, scale
            return self

    gs.register_wrapper(
        Packed, name="packed", take_apart=lambda t: ({"data8": t.data8}, {}), put_together=lambda p, a: p["data8"]
    )
    packed: Any = Packed(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(1))
    gs.save({"p": gs.ShardedTensor("p", packed, torch.float32, (2, 6), (2, 6), (0, 0), None)}, tmp_path)
    with pytest.raises(BadArgumentError, match="Cut between packed values"):
        gs.save({"p": gs.ShardedTensor("p", packed, torch.float32, (2, 6), (2, 12), (0, 3), None)}, tmp_path)


def test_prepended_axes_and_replicas_of_wrappers(tmp_path: Path) -> None:
    layers = [RowScaled.quantised(values() * (n + 1)) for n in range(2)]

    def layer(group: Any, data: Any) -> gs.ShardedTensor:
        return gs.ShardedTensor.from_rank_offsets(
            "w", data, (0, group.rank // 2, 2), prepend_axis_num=1, replica_id=group.rank % 2
        )

    run_ranks(4, lambda group: gs.save({"w": layer(group, layers[group.rank // 2])}, tmp_path, process_group=group))
    assert gs.open_checkpoint(tmp_path)["w.scale"].shape == (2, ROWS // BLOCK, 1)
    run_ranks(4, lambda group: gs.load({"w": layer(group, empty())}, tmp_path, process_group=group))
    target = empty()
    gs.load({"w": gs.ShardedTensor.from_rank_offsets("w", target, (0, 1, 2), prepend_axis_num=1)}, tmp_path)
    assert same(target, layers[1])


@pytest.mark.parametrize("ranks", [1, 3, 4, 5])
def test_a_quantised_tensor_is_dequantised_on_load_if_asked(tmp_path: Path, ranks: int) -> None:
    """Any cut is possible then, since the parts around it are read."""
    whole = RowScaled.quantised(values())
    run_ranks(2, lambda group: gs.save({"w": sharded(whole, group.rank * 12, 12)}, tmp_path, process_group=group))
    plain = whole.dequantize()
    with pytest.raises(KeyMismatchError, match=r"w \(stored as a wrapper tensor; LoadOptions\(dequantise=True\)"):
        gs.load({"w": torch.zeros(ROWS, WIDTH)}, tmp_path)

    def load(group: Any) -> Any:
        start, stop = group.rank * ROWS // ranks, (group.rank + 1) * ROWS // ranks
        target = torch.zeros(stop - start, WIDTH, dtype=torch.bfloat16)
        wanted = gs.ShardedTensor("w", target, target.dtype, (stop - start, WIDTH), (ROWS, WIDTH), (start, 0), None)
        options = gs.LoadOptions(dequantise=True, cast="floating")
        loaded = gs.load({"w": wanted}, tmp_path, process_group=group, options=options)
        assert loaded["w"] is target
        assert torch.equal(target, plain[start:stop].bfloat16())
        return loaded.report

    for report in run_ranks(ranks, load):
        assert (report.dequantised, report.missing, report.unexpected, report.tensors) == (("w",), (), (), 1)


def test_dequantising_on_load_in_every_way_that_cannot_be(tmp_path: Path) -> None:
    gs.save({"w": RowScaled.quantised(values()), "f": Flattening.quantised(values())}, tmp_path)
    options = gs.LoadOptions(dequantise=True)
    lenient = gs.StrictHandling.RAISE_UNEXPECTED
    with pytest.raises(ShapeMismatchError, match=r"w: stored \(24, 6\), requested \(24, 7\)"):
        gs.load({"w": torch.zeros(ROWS, 7)}, tmp_path, options=options, strict=lenient)
    with pytest.raises(DtypeMismatchError, match="w: stored quantised float32, requested int8"):
        gs.load({"w": torch.zeros(ROWS, WIDTH, dtype=torch.int8)}, tmp_path, options=options, strict=lenient)
    with pytest.raises(UnsupportedTypeError, match="'Flattening', which is not registered here"):
        gs.load({"f": torch.zeros(ROWS, WIDTH)}, tmp_path, options=options, strict=lenient)
    gs.register_wrapper(Flattening, name="Flattening", take_apart=take_apart, put_together=put_together)
    with pytest.raises(UnsupportedTypeError, match="'Flattening', which was not registered when it was saved"):
        gs.load({"f": torch.zeros(ROWS, WIDTH)}, tmp_path, options=options, strict=lenient)
    wrappers._BY_NAME.clear()
    with pytest.raises(UnsupportedTypeError, match="'rows', which is not registered here"):
        gs.load({"w": torch.zeros(ROWS, WIDTH)}, tmp_path, options=options, strict=lenient)


def test_a_wrapper_that_nothing_explains_is_refused_at_save(tmp_path: Path) -> None:
    with pytest.raises(
        BadArgumentError, match=r"tensor 'a\.w' is a wrapped\.Opaque, which has no memory of its own.*register_wrapper"
    ):
        gs.save({"a": {"w": Opaque.quantised(values())}}, tmp_path)


def test_parts_that_do_not_follow_the_dimensions_are_refused(tmp_path: Path) -> None:
    class Crooked(RowScaled):
        pass

    gs.register_wrapper(
        Crooked, name="crooked", take_apart=lambda t: ({"data8": t.data8.view(2, 3, -1)}, {}), put_together=put_together
    )
    with pytest.raises(BadArgumentError, match=r"part 'data8' of tensor 'w' has shape .* does not follow the 2 dimensions"):
        gs.save({"w": Crooked.quantised(values())}, tmp_path)


def test_registering_twice_and_registering_what_is_no_wrapper() -> None:
    gs.register_wrapper(RowScaled, name="rows", take_apart=take_apart, put_together=put_together)
    for kind, name in ((RowScaled, "other"), (Opaque, "rows"), (torch.Tensor, "x"), (int, "x"), (Opaque, "")):
        with pytest.raises(BadArgumentError):
            gs.register_wrapper(kind, name=name, take_apart=take_apart, put_together=put_together)  # type: ignore[arg-type]


def test_a_hull_cuts_no_element_of_any_part() -> None:
    parts = {"data": (24, 6), "scale": (6, 1), "packed": (24, 3)}
    assert aligned_hull(Region((3, 1), (2, 1)), (24, 6), parts) == Region((0, 0), (8, 6))
    rows = Region((4, 0), (4, 6))
    assert aligned_hull(rows, (24, 6), {"data": (24, 6), "scale": (6, 1)}) == rows
    assert aligned_hull(Region((0,), (0,)), (0,), {"data": (0,)}) == Region((0,), (0,))
    # One scale for a whole axis serves any range of it; eight bits of a byte do not.
    narrow = Region((3, 1), (2, 1))
    assert aligned_hull(narrow, (24, 16), {"data": (24, 16), "scale": (1, 1)}) == narrow
    assert part_of(narrow, (24, 16), (1, 1)) == Region((0, 0), (1, 1))
    assert aligned_hull(narrow, (24, 8), {"bits": (24, 1)}) == Region((3, 0), (2, 8))


def test_modules_with_quantised_weights_save_and_load_as_modules(tmp_path: Path) -> None:
    model, other = torch.nn.Module(), torch.nn.Module()
    model.w = torch.nn.Parameter(Flattening.quantised(values()), requires_grad=False)
    other.w = torch.nn.Parameter(empty(Flattening), requires_grad=False)
    gs.save({"m": model.state_dict()}, tmp_path)
    gs.load({"m": other.state_dict()}, tmp_path)
    assert same(other.w, model.w)  # type: ignore[arg-type]


def test_distributed_tensors_of_wrappers(tmp_path: Path) -> None:
    """In a process of its own that is one rank of a mesh: what FSDP2 makes of quantised parameters."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])

        def distributed(tensor: RowScaled) -> DTensor:
            return DTensor.from_local(
                tensor, mesh, [Shard(0)], run_check=False, shape=torch.Size((ROWS, WIDTH)), stride=(WIDTH, 1)
            )

        saved, target = RowScaled.quantised(values()), empty()
        gs.save({"w": distributed(saved)}, tmp_path)
        assert gs.open_checkpoint(tmp_path).keys() == ["w.data8", "w.scale"]
        wanted = distributed(target)
        assert gs.load({"w": wanted}, tmp_path)["w"] is wanted
        assert same(target, saved)
        plain = torch.zeros(ROWS, WIDTH)
        gs.load({"w": plain}, tmp_path, options=gs.LoadOptions(dequantise=True))
        assert torch.equal(plain, saved.dequantize())
    finally:
        torch.distributed.destroy_process_group()


def test_a_wrapper_inside_a_wrapper_is_saved_and_loaded_but_not_dequantised(tmp_path: Path) -> None:
    class Outer(RowScaled):
        pass

    def outer(inner: RowScaled) -> Any:
        tensor = torch.Tensor._make_wrapper_subclass(Outer, inner.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        tensor.inner = inner
        return tensor

    gs.register_wrapper(
        Outer, name="outer", take_apart=lambda t: ({"inner": t.inner}, {}), put_together=lambda p, _: outer(p["inner"])
    )
    saved, target = outer(RowScaled.quantised(values())), outer(empty())
    gs.save({"w": saved}, tmp_path)
    assert gs.open_checkpoint(tmp_path).keys() == ["w.inner.data8", "w.inner.scale"]
    assert gs.load({"w": target}, tmp_path)["w"] is target
    assert same(target.inner, saved.inner)
    with pytest.raises(UnsupportedTypeError, match="whose part 'inner' is a wrapper too"):
        gs.load({"w": torch.zeros(ROWS, WIDTH)}, tmp_path, options=gs.LoadOptions(dequantise=True))


class Scaled(RowScaled):
    """`data8 * factor`, the factor an attribute."""

    factor: float


def scaled(data: torch.Tensor, factor: float) -> Any:
    tensor: Any = torch.Tensor._make_wrapper_subclass(Scaled, data.shape, dtype=torch.float32)  # type: ignore[attr-defined]
    tensor.data8, tensor.factor = data, factor
    return tensor


def register_scaled() -> None:
    gs.register_wrapper(
        Scaled,
        name="scaled",
        take_apart=lambda tensor: ({"data8": tensor.data8}, {"factor": tensor.factor}),
        put_together=lambda parts, attributes: scaled(parts["data8"], attributes["factor"]),
        dequantise=lambda tensor: tensor.data8.float() * tensor.factor,
    )


def test_a_wrapper_is_not_loaded_into_one_that_is_put_together_otherwise(tmp_path: Path) -> None:
    register_scaled()
    ones = torch.ones(4, 16, dtype=torch.int8)
    gs.save({"w": scaled(ones, 0.5), "other": torch.ones(2)}, tmp_path)
    for target in (scaled(torch.zeros_like(ones), 8.0), RowScaled(torch.zeros_like(ones), torch.zeros(1))):
        before = torch.zeros(2)
        with pytest.raises(MismatchError, match="wrapper tensor is stored with another kind"):
            gs.load({"w": target, "other": before}, tmp_path, strict=gs.StrictHandling.IGNORE_ALL)
        assert not target.data8.any()
        assert not before.any()
    same_kind = scaled(torch.zeros_like(ones), 0.5)
    assert gs.load({"w": same_kind, "other": torch.zeros(2)}, tmp_path)["w"] is same_kind
    assert same_kind.data8.all()


def test_shards_with_different_attributes_are_refused_whatever_the_policy(tmp_path: Path) -> None:
    register_scaled()
    ones = torch.ones(2, 16, dtype=torch.int8)

    def shard(place: int, factor: float) -> gs.ShardedTensor:
        return gs.ShardedTensor.from_rank_offsets("w", scaled(ones.clone(), factor), (0, place, 2))

    with pytest.raises(BadArgumentError, match="different attributes in different shards"):
        gs.save({"a": shard(0, 0.5), "b": shard(1, 2.0)}, tmp_path)

    def save(group: Any) -> None:
        gs.save({"w": shard(group.rank, 0.5 + group.rank)}, tmp_path, process_group=group)

    _, errors = run_ranks_collecting(2, save)
    assert {type(error) for error in errors} == {DisagreementError}
    assert "'w/wrapper' differs from rank 0's at 'attributes.factor' (rank 1)" in str(errors[1])

    def mixed(group: Any) -> None:
        plain = torch.ones(2, 16)
        gs.save({"w": plain if group.rank else scaled(ones.clone(), 0.5)}, tmp_path, process_group=group)

    _, errors = run_ranks_collecting(2, mixed)
    assert {type(error) for error in errors} == {DisagreementError}
    assert "'w' is a wrapper tensor, stored as its parts, and also a plain tensor" in str(errors[0])


def test_a_class_that_is_taken_apart_into_copies_is_put_together_again(tmp_path: Path) -> None:
    class Copying(RowScaled):
        pass

    def copies(tensor: Copying) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"data8": tensor.data8.clone(), "scale": tensor.scale.clone().view(-1, 1)}, {}

    def together(parts: Any, _: Any) -> Any:
        return Copying(parts["data8"], parts["scale"].reshape(-1))

    gs.register_wrapper(Copying, name="copying", take_apart=copies, put_together=together)
    saved = Copying.quantised(values())
    gs.save({"w": saved}, tmp_path)
    loaded = gs.load({"w": empty(Copying)}, tmp_path)["w"]
    assert type(loaded) is Copying
    assert same(loaded, saved)


def test_empty_shards_of_wrappers(tmp_path: Path) -> None:
    whole = RowScaled.quantised(values())

    def shard(tensor: Any, rank: int) -> gs.ShardedTensor:
        part = rows_of(tensor, 0, ROWS) if rank == 0 else RowScaled(tensor.data8[:0], tensor.scale[:0])
        start = 0 if rank == 0 else ROWS
        return gs.ShardedTensor("w", part, torch.float32, tuple(part.shape), (ROWS, WIDTH), (start, 0), None)

    run_ranks(2, lambda group: gs.save({"w": shard(whole, group.rank)}, tmp_path, process_group=group))
    target = empty()
    run_ranks(2, lambda group: gs.load({"w": shard(target, group.rank)}, tmp_path, process_group=group))
    assert same(target, whole)


def test_wrappers_of_torchs_protocol_move_between_whole_and_cut(tmp_path: Path) -> None:
    rows = 2 * BLOCK
    saved = Flattening(torch.ones(rows, WIDTH, dtype=torch.int8), torch.arange(float(rows)))
    gs.save({"w": saved}, tmp_path)
    target: Any = Flattening(torch.zeros(4, WIDTH, dtype=torch.int8), torch.zeros(4))
    gs.load({"w": gs.ShardedTensor("w", target, torch.float32, (4, WIDTH), (rows, WIDTH), (4, 0), None)}, tmp_path)
    assert target.scale.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(("rows", "width"), [(4096, 1024), (4, 1 << 20)])
def test_dequantising_is_bounded_in_memory_and_counted(tmp_path: Path, rows: int, width: int) -> None:
    register_scaled()
    read = largest = 0
    gs.save({"w": scaled(torch.ones(rows, width, dtype=torch.int8), 0.5)}, tmp_path)
    wrappers._BY_NAME.clear()
    wrappers._BY_TYPE.clear()

    def together(parts: Any, attributes: dict[str, Any]) -> Any:
        nonlocal largest, read
        largest, read = max(largest, parts["data8"].numel()), read + parts["data8"].numel()
        return scaled(parts["data8"], attributes["factor"])

    gs.register_wrapper(
        Scaled,
        name="scaled",
        take_apart=lambda _: ({}, {}),
        put_together=together,
        dequantise=lambda t: t.data8.float() * t.factor,
    )
    target = torch.zeros(rows, width)
    report = gs.load({"w": target}, tmp_path, options=gs.LoadOptions(dequantise=True)).report
    assert bool((target == 0.5).all())
    assert (largest, read) == (1 << 20, rows * width)
    assert (report.bytes_read, report.bytes_filled) == (rows * width, rows * width * 4)


def test_verifying_before_covers_what_is_dequantised(tmp_path: Path) -> None:
    # So large that a block in its middle holds nothing else.
    large = RowScaled(torch.ones(8192, 64, dtype=torch.int8), torch.ones(8192 // BLOCK))
    gs.save({"a": torch.ones(5), "w": large}, tmp_path)
    checkpoint = gs.open_checkpoint(tmp_path)
    (chunk,) = checkpoint.info("w.data8").chunks
    damaged = tmp_path / chunk.file
    data = bytearray(damaged.read_bytes())
    data[chunk.start + chunk.bytes // 2] ^= 1
    damaged.write_bytes(data)
    target = torch.zeros(5)
    options = gs.LoadOptions(dequantise=True, verify="before")
    with pytest.raises(CorruptionError, match=r"w\.data8"):
        gs.load({"a": target, "w": torch.zeros(8192, 64)}, tmp_path, options=options)
    assert not target.any()


def test_dequantised_tensors_share_no_memory_and_respect_casting_and_filters(tmp_path: Path) -> None:
    gs.save({"v": torch.ones(ROWS, WIDTH), "w": RowScaled.quantised(values())}, tmp_path)
    target = torch.zeros(ROWS, WIDTH)
    options = gs.LoadOptions(dequantise=True)
    with pytest.raises(BadArgumentError, match="share memory, or may, and one of them is to be dequantised"):
        gs.load({"v": target, "w": target}, tmp_path, options=options)
    assert not target.any()
    with pytest.raises(DtypeMismatchError, match="w: stored quantised float32, requested bfloat16"):
        gs.load({"v": target, "w": torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16)}, tmp_path, options=options)
    left_out = gs.LoadOptions(dequantise=True, rename={"w": None})
    report = gs.load({"v": target, "w": torch.zeros(ROWS, WIDTH)}, tmp_path, options=left_out).report
    assert (report.skipped, report.missing) == (("w",), ())
