"""Processes that ``datasets`` starts for a map."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1
_quiet = False
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _in_child() -> None:
    """A terminal's Ctrl-C goes to every process: the parent ends its workers, and they need not say so with tracebacks.
    Where the parent is killed, the system ends them: they would wait for work for ever."""
    if _quiet:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if _libc is not None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C stays an interruption: ``datasets``' pool waits a moment for its workers then, and raises a timeout instead.
    Workers that are forked within leave it to this process.

    Raises:
        KeyboardInterrupt: what was raised within was caused by one.
    """
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    except Exception as error:
        # both chains: the cause of a worker's error is its traceback
        causes: list[BaseException | None] = [error]
        while causes:
            cause = causes.pop()
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            if cause is not None:
                causes += (cause.__cause__, cause.__context__)
        raise
    finally:
        _quiet = before
