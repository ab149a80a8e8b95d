"""One memory under several keys: stored once, restored tied; memory that overlaps otherwise is not filled wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import giantstep as gs
from giantstep import sharing
from giantstep.errors import BadArgumentError, MismatchError
from giantstep.mapping.overlap import disjoint, shares_elements
from giantstep.testing.ranks import run_ranks


class Tied(torch.nn.Module):
    def __init__(self, *, tie: bool = True, device: str = "cpu") -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8, device=device)
        self.head = torch.nn.Linear(8, 16, bias=False, device=device)
        if tie:
            self.head.weight = self.embed.weight


def stored_bytes(path: Path) -> int:
    return gs.open_checkpoint(path).record.totals.bytes


def test_tied_weights_are_stored_once_and_open_under_both_keys(tmp_path: Path) -> None:
    model = Tied()
    report = gs.save(model.state_dict(), tmp_path)
    assert report.bytes == report.bytes_written == stored_bytes(tmp_path) == 16 * 8 * 4
    checkpoint = gs.open_checkpoint(tmp_path)
    assert checkpoint.keys() == ["embed.weight", "head.weight"]
    for key in checkpoint:
        assert torch.equal(torch.from_numpy(checkpoint[key][...]), model.embed.weight)
    assert checkpoint.info("head.weight").chunks == checkpoint.info("embed.weight").chunks
    assert checkpoint.verify().ok


def test_tied_weights_load_into_tied_and_into_separate_ones(tmp_path: Path) -> None:
    model = Tied()
    gs.save({"m": model}, tmp_path)
    for tie in (True, False):
        other = Tied(tie=tie)
        report = gs.load({"m": other}, tmp_path).report
        assert torch.equal(other.embed.weight, model.embed.weight)
        assert torch.equal(other.head.weight, model.embed.weight)
        assert report.bytes_filled == 16 * 8 * 4 * (1 if tie else 2)
    alone = gs.load({"m": {"head.weight": torch.zeros(16, 8)}}, tmp_path, strict=gs.StrictHandling.RAISE_UNEXPECTED)
    assert torch.equal(alone["m"]["head.weight"], model.embed.weight)


def test_memory_that_load_allocates_is_tied_again(tmp_path: Path) -> None:
    gs.save({"m": Tied()}, tmp_path)
    loaded = gs.load({"m": Tied(device="meta").state_dict()}, tmp_path)["m"]
    assert loaded["embed.weight"] is loaded["head.weight"]
    module = Tied(device="meta")
    gs.load({"m": module}, tmp_path)
    assert module.head.weight is module.embed.weight
    untied = gs.load(gs.metadata.load_tensors_metadata(tmp_path), tmp_path)
    assert untied["m.embed.weight"].data_ptr() == untied["m.head.weight"].data_ptr()


def test_two_requests_of_one_key_by_renaming_get_memory_of_their_own(tmp_path: Path) -> None:
    gs.save(Tied().state_dict(), tmp_path)
    names = ("policy.embed.weight", "policy.head.weight", "reference.embed.weight", "reference.head.weight")
    wanted = {name: torch.empty(16, 8, device="meta") for name in names}
    options = gs.LoadOptions(rename=lambda key: key.split(".", 1)[1])
    loaded = gs.load(wanted, tmp_path, options=options)
    pointers = [loaded[name].data_ptr() for name in names]
    assert pointers[0] == pointers[1] != pointers[2] == pointers[3]


def test_a_tie_must_hold_on_every_rank_that_holds_the_tensor(tmp_path: Path) -> None:
    values = torch.arange(8.0)

    def save(group: Any, tied_ranks: set[int]) -> None:
        part = values[group.rank * 4 : group.rank * 4 + 4].clone()
        other = part if group.rank in tied_ranks else part.clone()
        state = {
            name: gs.ShardedTensor.from_rank_offsets(name, data, (0, group.rank, 2))
            for name, data in (("a", part), ("b", other))
        }
        # A rank that holds nothing of a tensor has no say.
        state["none"] = gs.ShardedTensor(f"rank{group.rank}", torch.ones(1), torch.float32, (1,), (1,), (0,), None)
        gs.save(state, tmp_path, process_group=group)

    for tied_ranks, size in (({0, 1}, 32 + 8), ({0}, 64 + 8), (set(), 64 + 8)):
        run_ranks(2, lambda group, tied=tied_ranks: save(group, tied))
        assert stored_bytes(tmp_path) == size
        for key in "ab":
            assert gs.open_checkpoint(tmp_path)[key][...].tolist() == values.tolist()


def test_a_tied_shard_that_one_rank_lacks_is_still_a_tie(tmp_path: Path) -> None:
    def save(group: Any) -> None:
        part = torch.full((0 if group.rank else 4,), 3.0)
        offset = 4 if group.rank else 0
        gs.save(
            {n: gs.ShardedTensor(n, part, part.dtype, tuple(part.shape), (4,), (offset,), None) for n in ("a", "b")},
            tmp_path,
            process_group=group,
        )

    run_ranks(2, save)
    assert stored_bytes(tmp_path) == 16


def test_views_that_are_not_the_same_tensor_are_stored_each(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    gs.save({"a": base, "b": base.view(2, 3), "c": base[:3], "d": base.view(torch.int32), "e": base[::2]}, tmp_path)
    assert stored_bytes(tmp_path) == 24 * 3 + 12 * 2
    conjugated = torch.tensor([1 + 2j])
    gs.save({"a": conjugated, "b": conjugated.conj()}, tmp_path)
    assert gs.metadata.load_plain_tensors(tmp_path)["b"].item() == 1 - 2j


def test_a_tied_target_of_two_stored_tensors_is_loaded_if_they_are_equal(tmp_path: Path) -> None:
    one = torch.arange(4.0)
    target = torch.zeros(4)
    gs.save({"a": one, "b": one.clone()}, tmp_path)
    gs.load({"a": target, "b": target}, tmp_path)
    assert torch.equal(target, one)
    gs.save({"a": one, "b": one + 1}, tmp_path)
    with pytest.raises(MismatchError, match="'b' shares memory with another tensor"):
        gs.load({"a": target, "b": target}, tmp_path)


def test_contiguous_targets_that_overlap_in_part_are_compared_after_loading(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    state = {"flat": flat, "view": flat[4:8].view(2, 2)}
    gs.save(state, tmp_path)
    target = torch.zeros(12)
    gs.load({"flat": target, "view": target[4:8].view(2, 2)}, tmp_path)
    assert torch.equal(target, flat)
    gs.save({"flat": flat, "view": flat[4:8].view(2, 2) + 1}, tmp_path)
    with pytest.raises(MismatchError, match="shares memory"):
        gs.load({"flat": target, "view": target[4:8].view(2, 2)}, tmp_path)
    # Columns of one matrix interleave without sharing an element.
    gs.save({"left": torch.ones(4, 2), "right": torch.full((4, 2), 2.0)}, tmp_path)
    both = torch.zeros(4, 4)
    gs.load({"left": both[:, :2], "right": both[:, 2:]}, tmp_path)
    assert both.tolist() == [[1, 1, 2, 2]] * 4


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4))
def test_sharing_elements_is_seen_for_any_strides(axes: list[tuple[int, int]]) -> None:
    shape, strides = [size for size, _ in axes], [stride for _, stride in axes]
    addresses = [0]
    for size, stride in axes:
        addresses = [address + n * stride for address in addresses for n in range(size)]
    assert shares_elements(shape, strides) == (len(set(addresses)) < len(addresses))


def test_a_target_that_overlaps_itself_is_refused(tmp_path: Path) -> None:
    gs.save({"x": torch.ones(3, 3)}, tmp_path)
    with pytest.raises(BadArgumentError, match="overlaps itself"):
        gs.load({"x": torch.zeros(5).as_strided((3, 3), (1, 1))}, tmp_path)
    odd = torch.zeros(16).as_strided((3, 3), (2, 5))
    gs.load({"x": odd}, tmp_path)
    assert odd.tolist() == [[1.0] * 3] * 3


def test_targets_that_overlap_in_any_way_are_compared(tmp_path: Path) -> None:
    square = torch.arange(9.0).reshape(3, 3)
    gs.save({"a": square, "b": square.t()}, tmp_path)
    target = torch.zeros(3, 3)
    gs.load({"a": target, "b": target.t()}, tmp_path)
    assert torch.equal(target, square)
    gs.save({"a": square, "b": square}, tmp_path)
    with pytest.raises(MismatchError, match="shares memory"):
        gs.load({"a": target, "b": target.t()}, tmp_path)
    base = torch.zeros(4, 6)
    gs.save({"left": torch.ones(4, 3), "right": torch.full((4, 4), 2.0)}, tmp_path)
    with pytest.raises(MismatchError, match="shares memory"):
        gs.load({"left": base[:, :3], "right": base[:, 2:]}, tmp_path)


def test_one_memory_for_two_regions_of_a_tensor_holds_both_only_if_they_are_equal(tmp_path: Path) -> None:
    gs.save({"x": torch.tensor([1.0, 2.0, 1.0])}, tmp_path)
    target = torch.zeros(1)

    def shard(offset: int) -> gs.ShardedTensor:
        return gs.ShardedTensor("x", target, torch.float32, (1,), (3,), (offset,), None)

    gs.load({"a": shard(0), "b": shard(2)}, tmp_path)
    with pytest.raises(MismatchError, match="shares memory"):
        gs.load({"a": shard(0), "b": shard(1)}, tmp_path)


@given(st.data())
def test_boxes_that_are_called_disjoint_share_no_element(data: st.DataObject) -> None:
    base = torch.zeros(120)
    shape = data.draw(st.sampled_from([(120,), (10, 12), (4, 5, 6)]))
    whole = base.view(shape)

    def box() -> torch.Tensor:
        view = whole
        for axis, size in enumerate(shape):
            start = data.draw(st.integers(0, size - 1))
            view = view.narrow(axis, start, data.draw(st.integers(1, size - start)))
            if data.draw(st.booleans()):
                view = view[tuple(slice(None, None, 2 if n == axis else 1) for n in range(len(shape)))]
        return view

    def shifted(view: torch.Tensor) -> torch.Tensor:
        # Another beginning, at which the strides of the array mean something else.
        start = data.draw(st.integers(0, 3))
        reach = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
        return base.as_strided(view.shape, view.stride(), min(start, 119 - reach))

    a, b = box(), box()
    was_shifted = data.draw(st.booleans())
    if was_shifted:
        b = shifted(b)
    base.zero_()
    a.fill_(1.0)
    shares = bool((b == 1.0).any())
    assert disjoint(a, b) == disjoint(b, a)
    if disjoint(a, b):
        assert not shares
    same_strides = all(x == y for x, y, p, q in zip(a.stride(), b.stride(), a.shape, b.shape, strict=True) if p > 1 and q > 1)
    plain = same_strides and a.stride() == whole.stride() == b.stride()
    if not shares and plain and not was_shifted:
        assert disjoint(a, b), "plain boxes of one array are told apart"


def test_padding_that_changes_needs_memory_of_its_own(tmp_path: Path) -> None:
    gs.save({"p": torch.ones(2), "q": torch.ones(4)}, tmp_path)
    target = torch.zeros(4)
    padded = gs.ShardedTensor("p", target, torch.float32, (4,), (4,), (0,), None, allow_shape_mismatch=True)
    with pytest.raises(BadArgumentError, match="another padding into memory that it shares"):
        gs.load({"q": target, "p": padded}, tmp_path)


def test_a_tied_module_without_memory_takes_two_stored_tensors_only_if_they_are_equal(tmp_path: Path) -> None:
    untied = Tied(tie=False)
    with torch.no_grad():
        untied.head.weight.copy_(untied.embed.weight)
    gs.save({"m": untied}, tmp_path)
    module = Tied(device="meta")
    gs.load({"m": module}, tmp_path)
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.head.weight, untied.embed.weight)
    gs.save({"m": Tied(tie=False)}, tmp_path)
    with pytest.raises(MismatchError, match="one tensor in the module"):
        gs.load({"m": Tied(device="meta")}, tmp_path)


def test_a_module_that_ties_nothing_gets_two_parameters(tmp_path: Path) -> None:
    gs.save({"m": Tied()}, tmp_path)
    module = Tied(tie=False, device="meta")
    gs.load({"m": module}, tmp_path)
    assert torch.equal(module.head.weight, module.embed.weight)
    assert module.head.weight.data_ptr() != module.embed.weight.data_ptr()


def test_parameters_that_have_memory_stay_the_objects_that_they_are(tmp_path: Path) -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    gs.save({"m": model}, tmp_path)
    other.bias = torch.nn.Parameter(torch.empty(2, device="meta"), requires_grad=False)
    weight = other.weight
    gs.load({"m": other}, tmp_path)
    assert other.weight is weight
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)
    assert not other.bias.requires_grad


def test_boxes_that_interleave_off_the_grid_are_compared(tmp_path: Path) -> None:
    gs.save({"a": torch.full((3, 3), 1.0), "b": torch.full((3, 3), 2.0)}, tmp_path)
    base = torch.zeros(20)
    with pytest.raises(MismatchError, match="shares memory"):
        gs.load({"a": base.as_strided((3, 3), (5, 2), 0), "b": base.as_strided((3, 3), (5, 2), 1)}, tmp_path)


def test_very_many_columns_of_one_matrix_are_loaded_without_looking_at_all_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 600
    whole = torch.arange(4.0 * count).reshape(4, count)
    gs.save({f"c{n}": whole[:, n] for n in range(count)}, tmp_path)
    tests = 0
    original = sharing.disjoint

    def counted(a: torch.Tensor, b: torch.Tensor) -> bool:
        nonlocal tests
        tests += 1
        return original(a, b)

    monkeypatch.setattr(sharing, "disjoint", counted)
    target = torch.zeros(4, count)
    gs.load({f"c{n}": target[:, n] for n in range(count)}, tmp_path)
    assert torch.equal(target, whole)
    assert tests < sharing._MOST_TESTS + count


def test_overlaps_are_seen_among_very_many_columns_too(tmp_path: Path) -> None:
    count = 400
    state = {f"c{n}": torch.full((4,), float(n)) for n in range(count)}
    gs.save({**state, "last": torch.full((4,), -1.0)}, tmp_path)
    target = torch.zeros(4, count)
    wanted = {f"c{n}": target[:, n] for n in range(count)}
    with pytest.raises(MismatchError, match="shares memory"):
        gs.load({**wanted, "last": target[:, count - 1]}, tmp_path)
    half = target.view(-1)[count - 2 : count + 2]
    with pytest.raises(MismatchError, match="shares memory"):
        gs.load({**wanted, "last": half}, tmp_path)
