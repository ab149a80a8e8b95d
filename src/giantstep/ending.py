"""What happens when the interpreter ends: a function that is called while threads can still be started; its exit code.

Called by `saver`.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable

from giantstep.errors import BadArgumentError

_EXIT_CODE = 1


def before_the_end(function: Callable[[], None]) -> None:
    """Call the function when the interpreter begins to end.

    Functions given to `atexit` run when threads can no longer be started. This earlier hook is the one by which
    `concurrent.futures` ends its own.

    Raises:
        BadArgumentError: the interpreter is ending already.
    """
    register: Callable[[Callable[[], None]], None] = getattr(threading, "_register_atexit")  # noqa: B009 - no stub has it
    try:
        register(function)
    except RuntimeError as error:
        raise BadArgumentError("the interpreter is ending: nothing can be begun in the background. Call save.") from error


def end_as_failed() -> None:
    """Have the interpreter end with exit code 1, after everybody else's functions for the end.

    To be called by a function given to `before_the_end`. Nothing else lets a program that has ended well say that it has not.
    """
    atexit.register(_leave)


def after_fork(function: Callable[[], None]) -> None:
    """Call the function in each child that is forked from this process, before anything else runs there.

    Nothing here forks; but users do, as workers of torch's DataLoader.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


_leaving = False


def _leave() -> None:
    global _leaving  # noqa: PLW0603 - the process's
    if _leaving:
        return
    _leaving = True
    # This function was registered last, so no other has run yet: now they all do, once.
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(_EXIT_CODE)
