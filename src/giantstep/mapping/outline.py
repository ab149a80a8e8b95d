"""`Outline`: what a state dict looked like, so that the next one that looks the same is not taken apart again.

Everything that `describe` finds besides values and memory is kept: keys, regions, roles, what is common state. Whether it
still holds is seen by comparing all that it follows from: the containers, the classes of the leaves, and of every tensor
shape, dtype, device, strides, what ShardedTensors and DTensors say of themselves, and which tensors begin where
others do. An outline refers to no tensor, mesh or process group of the caller's. Called by `describe`.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch.distributed.tensor import DTensor, _dtensor_spec

from giantstep.mapping.dtensor import DTensorReader
from giantstep.mapping.leaves import Extent, TensorLeaf
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.survey import Survey
from giantstep.mapping.tree import DROPPED, Tree
from giantstep.planning.description import Description
from giantstep.shards.paths import Path
from giantstep.shards.region import Region

Tensors = list[torch.Tensor]
_Views = Callable[[Any], Tensors]
_Template = tuple[Path, str, Extent, list[Region]]

_TENSORS = (torch.Tensor, ShardedTensor)
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_shape, _dtype, _device, _is_cpu = map(operator.attrgetter, ("shape", "dtype", "device", "is_cpu"))
_declared = operator.attrgetter(*(name.name for name in fields(ShardedTensor) if name.name != "data"))
# All that a spec says but the mesh, which is compared by identity: it leads to process groups, and must not be kept.
_placed = operator.attrgetter(*(name.name for name in fields(_dtensor_spec.DTensorSpec) if name.name != "mesh"))
_is_meta, _begin = operator.attrgetter("is_meta"), torch.Tensor.data_ptr
_local, _spec, _mesh, _data = map(operator.attrgetter, ("_local_tensor", "_spec", "mesh", "data"))


class Outline:
    """What a state dict looked like.

    Attributes:
        keys: [shards] key of the tensor that each shard is of; shards as in `Described.views`.
        shards: the same, with dtype and region of each.
        extents: of all tensors.
        structure: what the planner is told of it, once `describing` has worked that out.
    """

    def __init__(self, found: Survey, tree: Tree, leaves: Sequence[TensorLeaf], *, for_load: bool) -> None:
        self._found = Survey(found.containers, [], found.kinds)
        self._for_load = for_load
        self._is = {kind: [held is kind for held in found.kinds] for kind in (DTensor, ShardedTensor)}
        self._is_tensor = [isinstance(leaf, torch.Tensor | ShardedTensor) for leaf in found.leaves]
        # Per leaf, what belongs not to one state dict alone.
        self._templates: list[_Template] = [
            (leaf.path, leaf.key, leaf.extent, [region for region, _ in leaf.pieces]) for leaf in leaves
        ]
        self._remainder = _remainder_of(tree)
        sources = list(itertools.compress(found.leaves, self._is_tensor))
        inner = self._inner(found.leaves)
        self._several = {number: _views_of(leaves[number], sources[number]) for number in _in_parts(leaves, inner)}
        self._inner_kinds = list(map(type, inner))
        self._declared, self._placed = self._statements(found.leaves)
        meshes, self._mesh_of = self._meshes_of(found.leaves)
        self._meshes = [weakref.ref(mesh) for mesh in meshes]
        self._shapes, self._dtypes, self._devices = (list(map(fact, inner)) for fact in (_shape, _dtype, _device))
        self._on_cpu = all(map(_is_cpu, inner))
        self._has_complex = any(dtype.is_complex for dtype in set(self._dtypes))
        self._strides = self._strides_of(inner)
        self._lazy = self._lazy_of(inner)
        self._pattern = _pattern(self._views(sources, inner))
        self.extents = {extent for _, _, extent, _ in self._templates}
        shards = [(key, extent.dtype, region) for _, key, extent, regions in self._templates for region in regions]
        self.keys = [key for key, _, _ in shards]
        self.shards = self.keys, [dtype for _, dtype, _ in shards], [region for _, _, region in shards]
        self.structure: Description | None = None

    def views(self, found: Survey, *, for_load: bool) -> tuple[list[Any], Tensors] | None:
        """The tensors of a state dict, and the parts that are saved or loaded, if it looks as it did; else None."""
        try:
            return self._views_if_alike(found, for_load=for_load)
        except (RuntimeError, TypeError, ValueError):
            # Sparse tensors have no address, nor what else dense ones are asked for; and ShardedTensors may have been given
            # fields that cannot be compared, such as arrays, before they are validated.
            return None

    def _views_if_alike(self, found: Survey, *, for_load: bool) -> tuple[list[Any], Tensors] | None:
        known = self._found
        if for_load is not self._for_load or found.kinds != known.kinds or found.containers != known.containers:
            return None
        inner = self._inner(found.leaves)
        if list(map(type, inner)) != self._inner_kinds or not self._say_the_same(found.leaves):
            return None
        if list(map(_shape, inner)) != self._shapes or list(map(_dtype, inner)) != self._dtypes:
            return None
        devices_differ = not all(map(_is_cpu, inner)) if self._on_cpu else list(map(_device, inner)) != self._devices
        if devices_differ or self._strides_of(inner) != self._strides or self._lazy_of(inner) != self._lazy:
            return None
        sources = list(itertools.compress(found.leaves, self._is_tensor))
        views = self._views(sources, inner)
        return (sources, views) if _pattern(views) == self._pattern else None

    def leaves(self, sources: Sequence[Any], views: Sequence[torch.Tensor]) -> list[TensorLeaf]:
        """The leaves of a state dict that looks so."""
        # Most are detached already, and to say so takes less than to make another tensor.
        detached = [view.detach() if view.requires_grad or type(view) is not torch.Tensor else view for view in views]
        if not self._several:
            columns = zip(self._templates, sources, detached, strict=True)
            return [
                TensorLeaf(path, key, source, extent, [(regions[0], view)])
                for (path, key, extent, regions), source, view in columns
            ]
        left = iter(detached)
        return [
            TensorLeaf(path, key, source, extent, [(region, next(left)) for region in regions])
            for (path, key, extent, regions), source in zip(self._templates, sources, strict=True)
        ]

    def tensor_keys(self) -> list[str]:
        """The key of each leaf that is a tensor."""
        return [key for _, key, _, _ in self._templates]

    def remainder(self, tree: Tree) -> Tree:
        """The tree without dicts, and items of dicts, that hold tensors only; `DROPPED` if nothing is left."""
        return _reduced(tree, self._remainder)

    # What is compared.

    def _inner(self, leaves: list[Any]) -> list[Any]:
        """Per leaf that is a tensor, the one that has the memory; None for a ShardedTensor without."""
        found = list(leaves)
        for kind, inside in ((DTensor, _local), (ShardedTensor, _data)):
            if any(self._is[kind]):
                numbers = itertools.compress(range(len(leaves)), self._is[kind])
                for number, tensor in zip(numbers, map(inside, itertools.compress(leaves, self._is[kind])), strict=True):
                    found[number] = tensor
        return list(itertools.compress(found, self._is_tensor))

    def _statements(self, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        """What ShardedTensors and DTensors say of themselves."""
        declared = list(map(_declared, itertools.compress(leaves, self._is[ShardedTensor])))
        return declared, list(map(_placed, map(_spec, itertools.compress(leaves, self._is[DTensor]))))

    def _say_the_same(self, leaves: list[Any]) -> bool:
        meshes, mesh_of = self._meshes_of(leaves)
        if self._statements(leaves) != (self._declared, self._placed) or mesh_of != self._mesh_of:
            return False
        return all(mesh is held() for mesh, held in zip(meshes, self._meshes, strict=True))

    def _meshes_of(self, leaves: list[Any]) -> tuple[list[Any], list[int]]:
        """The meshes of the DTensors, each once, and per DTensor the first one with the same mesh."""
        meshes = list(map(_mesh, map(_spec, itertools.compress(leaves, self._is[DTensor]))))
        return list({id(mesh): mesh for mesh in meshes}.values()), _first_alike(map(id, meshes), len(meshes))

    def _strides_of(self, inner: Tensors) -> list[tuple[int, ...] | None]:
        """Of tensors that are not contiguous; the others' follow from their shapes."""
        contiguous = list(map(torch.Tensor.is_contiguous, inner))
        if all(contiguous):
            return [None] * len(inner)
        return [None if plain else tensor.stride() for tensor, plain in zip(inner, contiguous, strict=True)]

    def _lazy_of(self, inner: Tensors) -> list[bool]:
        """Whether they are negated or conjugated only when they are read."""
        negative = list(map(torch.Tensor.is_neg, inner))
        return negative + list(map(torch.Tensor.is_conj, inner)) if self._has_complex else negative

    def _views(self, sources: Sequence[Any], inner: Tensors) -> Tensors:
        """Parts with a region each, in order."""
        found: Tensors = []
        start = 0
        for number, views_of in self._several.items():
            found += inner[start:number]
            found += views_of(sources[number])
            start = number + 1
        return found + inner[start:] if start else inner


def outline_of(found: Survey, tree: Tree, leaves: Sequence[TensorLeaf], *, for_load: bool) -> Outline | None:
    """The outline of a state dict that was taken apart; None if it has tensors that an outline cannot be made of.

    Args:
        found, tree: the state dict, without what stands for something else (see `expand`).
        leaves: its tensors.
        for_load: as for `describe`.
    """
    inner = [leaf.source for leaf in leaves]
    for kind, inside in ((DTensor, _local), (ShardedTensor, _data)):
        inner = [inside(tensor) if type(tensor) is kind else tensor for tensor in inner]
    if not set(map(type, inner)) <= _PLAIN or any(map(_is_meta, inner)):
        return None
    return Outline(found, tree, leaves, for_load=for_load)


def _pattern(views: Tensors) -> list[int]:
    """Per view, the first one that begins at the same address."""
    return _first_alike(map(_begin, views), len(views))


def _first_alike(values: Iterable[int], count: int) -> list[int]:
    """Per value, the position of the first one that is equal."""
    first: dict[int, int] = {}
    return list(map(first.setdefault, values, range(count)))


def _in_parts(leaves: Sequence[TensorLeaf], inner: Tensors) -> list[int]:
    """Numbers of the leaves that are not one region each, which is all of their tensor as it is."""
    views = [leaf.pieces[0][1] if len(leaf.pieces) == 1 else None for leaf in leaves]
    first = [tensor if view is None else view for view, tensor in zip(views, inner, strict=True)]
    pairs = zip(map(_shape, first), map(_shape, inner), map(_begin, first), map(_begin, inner), views, strict=True)
    return [number for number, (a, b, begin, other, view) in enumerate(pairs) if view is None or a != b or begin != other]


def _views_of(leaf: TensorLeaf, source: Any) -> _Views:
    """Finds the parts of a tensor that has not one region."""
    if isinstance(source, DTensor):
        # It says where the parts lie, and knows no mesh.
        layout, key = DTensorReader().layout(leaf.key, source), leaf.key
        return lambda tensor: [view for _, view in layout.pieces(key, tensor)]
    return lambda tensor: [view for _, view in tensor.pieces(tensor.data)]


# Of a dict, its items that are not only tensors; of anything else, that it is kept (True) or not (False).
_Remainder = dict[Any, Any] | bool


def _remainder_of(tree: Tree) -> _Remainder:
    if type(tree) in (dict, OrderedDict):
        if tree and all(isinstance(value, _TENSORS) for value in tree.values()):
            return False
        found = {key: _remainder_of(value) for key, value in tree.items()}
        kept = {key: value for key, value in found.items() if value is not False}
        return kept if kept or not tree else False
    return not isinstance(tree, _TENSORS)


def _reduced(tree: Tree, remainder: _Remainder) -> Tree:
    if remainder is False:
        return DROPPED
    if remainder is True:
        return tree
    found = {key: _reduced(tree[key], value) for key, value in remainder.items()}
    return OrderedDict(found) if isinstance(tree, OrderedDict) else found
