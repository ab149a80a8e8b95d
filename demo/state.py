"""The demo of what can be saved: every dtype, every kind of leaf, flat ranges, and what happens where things do not fit.

Run by `make demo` after the training story. Ranks are threads of this process. Checks every claim it makes, and exits
with 1 if one is false.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from story import Story

import giantstep as gs
from giantstep.shards.dtypes import BY_TORCH_NAME
from giantstep.testing import check_coverage, draw, run_ranks
from giantstep.words import words_of

SHAPE = (12, 10)
VOCABULARY, HIDDEN = 1000, 16


def random_bits(dtype: torch.dtype) -> torch.Tensor:
    """A tensor of `SHAPE` with random bytes: NaN payloads, infinities and denormals among them."""
    count = SHAPE[0] * SHAPE[1] * torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return data.view(dtype).reshape(SHAPE)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of bytes."""
    return torch.equal(words_of(a).contiguous().view(torch.uint8), words_of(b).contiguous().view(torch.uint8))


def rows(tensor: torch.Tensor, rank: int, ranks: int) -> gs.ShardedTensor:
    """Rows of a tensor, cut between ranks as evenly as it goes."""
    low, high = SHAPE[0] * rank // ranks, SHAPE[0] * (rank + 1) // ranks
    part = words_of(tensor)[low:high].clone().view(tensor.dtype)
    return gs.ShardedTensor("x", part, tensor.dtype, tuple(part.shape), SHAPE, (low, 0), None)


def columns(tensor: torch.Tensor, rank: int, ranks: int) -> gs.ShardedTensor:
    """Columns of a tensor, likewise."""
    low, high = SHAPE[1] * rank // ranks, SHAPE[1] * (rank + 1) // ranks
    part = words_of(tensor)[:, low:high].clone().view(tensor.dtype)
    return gs.ShardedTensor("x", part, tensor.dtype, tuple(part.shape), SHAPE, (0, low), None)


def flat(tensor: torch.Tensor, rank: int, ranks: int) -> gs.ShardedTensor:
    """Ranges of the flattened tensor, as ZeRO cuts them."""
    total = SHAPE[0] * SHAPE[1]
    low, high = total * rank // ranks, total * (rank + 1) // ranks
    part = words_of(tensor).reshape(-1)[low:high].clone().view(tensor.dtype)
    return gs.ShardedTensor.from_rank_offsets_flat("x", part, SHAPE, flattened_range=slice(low, high))


Cut = Callable[[torch.Tensor, int, int], gs.ShardedTensor]


def survives(tensor: torch.Tensor, saved: Cut, saving: int, loaded: Cut, loading: int) -> bool:
    """Whether a tensor saved in one layout comes back in another to the bit."""
    path = f"memory://demo-{tensor.dtype}-{saving}-{loading}"
    zeros = torch.zeros_like(words_of(tensor)).view(tensor.dtype)

    def load(group: Any) -> bool:
        wanted = loaded(zeros, group.rank, loading)
        found = gs.load({"x": wanted}, path, process_group=group)["x"]
        expected = loaded(tensor, group.rank, loading).data
        return expected is not None and same_bits(found, expected)

    run_ranks(saving, lambda group: gs.save({"x": saved(tensor, group.rank, saving)}, path, process_group=group))
    return all(run_ranks(loading, load))


def every_dtype(story: Story) -> None:
    """The table of dtypes."""
    story.section("Every dtype, to the bit: saved and loaded alike, and resharded")
    story.row("dtype", ["1 -> 1", "rows 4", "rows 4", "flat 5", "flat 5"])
    story.row("", ["", "-> rows 3", "-> cols 3", "-> rows 2", "-> flat 7"])
    tried = failed = 0
    for name in BY_TORCH_NAME:
        dtype = getattr(torch, name, None)
        if dtype is None:
            story.row(name, ["(not in this torch)"])
            continue
        tensor = random_bits(dtype)
        cases = [(rows, 1, rows, 1), (rows, 4, rows, 3), (rows, 4, columns, 3), (flat, 5, rows, 2), (flat, 5, flat, 7)]
        results = [survives(tensor, *case) for case in cases]
        tried, failed = tried + len(results), failed + results.count(False)
        story.row(name, ["same" if result else "DIFFERS" for result in results])
    story.check(not failed, f"{tried} of {tried} round trips gave back every bit")


def gated(key: str, data: torch.Tensor, rank: int, ranks: int) -> gs.ShardedTensorFactory:
    """A fused gate and up projection, stored with all gate rows first whatever the number of ranks."""

    def build(key: str, data: torch.Tensor, replica_id: Any, _flat: slice | None) -> list[gs.ShardedTensor]:
        return [
            gs.ShardedTensor.from_rank_offsets(key, half, (0, place * ranks + rank, 2 * ranks), replica_id=replica_id)
            for place, half in enumerate(data.chunk(2))
        ]

    return gs.ShardedTensorFactory(key, data, build, torch.cat)


def padded(rank: int, ranks: int, multiple: int, *, filled: bool) -> gs.ShardedTensor:
    """The embedding: `VOCABULARY` rows padded to a multiple, cut between ranks."""
    total = -(-VOCABULARY // (multiple * ranks)) * multiple * ranks
    table = torch.zeros(total, HIDDEN) if filled else torch.full((total, HIDDEN), -1.0)
    if filled:
        table[:VOCABULARY] = torch.arange(float(VOCABULARY))[:, None]
    part = table.chunk(ranks)[rank].clone()
    return gs.ShardedTensor.from_rank_offsets("embedding", part, (0, rank, ranks), allow_shape_mismatch=True)


def rng_state(rank: int) -> Any:
    """The state of a rank's random number generator."""
    return random.Random(rank).getstate()  # noqa: S311 - training needs no secrets


def job_state(rank: int, ranks: int, *, filled: bool) -> dict[str, Any]:
    """What a rank of a job holds: tensor-parallel weights, moments, tied weights, RNG of its own, common state."""
    whole = torch.arange(24.0 * 4).reshape(24, 4) if filled else torch.zeros(24, 4)
    gate, up = whole.chunk(2)
    fused = torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
    weight = gated("mlp.weight", fused, rank, ranks)
    shared = torch.full((3,), 7.0 if filled else 0.0)
    return {
        "model": {"mlp": weight, "embedding": padded(rank, ranks, 64, filled=filled), "tied": [shared, shared]},
        "optimizer": {"exp_avg": replace(weight, key="exp_avg.mlp.weight", data=-fused if filled else fused.clone())},
        "rng": gs.ShardedObject("rng", rng_state(rank), (ranks,), (rank,)),
        "args": argparse.Namespace(lr=3e-4, dtype=torch.bfloat16),
        "device": gs.LocalNonpersistentObject(f"device of rank {rank}"),
    }


def every_kind_of_leaf(story: Story, path: Path) -> None:
    """Factories, objects, local objects, ties and padding, saved by 4 ranks and loaded by 3."""
    story.section("Every kind of leaf: saved by 4 ranks, loaded by 3")
    reports = run_ranks(4, lambda g: gs.save(job_state(g.rank, 4, filled=True), path, process_group=g))
    story.say(str(reports[0]))
    options = gs.LoadOptions(on_object_reshard=lambda key, stored, shape, offset: stored[offset])

    def load(group: Any) -> Any:
        return gs.load(job_state(group.rank, 3, filled=False), path, process_group=group, options=options)

    states = run_ranks(3, load)
    story.say(str(states[0].report))
    expected = [job_state(rank, 3, filled=True) for rank in range(3)]
    for place, claim in (
        (lambda s: s["model"]["mlp"], "gate and up rows of the fused weight stayed apart"),
        (lambda s: s["optimizer"]["exp_avg"], "the same factory served the optimizer's moment"),
    ):
        pairs = [(place(state), place(wanted).data) for state, wanted in zip(states, expected, strict=True)]
        story.check(all(torch.equal(found, wanted) for found, wanted in pairs), claim)
    vocabulary = torch.cat([state["model"]["embedding"] for state in states])
    logical = torch.arange(float(VOCABULARY))[:, None].expand(-1, HIDDEN)
    story.check(
        torch.equal(vocabulary[:VOCABULARY], logical) and not vocabulary[VOCABULARY:].any(),
        f"{VOCABULARY} rows padded to 1024 came back padded to {len(vocabulary)}: logical rows exact, the rest zero",
    )
    checkpoint = gs.open_checkpoint(path)
    first, second = checkpoint.info("model.tied.0"), checkpoint.info("model.tied.1")
    story.check(first.chunks == second.chunks, "tied tensors are stored once, under both keys")
    story.check(
        all(state["rng"] == rng_state(rank) for rank, state in enumerate(states)),
        "each rank got the RNG state of its number, by the policy given for another number of ranks",
    )
    story.check(
        all(state["device"] == f"device of rank {rank}" for rank, state in enumerate(states)),
        "local objects were not stored, and came back as they were",
    )


@contextmanager
def refused(story: Story, claim: str, *, lines: int) -> Iterator[None]:
    """The block must raise one of our errors, which is shown."""
    try:
        yield
    except gs.GiantstepError as error:
        story.quote(str(error).splitlines(), most=lines)
        story.check(True, claim)
    else:
        story.check(False, claim)


def what_does_not_fit(story: Story, path: Path) -> None:
    """Errors and pictures."""
    story.section("Layouts that do not fit, before anything is written")
    tensor = torch.zeros(SHAPE)
    states = [{"x": flat(tensor, rank, 7)} for rank in range(7)]
    story.quote(draw(states, "x").splitlines(), most=30)
    coverage = check_coverage(states)
    story.check(coverage.imbalance <= 1.05, f"7 ranks cover it once; the busiest writes {coverage.imbalance:.2f} x the mean")
    with refused(story, "a missing flat range is named", lines=8):
        check_coverage(states[:2] + states[3:])

    story.section("Requests that do not fit, in one readable report")
    target = torch.zeros(2)
    wanted = {f"model.layers.{n}.weight": target for n in range(10_000)} | {"model": {"tied": [target, target]}}
    with refused(story, "10,002 mismatches in a few lines, and no tensor was touched", lines=12):
        gs.load(wanted, path)
    story.check(not target.any(), "the tensors given are unchanged")


def main() -> int:
    """Tell everything; 0 if every claim is true."""
    logging.basicConfig(level=logging.ERROR)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="giantstep-state-") as folder:
        story = Story(Path(folder))
        print("Every kind of state. Ranks are threads of this process; every claim is checked.")
        every_dtype(story)
        every_kind_of_leaf(story, Path(folder) / "job")
        what_does_not_fit(story, Path(folder) / "job")
        print(f"\n{story.claims - story.failed} of {story.claims} claims hold.")
    return 1 if story.failed else 0


if __name__ == "__main__":
    sys.exit(main())
