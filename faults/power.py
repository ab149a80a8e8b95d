"""What a power loss right after a save may leave: everything that the save did not flush is gone.

Which files and directories were flushed is observed from outside, by strace, the same for all libraries.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

_CALLS = "fsync,fdatasync,sync,syncfs,rename,renameat,renameat2"
_SYNC = re.compile(r"\b(?:fsync|fdatasync)\(\d+<([^>]*)>\)\s*= 0")
_RENAME = re.compile(r'\brename(?:at2?)?\((?:[^",]*, )?"([^"]*)", (?:[^",]*, )?"([^"]*)"[^)]*\)\s*= 0')
_ALL = re.compile(r"\b(?:sync\(\)|syncfs\(.*\))")


def strace_prefix(log: Path) -> list[str]:
    """The beginning of a command whose flushes are to be observed."""
    return ["strace", "-f", "--seccomp-bpf", "-y", "-o", str(log), "-e", f"trace={_CALLS}"]


def is_available() -> bool:
    """Whether strace is installed."""
    return shutil.which("strace") is not None


@dataclass(slots=True)
class Flushes:
    """Paths that were flushed, by the names that they have in the end."""

    paths: set[str]
    everything: bool

    @classmethod
    def read(cls, log: Path) -> Flushes:
        """From what strace wrote."""
        found = cls(set(), everything=False)
        for line in log.read_text(errors="replace").splitlines():
            if match := _SYNC.search(line):
                found.paths.add(match[1])
            elif match := _RENAME.search(line):
                found._rename(str(Path(match[1]).absolute()), str(Path(match[2]).absolute()))
            elif _ALL.search(line):
                found.everything = True
        return found

    def _rename(self, old: str, new: str) -> None:
        moved = {path for path in self.paths if path == old or path.startswith(f"{old}/")}
        self.paths = (self.paths - moved) | {new + path.removeprefix(old) for path in moved}

    def has(self, path: Path) -> bool:
        """Whether it was flushed."""
        return self.everything or str(path) in self.paths


def lose_bytes(path: Path, flushes: Flushes) -> list[str]:
    """Empty all files whose bytes were not flushed; return their names."""
    lost = [file for file in path.rglob("*") if file.is_file() and not flushes.has(file)]
    for file in lost:
        file.write_bytes(b"")
    return [file.name for file in lost]


def lose_names(path: Path, flushes: Flushes) -> list[str]:
    """Remove what no flushed directory names: of `path` itself, its parent's; return the names."""
    lost = [] if flushes.has(path.parent) else [path]
    for folder in [path, *(found for found in path.rglob("*") if found.is_dir())]:
        if not flushes.has(folder):
            lost += list(folder.iterdir())
    for found in lost:
        if found.is_dir():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)
    return [found.name for found in lost]
