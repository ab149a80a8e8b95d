"""Ways to damage what lies on disk, the same for all libraries."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], bool]
"""Damages a checkpoint; False if there is no such thing in it."""


def files_of(path: Path) -> list[Path]:
    """All files of a checkpoint, the largest last."""
    return sorted((found for found in path.rglob("*") if found.is_file()), key=lambda one: (one.stat().st_size, one.name))


def data_files(path: Path) -> list[Path]:
    """Those that hold tensors."""
    return [found for found in files_of(path) if found.stat().st_size > 100_000]


def metadata_files(path: Path) -> list[Path]:
    """The others."""
    return [found for found in files_of(path) if found.stat().st_size <= 100_000]


def _flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


def flip_in_data(part: float) -> Damage:
    """A bit, so far into the largest file."""

    def damage(path: Path) -> bool:
        file = data_files(path)[-1]
        _flip(file, int(file.stat().st_size * part))
        return True

    return damage


def flip_in_metadata(part: float) -> Damage:
    """A bit, so far into the file that says where everything lies; the largest one besides tensors."""

    def damage(path: Path) -> bool:
        found = metadata_files(path)
        if found:
            _flip(found[-1], int(found[-1].stat().st_size * part))
        return bool(found)

    return damage


def zero_page(path: Path) -> bool:
    """4 KiB of zeros in the middle of a file, as a lost write leaves."""
    file = data_files(path)[-1]
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    file.write_bytes(content)
    return True


def truncate(path: Path) -> bool:
    """The last 1,000 bytes of a file gone."""
    file = data_files(path)[-1]
    file.write_bytes(file.read_bytes()[:-1000])
    return True


def remove_data(path: Path) -> bool:
    """A file gone."""
    data_files(path)[-1].unlink()
    return True


def swap(path: Path) -> bool:
    """Two files of one size exchanged, as a copy gone wrong leaves."""
    found = data_files(path)
    sizes = [file.stat().st_size for file in found]
    pair = next(((a, b) for a in range(len(found)) for b in range(a) if sizes[a] == sizes[b]), None)
    if pair is None:
        return False
    first, second = (found[number] for number in pair)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return True


def exchange_with(other: Path) -> Damage:
    """A data file of another checkpoint of the same structure, under the name that it has here."""

    def damage(path: Path) -> bool:
        mine, others = data_files(path), data_files(other)
        fitting = [(a, b) for a in mine for b in others if a.stat().st_size == b.stat().st_size]
        if fitting:
            fitting[0][0].write_bytes(fitting[0][1].read_bytes())
        return bool(fitting)

    return damage


def plant_code(marker: Path) -> Damage:
    """A pickle that makes a file when it is loaded, in place of all that might be one: metadata, and pickles in archives.

    Written by hand: it calls `open(marker, "w")`.
    """
    code = b"cbuiltins\nopen\n(S'" + str(marker).encode() + b"'\nS'w'\ntR."

    def damage(path: Path) -> bool:
        for file in files_of(path):
            if zipfile.is_zipfile(file):
                _plant_in_archive(file, code)
            elif file in metadata_files(path):
                file.write_bytes(code)
        return True

    return damage


def _plant_in_archive(file: Path, code: bytes) -> None:
    """As `torch.save` lays archives out, with another `data.pkl`."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, code if name.endswith("data.pkl") else data)
