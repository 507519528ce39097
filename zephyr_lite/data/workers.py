"""Processes that ``datasets`` starts for a map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C stays an interruption: ``datasets``' pool waits a moment for its workers then, and raises a timeout instead.

    Raises:
        KeyboardInterrupt: what was raised within was caused by one.
    """
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
