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
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            cause = cause.__cause__ or cause.__context__
        raise
