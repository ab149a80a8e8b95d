"""Mutants that once were findings, kept as they are, so that later changes to the mutations do not lose them.

To keep one: `python -m tests.fuzz.kept index build/fuzz/index/findings/0123456789.bin overlapping-chunks`.
Read by test_fuzz.py.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

from .targets import MUTANTS

FOLDER = Path(__file__).parent / "regressions"


def keep(files: dict[str, bytes], name: str) -> Path:
    """Write a mutant's files to an archive that is the same on every run."""
    path = FOLDER / f"{name}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(file), data, zipfile.ZIP_DEFLATED)
    return path


def kept() -> list[Path]:
    """All archives."""
    return sorted(FOLDER.glob("*.zip"))


def files_of(path: Path) -> dict[str, bytes]:
    """The files of a mutant that was kept."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def main() -> None:
    """Keep the mutant that a target makes of a file's bytes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("target", choices=sorted(MUTANTS))
    parser.add_argument("input", type=Path)
    parser.add_argument("name")
    asked = parser.parse_args()
    path = keep(MUTANTS[asked.target](asked.input.read_bytes()), f"{asked.target}-{asked.name}")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
