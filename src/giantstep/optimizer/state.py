"""`OptimizerState`: an optimizer as a leaf of the state dict, saved and loaded by the names of its parameters.

state = {"model": model}
state["optimizer"] = OptimizerState(optimizer, state)
gs.save(state, path)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from giantstep.errors import BadArgumentError
from giantstep.mapping.placed import PlacedState, StoredNames
from giantstep.mapping.sharded_object import ShardedObject
from giantstep.mapping.tree import Tree, flatten
from giantstep.optimizer.groups import plan_groups
from giantstep.optimizer.options import OptimizerOptions
from giantstep.optimizer.records import describe_optimizer
from giantstep.optimizer.report import OptimizerReport
from giantstep.optimizer.requests import want_optimizer
from giantstep.optimizer.restoring import Restorer
from giantstep.optimizer.slots import MainParams, ParamFinder, Slot, check_one_owner


class OptimizerState(PlacedState):
    """State of one or several optimizers, named by parameter: a leaf for `save`, `async_save` and `load`.

    Under "optimizer", the tensor that the optimizer keeps as `exp_avg` for parameter `w` has the key
    `optimizer.state.exp_avg.w` and is sharded like `w`. `step` and the like and which group a parameter is in are an object
    per parameter, `optimizer.param.w`; hyper-parameters an object per group. On load an optimizer needs no state yet: the
    checkpoint says which there is. What it has is filled in place.

    Args:
        optimizer: has `param_groups` and `state`, as those of `torch.optim`; several as a list or by name, each of which is
            stored under its number or name.
        model: whose parameters it has: what is given to `save` for them, or a module. Nested dicts of ShardedTensors,
            factories, DTensors, tensors and modules; may be the whole state dict that is saved. Parameters are found by
            object or memory, and named by their keys (of leaves without one: their path in this dict). Give
            `{"model": module}` to name them as a checkpoint does that has the module under "model".
        main_params: for optimizers that update copies of the parameters (fp32 main parameters, CPU offload): each copy with
            its parameter, or with (parameter, slice) if it is a copy of this range of the flattened parameter. Copies are
            stored, as `fp32_param`.
        options: see `OptimizerOptions`.

    Attributes:
        report: of the last save or load; see `OptimizerReport`.

    Raises:
        BadArgumentError: two optimizers have one parameter, or a parameter is not of the model.
    """

    def __init__(
        self,
        optimizer: Any,
        model: Tree,
        *,
        main_params: MainParams | None = None,
        options: OptimizerOptions | None = None,
    ) -> None:
        self._parts = _parts_of(optimizer)
        self._model = model
        self._main_params = dict(main_params or {})
        self._options = OptimizerOptions() if options is None else options
        if not isinstance(self._options, OptimizerOptions):
            raise BadArgumentError(f"options must be OptimizerOptions, not {type(options).__name__}")
        self.report = OptimizerReport()
        self._slots()

    def _slots(self) -> dict[str, list[Slot]]:
        """The parameters of all optimizers, found anew: models and optimizers may have changed."""
        finder = ParamFinder(self._model, self._main_params)
        found = {
            name: finder.slots(part, f"optimizer {name!r}" if name else "the optimizer") for name, part in self._parts.items()
        }
        check_one_owner(found)
        return found

    def state_dict(self) -> Tree:
        """The state under the name "optimizer"."""
        return self.state_at("optimizer")

    def state_at(self, place: str) -> Tree:
        """The state; its leaves share memory with that of the optimizers."""
        trees: dict[str, Tree] = {}
        report = OptimizerReport()
        for name, slots in self._slots().items():
            where = _within(place, name)
            trees[name], said = describe_optimizer(self._parts[name], slots, where, self._options)
            report += said
        self.report = report
        return trees.get("", trees)

    def state_for_load(self, place: str, stored: StoredNames) -> Tree:
        """What is wanted of a checkpoint.

        Raises:
            MismatchError: state cannot be cut as parameters are now, or parameters of one group were in different ones.
        """
        trees: dict[str, Tree] = {}
        keep = self._options.on_group_conflict == "keep"
        for name, slots in self._slots().items():
            optimizer = self._parts[name]
            wanted = want_optimizer(optimizer, slots, _within(place, name), stored, self._options)
            members: list[dict[str, str]] = [{} for _ in optimizer.param_groups]
            for slot, digest in zip(slots, wanted.digests, strict=True):
                if digest is not None:
                    members[slot.group][slot.names[0].place] = digest
            # Raises before anything is loaded where groups do not fit.
            plan_groups(optimizer.param_groups, members, wanted.groups, keep_conflicts=keep)
            trees[name] = wanted.tree
        return trees.get("", trees)

    def load_state_dict(self, state_dict: Tree) -> None:
        """Take over what `load` loaded. Called by `load`.

        Raises:
            BadArgumentError: it is a state dict that was not loaded, of this class or of torch's optimizers.
        """
        report = OptimizerReport()
        held = [*flatten(state_dict).values()]
        of_torch = isinstance(state_dict.get("param_groups"), list)
        if any(isinstance(leaf, ShardedObject) for leaf in held) or of_torch:
            raise BadArgumentError(
                "OptimizerState.load_state_dict takes what giantstep.load has loaded. Pass the OptimizerState to load as a "
                "leaf of its state dict."
            )
        for name, slots in self._slots().items():
            tree = state_dict.get(name, {}) if name else state_dict
            report += Restorer(self._parts[name], slots, tree, self._options).restore()
        self.report = report


def _within(place: str, name: str) -> str:
    return f"{place}.{name}" if name else place


def _parts_of(optimizer: Any) -> dict[str, Any]:
    """Optimizers by name; a single one has the name ""."""
    if isinstance(optimizer, Mapping):
        parts = {str(name): part for name, part in optimizer.items()}
        if len(parts) < len(optimizer):
            raise BadArgumentError(f"optimizers {list(optimizer)} have names that are the same text: give each its own")
    elif isinstance(optimizer, Sequence) and not isinstance(optimizer, str):
        parts = {str(number): part for number, part in enumerate(optimizer)}
    else:
        parts = {"": optimizer}
    for name, part in parts.items():
        if not (hasattr(part, "param_groups") and hasattr(part, "state")) or (not name and len(parts) > 1):
            raise BadArgumentError(
                f"optimizer {name!r} is a {type(part).__name__}: expected one with param_groups and state, as those of "
                "torch.optim, and a name if there are several"
            )
    return parts
