"""A state dict with every kind of leaf whose value can change in place, on the host or another device."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

import giantstep as gs


class Live:
    """An object of the user's whose state is its own."""

    def __init__(self, device: str = "cpu") -> None:
        self.values = {"momentum": torch.zeros(3, device=device), "steps": [0]}

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


def live_state(device: str = "cpu") -> dict[str, Any]:
    """Every kind of leaf whose value can change in place."""
    zeros = partial(torch.zeros, device=device)
    base = zeros(6, 8)
    tied = zeros(5)
    return {
        "plain": zeros(7),
        "parameter": torch.nn.Parameter(zeros(2, 3)),
        "transposed": base.t(),
        "every other": zeros(20)[::2],
        "scalar": zeros(()),
        "half": zeros(9, dtype=torch.bfloat16),
        "bool": zeros(4, dtype=torch.bool),
        "complex": zeros(3, dtype=torch.complex64).conj(),
        "fp8": zeros(5, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "empty": zeros(0, 3),
        "tied": tied,
        "also tied": tied,
        "shard": gs.ShardedTensor.from_rank_offsets("shard", zeros(4, 2)),
        "object": gs.ShardedObject("object", {"epoch": 0, "seen": [0]}, (1,), (0,)),
        "live": Live(device),
        "numbers": np.zeros(4),
        "step": 0,
        "list": [0, {"deep": [0]}],
    }


def tensors_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {**found, "shard": state["shard"].data, "live.momentum": state["live"].values["momentum"]}


def change(state: dict[str, Any], number: int) -> None:
    """Overwrite every value in place."""
    with torch.no_grad():
        for key, tensor in tensors_of(state).items():
            if key == "fp8":
                tensor.view(torch.uint8).fill_(number % 100)
            else:
                tensor.fill_(bool(number % 2) if key == "bool" else number)
    state["numbers"].fill(number)
    state["step"] = number
    state["list"][0] = state["list"][1]["deep"][0] = number
    state["object"].data["epoch"] = state["object"].data["seen"][0] = number
    state["live"].values["steps"][0] = number


def check_stored(store: Any, number: int) -> None:
    """Every stored value is `number`, in its kind."""
    checkpoint = gs.open_checkpoint(store)
    expected = live_state()
    change(expected, number)
    for key, tensor in tensors_of(expected).items():
        stored = np.asarray(checkpoint[key][...])
        words = (
            tensor.detach().resolve_conj().contiguous().view(torch.uint8)
            if tensor.dim()
            else tensor.reshape(1).view(torch.uint8)
        )
        if stored.tobytes() != words.numpy().tobytes():
            raise AssertionError(f"{key} in save {number} is {stored}")
    common = checkpoint.common
    assert (common["step"], common["list"]) == (number, [number, {"deep": [number]}])
    assert common["numbers"].tolist() == [number] * 4
    assert common["live"]["steps"] == [number]
    assert list(checkpoint.objects().values()) == [{"epoch": number, "seen": [number]}]
