"""What `OptimizerState` says about what it did: every piece of state is accounted for."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class OptimizerReport:
    """One save or load of optimizer state, on this rank. Parameters are named by their keys.

    Attributes:
        stored, loaded: tensors of state, as `name of parameter`.
        values: how many other values (`step` and the like) were stored or loaded.
        without_state: parameters that were saved without state, as before their first gradient, and frozen ones. After a
            load they have none.
        added: parameters of which the checkpoint has no record; their state is what it was.
        skipped: parameters whose state was left out by `LoadOptions.rename`, or is not stored; it is what it was.
        dropped: parameters whose state could not be cut anew; they have none now.
        removed: state that the optimizer had and the checkpoint does not, named likewise; it is gone.
        derived: main parameters that the checkpoint does not hold, and that were made from the model's.
        groups: what was done about param groups where it was not plain.
    """

    stored: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    values: int = 0
    without_state: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __add__(self, other: OptimizerReport) -> OptimizerReport:
        return OptimizerReport(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def __str__(self) -> str:
        lines = [f"optimizer state: {len(self.stored)} tensors stored, {len(self.loaded)} loaded, {self.values} other values"]
        for item in fields(self)[3:]:
            names = getattr(self, item.name)
            if names:
                more = " ..." if len(names) > 5 else ""
                lines.append(f"  {item.name.replace('_', ' ')}: {len(names)}: {', '.join(names[:5])}{more}")
        return "\n".join(lines)
