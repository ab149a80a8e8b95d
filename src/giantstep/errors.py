"""The one tree of errors that giantstep raises, grouped by what the caller does next.

    GiantstepError
    ├── BadArgumentError            fix the call: a value that can never work
    │   └── UnsupportedTypeError    register or convert an object that cannot be stored
    ├── LayoutError                 fix the sharding: what the ranks describe does not fit together
    │   ├── CoverageError           a gap, an overlap, or a region outside its tensor
    │   └── DisagreementError       one key with two meanings on different ranks
    ├── MismatchError               fix the request or the strictness: the checkpoint holds something else
    │   ├── KeyMismatchError        keys that one side has and the other has not
    │   ├── ShapeMismatchError      same key, another global shape
    │   ├── DtypeMismatchError      same key, another dtype, and casting was not allowed
    │   └── LayoutMismatchError     state that loads only in the layout that saved it, in another one
    ├── OpenError                   choose another path or another version of the library
    │   ├── CheckpointNotFoundError nothing is at the path
    │   ├── NotACheckpointError     something is there, but not a checkpoint
    │   ├── IncompleteError         a save that never committed, or one that lost files
    │   └── VersionError            written by a newer major version of the format
    ├── CorruptionError             restore another copy or an older step: bytes are not what was written
    ├── ChangedTooSoonError         wait until an asynchronous save is staged before tensors are changed
    ├── CancelledError              nothing: a save was cancelled on request
    ├── StoreError                  look at the disk or the network: a storage operation failed
    ├── UnexpectedError             read the traceback: an exception that is none of ours, from an object of the
    │                               caller's or from a mistake in this library
    └── PeerError                   look at another rank
        ├── PeerFailureError        a rank is gone
        └── PhaseTimeoutError       a rank did not report in time

On several ranks everybody raises an error of the same class with the same message, naming the rank and
the phase where it began. Not here: any handling or retrying. Called by every other module.
"""

from __future__ import annotations

import traceback
from typing import Any, ClassVar


class GiantstepError(Exception):
    """Root of the tree.

    Attributes:
        code: stable name of the class, for logs and for the wire between ranks.
        rank: rank on which the error began, or None when it is no particular rank's.
        phase: stage in which it began ("describe", "plan", "write", "commit", "open", "read" ...).
        remote_traceback: traceback of the rank where it began, when that was another one.
        agreed: rank 0 told all ranks of it, so that all raise it and none went on.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, rank: int | None = None, phase: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.rank = rank
        self.phase = phase
        self.remote_traceback: str | None = None
        self.agreed = False

    def __str__(self) -> str:
        where = ", ".join(
            part
            for part in (
                None if self.rank is None else f"rank {self.rank}",
                None if self.phase is None else f"phase {self.phase}",
            )
            if part
        )
        return f"[{where}] {self.message}" if where else self.message


class BadArgumentError(GiantstepError, ValueError):
    """A value that can never work was passed."""

    code = "bad_argument"


class UnsupportedTypeError(BadArgumentError, TypeError):
    """An object whose type the object codec does not know."""

    code = "unsupported_type"


class LayoutError(GiantstepError):
    """What the ranks describe does not fit together."""

    code = "layout"


class CoverageError(LayoutError):
    """Main replicas leave a gap, overlap, or lie outside their global tensor.

    Attributes:
        tensor_key: the tensor; known only where the error is found.
    """

    code = "coverage"
    tensor_key: str | None = None


class DisagreementError(LayoutError):
    """Ranks give one key two meanings: another dtype, global shape, kind or content."""

    code = "disagreement"


class MismatchError(GiantstepError):
    """The request does not fit the checkpoint."""

    code = "mismatch"


class KeyMismatchError(MismatchError, KeyError):
    """Keys that are requested but not stored, or stored but not requested."""

    code = "key_mismatch"

    # KeyError.__str__ would print the message's repr.
    __str__ = GiantstepError.__str__


class ShapeMismatchError(MismatchError):
    """A key is stored with another global shape."""

    code = "shape_mismatch"


class DtypeMismatchError(MismatchError):
    """A key is stored with another dtype, and casting was not allowed."""

    code = "dtype_mismatch"


class LayoutMismatchError(MismatchError):
    """State that loads only in the layout that saved it is requested in another one."""

    code = "layout_mismatch"


class OpenError(GiantstepError):
    """The path cannot be opened as a checkpoint."""

    code = "open"


class CheckpointNotFoundError(OpenError, FileNotFoundError):
    """Nothing is at the path."""

    code = "not_found"


class NotACheckpointError(OpenError):
    """Something is at the path, but no checkpoint."""

    code = "not_a_checkpoint"


class IncompleteError(OpenError):
    """A save that never committed, or a checkpoint that lost files."""

    code = "incomplete"


class VersionError(OpenError):
    """Written by a newer major version of the format."""

    code = "version"


class CorruptionError(GiantstepError):
    """Stored bytes are not the bytes that were written."""

    code = "corruption"


class ChangedTooSoonError(GiantstepError):
    """A tensor was changed while an asynchronous save was still copying it."""

    code = "changed_too_soon"


class CancelledError(GiantstepError):
    """A save was cancelled before it was committed."""

    code = "cancelled"


class StoreError(GiantstepError):
    """A storage operation failed; the cause is chained."""

    code = "store"


class UnexpectedError(GiantstepError):
    """An exception that is none of ours, raised by an object of the caller's or by a mistake in this library."""

    code = "unexpected"


class PeerError(GiantstepError):
    """Another rank is at fault."""

    code = "peer"


class PeerFailureError(PeerError):
    """A rank is gone, or does not speak our language."""

    code = "peer_failure"


class PhaseTimeoutError(PeerError, TimeoutError):
    """A rank did not report in time."""

    code = "phase_timeout"


def _tree(root: type[GiantstepError]) -> list[type[GiantstepError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


def error_classes() -> dict[str, type[GiantstepError]]:
    """All classes of the tree by their `code`."""
    return {found.code: found for found in _tree(GiantstepError)}


def located(error: Exception, rank: int | None, phase: str) -> GiantstepError:
    """The error as one of ours that says where it began.

    An error of ours keeps its class; an `OSError` becomes a `StoreError`; anything else an `UnexpectedError`. The
    original is chained as the cause.
    """
    if isinstance(error, GiantstepError):
        if error.rank is None:
            error.rank = rank
        if error.phase is None:
            error.phase = phase
        return error
    kind = StoreError if isinstance(error, OSError) else UnexpectedError
    ours = kind(f"{type(error).__name__}: {error}", rank=rank, phase=phase)
    ours.__cause__ = error
    return ours


def error_to_wire(error: GiantstepError) -> dict[str, Any]:
    """The error as JSON values, to be sent to other ranks."""
    return {
        "code": error.code,
        "message": error.message,
        "rank": error.rank,
        "phase": error.phase,
        "traceback": error.remote_traceback or "".join(traceback.format_exception(error)),
    }


def error_from_wire(wire: dict[str, Any]) -> GiantstepError:
    """Inverse of `error_to_wire`; the remote traceback is attached as a note."""
    kind = error_classes().get(str(wire.get("code")), GiantstepError)
    error = kind(str(wire.get("message")), rank=wire.get("rank"), phase=wire.get("phase"))
    error.remote_traceback = str(wire.get("traceback", ""))
    if error.remote_traceback:
        # An error of no particular rank was found where decisions are made.
        error.add_note(f"Raised on rank {error.rank or 0}:\n{error.remote_traceback}")
    return error
