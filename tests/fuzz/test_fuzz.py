"""Hostile checkpoints give values or the expected errors, in bounded memory and time, and run nothing.

A small, fixed part of what `make fuzz` does for as long as one likes; see docs/fuzzing.md.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import giantstep as gs
from fuzz.draft import INDEX, RECORD, Columns, Edits, file_name, seal
from fuzz.exercise import DictStore, FindingError, Steps, exercise
from fuzz.guard import no_effects
from fuzz.kept import files_of, kept
from fuzz.mutations import TAGS
from fuzz.seeds import KEYS, encoded_objects, seed_draft, small_draft
from fuzz.targets import TARGETS, check_object, read_mutant, run, sealed_seed, warm_up
from giantstep.codecs import OBJECT_CODEC
from independent_reader import read_checkpoint

# How many mutants of each kind.
EXAMPLES = {"record": 150, "index": 100, "data_file": 50, "object": 200, "checkpoint": 40}


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    """While memory is traced, using too much is a finding."""
    warm_up()
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("target", TARGETS)
def test_whatever_is_stored_gives_values_or_typed_errors(target: str) -> None:
    @settings(derandomize=True, database=None, deadline=None, max_examples=EXAMPLES[target])
    @given(st.binary(max_size=48))
    def check(data: bytes) -> None:
        run(target, data)

    check()


@pytest.mark.parametrize("path", kept(), ids=lambda path: path.stem)
def test_what_once_was_a_finding_is_none_any_more(path: Path) -> None:
    read_mutant(files_of(path))


def test_the_valid_checkpoint_is_what_the_format_says() -> None:
    found = read_checkpoint(sealed_seed())
    assert tuple(found.tensors) == KEYS
    assert found.objects == encoded_objects()
    assert sealed_seed() == seal(seed_draft())
    assert exercise(seal(small_draft()), ()) == []


def test_every_tag_occurs_in_the_valid_objects() -> None:
    text = b"".join(encoded_objects().values()).decode("latin-1")
    assert len(TAGS) > 30
    assert [tag for tag in TAGS if f'"$":"{tag}"' not in text] == []


# What the harness itself would notice.


def test_effects_are_noticed() -> None:
    for effect in ("open('/dev/null').close()", "exec('1')", "__import__('os').listdir('/')"):
        code = compile(effect, "x", "exec")
        with pytest.raises(RuntimeError, match="had effects"), no_effects():
            exec(code)  # noqa: S102 - is what must be noticed


def test_an_unexpected_error_much_memory_and_many_reads_are_findings() -> None:
    store = DictStore(sealed_seed())
    steps = Steps(store)
    with pytest.raises(FindingError, match="sum raised ZeroDivisionError"):
        steps.run("sum", lambda: 1 // 0)
    with pytest.raises(FindingError, match="sum raised BadArgumentError"):
        steps.run("sum", lambda: gs.open_checkpoint(""))
    with pytest.raises(FindingError, match="sum held"):
        steps.run("sum", lambda: len(bytes(200 * store.stored_bytes)))

    def reads() -> None:
        for _ in range(50):
            store.open_read(INDEX).read_into(0, memoryview(bytearray(len(store.files[INDEX]))))

    with pytest.raises(FindingError, match="sum read"):
        steps.run("sum", reads)


def test_sealing_reaches_the_checks_behind_the_checksums() -> None:
    def outside(columns: Columns) -> None:
        columns["chunk_start"][0] = 1 << 40

    refused = exercise(seal(seed_draft(), Edits(columns=outside)), KEYS)
    assert "info: CorruptionError" in refused
    assert "load: CorruptionError" in refused
    assert not any(found.startswith(("open", "keys")) for found in refused)
    damaged = {**sealed_seed(), RECORD: sealed_seed()[RECORD].replace(b"world_size", b"World_size")}
    assert exercise(damaged, ()) == ["open: CorruptionError"]
    del damaged[RECORD], damaged[file_name(0)]
    assert exercise(damaged, ()) == ["open: IncompleteError"]


def test_an_object_of_a_type_that_no_kind_gives_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(OBJECT_CODEC), "decode", lambda *_arguments, **_settings: [Path])
    with pytest.raises(FindingError, match="came out as"):
        check_object(encoded_objects()["plain"])
