"""What rank 0 does for a save, call by call: messages come in over the tree, are decoded, planned, answered, sent out."""

from __future__ import annotations

from collections.abc import Sequence

from giantstep.format.index import Index
from giantstep.format.record import FileEntry
from giantstep.group.bundle import Buffer, Bundle, from_wire
from giantstep.group.tree import Tree
from giantstep.options import SaveOptions
from giantstep.planning.description import Description, decode_descriptions
from giantstep.planning.index_plan import WriteReport, build_index
from giantstep.planning.reuse import PLAN_ID_BYTES, all_as_before, token
from giantstep.planning.save_plan import SavePlan, plan_save

Parts = tuple[bytes, ...]

_OPTIONS = SaveOptions()
# Ranks that report to one rank, level by level, as `TorchGroup` does it.
_FANOUT = 8


def arriving(messages: Sequence[Parts]) -> list[list[Buffer]]:
    """What rank 0's children in the tree send it: a bundle each, for themselves and all below them."""
    tree = Tree(len(messages), _FANOUT)
    spans = [tree.span(child) for child in tree.children(0)]
    return [Bundle.of(messages[span.start : span.stop]).to_wire() for span in spans]


def gathered(own: Parts, wires: Sequence[Sequence[Buffer]]) -> list[Parts]:
    """Everybody's message, from rank 0's and those that arrived. Equal parts are one object."""
    bundles = []
    for wire in wires:
        buffers = iter(wire)
        bundles.append(from_wire(lambda _size, buffers=buffers: bytes(next(buffers))))
    return Bundle.join([Bundle.of([own]), *bundles]).messages()


def gathered_alone(messages: Sequence[Parts]) -> list[Parts]:
    """Everybody's message, equal parts being one object, without the way over the tree."""
    return Bundle.of(messages).messages()


def decoded(reports: Sequence[Parts]) -> list[Description]:
    """What ranks say of their shards."""
    return decode_descriptions(reports)


def planned(descriptions: Sequence[Description]) -> SavePlan:
    """The plan, checks included, with the settings that `save` has by itself."""
    return plan_save(descriptions, split_bytes=_OPTIONS.split_bytes, max_chunk_bytes=_OPTIONS.max_file_bytes)


def answers(plan: SavePlan, descriptions: Sequence[Description]) -> list[Parts]:
    """What every rank is to be told."""
    return [part.encode() for part in plan.parts(descriptions)]


def leaving(messages: Sequence[Parts]) -> list[list[Buffer]]:
    """What rank 0 sends to its children in the tree."""
    tree = Tree(len(messages), _FANOUT)
    whole = Bundle.of(messages)
    spans = [tree.span(child) for child in tree.children(0)]
    return [whole.cut(span.start, span.stop).to_wire() for span in spans]


def tokens(plan: SavePlan, descriptions: Sequence[Description]) -> list[Parts]:
    """What ranks report when they find that they hold what they held when the plan was made."""
    plan_id = bytes(PLAN_ID_BYTES)
    return [
        (token(plan_id, found.object_keys, part.weights, found.object_digest),)
        for part, found in zip(plan.parts(descriptions), descriptions, strict=True)
    ]


def used_again(own: Parts, wires: Sequence[Sequence[Buffer]]) -> list[list[Buffer]]:
    """What rank 0 does with such reports: agree that the plan holds, and say so to all."""
    reports = gathered(own, wires)
    if not all_as_before([report for (report,) in reports]):
        raise ValueError("the plan should hold, but rank 0 found that it does not")
    return leaving([(b"H",)] * len(reports))


def indexed(plan: SavePlan, reports: Sequence[Parts]) -> tuple[Index, tuple[FileEntry, ...]]:
    """The index, from what every rank reports to have written."""
    return build_index(plan, [WriteReport.decode(report) for report in reports])


def message_bytes(messages: Sequence[Sequence[Buffer]]) -> int:
    """Bytes of all of them."""
    return sum(len(part) for message in messages for part in message)
