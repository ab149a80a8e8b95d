"""Real file systems of a few MiB, mounted for one test; the test is skipped where that is not allowed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not there")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{' '.join(command)}: {error.stderr.strip()}")


@contextlib.contextmanager
def mounted(kind: str, folder: Path, mebibytes: int) -> Iterator[Path]:
    """An ext4 in a file, or a tmpfs, of this size."""
    place = folder / f"{kind}-place"
    place.mkdir()
    if kind == "tmpfs":
        _run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(place))
    else:
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(mebibytes << 20)
        _run("mkfs.ext4", "-q", "-m", "0", str(image))
        _run("mount", "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        subprocess.run(("umount", "-l", str(place)), check=True, capture_output=True, timeout=30)


@contextlib.contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Nobody can write to a mounted file system, root neither."""
    _run("mount", "-o", "remount,ro", str(place))
    try:
        yield
    finally:
        subprocess.run(("mount", "-o", "remount,rw", str(place)), check=True, capture_output=True, timeout=30)
