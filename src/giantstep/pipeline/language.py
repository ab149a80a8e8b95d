"""The language of layout strings, `Et*3|(tt|)*29,m|L`: a string to stages of symbols, and back. Pure; called by `layout`.

It is that of Megatron-Core's `pipeline_model_parallel_layout`: a symbol per layer, `|` between stages, `x*n` for n times x,
where x may be in parentheses, and commas that mean nothing. Beyond it, parentheses nest and may stand without a number, and
spaces mean nothing either.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from giantstep.errors import BadArgumentError

EMBEDDING, DECODER, MTP, LOSS = "E", "t", "m", "L"
NAMES = {EMBEDDING: "embedding", DECODER: "decoder layer", MTP: "MTP layer", LOSS: "loss"}
_BAR = "|"
_ATOMS = (*NAMES, _BAR, "(")
_NOTHING = " ,\t\n\r"
_EXPECTED = "a layer (E, t, m or L), '|' or '('"

MAX_SYMBOLS = 1 << 20
MAX_DEPTH = 50


def parse_stages(text: str) -> list[str]:
    """The symbols of each stage, in order.

    Raises:
        BadArgumentError: the string is not in the language; names the position, what is there and what was expected.
    """
    return _Parser(text).parse().split(_BAR)


class _Parser:
    """Recursive descent: a sequence is of atoms, each with or without a number of times."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0

    def parse(self) -> str:
        found = self._sequence(0)
        if self._peek():
            self._fail(f"{_EXPECTED}, or the end")
        return found

    def _peek(self) -> str:
        """The next character that means something; empty at the end."""
        while self._place < len(self._text) and self._text[self._place] in _NOTHING:
            self._place += 1
        return self._text[self._place : self._place + 1]

    def _sequence(self, depth: int) -> str:
        parts: list[str] = []
        symbols = 0
        while (sign := self._peek()) in _ATOMS and sign:
            part = self._repeated(depth)
            symbols += len(part)
            self._check_size(symbols)
            parts.append(part)
        return "".join(parts)

    def _repeated(self, depth: int) -> str:
        part = self._atom(depth)
        if self._peek() != "*":
            return part
        self._place += 1
        times = self._number()
        self._check_size(times * len(part))
        return part * times

    def _atom(self, depth: int) -> str:
        sign = self._peek()
        opened = self._place
        self._place += 1
        if sign != "(":
            return sign
        if depth == MAX_DEPTH:
            self._place = opened
            self._fail(f"at most {MAX_DEPTH} parentheses in one another")
        inner = self._sequence(depth + 1)
        if self._peek() != ")":
            self._fail(f"{_EXPECTED}, or ')' for the '(' at position {opened}")
        self._place += 1
        return inner

    def _number(self) -> int:
        self._peek()
        start = self._place
        while self._text[self._place : self._place + 1] in set("0123456789"):
            self._place += 1
        if start == self._place:
            self._fail("a number after '*'")
        digits = self._text[start : self._place]
        if len(digits) > 9:
            self._place = start
            self._fail(f"a number of at most {MAX_SYMBOLS}")
        return int(digits)

    def _check_size(self, symbols: int) -> None:
        if symbols > MAX_SYMBOLS:
            raise BadArgumentError(
                f"pipeline layout {_short(self._text)}: up to position {self._place} it describes {symbols} layers and stages, "
                f"more than the {MAX_SYMBOLS} there may be"
            )

    def _fail(self, expected: str) -> None:
        found = repr(self._text[self._place]) if self._place < len(self._text) else "the end"
        raise BadArgumentError(
            f"pipeline layout {_short(self._text)}, position {self._place}: expected {expected}, found {found}"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:197] + "...")


def format_stages(stages: Sequence[str]) -> str:
    """The canonical string of stages: equal symbols and equal stages joined, parentheses never nested."""
    found = []
    # The last stage has no '|' behind it.
    for stage, equal in groupby(stages[:-1]):
        one, count = _symbols(stage) + _BAR, len(list(equal))
        many = f"({one})*{count}" if stage else f"{one}*{count}"
        found.append(min(one * count, many, key=len))
    return "".join(found) + _symbols(stages[-1])


def _symbols(stage: str) -> str:
    runs = [(sign, len(list(equal))) for sign, equal in groupby(stage)]
    return "".join(sign * count if count < 4 else f"{sign}*{count}" for sign, count in runs)
