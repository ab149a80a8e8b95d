"""`giantstep diff`: in what do two checkpoints differ?"""

from __future__ import annotations

import fnmatch
import json
import math
import sys
from typing import TYPE_CHECKING

import click

from giantstep.cli.text import shape_text
from giantstep.errors import GiantstepError
from giantstep.reports import size_text

if TYPE_CHECKING:
    from giantstep.difference import Difference, FormDifference, ValueDifference


@click.command("diff")
@click.argument("first")
@click.argument("second")
@click.option("--norms", is_flag=True, help="Say by how much values differ; reads the tensors that do.")
@click.option("--match", metavar="PATTERN", help="Only tensors whose keys match this shell pattern, and no objects.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def command(first: str, second: str, norms: bool, match: str | None, as_json: bool) -> None:
    """Say in what the checkpoints FIRST and SECOND differ.

    Exits with 0 if they are equal, 1 if they differ, 2 if there is trouble.
    """
    from giantstep.difference import compare

    wanted = None if match is None else (lambda key: fnmatch.fnmatchcase(key, match))
    try:
        found = compare(first, second, norms=norms, match=wanted)
    except GiantstepError as error:
        # 1 would say that they were compared.
        click.echo(f"giantstep: {error}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(_as_json(found), indent=1))
    else:
        _print(found)
    if not found.equal:
        sys.exit(1)


def _as_json(found: Difference) -> dict[str, object]:
    return {
        "equal": found.equal,
        "first": found.first,
        "second": found.second,
        "tensors": found.tensors,
        "only_first": found.only_first,
        "only_second": found.only_second,
        "form": [
            {
                "key": one.key,
                "first": {"dtype": one.first[0], "shape": one.first[1]},
                "second": {"dtype": one.second[0], "shape": one.second[1]},
            }
            for one in found.form
        ],
        "values": [{"key": one.key, **_norms_as_json(one)} for one in found.values],
        "objects_only_first": found.objects_only_first,
        "objects_only_second": found.objects_only_second,
        "objects": found.objects,
        "common": found.common,
        "bytes": found.bytes,
        "bytes_read": found.bytes_read,
    }


def _norms_as_json(one: ValueDifference) -> dict[str, object]:
    norms = one.norms
    if norms is None:
        return {}
    found = {"l2": norms.l2, "max_abs": norms.max_abs, "relative": norms.relative}
    # JSON has no infinity.
    finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return {"elements": norms.elements, "not_finite": norms.not_finite, **finite}


def _print(found: Difference) -> None:
    """A line for each difference: - only in the first, + only in the second, ~ in both."""
    for key in found.only_first:
        click.echo(f"- {key}")
    for key in found.only_second:
        click.echo(f"+ {key}")
    for form in found.form:
        click.echo(f"~ {form.key}: {_form_text(form)}")
    for values in found.values:
        click.echo(f"~ {values.key}: {_values_text(values)}")
    for sign, keys in (("-", found.objects_only_first), ("+", found.objects_only_second), ("~", found.objects)):
        for key in keys:
            click.echo(f"{sign} object {key}")
    for path in found.common:
        click.echo(f"~ common state: {path}")
    click.echo(_summary(found))


def _form_text(form: FormDifference) -> str:
    first, second = (f"{dtype} {shape_text(shape)}" for dtype, shape in (form.first, form.second))
    return f"{first} became {second}"


def _values_text(values: ValueDifference) -> str:
    norms = values.norms
    if norms is None:
        return "values differ"
    left_out = f" ({norms.not_finite} of them NaN or infinite)" if norms.not_finite else ""
    return (
        f"{norms.elements} values differ{left_out}, L2 {norms.l2:.6g}, largest {norms.max_abs:.6g}, "
        f"relative {norms.relative:.3g}"
    )


def _summary(found: Difference) -> str:
    count = len(found.only_first) + len(found.only_second) + len(found.form) + len(found.values)
    if found.equal:
        what = f"equal: {found.tensors} tensors"
    else:
        others = len(found.objects_only_first) + len(found.objects_only_second) + len(found.objects) + len(found.common)
        what = f"{count} of {found.tensors} tensors and {others} other values differ"
    return f"{what}; read {size_text(found.bytes_read)} of checkpoints of {size_text(found.bytes)}"
