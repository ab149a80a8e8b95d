"""torchao's int8 and float8 tensors, as they come out of `quantize_`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from giantstep.mapping import wrappers
from giantstep.testing.ranks import run_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantization = pytest.importorskip("torchao.quantization")

ROWS, WIDTH = 32, 64


def quantised(config: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, ROWS, dtype=torch.bfloat16), torch.nn.LayerNorm(ROWS))
    quantization.quantize_(model, getattr(quantization, config)())
    return model


CONFIGS = ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"]


@pytest.fixture(params=[False, True], ids=["unregistered", "registered"])
def registered(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param:
        from giantstep.integrations.torchao import register_torchao

        register_torchao()
        register_torchao()
    yield request.param
    wrappers._BY_TYPE.clear()
    wrappers._BY_NAME.clear()


def parts_of(tensor: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    assert a.__tensor_flatten__()[1] == b.__tensor_flatten__()[1]
    for name, part in parts_of(a).items():
        assert torch.equal(part.view(torch.uint8), parts_of(b)[name].view(torch.uint8)), name


@pytest.mark.parametrize("config", CONFIGS)
def test_a_quantised_model_loads_into_another_in_place(tmp_path: Path, config: str, *, registered: bool) -> None:
    model, other = quantised(config, 1), quantised(config, 2)
    gs.save({"m": model}, tmp_path)
    assert "m.0.weight.qdata" in gs.open_checkpoint(tmp_path)
    assert ("m.0.weight/wrapper" in gs.open_checkpoint(tmp_path).object_keys()) is True
    weight = other[0].weight
    gs.load({"m": other}, tmp_path)
    assert other[0].weight is weight
    assert_same(other[0].weight, model[0].weight)
    given = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(model[0](given), other[0](given))


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_quantised_weights_reshard(tmp_path: Path, config: str, *, registered: bool) -> None:
    whole: Any = quantised(config, 1)[0].weight
    blank: Any = quantised(config, 2)[0].weight

    def shard(tensor: Any, rank: int, ranks: int) -> gs.ShardedTensor:
        count = ROWS // ranks
        part = tensor[rank * count : (rank + 1) * count]
        return gs.ShardedTensor.from_rank_offsets("w", part, (0, rank, ranks))

    run_ranks(4, lambda group: gs.save({"w": shard(whole, group.rank, 4)}, tmp_path, process_group=group))

    def load(group: Any) -> None:
        wanted = shard(copy.deepcopy(blank), group.rank, 2)
        loaded = gs.load({"w": wanted}, tmp_path, process_group=group)["w"]
        for name, part in parts_of(shard(whole, group.rank, 2).data).items():
            assert torch.equal(part.view(torch.uint8), parts_of(loaded)[name].view(torch.uint8))

    run_ranks(2, load)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_quantised_weight_is_dequantised_into_a_plain_one(tmp_path: Path, config: str) -> None:
    from giantstep.integrations.torchao import register_torchao

    register_torchao()
    weight: Any = quantised(config, 1)[0].weight
    gs.save({"w": weight}, tmp_path)
    plain = weight.dequantize()

    def load(group: Any) -> None:
        # Cut along both axes, inside rows' scale blocks too.
        target = torch.zeros(ROWS // 2, WIDTH // 2, dtype=torch.float32)
        where = (slice(16 * (group.rank // 2), None), slice(32 * (group.rank % 2), None))
        wanted = gs.ShardedTensor.from_rank_offsets("w", target, (0, group.rank // 2, 2), (1, group.rank % 2, 2))
        options = gs.LoadOptions(dequantise=True, cast="floating")
        gs.load({"w": wanted}, tmp_path, process_group=group, options=options)
        assert torch.equal(target, plain[where][:16, :32].float())

    run_ranks(4, load)
    wrappers._BY_TYPE.clear()
    wrappers._BY_NAME.clear()


@pytest.mark.parametrize("config", CONFIGS)
def test_quantised_weights_without_memory_get_it_and_keep_their_settings(
    tmp_path: Path, config: str, *, registered: bool
) -> None:
    weight: Any = quantised(config, 1)[0].weight
    gs.save({"w": weight}, tmp_path)
    names, context = weight.__tensor_flatten__()
    meta = {name: getattr(weight, name).to("meta") for name in names}
    hollow = type(weight).__tensor_unflatten__(meta, context, weight.size(), weight.stride())
    assert_same(gs.load({"w": hollow}, tmp_path)["w"], weight)
