"""The package's messages: ``logging.getLogger("zephyr_lite")``, and where a command prints them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PACKAGE = logging.getLogger("zephyr_lite")
# ``extra`` of a message that ``--quiet`` prints, too
RESULT = {"result": True}


class Output(logging.Handler):
    """Prints the package's messages. An OSError does not end a run in the middle of a step (see ``train.stage.Observers``).

    Args:
        write: prints a message.

    Attributes:
        fault: the error of the first message that could not be printed; nothing is printed after it.
    """

    fault: OSError | None = None

    def __init__(self, write: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self.write = write

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
    handler = logging.NullHandler() if write is None else Output(write)
    before = PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate
    PACKAGE.handlers, PACKAGE.propagate = [handler], False
    PACKAGE.setLevel(logging.INFO)
    try:
        yield
    finally:
        PACKAGE.handlers, PACKAGE.propagate = before[0], before[2]
        PACKAGE.setLevel(before[1])
    if isinstance(handler, Output) and handler.fault is not None:
        raise handler.fault


def output_fault() -> OSError | None:
    """The error of the first message that could not be written, if there was one."""
    for handler in PACKAGE.handlers:
        if isinstance(handler, Output) and handler.fault is not None:
            return handler.fault
    return None
