"""Every checkpoint that a test commits in this process is read at once by the independent reader."""

from __future__ import annotations

from typing import Any

import pytest

import giantstep.saving
from giantstep.storage.base import Store, read_all
from independent_reader import StoredCheckpoint, read_checkpoint


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases that take long are run on request: `pytest -m slow`."""
    if config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="takes long: run it with -m slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


def files_of(store: Store, names: list[str]) -> dict[str, bytes]:
    """Bytes of the named files."""
    return {name: read_all(store, name, 1 << 32) for name in names}


class Commits(list[StoredCheckpoint]):
    """Checkpoints that were committed during the test, as the independent reader sees them."""

    def __repr__(self) -> str:
        return f"<{len(self)} commits>"


@pytest.fixture(autouse=True)
def committed(monkeypatch: pytest.MonkeyPatch) -> Commits:
    """See `Commits`."""
    found = Commits()
    publish = giantstep.saving.publish

    def publish_and_read(store: Store, *arguments: Any, **settings: Any) -> Any:
        record = publish(store, *arguments, **settings)
        names = ["checkpoint.json", record.index.name, *(file.name for file in record.files)]
        found.append(read_checkpoint(files_of(store, names)))
        return record

    monkeypatch.setattr(giantstep.saving, "publish", publish_and_read)
    return found
