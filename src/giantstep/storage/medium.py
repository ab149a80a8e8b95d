"""What kind of medium a file system lies on, as Linux tells it. Called by `local`."""

from __future__ import annotations

from pathlib import Path

# Each line: number, parent, major:minor, root, place, options, more fields, "-", type, source, options of the type.
_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def is_memory_backed(major: int, minor: int) -> bool:
    """Whether the file system with this device number keeps its files in memory alone; False where that is unknown."""
    try:
        lines = _MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        # Not Linux, or no /proc: files are then written as if to a disk, which is right anywhere.
        return False
    kinds = (line.partition(" - ")[2].split(" ", 1)[0] for line in lines if line.split(" ", 3)[2:3] == [f"{major}:{minor}"])
    return next(kinds, "") in _IN_MEMORY
