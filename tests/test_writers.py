"""Policies of who writes what several ranks hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import giantstep as gs
from giantstep.group.threads import ThreadGroup
from giantstep.testing.ranks import run_ranks
from giantstep.writers import Balanced, Caller, LowestRank, SameHost
from processes import results, run_processes

MIB = 1 << 20


def replicated(megabytes: int = 8) -> dict[str, Any]:
    return {f"layer{n}": torch.full((256, 256), float(n)) for n in range(4 * megabytes)}


def written(size: int, folder: Path, writers: Any, state: Any = None) -> list[int]:
    """Bytes that each rank writes of a replicated state."""

    def run(group: ThreadGroup) -> int:
        options = gs.SaveOptions(writers=writers(group.rank))
        return gs.save(state or replicated(), folder, process_group=group, options=options).bytes_written

    found = run_ranks(size, run)
    stored = gs.open_checkpoint(folder)
    assert stored.verify().ok
    for key, value in (state or replicated()).items():
        assert torch.equal(torch.from_numpy(stored[key][...]), value)
    return found


def test_all_holders_write_equal_shares_by_default(tmp_path: Path) -> None:
    for name, policy in (("none", None), ("balanced", Balanced())):
        assert written(8, tmp_path / name, lambda _rank, policy=policy: policy) == [MIB] * 8


def test_the_lowest_rank_writes_everything_if_that_is_asked_for(tmp_path: Path) -> None:
    assert written(4, tmp_path / "c", lambda _rank: LowestRank()) == [8 * MIB, 0, 0, 0]


def test_the_lowest_rank_is_the_main_replica_where_there_is_one(tmp_path: Path) -> None:
    def run(group: ThreadGroup) -> int:
        shard = gs.ShardedTensor.from_rank_offsets("w", torch.ones(1000), replica_id=(group.rank + 1) % 3)
        options = gs.SaveOptions(writers=LowestRank())
        return gs.save({"w": shard}, tmp_path / "c", process_group=group, options=options).bytes_written

    assert run_ranks(3, run) == [0, 0, 4000]


def test_replicas_are_shared_among_the_main_replica_s_group_alone(tmp_path: Path) -> None:
    assert written(6, tmp_path / "c", lambda rank: Balanced(over=[0, 2, 4] if rank % 2 == 0 else [1, 3, 5])) == [
        pytest.approx(8 * MIB / 3, rel=0.05) if rank % 2 == 0 else 0 for rank in range(6)
    ]


def test_each_data_parallel_group_shares_its_own_tensor_parallel_part(tmp_path: Path) -> None:
    """Two tensor-parallel parts on eight ranks: each part is divided among its four replicas."""

    def run(group: ThreadGroup) -> int:
        tp, dp = group.rank % 2, group.rank // 2
        shard = gs.ShardedTensor.from_rank_offsets("w", torch.full((512, 512), float(tp)), (0, tp, 2), replica_id=dp)
        options = gs.SaveOptions(writers=Balanced(over=range(tp, 8, 2)))
        return gs.save({"w": shard}, tmp_path / "c", process_group=group, options=options).bytes_written

    assert run_ranks(8, run) == [MIB // 4] * 8


def test_replicas_of_one_host_share_and_other_hosts_write_nothing_of_them(tmp_path: Path) -> None:
    assert written(4, tmp_path / "c", lambda rank: SameHost(host=f"node{rank // 2}")) == [4 * MIB, 4 * MIB, 0, 0]
    # All threads of this test are on one host.
    assert written(4, tmp_path / "here", lambda _rank: SameHost()) == [2 * MIB] * 4


class Halves:
    """A policy as a user writes it: the two halves of all ranks share among themselves."""

    def cell(self, caller: Caller) -> str:
        return "low" if caller.rank < caller.size // 2 else "high"


def test_a_policy_of_the_user_s_is_one_method(tmp_path: Path) -> None:
    assert written(4, tmp_path / "c", lambda _rank: Halves()) == [4 * MIB, 4 * MIB, 0, 0]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([1, 2], "rank 0 among them"),
        ([0, 0], "different ranks"),
        ([0, 9], "different ranks"),
        ("dp", "sequence of ranks"),
        (3, "sequence"),
    ],
)
def test_a_group_that_cannot_be_is_refused_on_all_ranks_before_anything_is_written(
    tmp_path: Path, over: Any, message: str
) -> None:
    def run(group: ThreadGroup) -> str:
        policy = Balanced(over=over if group.rank == 0 else [0, 1, 2])
        with pytest.raises(gs.errors.BadArgumentError, match=message) as caught:
            gs.save(replicated(1), tmp_path / "c", process_group=group, options=gs.SaveOptions(writers=policy))
        return str(caught.value)

    assert len(set(run_ranks(3, run))) == 1
    assert not (tmp_path / "c").exists()


def test_ranks_with_different_policies_make_different_calls(tmp_path: Path) -> None:
    def run(group: ThreadGroup) -> None:
        options = gs.SaveOptions(writers=LowestRank() if group.rank else Balanced())
        with pytest.raises(gs.errors.DisagreementError, match="writers"):
            gs.save(replicated(1), tmp_path / "c", process_group=group, options=options)

    run_ranks(2, run)


@pytest.mark.parametrize("policy", ["balanced", LowestRank, 3])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(gs.errors.BadArgumentError, match="writers"):
        gs.SaveOptions(writers=policy)


def _over_a_process_group(rank: int, folder: str) -> int:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    options = gs.SaveOptions(writers=Balanced(over=groups[rank % 2]))
    return gs.save(replicated(), folder, options=options).bytes_written


def _in_a_subgroup(rank: int, folder: str) -> int:
    """The save is of ranks 1 to 3; the group to share in holds the last two of them."""
    saving, last = dist.new_group([1, 2, 3]), dist.new_group([2, 3])
    if rank == 0:
        return -1
    over = last if rank > 1 else dist.new_group([1], use_local_synchronization=True)
    shard = gs.ShardedTensor.from_rank_offsets("w", torch.ones(512, 512), replica_id=int(rank != 3))
    options = gs.SaveOptions(writers=Balanced(over=over))
    return gs.save({"w": shard}, folder, process_group=saving, options=options).bytes_written


def test_the_group_may_be_a_process_group_also_of_a_save_on_some_ranks(tmp_path: Path) -> None:
    assert results(run_processes(4, _over_a_process_group, str(tmp_path / "a"))) == [4 * MIB, 0, 4 * MIB, 0]
    assert results(run_processes(4, _in_a_subgroup, str(tmp_path / "b"))) == [-1, 0, MIB // 2, MIB // 2]


@pytest.mark.parametrize("name", [3, None, b"rack"])
def test_a_policy_that_names_no_text_is_refused_on_all_ranks(tmp_path: Path, name: Any) -> None:
    class Odd:
        def cell(self, caller: Caller) -> Any:
            return name if caller.rank == 1 else "a"

    def run(group: ThreadGroup) -> str:
        with pytest.raises(gs.errors.BadArgumentError, match=r"Odd\.cell must return a str") as caught:
            gs.save(replicated(1), tmp_path / "c", process_group=group, options=gs.SaveOptions(writers=Odd()))
        return str(caught.value)

    assert len(set(run_ranks(2, run))) == 1


def test_a_tensor_larger_than_a_file_may_be_is_stored_as_it_was(tmp_path: Path) -> None:
    value = torch.arange(1 << 20, dtype=torch.float32)
    gs.save({"w": value}, tmp_path / "c", options=gs.SaveOptions(max_file_bytes=1 << 20))
    assert torch.equal(torch.from_numpy(gs.open_checkpoint(tmp_path / "c")["w"][:]), value)
