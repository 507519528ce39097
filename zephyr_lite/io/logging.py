"""The package's messages: ``logging.getLogger("zephyr_lite")``, and where a command prints them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PACKAGE = logging.getLogger("zephyr_lite")


class MessageHandler(logging.Handler):
    """Passes the package's messages to a function.

    Attributes:
        fault: the error of the first message that could not be written; nothing is written after it. With
            ``sft | tee log``, Ctrl-C ends the reader too, and the run must still write its checkpoint.
    """

    def __init__(self, write: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self.write = write
        self.fault: OSError | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.fault is None:
            try:
                self.write(record)
            except OSError as error:
                self.fault = error


@contextmanager
def messages_to(write: Callable[[logging.LogRecord], None] | None) -> Iterator[None]:
    """Within, the package's messages of level INFO and above go to this function alone, or nowhere.

    Raises:
        OSError: a message could not be written.
    """
    handler = logging.NullHandler() if write is None else MessageHandler(write)
    before = PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate
    PACKAGE.handlers, PACKAGE.propagate = [handler], False
    PACKAGE.setLevel(logging.INFO)
    try:
        yield
    finally:
        PACKAGE.handlers, PACKAGE.propagate = before[0], before[2]
        PACKAGE.setLevel(before[1])
    if isinstance(handler, MessageHandler) and handler.fault is not None:
        raise handler.fault


def output_fault() -> OSError | None:
    """The error of the first message that could not be written, if there was one."""
    return next((h.fault for h in PACKAGE.handlers if isinstance(h, MessageHandler) and h.fault is not None), None)
