"""`describe`: the one entry of stage 1. Sorts the leaves of a state dict into tensors and common state.

Nothing after this module knows of ShardedTensor, DTensor, flatness or strides: only regions, each with a view of
the memory that holds (or will hold) it. Called by `save` and `load`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from giantstep.errors import BadArgumentError
from giantstep.mapping.dtensor import DTensorReader
from giantstep.mapping.sharded_tensor import ShardedTensor, is_main_replica
from giantstep.mapping.tree import DROPPED, Tree, map_leaves, prune
from giantstep.planning.description import COPY, IMPLICIT, MAIN
from giantstep.shards.dtypes import DType, dtype_of_torch_name
from giantstep.shards.paths import Path, dotted
from giantstep.shards.region import Region, check_shape


@dataclass(slots=True)
class TensorLeaf:
    """One tensor of the state dict, as regions of its global tensor.

    Attributes:
        path: where it stands in the state dict.
        key, dtype, global_shape: the global tensor.
        source: the user's object.
        role: MAIN, COPY (explicit replica ids) or IMPLICIT (holders of one region are found by comparing).
        mesh: for IMPLICIT shards, the set of ranks within which equality is guaranteed; 0 for none.
        pieces: (region, view) pairs; the views are None where memory is still to be allocated.
        allow_shape_mismatch: see `ShardedTensor`.
    """

    path: Path
    key: str
    dtype: DType
    global_shape: tuple[int, ...]
    source: Any
    role: int
    mesh: int = 0
    mesh_size: int = 1
    pieces: list[tuple[Region, torch.Tensor | None]] = field(default_factory=list)
    allow_shape_mismatch: bool = False

    def allocate(self) -> None:
        """Give memory to a leaf that has none, on the CPU; `result` is then the new tensor."""
        absent = isinstance(self.source, ShardedTensor) and self.source.data is None
        if not absent and all(view is not None for _, view in self.pieces):
            return
        kind = getattr(torch, self.dtype.torch_name)
        if isinstance(self.source, ShardedTensor):
            self.source = ShardedTensor(
                **{name: getattr(self.source, name) for name in _SHARDED_FIELDS if name != "data"},
                data=torch.empty(self.source.data_shape(), dtype=kind, device="cpu"),
            )
            self.pieces = [*self.source.pieces(_data(self.source))]
        elif isinstance(self.source, DTensor):
            local = torch.empty_like(self.source._local_tensor, device=self.source.device_mesh.device_type)
            self.source = DTensor.from_local(
                local,
                self.source.device_mesh,
                self.source.placements,
                run_check=False,
                shape=self.source.shape,
                stride=self.source.stride(),
            )
            self.pieces = [*DTensorReader().shard(self.key, self.source).pieces]
        else:
            self.source = torch.empty(self.global_shape, dtype=kind, device="cpu")
            self.pieces = [(Region.whole(self.global_shape), self.source)]

    @property
    def result(self) -> Any:
        """What stands at `path` after loading: the local tensor of a ShardedTensor, else the tensor itself."""
        return self.source.data if isinstance(self.source, ShardedTensor) else self.source


_SHARDED_FIELDS = tuple(ShardedTensor.__dataclass_fields__)


def _data(tensor: ShardedTensor) -> torch.Tensor:
    if tensor.data is None:
        raise BadArgumentError(f"tensor {tensor.key!r} has no data")
    return tensor.data


@dataclass(frozen=True, slots=True)
class Described:
    """A state dict taken apart.

    Attributes:
        leaves: its tensors, in the order of the state dict.
        common: the state dict without tensors (see `tree.prune`); an empty dict if nothing is left.
        tree: the state dict with Stateful objects replaced by their state dicts.
        statefuls: (path, object) of those; inner ones before outer ones.
    """

    leaves: list[TensorLeaf]
    common: Tree
    tree: Tree
    statefuls: list[tuple[Path, Any]]


def describe(state_dict: Any, *, for_load: bool) -> Described:
    """Take a state dict apart.

    Args:
        state_dict: nested dicts and lists; see `giantstep.save`.
        for_load: tensors without memory (None, meta) are allowed; `TensorLeaf.allocate` gives it to them.

    Raises:
        BadArgumentError: a leaf cannot be described; names its path or key.
    """
    if not isinstance(state_dict, dict):
        raise BadArgumentError(f"state_dict must be a dict, not {type(state_dict).__name__}")
    statefuls: list[tuple[Path, Any]] = []
    tree = _expand(state_dict, statefuls, ())
    leaves: list[TensorLeaf] = []
    reader = DTensorReader()

    def sort(path: Path, leaf: Any) -> Any:
        if isinstance(leaf, ShardedTensor):
            leaves.append(_sharded_leaf(path, leaf, for_load))
        elif isinstance(leaf, DTensor):
            leaves.append(_dtensor_leaf(path, leaf, reader, for_load))
        elif isinstance(leaf, torch.Tensor):
            leaves.append(_plain_leaf(path, leaf, for_load))
        else:
            return leaf
        return DROPPED

    common = prune(map_leaves(tree, sort))
    _check_keys(leaves)
    return Described(leaves, {} if common is DROPPED else common, tree, statefuls)


def _expand(tree: Tree, statefuls: list[tuple[Path, Any]], path: Path) -> Tree:
    def replace(where: Path, leaf: Any) -> Any:
        is_stateful = callable(getattr(leaf, "state_dict", None)) and callable(getattr(leaf, "load_state_dict", None))
        if not is_stateful or isinstance(leaf, torch.Tensor | type):
            return leaf
        inner = _expand(leaf.state_dict(), statefuls, where)
        statefuls.append((where, leaf))
        return inner

    return map_leaves(tree, replace, path)


def _check_view(view: torch.Tensor, key: str, for_load: bool) -> torch.Tensor | None:
    if view.layout != torch.strided:
        raise BadArgumentError(
            f"tensor {key!r} has layout {view.layout}: expected a dense (strided) one. Save its parts as tensors of their own."
        )
    if view.device.type == "meta":
        if for_load:
            return None
        raise BadArgumentError(f"tensor {key!r} is on the meta device and has no values to save")
    if (
        for_load
        and 0 in view.stride()
        and any(stride == 0 and size > 1 for stride, size in zip(view.stride(), view.shape, strict=True))
    ):
        raise BadArgumentError(f"tensor {key!r} is expanded: several of its elements share memory, so it cannot be loaded into")
    return view.detach()


def _sharded_leaf(path: Path, tensor: ShardedTensor, for_load: bool) -> TensorLeaf:
    tensor.validate()
    role = MAIN if is_main_replica(tensor.replica_id) else COPY
    leaf = TensorLeaf(path, tensor.key, dtype_of_torch_name(str(tensor.dtype)), tensor.global_shape, tensor, role)
    leaf.allow_shape_mismatch = tensor.allow_shape_mismatch
    if tensor.data is None:
        if not for_load:
            raise BadArgumentError(f"tensor {tensor.key!r} has no data to save: data is None")
        stand_in = torch.empty(tensor.data_shape(), dtype=tensor.dtype, device="meta")
        leaf.pieces = [(region, None) for region, _ in tensor.pieces(stand_in)]
    else:
        leaf.pieces = [
            (region, _check_view(view, tensor.key, for_load)) for region, view in tensor.pieces(tensor.data.detach())
        ]
    return leaf


def _dtensor_leaf(path: Path, tensor: DTensor, reader: DTensorReader, for_load: bool) -> TensorLeaf:
    key = dotted(path)
    dtype = dtype_of_torch_name(str(tensor.dtype))
    shape = check_shape(tuple(tensor.shape), f"tensor {key!r}")
    shard = reader.shard(key, tensor)
    pieces = [(region, _check_view(view, key, for_load)) for region, view in shard.pieces]
    return TensorLeaf(path, key, dtype, shape, tensor, IMPLICIT, shard.mesh, shard.mesh_size, pieces)


def _plain_leaf(path: Path, tensor: torch.Tensor, for_load: bool) -> TensorLeaf:
    key = dotted(path)
    dtype = dtype_of_torch_name(str(tensor.dtype))
    shape = check_shape(tuple(tensor.shape), f"tensor {key!r}")
    view = _check_view(tensor, key, for_load)
    return TensorLeaf(path, key, dtype, shape, tensor, IMPLICIT, pieces=[(Region.whole(shape), view)])


def _check_keys(leaves: Sequence[TensorLeaf]) -> None:
    """One key has one meaning on this rank, and only ShardedTensors may share a key."""
    first: dict[str, TensorLeaf] = {}
    for leaf in leaves:
        try:
            leaf.key.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadArgumentError(f"tensor key {leaf.key!r} is not valid Unicode: {error}") from error
        if not leaf.key:
            raise BadArgumentError(f"tensor at path {leaf.path} has an empty key")
        other = first.setdefault(leaf.key, leaf)
        if other is leaf:
            continue
        if IMPLICIT in (leaf.role, other.role):
            raise BadArgumentError(f"two tensors of the state dict have the key {leaf.key!r}: at {other.path} and {leaf.path}")
        if (leaf.dtype, leaf.global_shape) != (other.dtype, other.global_shape):
            raise BadArgumentError(
                f"tensor {leaf.key!r} is {other.dtype.name} {other.global_shape} at {dotted(other.path)!r} and "
                f"{leaf.dtype.name} {leaf.global_shape} at {dotted(leaf.path)!r}"
            )
