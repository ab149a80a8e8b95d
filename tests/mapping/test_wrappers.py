"""Wrapper tensors: stored as their parts, cut only where no part is split, dequantised on request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DeviceMesh, DTensor, Shard
from wrapped import BLOCK, Flattening, Opaque, RowScaled, put_together, take_apart

import giantstep as gs
from giantstep.errors import BadArgumentError, DtypeMismatchError, KeyMismatchError, ShapeMismatchError, UnsupportedTypeError
from giantstep.mapping import wrappers
from giantstep.mapping.wrappers import aligned_hull
from giantstep.testing.ranks import run_ranks

ROWS, WIDTH = 24, 6


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gs.register_wrapper(RowScaled, name="rows", take_apart=take_apart, put_together=put_together)
    yield
    wrappers._BY_TYPE.clear()
    wrappers._BY_NAME.clear()


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
        loaded = gs.load({"w": wanted}, tmp_path, process_group=group, options=gs.LoadOptions(dequantise=True))
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
    assert aligned_hull((3, 1), (2, 1), (24, 6), parts) == ((0, 0), (8, 6))
    assert aligned_hull((4, 0), (4, 6), (24, 6), {"data": (24, 6), "scale": (6, 1)}) == ((4, 0), (4, 6))
    assert aligned_hull((0,), (0,), (0,), {"data": (0,)}) == ((0,), (0,))


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
