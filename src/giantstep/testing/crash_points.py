"""`explore`: crash an operation before and after each of its storage operations, and look at every state that this may leave.

def overwrite(store): gs.save({"w": torch.full((9,), 2.0)}, store)

def check(store): return str(gs.open_checkpoint(store)["w"][0])    # raises if it does not load

report = explore(overwrite, before=lambda store: gs.save({"w": torch.ones(9)}, store), check=check)
assert set(report.outcomes) == {"1.0", "2.0"}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from giantstep.testing.faults import CrashError, CrashingStore, Loss
from giantstep.testing.power_loss import Survivors, states_after

Act = Callable[[CrashingStore], object]


class CrashPointError(AssertionError):
    """Some state after a crash is not as it must be; says after which operation, and what had survived."""


@dataclass(slots=True)
class CrashReport:
    """What `explore` did.

    Attributes:
        operations: the storage operations, in order; each was crashed before and after.
        points: crash points tried.
        states: states of the disk looked at, over all points.
        outcomes: what `check` said, and how often.
    """

    operations: tuple[str, ...]
    points: int = 0
    states: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        found = ", ".join(f"{count} x {outcome}" for outcome, count in sorted(self.outcomes.items()))
        return f"{self.points} crash points in {len(self.operations)} operations, {self.states} states: {found}"


def explore(
    operation: Act,
    *,
    check: Callable[[CrashingStore], str],
    before: Act | None = None,
    again: Act | None = None,
    states_per_point: int = 24,
    seed: int = 0,
) -> CrashReport:
    """Try all crash points of an operation.

    Args:
        operation: what is to be crashed, as a function of the store that it works on. It must do the same operations each
            time, up to their order between ranks. Whatever it raises once the store has crashed is what a dead process
            raises: nobody sees it.
        check: looks at the store after a crash, says which outcome it is, and raises whatever if it must not be so.
        before: makes what was there before.
        again: what is done over the leftovers, such as the next save; `check` looks once more, and is not counted.
        states_per_point: how many of the states are looked at, besides that of a killed process, where nothing is lost.
        seed: of what is drawn if there are more.

    Raises:
        CrashPointError: `check` or `again` raised; names the crash point and what had survived.
        Exception: what `operation` raises if it is not crashed.
    """
    whole = _begun(before)
    operation(whole)
    check(_copy(whole))
    report = CrashReport(tuple(whole.operations))
    for position in range(len(report.operations)):
        for after in (False, True):
            store = _begun(before)
            store.arm(position, after=after)
            _run(operation, store)
            if not store.crashed:
                raise CrashPointError(f"the operation ended after {len(store.operations)} storage operations, not {position}")
            report.points += 1
            where = f"crash {'after' if after else 'before'} operation {position}, {store.operations[position]}"
            for state in _states(store, states_per_point, seed + report.points):
                report.states += 1
                report.outcomes[_looked_at(state, where, check, again)] += 1
    return report


def _begun(before: Act | None) -> CrashingStore:
    store = CrashingStore()
    if before is not None:
        before(store)
    store.arm(None)
    return store


def _copy(store: CrashingStore) -> CrashingStore:
    return store.after_power_loss(Loss.NOTHING)


def _run(operation: Act, store: CrashingStore) -> None:
    try:
        operation(store)
    except CrashError:
        pass
    except BaseException:
        # Of a rank that noticed that another one is dead, or of a harness that collects what ranks raise.
        if not store.crashed:
            raise


def _states(store: CrashingStore, most: int, seed: int) -> Iterator[Survivors]:
    yield Survivors(_copy(store), "the process was killed, and nothing lost")
    yield from states_after(store, most, seed)


def _looked_at(state: Survivors, where: str, check: Callable[[CrashingStore], str], again: Act | None) -> str:
    try:
        outcome = check(state.store)
        if again is not None:
            again(state.store)
            check(state.store)
    except Exception as error:
        raise CrashPointError(f"{where}; {state.words}: {type(error).__name__}: {error}") from error
    return outcome
