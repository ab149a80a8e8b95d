"""`async_save`: describe and copy in the caller's thread, everything else in the background.

state -describe-> leaves -agree-> nobody is in the way -Snapshot-> copies -(background) as in `save`-> checkpoint

The background works on copies alone: of tensors by `Snapshot`, of objects as encoded bytes, so that it stores what `save`
would have stored at the time of the call.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from giantstep.codecs import OBJECT_CODEC
from giantstep.collection import uncollected
from giantstep.errors import BadArgumentError, CancelledError, GiantstepError, error_from_wire, error_to_wire
from giantstep.format.record import Json
from giantstep.group.base import Group, Parts, consult_parts
from giantstep.group.faults import ended
from giantstep.group.torch_group import group_of
from giantstep.mapping.describe import Described, StoredObject
from giantstep.mapping.leaves import TensorLeaf
from giantstep.mapping.overlap import memory_of
from giantstep.mapping.sharded_tensor import ShardedTensor
from giantstep.mapping.torch_sharded import is_torch_sharded
from giantstep.options import SaveOptions, threads_for
from giantstep.pending import PendingSave
from giantstep.phases import same_call, with_call
from giantstep.planned_save import Subject
from giantstep.reports import SaveReport
from giantstep.saver import Saver, Work, check_not_ending, line_up, saver_of
from giantstep.saving import Save
from giantstep.shards.paths import dotted
from giantstep.staging.snapshot import Layout, Snapshot, lay_out
from giantstep.storage.locate import StoreLike

_GO, _FAILED = b"G", b"F"


def async_save(
    state_dict: dict[Any, Any],
    path: StoreLike,
    *,
    process_group: Any = None,
    options: SaveOptions | None = None,
    content_metadata: Json = None,
    metrics: Mapping[str, float] | None = None,
) -> PendingSave:
    """Begin to save the state of all ranks; return once it is handed off. The rest goes on in the background.

    What is stored is the state at the time of the call. With the defaults, tensors in host memory and all other values may
    change as soon as it returns; tensors on CUDA devices, and with `SaveOptions(staging="background")` all tensors, once
    `PendingSave.wait_staged` returns (see `PendingSave.guard`). The call waits while `SaveOptions.max_pending` saves are
    unfinished; saves of one group are carried out in the order of the calls.

    Collective: every rank of the group calls it with the same path and options. Nobody needs to do anything until the
    checkpoint is committed: a thread of this process sees to it.

    Args:
        state_dict, path, process_group, content_metadata, metrics: as for `save`.
        options: see `SaveOptions`.

    Returns:
        The handle. A failure of the save is raised by its `result`; at the latest by the next `async_save` of the group or
        by `finish_saves`, and logged at the end of the interpreter.

    Raises (the same on all ranks):
        BadArgumentError, UnsupportedTypeError, DisagreementError: as `save`. Nothing was begun.
        GiantstepError: an earlier save of the group failed, and no call has told so far (`SaveOptions.on_error`). Its
            checkpoint was not committed, and this save was not begun; the next call begins one.
        PeerError: a rank died or did not call in time.
    """
    group = group_of(process_group)
    run = _AsyncSave(group, state_dict, path, process_group, options, content_metadata, metrics)
    return run.begin()


class _AsyncSave:
    """One asynchronous save on one rank."""

    def __init__(
        self,
        group: Group,
        state_dict: dict[Any, Any],
        path: StoreLike,
        process_group: Any,
        options: SaveOptions | None,
        metadata: Json,
        metrics: Mapping[str, float] | None,
    ) -> None:
        self._group = group
        self._saver: Saver = saver_of(group)
        self._save = Save(state_dict, path, process_group, options, metadata, metrics)
        self._options = self._save.options

    # In the caller's thread.

    def begin(self) -> PendingSave:
        """Hand off."""
        watch = self._save.watch
        try:
            with watch.phase("wait"):
                self._wait()
            with uncollected(), watch.phase("describe"):
                (kind, answer) = self._agree()
        except GiantstepError as fault:
            if not fault.agreed:
                # Other ranks may have heard that all can begin.
                self._saver.give_up(fault)
            raise
        except BaseException as error:
            self._saver.give_up(ended(error, self._group.rank, "describe"))
            raise
        if kind == _FAILED:
            self._raise_failure(answer)
        self._number = int(answer)
        with uncollected(), watch.phase("stage"):
            warns = self._options.on_error == "warn"
            return self._saver.submit(self._number, self._save.location, self._stage, self._failed, warns=warns)

    def _wait(self) -> None:
        try:
            self._saver.wait_for(lambda unfinished: unfinished < self._options.max_pending)
        except BaseException as error:
            # An interrupt: the others must not wait for this rank.
            self._group.withdraw(ended(error, self._group.rank, "describe"))
            raise

    def _agree(self) -> Parts:
        """The one agreement in the caller's thread: all ranks can begin, and no earlier save failed unnoticed.

        Returns whether it is so, and the number of this save or the failure.
        """
        return consult_parts(self._group, "describe", self._options.timeout_secs, self._describe, self._decide)

    def _raise_failure(self, wire: bytes) -> None:
        failure = json.loads(wire)
        self._saver.tell_until(failure["number"])
        error = error_from_wire(failure["error"])
        error.add_note(
            f"This is what an earlier asynchronous save failed with, that to {failure['location']}: it was not committed. "
            "The save that was to begin now was not begun."
        )
        raise error

    def _describe(self) -> Parts:
        check_not_ending()
        self._save.describe(self._group)
        self._take_apart(self._save.described)
        limit = self._options.staging_bytes
        if limit is not None and self._layout.bytes > limit:
            raise BadArgumentError(
                f"staging_bytes={limit} is not enough: copies of this rank's tensors take {self._layout.bytes} bytes. Allow "
                "more, or call save, which needs no copies."
            )
        failure = self._saver.first_failure()
        call = self._save.call("async_save")
        if failure is None:
            return with_call(call)
        wire = {"number": failure.number, "location": failure.location, "error": error_to_wire(failure.error)}
        return with_call(call, json.dumps(wire).encode("ascii"))

    def _decide(self, reports: Sequence[Parts]) -> list[Parts]:
        failures = [report[0] for report in same_call(reports) if report]
        if not failures:
            self._saver.number += 1
            return [(_GO, str(self._saver.number).encode("ascii"))] * len(reports)
        first = min(failures, key=lambda failure: int(json.loads(failure)["number"]))
        return [(_FAILED, first)] * len(reports)

    def _take_apart(self, described: Described) -> None:
        """Note the tensors, and encode all objects, also those that this rank will not write but compare."""
        self._tensors = [view for view in described.views if view is not None]
        self._layout: Layout = self._saver.layout_of(described.outline, lambda: lay_out(self._tensors, memory_of))
        self._encoded = {
            name: self._save.objects.get(name) or OBJECT_CODEC.encode(item.value, item.path)
            for name, item in described.stored.items()
        }

    def _has_memory(self, _unfinished: int) -> bool:
        limit = self._options.staging_bytes
        return limit is None or self._saver.memory.taken_bytes + self._layout.bytes <= limit

    def _stage(self, pending: PendingSave) -> tuple[Work, Callable[[], None]]:
        """Copy, or begin to; what is to be done in the background, and what instead if it is not."""
        self._saver.wait_for(self._has_memory)
        memory, limit = self._saver.memory, self._options.staging_bytes
        if limit is not None and memory.held_bytes + self._layout.bytes > limit and not memory.has_free(self._layout.bytes):
            # What is free but too small would come on top.
            memory.clear()
        described, tensors, self._tensors = self._save.described, self._tensors, []
        later = self._options.staging == "background"
        threads = threads_for(self._options.writer_threads, self._group.size).memory
        outer = [] if self._layout.is_plain and not later else _outer(described)
        snapshot = Snapshot(tensors, described.names, self._layout, memory, outer=outer, later=later, threads=threads)
        del described, tensors, outer
        if not snapshot.is_on_its_way:
            pending.mark_staged()

        def work(group: Group) -> SaveReport:
            try:
                return self._carry_out(group, lambda: self._staged(snapshot, pending), lambda: _stop_if_cancelled(pending))
            finally:
                snapshot.release()
                self._forget()

        return work, snapshot.release

    def _failed(self, error: GiantstepError) -> Work:
        """The others are in the background already, or will be."""
        self._tensors = []
        self._forget()

        def subject() -> Subject:
            raise error

        return lambda group: self._carry_out(group, subject, lambda: None)

    # In the background.

    def _staged(self, snapshot: Snapshot, pending: PendingSave) -> Subject:
        # Of what is cancelled nobody needs to know whether it was changed.
        _stop_if_cancelled(pending)
        with self._save.watch.phase("stage"):
            snapshot.finish()
        pending.mark_staged()
        _stop_if_cancelled(pending)
        self._save.described = _of_copies(self._save.described, snapshot.copies, self._encoded)
        return self._save.subject("async_save")

    def _carry_out(self, group: Group, subject: Callable[[], Subject], check: Callable[[], None]) -> SaveReport:
        save = self._save
        with save.watch.phase("line up"):
            line_up(group, self._number, self._options.timeout_secs)
        with uncollected(), save.watch.phase("plan"):
            save.plan(group, subject)
        save.compare(check, spared=1)
        with save.watch.phase("write"):
            # The trainer goes on meanwhile.
            save.write_and_commit(check, spared=1)
        with save.watch.phase("clean"):
            removed = save.clean()
        return save.report(removed)

    def _forget(self) -> None:
        """What was saved is not needed by whoever keeps the handle, or an error of the save."""
        self._save.forget()
        self._encoded = {}


def _stop_if_cancelled(pending: PendingSave) -> None:
    if pending.is_cancelled:
        raise CancelledError(f"the save to {pending.location} was cancelled")


def _outer(described: Described) -> list[tuple[str, torch.Tensor]]:
    """Tensors whose changes are counted by themselves, not by the parts that are copied."""
    found = [(name, source) for name, source in described.named_sources() if isinstance(source, torch.Tensor)]
    found += [(dotted(joint.path), joint.value) for joint in described.joints if isinstance(joint.value, torch.Tensor)]
    # A torch ShardedTensor counts nothing; its shards, which are copied, do.
    plain = (torch.Tensor, torch.nn.Parameter)
    return [(name, tensor) for name, tensor in found if type(tensor) not in plain and not is_torch_sharded(type(tensor))]


def _of_copies(described: Described, copies: list[torch.Tensor], encoded: dict[str, bytes]) -> Described:
    """The same state, with copies in the place of what is the caller's."""
    stored = {
        name: StoredObject(OBJECT_CODEC.decode(encoded[name], f"object {name!r}"), item.role, item.path)
        for name, item in described.stored.items()
    }
    if described.outline is not None:
        found = Described((described.outline, _without_data(described.sources), copies), [], [], stored, None, [])
    else:
        left = iter(copies)
        found = Described([_of_copy(leaf, left.__next__) for leaf in described.leaves], [], [], stored, None, [])
    return found


def _without_data(sources: Sequence[Any]) -> list[Any]:
    """What errors about flat ranges need to say where they lie; the tensors are the caller's."""
    declared = [source if isinstance(source, ShardedTensor) else None for source in sources]
    if all(source is None or source.flattened_range is None for source in declared):
        return [None] * len(declared)
    return [None if source is None else _bare(source) for source in declared]


def _bare(source: ShardedTensor) -> ShardedTensor:
    found = copy.copy(source)
    found.data = None
    return found


def _of_copy(leaf: TensorLeaf, next_copy: Callable[[], torch.Tensor]) -> TensorLeaf:
    pieces = [(region, None if view is None else next_copy()) for region, view in leaf.pieces]
    source = leaf.source
    return replace(leaf, pieces=pieces, source=_bare(source) if isinstance(source, ShardedTensor) else None)
