"""Notices code being run, files opened or processes started while stored bytes are read.

Called by `exercise`. An audit hook of the interpreter; it cannot be removed, and so does nothing outside `no_effects`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FORBIDDEN = (
    *("exec", "import", "pickle.find_class", "marshal.loads", "code.__new__", "ctypes.dlopen", "shutil.", "tempfile."),
    *("open", "os.", "subprocess.", "socket.", "urllib.", "webbrowser.", "ftplib.", "glob."),
)


class _Watch:
    warm = False
    active = 0
    seen: list[str] = []  # noqa: RUF012 - one list for the one hook
    installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _Watch.active and event.startswith(FORBIDDEN) and not _is_traceback(event, arguments):
        _Watch.seen.append(f"{event} {arguments!r:.200}")


def _is_traceback(event: str, arguments: tuple[Any, ...]) -> bool:
    """Formatting a traceback for other ranks reads source files."""
    return event == "open" and str(arguments[0]).endswith(".py")


@contextmanager
def no_effects() -> Iterator[None]:
    """Raise RuntimeError if what runs inside imports, executes, or touches files, processes or the network."""
    if not _Watch.installed:
        sys.addaudithook(_hook)
        _Watch.installed = True
    _Watch.seen.clear()
    _Watch.active += 1
    try:
        yield
    finally:
        _Watch.active -= 1
    if _Watch.seen and _Watch.warm:
        raise RuntimeError(f"reading stored bytes had effects: {_Watch.seen[:3]}")


def warmed_up() -> None:
    """Say that everything that is imported when it is first used now is."""
    _Watch.warm = True
