"""JSON as a tree that can also say what JSON values cannot: keys twice, NaN, broken UTF-8, text of any kind.

Called by `mutations`. Objects are lists of pairs, so that their keys may repeat; `Raw` is written as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from .steering import Steering

Node = Any

# Larger trees are not changed further: mutants must stay small.
MOST_PLACES = 1_000


@dataclass(frozen=True)
class Raw:
    """Bytes written in place of a value."""

    data: bytes


class Object(list[list[Any]]):
    """A JSON object as a list of [key, value]."""

    def get(self, key: str) -> Node:
        """The first value of a key."""
        return next(value for name, value in self if name == key)

    def put(self, key: str, value: Node) -> None:
        """Replace the first value of a key, or add it."""
        for pair in self:
            if pair[0] == key:
                pair[1] = value
                return
        self.append([key, value])


def parse(text: bytes | str) -> Node:
    """The tree of a JSON text."""
    return json.loads(text, object_pairs_hook=lambda pairs: Object([key, value] for key, value in pairs))


def plain(node: Node) -> Node:
    """A tree made of dicts, lists and tuples as `parse` would give it."""
    return parse(json.dumps(node))


def dump(node: Node, indent: str | None = None, depth: int = 0) -> bytes:
    """The text of a tree; with `indent`, items of objects and lists on lines of their own."""
    if isinstance(node, Raw):
        return node.data
    if not isinstance(node, list):
        return json.dumps(node).encode("ascii")
    is_object = isinstance(node, Object)
    left, right = (b"{", b"}") if is_object else (b"[", b"]")
    if not node:
        return left + right
    between = b"" if indent is None else b"\n" + (indent * (depth + 1)).encode()
    after = b"" if indent is None else b"\n" + (indent * depth).encode()
    items = (
        dump(item[0]) + b": " + dump(item[1], indent, depth + 1) if is_object else dump(item, indent, depth + 1)
        for item in node
    )
    return left + between + (b"," + between).join(items) + after + right


def slots(node: Node) -> Iterator[tuple[list[Any], int]]:
    """Every place of a value below `node`: the list that holds it, and its position there."""
    if isinstance(node, Object):
        for pair in node:
            yield pair, 1
            yield from slots(pair[1])
    elif isinstance(node, list):
        for position, item in enumerate(node):
            yield node, position
            yield from slots(item)


HOSTILE: tuple[Node, ...] = (
    *(None, True, False, "", 0, -1, 1.5, 1e308, [], Object()),
    *(Raw(text) for text in (b"NaN", b"-Infinity", b"1e999", b"-0", b'"\xff\xfe"', b'"\\ud800"', b"", b"nul", b"'x'")),
    Raw(b"[" * 100_000 + b"]" * 100_000),
    Raw(b'{"a":' * 5_000 + b"1" + b"}" * 5_000),
    Raw(b'{"$":"tuple","v":[' * 190 + b"]}" * 190),
    Raw(b'{"$":"tuple","v":[' * 300 + b"]}" * 300),
    Raw(b"9" * 5_000),
    *("../../etc/passwd", "/etc/passwd", "data/../x.safetensors", "\0", "a" * 3_000, "é\U0001f600"),
)


def change_tree(root: list[Any], steering: Steering, words: Sequence[Node]) -> None:
    """One change somewhere in the tree that `root[0]` holds; `words` are values that mean something there."""
    places = [(root, 0), *slots(root[0])]
    if len(places) > MOST_PLACES:
        return
    holder, position = places[steering.below(len(places))]
    value = holder[position]
    operation = steering.below(11)
    if operation == 0:
        holder[position] = deepcopy(steering.pick(HOSTILE))
    elif operation in (1, 2):
        holder[position] = steering.number(value if isinstance(value, int) else 0)
    elif operation == 3:
        other, place = places[steering.below(len(places))]
        holder[position] = deepcopy(other[place])
    elif operation in (4, 5):
        holder[position] = deepcopy(steering.pick(words))
    elif operation == 6:
        holder[position] = (
            [value, deepcopy(value)] if steering.below(2) else Object([["$", deepcopy(steering.pick(words))], ["v", value]])
        )
    elif operation == 7:
        holder[position] = _changed_text(value, steering) if isinstance(value, str) else Raw(steering.blob())
    else:
        _change_items(value, operation, steering, words)


def _changed_text(text: str, steering: Steering) -> str:
    place = steering.below(len(text) + 1)
    return text[:place] + steering.blob(8).decode("latin-1") + text[place + steering.below(3) :]


def _change_items(value: Node, operation: int, steering: Steering, words: Sequence[Node]) -> None:
    """Drop, repeat or rename an item of an object or a list."""
    if not isinstance(value, list) or not value:
        return
    place = steering.below(len(value))
    if operation == 8:
        del value[place]
    elif operation == 9:
        value[place:place] = [deepcopy(value[place]) for _ in range(steering.pick((1, 2, 300)))]
    elif isinstance(value, Object):
        value[place][0] = str(steering.pick(words))
    else:
        value.append(deepcopy(steering.pick(words)))
