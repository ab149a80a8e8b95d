"""Which rank holds which layer: parsed, written, counted, asked."""

from __future__ import annotations

import enum
import re
import subprocess
import sys

import pytest
from drawn_pipelines import layouts, stage_symbols
from hypothesis import given, settings
from hypothesis import strategies as st

from giantstep.errors import BadArgumentError
from giantstep.pipeline import PipelineLayout
from giantstep.pipeline.language import MAX_DEPTH, MAX_SYMBOLS, parse_stages


def expanded(text: str) -> str:
    """A layout string without `*`, parentheses, commas and spaces: by rewriting its innermost parts until none is left."""
    text = re.sub(r"[\s,]", "", text)
    while True:
        shorter = re.sub(r"([EtmL|])\*(\d+)", lambda m: "(" + m[1] * int(m[2]) + ")", text, count=1)
        if shorter == text:
            shorter = re.sub(
                r"\(([EtmL|]*)\)(?:\*(\d+))?", lambda m: m[1] * int(m[2] if m[2] is not None else 1), text, count=1
            )
        if shorter == text:
            return text
        text = shorter


@st.composite
def strings(draw: st.DrawFn, depth: int = 2) -> str:
    """Strings of the language, nested, repeated and spaced."""
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        part = draw(st.sampled_from("EtmL|"))
        if depth and draw(st.booleans()):
            part = "(" + draw(strings(depth - 1)) + ")"
        if draw(st.booleans()):
            part += draw(st.sampled_from(["", " "])) + "*" + str(draw(st.integers(0, 3)))
        parts.append(part + draw(st.sampled_from(["", " ", ",", "\n"])))
    return "".join(parts)


@settings(max_examples=400)
@given(strings())
def test_a_string_means_what_rewriting_it_gives(text: str) -> None:
    assert parse_stages(text) == expanded(text).split("|")


@settings(max_examples=300)
@given(layouts())
def test_the_canonical_string_is_parsed_to_the_same_layout(layout: PipelineLayout) -> None:
    text = str(layout)
    assert PipelineLayout.parse(text, layout.ranks) == layout
    assert hash(PipelineLayout.parse(text, layout.ranks)) == hash(layout)
    assert len(text) <= len("|".join(layout.stages))
    # Megatron-Core's parser knows no nested parentheses, and none without a number.
    assert not re.search(r"\([^)]*\(|\)(?!\*\d)", text)
    assert str(PipelineLayout.parse(text, layout.ranks)) == text


@settings(max_examples=200)
@given(layouts())
def test_questions_are_answered_as_by_walking_through_all_stages(layout: PipelineLayout) -> None:
    for kind, total in (("t", layout.layers), ("m", layout.mtp_layers)):
        layer = 0
        held: dict[int, list[int]] = {rank: [] for rank in range(layout.ranks)}
        for number, symbols in enumerate(layout.stages):
            rank, virtual = number % layout.ranks, number // layout.ranks
            assert layout.place_of(number) == (rank, virtual)
            assert layout.stage_of(rank, virtual) == number
            assert layout.layer_offset(rank, virtual, kind=kind) == layer
            mine = list(range(layer, layer + symbols.count(kind)))
            assert list(layout.layers_of(rank, virtual, kind=kind)) == mine
            for local, index in enumerate(mine):
                assert layout.global_index(rank, virtual, local, kind=kind) == index
                assert layout.local_index(index, kind=kind) == (rank, virtual, local)
                assert layout.holder_of(index, kind=kind) == (rank, virtual)
            held[rank] += mine
            layer += len(mine)
        assert layer == total
        assert all(list(layout.layers_of(rank, kind=kind)) == mine for rank, mine in held.items())
    first = next(n for n, symbols in enumerate(layout.stages) if "E" in symbols)
    last = next(n for n, symbols in enumerate(layout.stages) if "L" in symbols)
    assert layout.embedding_place == layout.place_of(first)
    assert layout.loss_places == (layout.place_of(last),)
    holders = layout.embedding_holders(tied=True)
    assert holders[0] == layout.embedding_place
    assert set(holders) == {layout.place_of(n) for n, symbols in enumerate(layout.stages) if set("EmL") & set(symbols)}
    assert len(set(holders)) == len(holders)


def test_the_layout_of_a_large_model() -> None:
    layout = PipelineLayout.parse("Et*3|(tt|)*29,m|L", 16)
    assert (layout.layers, layout.mtp_layers, layout.virtual, len(layout.stages)) == (61, 1, 2, 32)
    assert layout.layers_of(0) == (0, 1, 2, 33, 34)
    assert layout.layers_of(13) == (27, 28, 59, 60)
    assert layout.layers_of(14) == (29, 30)
    assert layout.layers_of(14, 1) == ()
    assert layout.layers_of(14, 1, kind="m") == (0,)
    assert layout.loss_places == ((15, 1),)
    assert layout.embedding_holders(tied=False) == ((0, 0), (14, 1))
    assert layout.embedding_holders(tied=True) == ((0, 0), (14, 1), (15, 1))
    assert str(layout) == "Ettt|(tt|)*29m|L"


def test_stages_may_be_empty_and_a_bar_at_the_end_of_a_repeated_part_separates() -> None:
    assert PipelineLayout.parse("E||t|L", 2).stages == ("E", "", "t", "L")
    assert PipelineLayout.parse("Et*3|(tt|)*2|L", 5).stages == ("Ettt", "tt", "tt", "", "L")
    assert PipelineLayout.parse("E|*3L", 4).stages == ("E", "", "", "L")
    assert str(PipelineLayout.parse("E" + "|" * 10 + "L", 11)) == "E||*9L"


def test_layouts_are_made_of_lists_as_well() -> None:
    named = PipelineLayout.parse([["embedding", "decoder"], ["decoder", "mtp", "loss"]], 2)
    assert named == PipelineLayout.parse([["E", "t"], ["t", "m", "L"]], 2) == PipelineLayout.parse("Et|tmL", 2)
    kinds = enum.Enum("kinds", ["embedding", "loss", "encoder", "decoder", "mtp"])
    assert PipelineLayout.parse([[kinds.embedding, kinds.decoder], [" Decoder", kinds.mtp, kinds.loss]], 2) == named
    for wrong in (kinds.encoder, 5):
        with pytest.raises(BadArgumentError, match="is none of embedding"):
            PipelineLayout.parse([["E"], [wrong, "L"]], 2)
    with pytest.raises(BadArgumentError, match="stage 1 of the pipeline: 'encoder' is none of embedding, decoder, mtp, loss"):
        PipelineLayout.parse([["embedding"], ["encoder", "loss"]], 2)


def test_losses_of_mtp_layers_may_be_split() -> None:
    layout = PipelineLayout.parse("Et|tmL|mL|L", 4)
    assert layout.loss_places == ((1, 0), (2, 0), (3, 0))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (PipelineLayout.even(8, 4), "Ett|(tt|)*2ttL"),
        (PipelineLayout.even(8, 2, virtual=2), "Ett|(tt|)*2ttL"),
        (PipelineLayout.even(6, 4, first=1, last=1), "Et|tt|tt|tL"),
        (PipelineLayout.even(8, 2, virtual=2, first=2), "Et|ttt|t|tttL"),
        (PipelineLayout.even(7, 4, count_embedding=True), "Et|tt|tt|ttL"),
        (PipelineLayout.even(6, 4, count_embedding=True, count_loss=True), "Et|tt|tt|tL"),
        (PipelineLayout.even(6, 2, virtual=2, count_embedding=True, count_loss=True), "Et|tt|tt|tL"),
        (PipelineLayout.even(2, 4, count_embedding=True, count_loss=True), "E|t|t|L"),
        (PipelineLayout.even(3, 1, mtp=2), "EtttmmL"),
        (PipelineLayout.even(3, 1, first=3), "EtttL"),
        (PipelineLayout.even(5, 2, first=2, last=3), "Ett|tttL"),
        (PipelineLayout.from_counts([0, 3, 0]), "E|ttt|L"),
        (PipelineLayout.from_counts([1, 2, 1, 2], 2, mtp=1), "Et|tt|t|ttmL"),
    ],
)
def test_layouts_from_numbers(layout: PipelineLayout, expected: str) -> None:
    assert layout.stages == tuple(parse_stages(expected))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et*|L", "'Et\\*|L', position 3: expected a number after '\\*', found '|'"),
        ("Ex|L", "position 1: expected a layer .E, t, m or L., '|' or '\\(', or the end, found 'x'"),
        ("E(t|L", "position 5: .* or '\\)' for the '\\(' at position 1, found the end"),
        ("E t)L", "position 3: .* or the end, found '\\)'"),
        ("E t*3*2 L", "position 5: .*, found '\\*'"),
        ("*3", "position 0: .*, found '\\*'"),
        ("Et*1,0L", "position 5: .*, found '0'"),
        ("|", "expected one E .embedding., before everything else, found 0"),
        ("tE|L", "expected one E .embedding., before everything else, found 1"),
        ("E|t|E|L", "found 2"),
        ("Et|t", "expected one L .loss. at the end"),
        ("EtL|t", "expected one L .loss. at the end"),
        ("Et|LL", "one more than m, found 2"),
        ("Etm|tL", "every m .MTP layer. behind the last t"),
        ("Et|t|L", "3 stages for 2 ranks: the number of stages must be a multiple"),
        (f"E({'t' * 3}*{MAX_SYMBOLS})*9 L", f"more than the {MAX_SYMBOLS} there may be"),
        ("E" + "(" * 30 + "t*9" + ")*9" * 30 + "L", "more than the"),
        ("Et*1234567890L", f"a number of at most {MAX_SYMBOLS}"),
        ("E" + "(" * (MAX_DEPTH + 1) + "t" + ")" * (MAX_DEPTH + 1) + "L", f"at most {MAX_DEPTH} parentheses"),
        ("E" + "(" * 100_000, "parentheses"),
    ],
)
def test_a_string_that_is_no_layout_is_refused_with_the_position(text: str, message: str) -> None:
    with pytest.raises(BadArgumentError, match=message.replace("|", r"\|")):
        PipelineLayout.parse(text, 2)


@settings(max_examples=300)
@given(st.text(alphabet="EtmL|()*0123 ,x", max_size=12), st.integers(1, 3))
def test_any_other_text_is_refused_and_not_misread(text: str, ranks: int) -> None:
    try:
        layout = PipelineLayout.parse(text, ranks)
    except BadArgumentError:
        return
    assert "|".join(layout.stages) == expanded(text)


@settings(max_examples=200)
@given(stage_symbols(mtp=0), st.permutations("EtL"))
def test_layers_out_of_order_are_refused(stages: list[str], order: list[str]) -> None:
    swapped = dict(zip("EtL", order, strict=True))
    renamed = tuple("".join(swapped[symbol] for symbol in stage) for stage in stages)
    flat = "".join(renamed)
    right = re.fullmatch("Et*L", flat) is not None
    try:
        PipelineLayout(renamed, 1)
    except BadArgumentError:
        assert not right
    else:
        assert right


@pytest.mark.parametrize(
    "make",
    [
        lambda: PipelineLayout.even(7, 2),
        lambda: PipelineLayout.even(4, 2, virtual=4),
        lambda: PipelineLayout.even(4, 0),
        lambda: PipelineLayout.even(4, 4, first=9),
        lambda: PipelineLayout.even(5, 2, first=2, last=2),
        lambda: PipelineLayout.even(5, 1, first=2),
        lambda: PipelineLayout.even(8, 4, first=2, count_loss=True),
        lambda: PipelineLayout.even(0, 2, count_embedding=True, count_loss=True, virtual=2),
        lambda: PipelineLayout.from_counts([]),
        lambda: PipelineLayout.from_counts([2, -1]),
        lambda: PipelineLayout.from_counts([2.5, 1]),  # type: ignore[list-item]
        lambda: PipelineLayout.from_counts(["a"]),  # type: ignore[list-item]
        lambda: PipelineLayout.from_counts(5),  # type: ignore[arg-type]
        lambda: PipelineLayout.from_counts([2, 1], mtp=-1),
        lambda: PipelineLayout.even(8, 2.0),  # type: ignore[arg-type]
        lambda: PipelineLayout.parse(None, 1),  # type: ignore[arg-type]
        lambda: PipelineLayout.parse(b"EtL", 1),  # type: ignore[arg-type]
        lambda: PipelineLayout.from_counts([2, 1], 0),
        lambda: PipelineLayout(("Ex", "L"), 1),
        lambda: PipelineLayout.even(4, 2).layers_of(2),
        lambda: PipelineLayout.even(4, 2).layers_of(0, 1),
        lambda: PipelineLayout.even(4, 2).layers_of(0, kind="E"),
        lambda: PipelineLayout.even(4, 2).place_of(2),
        lambda: PipelineLayout.even(4, 2).global_index(0, 0, 2),
        lambda: PipelineLayout.even(4, 2).local_index(4),
    ],
)
def test_what_cannot_be_is_refused(make: object) -> None:
    with pytest.raises(BadArgumentError):
        make()  # type: ignore[operator]


def test_layouts_and_names_need_no_torch() -> None:
    program = (
        "import sys; from giantstep.pipeline import PipelineLayout, globalise, localise, check_names;"
        "print(PipelineLayout.even(4, 2), 'torch' in sys.modules);"
        "from giantstep.pipeline import describe_stage, ModelNames; print('torch' in sys.modules);"
        "import giantstep.pipeline as p; print(hasattr(p, 'nothing'))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.split() == ["Ett|ttL", "False", "True", "False"]
