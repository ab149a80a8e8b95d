"""What a checkpoint holds, as requests that `load` can fill, without reading tensor data; and all of it as plain tensors.

The functions named `load_*` of the field. Those that read only metadata need no process group and may be called by
one process; `load_plain_tensors` is collective. Looking at values without torch is `opening`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import DisagreementError, GiantstepError, StoreError, UnsupportedTypeError
from giantstep.format.record import Json
from giantstep.group.base import consult
from giantstep.group.torch_group import group_of
from giantstep.loading import load
from giantstep.mapping.sharded_object import ShardedObject
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.options import LoadOptions, StrictHandling
from giantstep.reading.checkpoint import Checkpoint, TensorInfo
from giantstep.shards.object_keys import position_of
from giantstep.storage.locate import StoreLike, store_at
from giantstep.storage.record_file import read_record


def load_tensors_metadata(path: StoreLike) -> dict[str, ShardedTensor]:
    """All tensors of a checkpoint by key, whole and without data.

    Every shard spans its tensor: the result, or part of it, is a state dict with which `load` allocates and
    fills them on the CPU.

    Args:
        path: a directory, a `file://` or `memory://` URL, or a `Store`.

    Raises:
        OpenError: there is no committed checkpoint at the path, or it is of a newer major version.
        CorruptionError: commit record or index are not what was written.
        UnsupportedTypeError: a tensor has a dtype that this version of torch lacks.
        StoreError: a storage operation failed.
    """
    with _opened(path) as checkpoint:
        return _tensors_of(checkpoint)


def load_sharded_metadata(path: StoreLike) -> dict[str, ShardedTensor | ShardedObject]:
    """As `load_tensors_metadata`, with all sharded objects by their unique key, without data.

    The common state is not among them, nor are objects that only describe stored tensors.

    Args:
        path: as for `load_tensors_metadata`.

    Raises:
        DisagreementError: a tensor has the unique key of an object; `load_tensors_metadata` still works.
        Others: as `load_tensors_metadata`.
    """
    with _opened(path) as checkpoint:
        found: dict[str, ShardedTensor | ShardedObject] = {**_tensors_of(checkpoint)}
        for key in checkpoint.object_keys():
            if position_of(key) is None:
                continue
            if key in found:
                raise DisagreementError(
                    f"{checkpoint.location} holds both a tensor and a sharded object named {key!r}; "
                    "load_tensors_metadata gives the tensors alone"
                )
            found[key] = ShardedObject.empty_from_unique_key(key)
    return found


def load_common_state_dict(path: StoreLike) -> dict[Any, Any]:
    """The common state: what was saved of a state dict besides tensors and sharded objects; empty if nothing was.

    Args:
        path: as for `load_tensors_metadata`.

    Raises:
        As `load_tensors_metadata`.
    """
    with _opened(path) as checkpoint:
        common: dict[Any, Any] = checkpoint.common
    return common


def load_content_metadata(path: StoreLike) -> Json:
    """The `content_metadata` given to `save`; None if none was.

    Args:
        path: as for `load_tensors_metadata`.

    Raises:
        As `load_tensors_metadata`.
    """
    with _opened(path) as checkpoint:
        return checkpoint.content_metadata


def load_plain_tensors(
    path: StoreLike, *, process_group: Any = None, options: LoadOptions | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by key, each whole and on the CPU of every rank.

    Collective: every rank of the group calls it with the same path and options.

    Args:
        path: as for `load`.
        process_group: as for `load`.
        options: as for `load`.

    Raises (the same on all ranks):
        As `load`, and UnsupportedTypeError as `load_tensors_metadata`.
        StoreError: besides, if another checkpoint was saved to the path during the call.
    """
    settings = options if isinstance(options, LoadOptions) else LoadOptions()
    wanted: dict[str, ShardedTensor] = {}

    def look() -> bytes:
        with _opened(path) as checkpoint:
            wanted.update(_tensors_of(checkpoint))
            return checkpoint.record.save_id.encode("ascii")

    def agree(save_ids: Sequence[bytes]) -> list[bytes]:
        if len(set(save_ids)) != 1:
            raise _overwritten(path)
        return list(save_ids)

    save_id = consult(group_of(process_group), "open", settings.timeout_secs, look, agree).decode("ascii")
    # The request is all tensors; what else the checkpoint holds is not asked for.
    everything = replace(settings, unknown_types="keep") if isinstance(options, LoadOptions | None) else options
    loaded = load(wanted, path, strict=StrictHandling.IGNORE_ALL, process_group=process_group, options=everything)
    if loaded.report.save_id != save_id:
        raise _overwritten(path)
    return {key: loaded[key] for key in wanted}


def _overwritten(path: StoreLike) -> StoreError:
    return StoreError(f"another checkpoint was saved to {path} while it was being loaded. Load again.")


@contextmanager
def _opened(path: StoreLike) -> Iterator[Checkpoint]:
    """The checkpoint; what the system says against reading it becomes an error of ours."""
    store = store_at(path)
    try:
        yield Checkpoint(store, read_record(store), OBJECT_CODEC)
    except GiantstepError:
        raise
    except OSError as error:
        raise StoreError(f"{store.location} cannot be read: {error}") from error


def _tensors_of(checkpoint: Checkpoint) -> dict[str, ShardedTensor]:
    return {info.key: _whole(info, checkpoint.location) for info in checkpoint.infos()}


def _whole(info: TensorInfo, location: str) -> ShardedTensor:
    dtype = getattr(torch, info.dtype, None)
    if dtype is None:
        raise UnsupportedTypeError(
            f"tensor {info.key!r} of {location} has dtype {info.dtype}, which torch {torch.__version__} lacks: upgrade torch"
        )
    dims = len(info.shape)
    return ShardedTensor(info.key, None, dtype, info.shape, info.shape, (0,) * dims, (1,) * dims)
