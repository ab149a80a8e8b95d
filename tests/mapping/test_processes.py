"""Real processes: every kind of leaf over gloo, and FSDP1's flat parameters as torch cuts them."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import giantstep as gs
from processes import results, run_processes

WIDTH, HIDDEN = 7, 13


def whole_weight() -> torch.Tensor:
    return torch.arange(24.0 * 5).reshape(24, 5)


def rng_state(rank: int) -> Any:
    return random.Random(rank).getstate()


def state_of(rank: int, size: int, *, filled: bool) -> dict[str, Any]:
    whole = whole_weight() if filled else torch.zeros(24, 5)
    gate, up = whole.chunk(2)
    fused = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])

    def build(key: str, data: torch.Tensor, replica_id: Any, _flat: Any) -> list[gs.ShardedTensor]:
        return [
            gs.ShardedTensor.from_rank_offsets(key, half, (0, n * size + rank, 2 * size), replica_id=replica_id)
            for n, half in enumerate(data.chunk(2))
        ]

    tied = torch.full((3,), 5.0 if filled else 0.0)
    return {
        "fused": gs.ShardedTensorFactory("fused", fused, build, torch.cat),
        "rng": gs.ShardedObject("rng", rng_state(rank) if filled else None, (size,), (rank,)),
        "tied": {"a": tied, "b": tied},
        "local": gs.LocalNonpersistentObject(rank),
        "step": 3 if filled else 0,
    }


def save_rank(rank: int, folder: str, size: int) -> None:
    gs.save(state_of(rank, size, filled=True), folder)


def load_rank(rank: int, folder: str, size: int) -> tuple[bool, bool, bool, int, int]:
    options = gs.LoadOptions(on_object_reshard=lambda _key, stored, _shape, offset: stored[offset])
    wanted = state_of(rank, size, filled=False)
    loaded = gs.load(wanted, folder, options=options)
    expected = state_of(rank, size, filled=True)
    return (
        torch.equal(loaded["fused"], expected["fused"].data),
        loaded["rng"] == rng_state(rank),
        torch.equal(loaded["tied"]["b"], expected["tied"]["b"]),
        loaded["local"],
        loaded["step"],
    )


def test_every_kind_of_leaf_over_processes(tmp_path: Path) -> None:
    results(run_processes(4, save_rank, str(tmp_path), 4))
    assert gs.open_checkpoint(tmp_path).record.totals.bytes < 24 * 5 * 4 + 3 * 4 + 4 * 20_000
    for size in (3, 4):
        found = results(run_processes(size, load_rank, str(tmp_path), size))
        assert found == [(True, True, True, rank, 3) for rank in range(size)]


def fsdp1_state(module: Any) -> dict[str, gs.ShardedTensor]:
    """Each original parameter as the flat range of it that this rank's part of the flat parameter holds."""
    from torch.distributed.fsdp._traversal_utils import _get_fsdp_handles

    state = {}
    for handle in _get_fsdp_handles(module):
        flat = handle.flat_param
        parts = zip(flat._fqns, flat._shapes, flat._shard_param_infos, strict=True)
        for name, shape, info in parts:
            low, high = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
            start = info.offset_in_shard if info.in_shard else 0
            # Before its first forward pass a flat parameter is its local shard.
            data = getattr(flat, "_local_shard", flat).detach()[start : start + high - low]
            state[name] = gs.ShardedTensor.from_rank_offsets_flat(name, data, tuple(shape), flattened_range=slice(low, high))
    return state


def fsdp1_model(seed: int) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp1_rank(rank: int, folder: str, *, save: bool) -> list[float]:
    """Train a step, save; or load into another model. Returns what the model makes of ones."""
    model = fsdp1_model(1 if save else 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if save:
            model(torch.ones(2, WIDTH)).square().sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            gs.save(fsdp1_state(model), folder)
        else:
            gs.load(fsdp1_state(model), folder)
        found: list[float] = model(torch.ones(1, WIDTH)).detach().reshape(-1).tolist()
        return found


def fsdp1_save(rank: int, folder: str) -> list[float]:
    return fsdp1_rank(rank, folder, save=True)


def fsdp1_load(rank: int, folder: str) -> list[float]:
    return fsdp1_rank(rank, folder, save=False)


@pytest.mark.parametrize(("saving", "loading"), [(3, 4), (4, 2)])
def test_flat_parameters_of_fsdp1_load_on_another_number_of_ranks(tmp_path: Path, saving: int, loading: int) -> None:
    (expected, *_) = results(run_processes(saving, fsdp1_save, str(tmp_path)))
    found = results(run_processes(loading, fsdp1_load, str(tmp_path)))
    assert found == [expected] * loading
    plain = torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, WIDTH))
    gs.load(plain.state_dict(), tmp_path)
    assert plain(torch.ones(1, WIDTH)).detach().reshape(-1).tolist() == pytest.approx(expected)
