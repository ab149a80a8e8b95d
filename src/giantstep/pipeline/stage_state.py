"""`describe_stage`: the tensors of a pipeline stage as shards of the whole model: global names, and who writes what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from giantstep.errors import BadArgumentError
from giantstep.mapping.factory import ShardedTensorFactory
from giantstep.mapping.replica import ReplicaId, check_replica_id
from giantstep.mapping.sharded_object import ShardedObject
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.pipeline.layout import PipelineLayout, Place
from giantstep.pipeline.names import MTP_PREFIX, PREFIX, LayerNames


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNames:
    """Names in a stage's state dict. The defaults are those of a GPT of Megatron-Core.

    Attributes:
        layers, mtp: what names of decoder and of MTP layers begin with.
        embedding, output: the weights of the embedding and of the output layer.
        tied: they are one weight: the last stage's copy is a replica of the first's, under the embedding's key.
    """

    layers: str = PREFIX
    mtp: str = MTP_PREFIX
    embedding: str = "embedding.word_embeddings.weight"
    output: str = "output_layer.weight"
    tied: bool = False


_MEGATRON = ModelNames()


def describe_stage(
    state: Mapping[str, Any],
    layout: PipelineLayout,
    rank: int,
    virtual: int = 0,
    *,
    names: ModelNames = _MEGATRON,
    replica_id: ReplicaId = 0,
) -> dict[str, Any]:
    """The state dict of a pipeline stage as it is to be given to `save` and `load`.

    Layers are named by their global index. Plain tensors become `ShardedTensor`s that are whole. Of `ShardedTensor`s,
    factories and `ShardedObject`s the key is changed in the same way; it must have the stage's name of the layer (or of the
    embedding) in it, as `exp_avg.decoder.layers.0.mlp.weight` has. What else there is stays as it is. Tensors are shared
    with `state`, so loading fills them.

    Describe each of a rank's virtual stages, and give each a place of its own in the state dict, such as its number: two of
    them may hold copies of the embedding under one name. Keys decide what is stored, not these places.

    Args:
        state: by name, as the stage counts its layers.
        layout: of the pipeline.
        rank, virtual: the stage.
        names: where layers, embedding and output layer are.
        replica_id: of plain tensors: 0 (or zeros) on one of the ranks that hold the same stage, such as the data-parallel
            rank. `ShardedTensor`s and factories have their own.

    Returns:
        By global name. To give the loaded state to the stage's module, use `localise`.

    Raises:
        BadArgumentError: a name is none of this stage's, or a key does not belong to its name.
    """
    check_replica_id(replica_id, "describe_stage")
    layers = LayerNames(names.layers, names.mtp)
    layers.check_prefix(state, layout, rank, virtual)
    found: dict[str, Any] = {}
    for name, value in state.items():
        there = layers.global_name(name, layout, rank, virtual)
        if isinstance(value, torch.Tensor):
            value = ShardedTensor.from_rank_offsets(name, value, replica_id=replica_id)  # noqa: PLW2901
        if not isinstance(value, ShardedTensor | ShardedTensorFactory | ShardedObject):
            found[there] = value
            continue
        old, new, copy = layers.layer_of(name), layers.layer_of(there), 0
        if name in (names.embedding, names.output):
            old = name
            new, copy = _stored_embedding(name, layout, (rank, virtual), names, state)
        own = (value.replica_id,) if isinstance(value.replica_id, int) else value.replica_id
        key = _renamed(value.key, name, old, new) if old else value.key
        found[there] = replace(value, key=key, replica_id=(*own, copy) if copy else value.replica_id)
    return found


def _stored_embedding(
    name: str, layout: PipelineLayout, place: Place, names: ModelNames, state: Mapping[str, Any]
) -> tuple[str, int]:
    """Of embedding and output layer: the key, and which of several copies in the pipeline this one is; 0 is written."""
    if name == names.embedding:
        return name, _number(name, place, layout.embedding_holders(tied=names.tied), layout)
    if not names.tied:
        return name, _number(name, place, layout.loss_places, layout)
    number = _number(name, place, layout.embedding_holders(tied=True), layout)
    # Where the stage has the weight twice, the embedding is the one that counts.
    return names.embedding, number + len(layout.stages) if names.embedding in state else number


def _number(name: str, place: Place, holders: tuple[Place, ...], layout: PipelineLayout) -> int:
    if place not in holders:
        where = ", ".join(f"rank {rank} stage {virtual}" for rank, virtual in holders)
        raise BadArgumentError(
            f"{name!r} on rank {place[0]}, virtual stage {place[1]}: in the layout '{layout}' it is held by {where}. Correct "
            "the layout, or leave it out on other stages."
        )
    return holders.index(place)


def _renamed(key: str, name: str, old: str, new: str) -> str:
    """The key with the steps `new` in place of `old`, which it has once."""
    steps = rf"(?<![^.]){re.escape(old)}(?![^.])"
    if len(re.findall(steps, key)) != 1:
        raise BadArgumentError(
            f"{name!r} is described with the key {key!r}, in which {old!r} is to become {new!r}: expected it there once"
        )
    return re.sub(steps, lambda _: new, key)
