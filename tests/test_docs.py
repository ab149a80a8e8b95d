"""The documents say what the code does: their examples run, their tables are the code's, their tests exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from giantstep.codecs import OBJECT_CODEC
from giantstep.errors import error_classes
from giantstep.format.index import COLUMNS, OPTIONAL_COLUMNS
from giantstep.format.registry import FROM_THE_START
from giantstep.shards.dtypes import BY_CODE

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])


def blocks(page: Path) -> list[str]:
    """Python blocks that are meant to run."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def rows(page: str, first_cell: str) -> list[list[str]]:
    """Rows of the table whose header begins with `first_cell`."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_blocks_run_in_order(page: Path, tmp_path: Path) -> None:
    program = tmp_path / "blocks.py"
    program.write_text("\n\n".join(blocks(page)))
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    found = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False, env=environment
    )
    assert found.returncode == 0, found.stderr


def test_dtype_table_is_the_codes() -> None:
    table = {
        int(code): (name.strip("`"), int(size), container.strip("`"))
        for code, name, _, size, container, *_ in rows("format.md", "code")
    }
    assert table == {code: (dtype.name, dtype.item_bytes, dtype.container) for code, dtype in BY_CODE.items()}


def test_tag_table_is_the_codecs() -> None:
    assert {row[0].strip("`") for row in rows("format.md", "tag")} == OBJECT_CODEC.tags()


def test_types_that_are_registered_from_the_start_are_documented() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    assert [found.name for found in FROM_THE_START if f"| `{found.name}` | `" not in text] == []


def test_every_column_and_every_error_is_documented() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    assert [name for name in COLUMNS | OPTIONAL_COLUMNS if f"`{name}`" not in text] == []
    text = (ROOT / "docs" / "errors.md").read_text()
    assert [kind.__name__ for kind in error_classes().values() if kind.__name__ not in text] == []
    assert [code for code in error_classes() if code not in text] == []


def test_every_test_that_a_document_names_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"`?(tests/[\w/]+\.py)(?:::(test_\w+))?", page.read_text()):
            file = ROOT / name[0]
            assert file.exists(), f"{page.name} names {name[0]}"
            assert f"def {name[1]}" in file.read_text(), f"{page.name} names {'::'.join(name)}"


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
