"""`explore`: does an operation on a store leave the old state or the new one, whenever the power fails?

The operation runs once, on a store that notes every system call. Before each call, between any two and after the last, the
model of a file system says what may be found after a power loss; each such state is read by `check`, and gone on with by
`again`. Nothing here knows what the operation is: saves, removals, clean-ups and whatever else takes a store.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import BadArgumentError, CheckpointNotFoundError, IncompleteError, NotACheckpointError, OpenError
from giantstep.format.names import RECORD_NAME
from giantstep.opening import open_checkpoint
from giantstep.steps import step_name, step_of
from giantstep.storage.record_file import files_of_ours, read_record
from giantstep.testing.journal_store import Journal, JournalStore
from giantstep.testing.power_loss import Choice, Disk, File, decisions

# How many of the last calls an error shows.
_SHOWN_CALLS = 5


class CrashPointError(AssertionError):
    """A crash loses what was there, or leaves something that is neither the old state nor the new one.

    Attributes:
        point: number of system calls made before the crash.
        lost: what of them did not survive.
    """

    def __init__(self, message: str, point: int, lost: Sequence[str]) -> None:
        super().__init__(message)
        self.point = point
        self.lost = tuple(lost)


@dataclass(frozen=True, slots=True)
class CrashReport:
    """What was explored.

    Attributes:
        operations: the system calls that were made, in order.
        points: moments at which it crashed: before, between and after all calls.
        states: what may be found, summed over all points.
        distinct: of these, how many are different. Each was checked, and gone on with.
        sampled_points: points of which not every possible state was looked at.
        outcomes: how many distinct states were found to be what.
    """

    operations: tuple[str, ...]
    points: int
    states: int
    distinct: int
    sampled_points: int
    outcomes: Counter[Hashable]

    def __str__(self) -> str:
        return (
            f"{self.points} crash points, {self.states} states after a power loss, {self.distinct} different ones checked "
            f"({self.sampled_points} points by sample), {len(self.outcomes)} outcomes"
        )


def contents(store: Any) -> str | None:
    """A digest of all bits of the checkpoint at a place; None if there is none.

    Raises:
        AssertionError: what is there does not verify.
        GiantstepError: it does not open, but was committed.
    """
    try:
        checkpoint = open_checkpoint(store)
    except (CheckpointNotFoundError, NotACheckpointError):
        return None
    except IncompleteError:
        if RECORD_NAME in store.names(""):
            raise
        return None
    report = checkpoint.verify()
    if not report.ok:
        raise AssertionError(f"the checkpoint at {store.location} does not verify: {report}")
    state = hashlib.blake2b(digest_size=8)
    for key in sorted(checkpoint.keys()):
        info = checkpoint.info(key)
        state.update(repr((key, str(info.dtype), tuple(info.shape))).encode("utf-8"))
        state.update(checkpoint[key][...].tobytes())
    for key in sorted(checkpoint.object_keys()):
        state.update(key.encode("utf-8") + OBJECT_CODEC.encode(checkpoint.object(key), (key,)))
    state.update(OBJECT_CODEC.encode(checkpoint.common, ()))
    return state.hexdigest()


def step_contents(root: Any) -> tuple[tuple[int, str], ...]:
    """All steps under a root that hold a checkpoint, with the `contents` of each."""
    steps = sorted(step for step in map(step_of, root.folders()) if step is not None)
    found = [(step, contents(root.folder(step_name(step)))) for step in steps]
    return tuple((step, digest) for step, digest in found if digest is not None)


def unneeded_files(store: Any) -> list[str]:
    """Names of files at a place that the checkpoint there does not need; all that there are if it holds none."""
    try:
        record = read_record(store)
    except OpenError:
        return sorted(files_of_ours(store))
    needed = {RECORD_NAME, record.index.name, *(file.name for file in record.files)}
    return sorted(set(files_of_ours(store)) - needed)


def explore(
    *operations: Callable[[Any], object],
    check: Callable[[Any], Hashable] = contents,
    before: Callable[[Any], object] | None = None,
    again: Callable[[Any], object] | None = None,
    also: Collection[Hashable] = (),
    states_per_point: int = 48,
    seed: int = 0,
    store_type: type[JournalStore] = JournalStore,
) -> CrashReport:
    """Crash operations before and after every system call, and look at what a power loss may leave.

    Args:
        operations: run one after another, each with the store. Ranks may be threads; work in the background must be finished
            when the last operation returns.
        check: says what is found at a store, as something that can be compared. It may change the store, which is a copy.
            Raises if what is found must never be.
        before: makes what is there before; durable in all its parts when the operations begin.
        again: goes on with what was left, as a new process would: the next save, say. Raises if that does not work, or leaves
            something behind.
        also: what else may be found before the last operation has returned.
        states_per_point: how many states are looked at after each call. Where there are more, a sample is: with everything that
            processes saw, with nothing that was not flushed, all in which one thing alone is lost, and drawn ones.
        seed: of what is drawn.
        store_type: the store; one that makes a mistake shows that the mistake is found.

    While an operation runs, what was there before it or what is there after it must be found. Once it has returned, only the
    latter: it is durable.

    Raises:
        BadArgumentError: no operation does anything to the store, or `states_per_point` is no int of at least 1.
        CrashPointError: that is not so. The cause is what `check` or `again` raised, if anything.
        Exception: what an operation raises by itself.
    """
    if isinstance(states_per_point, bool) or not isinstance(states_per_point, int) or states_per_point < 1:
        raise BadArgumentError(f"states_per_point={states_per_point!r} cannot be: expected an int of at least 1")
    journal = Journal()
    store = store_type(journal)
    if before is not None:
        before(store)
    journal.restart()

    def seen() -> Hashable:
        with journal.lock:
            disk = journal.disk.left([], [])
        return check(JournalStore(Journal(disk)))

    expected, ends = [seen()], [0]
    for operation in operations:
        operation(store)
        ends.append(len(journal.calls))
        expected.append(seen())
    if not journal.calls:
        # Without a crash point everything would seem well.
        raise BadArgumentError("nothing can crash: no operation was given, or none has changed the store that it was given")
    return _Exploration(journal, ends, expected, also, check, again).run(states_per_point, seed)


class _Exploration:
    def __init__(
        self,
        journal: Journal,
        ends: list[int],
        expected: list[Hashable],
        also: Collection[Hashable],
        check: Callable[[Any], Hashable],
        again: Callable[[Any], object] | None,
    ) -> None:
        self._journal = journal
        self._ends = ends
        self._expected = expected
        self._also = also
        self._check = check
        self._again = again
        # What is found in a state does not depend on when the crash was.
        self._outcomes: dict[bytes, Hashable] = {}

    def run(self, states_per_point: int, seed: int) -> CrashReport:
        chance = random.Random(seed)  # noqa: S311 - which states are looked at is no secret
        states = sampled = points = 0
        for point, disk in enumerate(self._journal.replay()):
            choices = disk.choices()
            ways, complete = decisions(choices, states_per_point, chance)
            points, states, sampled = points + 1, states + len(ways), sampled + (not complete)
            allowed = self._allowed(point)
            for decided in ways:
                self._look(point, disk, choices, decided, allowed)
        return CrashReport(
            tuple(map(str, self._journal.calls)),
            points,
            states,
            len(self._outcomes),
            sampled,
            Counter(self._outcomes.values()),
        )

    def _allowed(self, point: int) -> set[Hashable]:
        last = self._ends[-1]
        if point >= last:
            return {self._expected[-1]}
        done = max(number for number, end in enumerate(self._ends) if end <= point)
        found = {self._expected[done], *self._also}
        return found if point == self._ends[done] else found | {self._expected[done + 1]}

    def _look(self, point: int, disk: Disk, choices: list[Choice], decided: tuple[int, ...], allowed: set[Hashable]) -> None:
        left = disk.left(choices, decided)
        key = left.key()
        known = key in self._outcomes
        try:
            if not known:
                self._outcomes[key] = self._check(JournalStore(Journal(left.copy())))
            outcome = self._outcomes[key]
            if outcome in allowed:
                if not known and self._again is not None:
                    self._again(JournalStore(Journal(left)))
                return
        except Exception as error:
            raise self._error(point, disk, choices, decided, f"{type(error).__name__}: {error}") from error
        wanted = " or ".join(sorted(repr(value) for value in allowed))
        raise self._error(point, disk, choices, decided, f"found {outcome!r}, expected {wanted}")

    def _error(self, point: int, disk: Disk, choices: list[Choice], decided: tuple[int, ...], what: str) -> CrashPointError:
        calls = [str(call) for call in self._journal.calls]
        lost = [_described(disk, choice, pick) for choice, pick in zip(choices, decided, strict=True) if pick]
        following = calls[point] if point < len(calls) else "the operation returned"
        message = (
            f"a crash after {point} of {len(calls)} system calls is not survived: {what}\n"
            f"  last calls: {'; '.join(calls[max(0, point - _SHOWN_CALLS) : point]) or 'none'}\n"
            f"  next: {following}\n"
            f"  not as processes saw it: {'; '.join(lost) or 'nothing, they were killed'}"
        )
        return CrashPointError(message, point, lost)


def _described(disk: Disk, choice: Choice, pick: int) -> str:
    paths = _paths(disk)
    where = paths.get(choice.number, f"file {choice.number}, which had no name any more")
    last = pick == len(choice.values) - 1
    if choice.name is None:
        value = choice.values[pick]
        size = len(value) if isinstance(value, bytes) else 0
        return f"bytes of {where}: " + ("none that was not flushed" if last else f"version {pick}, {size} bytes long")
    name = f"{where}/{choice.name}".lstrip("/")
    found = choice.values[pick]
    if found is None:
        return f"name {name}: not there"
    return f"name {name}: there again" if choice.values[0] is None else f"name {name}: as {'before' if last else 'in between'}"


def _paths(disk: Disk) -> dict[int, str]:
    found: dict[int, str] = {0: ""}
    todo = [0]
    while todo:
        number = todo.pop()
        item = disk.items[number]
        if isinstance(item, File):
            continue
        for name, inner in item.names.items():
            found[inner] = f"{found[number]}/{name}".lstrip("/")
            todo.append(inner)
    return found
