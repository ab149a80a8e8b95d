"""What every rank needs is read by one of them; what lies together is read together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import giantstep as gs
from counting_store import CountingStore, counting_store
from giantstep.errors import CorruptionError
from giantstep.group.threads import ThreadGroup
from giantstep.storage.memory import _MEDIA
from giantstep.testing.ranks import run_ranks, run_ranks_collecting

RANKS, OBJECTS = 4, 60
SAVING = gs.SaveOptions(block_bytes=4096, buffer_bytes=1 << 16)


def state_of(rank: int, *, filled: bool) -> dict[str, Any]:
    grids = {
        f"rng{number}": gs.ShardedObject(
            f"rng{number}", {"rank": rank, "number": number} if filled else None, (RANKS,), (rank,)
        )
        for number in range(OBJECTS)
    }
    return {"w": torch.arange(10.0) if filled else torch.zeros(10), "step": 12, "text": "x" * 3000, **grids}


@pytest.fixture
def store() -> Iterator[CountingStore]:
    with counting_store() as found:
        run_ranks(RANKS, lambda group: gs.save(state_of(group.rank, filled=True), found, process_group=group, options=SAVING))
        found.forget()
        yield found


def load(store: CountingStore, exchange: str) -> None:
    def rank(group: ThreadGroup) -> None:
        target = state_of(group.rank, filled=False)
        loaded = gs.load(target, store, process_group=group, options=gs.LoadOptions(exchange=exchange))
        expected = state_of(group.rank, filled=True)
        for number in range(OBJECTS):
            if loaded[f"rng{number}"] != expected[f"rng{number}"].data:
                raise AssertionError(f"object {number} on rank {group.rank}: {loaded[f'rng{number}']}")
        if loaded["step"] != 12 or not torch.equal(target["w"], expected["w"]):
            raise AssertionError(f"rank {group.rank}")

    run_ranks(RANKS, rank)


def test_index_and_common_state_are_read_by_one_rank(store: CountingStore) -> None:
    load(store, "auto")
    once, blocks = store.other_reads["index.safetensors"], len(store.ranges)
    store.forget()
    load(store, "none")
    assert once > 0
    assert store.other_reads["index.safetensors"] == RANKS * once
    # Each rank read the common state for itself.
    assert len(store.ranges) == blocks + RANKS - 1


def test_objects_that_lie_together_are_read_together(store: CountingStore) -> None:
    """Sixty objects of each rank lie in its file, beside the tensors."""
    load(store, "auto")
    assert len(store.ranges) <= 3 * RANKS
    store.forget()
    assert len(gs.open_checkpoint(store).objects()) == RANKS * OBJECTS
    assert len(store.ranges) == RANKS


def test_a_damaged_index_is_the_same_error_on_all_ranks(store: CountingStore) -> None:
    files = _MEDIA[store.location.removeprefix("memory://")]
    (name,) = [name for name in files if name.endswith(".index.safetensors")]
    files[name][-5] ^= 1

    def rank(group: ThreadGroup) -> None:
        gs.load(state_of(group.rank, filled=False), store, process_group=group)

    errors = run_ranks_collecting(RANKS, rank)[1]
    assert len({str(error) for error in errors}) == 1
    assert isinstance(errors[0], CorruptionError)
    assert name in str(errors[0])


def test_a_damaged_object_names_itself_and_not_its_neighbours_in_other_blocks(store: CountingStore) -> None:
    files = _MEDIA[store.location.removeprefix("memory://")]
    name = min(name for name in files if name.startswith("data/"))
    at = bytes(files[name]).index(b"xxxx")
    files[name][at] ^= 1
    with pytest.raises(CorruptionError, match="common_state") as caught:
        _ = gs.open_checkpoint(store).common
    assert "rng" not in str(caught.value)
