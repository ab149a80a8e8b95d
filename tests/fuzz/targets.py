"""What is fuzzed: functions from bytes, which steer the mutations, to nothing; a `FindingError` is what must not happen.

Called by `atheris_child`, `kept` and the tests.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import CorruptionError, UnsupportedTypeError
from giantstep.format.codec import Unregistered
from giantstep.format.container import parse_header

from .draft import Edits, seal
from .exercise import DictStore, FindingError, Steps, exercise
from .guard import warmed_up
from .mutations import change_data_file, change_index, change_record, changed_object, damage, mixed, put_object
from .seeds import KEYS, SMALL_KEYS, encoded_objects, seed_draft, small_draft
from .steering import Steering


@functools.cache
def warm_up() -> None:
    """Read the valid checkpoint: nothing is refused, and what is imported on first use is imported."""
    refused = exercise(sealed_seed(), KEYS)
    if refused:
        raise FindingError(f"the valid checkpoint was refused: {refused}")
    for encoded in encoded_objects().values():
        check_object(encoded)
    warmed_up()


@functools.cache
def sealed_seed() -> dict[str, bytes]:
    """The valid checkpoint's files."""
    return seal(seed_draft())


def files_record(data: bytes) -> dict[str, bytes]:
    """A checkpoint with another commit record."""
    edits = Edits()
    change_record(Steering(data), edits)
    return seal(small_draft(), edits)


def files_index(data: bytes) -> dict[str, bytes]:
    """A checkpoint with another index."""
    draft, edits = small_draft(), Edits()
    change_index(Steering(data), draft, edits)
    return seal(draft, edits)


def files_data_file(data: bytes) -> dict[str, bytes]:
    """A checkpoint with other data files, whose checksums fit."""
    draft, steering = small_draft(), Steering(data)
    for _ in range(1 + steering.below(3)):
        change_data_file(steering, draft)
    return seal(draft)


def files_checkpoint(data: bytes) -> tuple[dict[str, bytes], bool]:
    """A checkpoint with changes in several parts; or the valid one with damage behind its seals (then True)."""
    steering = Steering(data)
    if steering.below(3) == 2:
        return damage(sealed_seed(), steering), True
    draft, edits = mixed(steering)
    files = seal(draft, edits)
    return (damage(files, steering), False) if steering.below(8) == 7 else (files, False)


def _one_in(count: int, data: bytes) -> bool:
    """The first byte decides whether to go on to what takes longer."""
    return not data or data[0] % count == 0


def fuzz_record(data: bytes) -> None:
    """Hostile commit records; in one of four, everything is read that they lead to."""
    exercise(files_record(data[1:]), SMALL_KEYS, reads=_one_in(4, data))


def fuzz_index(data: bytes) -> None:
    """Hostile indices; in one of four, everything is read that they lead to."""
    exercise(files_index(data[1:]), SMALL_KEYS, reads=_one_in(4, data))


def fuzz_data_file(data: bytes) -> None:
    """Headers of hostile data files as containers; in one of four, all that the files hold."""
    files = files_data_file(data[1:])
    for name, content in files.items():
        if name.startswith("data/"):
            try:
                parse_header(content, len(content), name)
            except CorruptionError:
                continue
    if _one_in(4, data):
        exercise(files, SMALL_KEYS)


def fuzz_object(data: bytes) -> None:
    """Hostile objects: decoded alone, and one in eight as part of a checkpoint."""
    key, encoded = changed_object(Steering(data[1:]))
    check_object(encoded)
    if _one_in(8, data):
        draft = small_draft()
        put_object(draft, "common_state" if key == "common_state" else "bytes", encoded)
        exercise(seal(draft), ())


def check_object(encoded: bytes) -> None:
    """Decode; what comes out must be of known types, and survive being stored once more."""
    steps = Steps(DictStore({"object": encoded}))
    kept = steps.run("decode, keep", lambda: (OBJECT_CODEC.decode(encoded, "x", unknown="keep"),))
    found = steps.run("decode", lambda: (OBJECT_CODEC.decode(encoded, "x"),))
    for values in (kept, found):
        _check_types(values and values[0])
    if found is None:
        return
    again = steps.run("encode", lambda: OBJECT_CODEC.encode(found[0]))
    if again is None:
        raise FindingError("a value that was decoded cannot be encoded")
    once_more = steps.run("decode again", lambda: OBJECT_CODEC.encode(OBJECT_CODEC.decode(again, "x")))
    if once_more != again:
        raise FindingError("a value changes when it is stored once more")


def _check_types(value: Any) -> None:
    """Follow containers, and raise a `FindingError` at the first value of a type that no kind gives."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if item is None or type(item) in (bool, str, int, float):
            continue
        if isinstance(item, Unregistered):
            waiting.append(item.value)
            continue
        if type(item) is not list:
            try:
                OBJECT_CODEC.for_type(type(item), ())
            except UnsupportedTypeError as error:
                raise FindingError(f"an object came out as {type(item)}") from error
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list | tuple | set | frozenset | deque):
            waiting += item
        elif type(item).__name__ in ("Namespace", "SimpleNamespace"):
            waiting += vars(item).values()


def fuzz_checkpoint(data: bytes) -> None:
    """Several hostile parts at once, and damage that no seal hides."""
    files, damaged = files_checkpoint(data)
    refused = exercise(files, KEYS)
    if damaged and files != sealed_seed() and not refused:
        raise FindingError("damage went unnoticed")


def run(target: str, data: bytes) -> None:
    """Run a target of `TARGETS`; raises a `FindingError`."""
    warm_up()
    TARGETS[target](data)


Target = Callable[[bytes], None]
TARGETS: dict[str, Target] = {
    "record": fuzz_record,
    "index": fuzz_index,
    "data_file": fuzz_data_file,
    "object": fuzz_object,
    "checkpoint": fuzz_checkpoint,
}

# The mutant that a target makes of its bytes; an object alone is a file of that name.
MUTANTS: dict[str, Callable[[bytes], dict[str, bytes]]] = {
    "record": lambda data: files_record(data[1:]),
    "index": lambda data: files_index(data[1:]),
    "data_file": lambda data: files_data_file(data[1:]),
    "object": lambda data: {"object": changed_object(Steering(data[1:]))[1]},
    "checkpoint": lambda data: files_checkpoint(data)[0],
}


def read_mutant(files: Mapping[str, bytes]) -> None:
    """Everything that is done to any mutant; raises a `FindingError`."""
    warm_up()
    encoded = files.get("object")
    if encoded is None:
        exercise(files, KEYS)
        return
    check_object(encoded)
    for key in ("common_state", "bytes"):
        draft = small_draft()
        put_object(draft, key, encoded)
        exercise(seal(draft), ())
