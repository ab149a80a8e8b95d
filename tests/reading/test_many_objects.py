"""Many objects are looked up by one table, few by a search each: the result is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import giantstep as gs
from giantstep.errors import KeyMismatchError
from giantstep.reading import index_reader


@pytest.mark.parametrize("steps", [0, 10**9])
def test_every_object_is_found_either_way(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = {f"é{n}": gs.ShardedObject(f"é{n}", n, (), ()) for n in range(40)}
    gs.save(objects, tmp_path / "c")
    monkeypatch.setattr(index_reader, "_SEARCH_STEPS", steps)
    checkpoint = gs.open_checkpoint(tmp_path / "c")
    assert checkpoint.objects() == {f"é{n}/shard__": n for n in range(40)}
    assert checkpoint.index_tables().find_objects(["nothing", "é7/shard__"])[0] is None
    with pytest.raises(KeyMismatchError, match="no object 'nothing'"):
        checkpoint.object("nothing")
