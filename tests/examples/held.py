"""Runs a script in which one operation of local stores never ends, so that it can be killed in the middle of a save.

python held.py FOLDER OPERATION SCRIPT [ARGUMENT ...]

The operation, a method of `LocalStore`, is held where the store's folder is FOLDER. "held" is printed when it is reached.
"""

from __future__ import annotations

import runpy
import sys
import threading
from pathlib import Path
from typing import Any

from giantstep.storage.local import LocalStore


def hold(folder: str, operation: str) -> None:
    """See above."""
    held = getattr(LocalStore, operation)

    def never_ends(self: LocalStore, *arguments: Any, **settings: Any) -> Any:
        if self.location == folder:
            print("held", flush=True)
            threading.Event().wait()
        return held(self, *arguments, **settings)

    setattr(LocalStore, operation, never_ends)


if __name__ == "__main__":
    _, folder, operation, script, *_ = sys.argv
    del sys.argv[:3]
    sys.path[0] = str(Path(script).parent)
    hold(folder, operation)
    runpy.run_path(script, run_name="__main__")
