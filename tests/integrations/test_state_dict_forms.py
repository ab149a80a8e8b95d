"""Forms of torch's state dicts besides those of `test_layout_pairs`: flattened, offloaded, with DDP's prefix, FSDP1's own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from parallel_layouts import LAYOUTS, Trainer

import giantstep as gs
from processes import results, run_processes

SHARDED = ("FSDP1", "FSDP1 flat", "FSDP1 hybrid")


def trained(layout: str, seed: int) -> Trainer:
    trainer = Trainer(layout, seed)
    trainer.train(1)
    return trainer


def flattened_rank(rank: int, root: str) -> dict[str, bool]:
    """Each layout loads what the one before it has saved."""
    digests = []
    for number, layout in enumerate(LAYOUTS):
        source = trained(layout, number)
        source.save("flattened", f"{root}/flattened/{number}")
        digests.append(source.digests())
    found = {}
    for number, layout in enumerate(LAYOUTS):
        target = Trainer(layout, 100)
        target.load("flattened", f"{root}/flattened/{number - 1 if number else len(LAYOUTS) - 1}")
        found[layout] = target.digests() == digests[number - 1]
    return found


def prefixed_rank(rank: int, root: str) -> dict[str, bool]:
    """DDP's own state dict, loaded without DDP; and the other way round."""
    ddp, other = trained("DDP", 0), Trainer("FSDP2", 1)
    gs.save({"model": ddp.model.state_dict()}, f"{root}/prefixed")
    options = gs.LoadOptions(rename=lambda key: key.replace("model.", "model.module.", 1))
    gs.load({"model": other.model}, f"{root}/prefixed", options=options)
    ddp_digests, other_digests = ddp.digests(), other.digests()
    found = {"to FSDP2": all(other_digests[key] == ddp_digests[key] for key in ddp_digests if key.startswith("model."))}
    gs.save({"model": trained("TP", 2).model.state_dict()}, f"{root}/plain")
    wanted = {"model": ddp.model.state_dict()}
    gs.load(wanted, f"{root}/plain", options=gs.LoadOptions(rename=lambda key: key.replace("model.module.", "model.", 1)))
    stored = gs.open_checkpoint(f"{root}/plain")
    parameters = dict(ddp.model.module.named_parameters())
    found["from TP"] = all(
        torch.equal(value, torch.from_numpy(stored[f"model.{key}"][...])) for key, value in parameters.items()
    )
    return found


def fsdp1_rank(rank: int, root: str) -> dict[str, Any]:
    """FSDP1's sharded and full state dicts, without torch.distributed.checkpoint; and its optimizer's, which has no names."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    found: dict[str, Any] = {}
    for number, layout in enumerate(SHARDED):
        source, target = trained(layout, number), Trainer(SHARDED[number - 1], 100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with FullyShardedDataParallel.state_dict_type(source.model, StateDictType.SHARDED_STATE_DICT):
                sharded = source.model.state_dict()
                moments = FullyShardedDataParallel.optim_state_dict(source.model, source.optimizer)
                gs.save({"model": sharded, "optimizer": moments}, f"{root}/{number}/sharded")
            gs.save({"model": source.model}, f"{root}/{number}/full")
            gs.load({"model": target.model}, f"{root}/{number}/full")
            again = target.digests()
            found[f"{layout}, full"] = {k: v for k, v in source.digests().items() if "model." in k}.items() <= again.items()
            target.scramble()
            with FullyShardedDataParallel.state_dict_type(target.model, StateDictType.SHARDED_STATE_DICT):
                wanted = {
                    "model": target.model.state_dict(),
                    "optimizer": FullyShardedDataParallel.optim_state_dict(target.model, target.optimizer),
                }
                loaded = gs.load(wanted, f"{root}/{number}/sharded")
                target.model.load_state_dict(loaded["model"])
                fitting = FullyShardedDataParallel.optim_state_dict_to_load(target.model, target.optimizer, loaded["optimizer"])
                target.optimizer.load_state_dict(fitting)
            found[f"{layout}, sharded"] = target.digests() == source.digests()
        try:
            gs.save({"optimizer": source.optimizer}, f"{root}/{number}/refused")
        except gs.errors.GiantstepError as error:
            found[f"{layout}, optimizer"] = type(error).__name__
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one world of 4 processes found."""
    ranks = results(run_processes(4, all_of_them, str(tmp_path_factory.mktemp("forms"))))
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


def all_of_them(rank: int, root: str) -> dict[str, dict[str, Any]]:
    return {
        "flattened": flattened_rank(rank, root),
        "prefixed": prefixed_rank(rank, f"{root}/ddp"),
        "fsdp1": fsdp1_rank(rank, f"{root}/fsdp1"),
    }


def test_flattened_and_offloaded_state_goes_from_layout_to_layout(found: dict[str, dict[str, Any]]) -> None:
    assert found["flattened"] == dict.fromkeys(LAYOUTS, True)


def test_renaming_puts_on_and_takes_off_the_prefix_of_ddp(found: dict[str, dict[str, Any]]) -> None:
    assert found["prefixed"] == {"to FSDP2": True, "from TP": True}


def test_fsdp1_through_its_own_state_dicts(found: dict[str, dict[str, Any]]) -> None:
    expected = {f"{layout}, {form}": True for layout in SHARDED for form in ("full", "sharded")}
    assert expected.items() <= found["fsdp1"].items()


def test_flat_optimizer_state_without_names_is_refused_when_saved(found: dict[str, dict[str, Any]]) -> None:
    told = {layout: found["fsdp1"][f"{layout}, optimizer"] for layout in SHARDED}
    assert told == dict.fromkeys(SHARDED, "DisagreementError")
