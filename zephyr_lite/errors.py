"""What ends a command early: something of the user's has to change, or the user wanted it to end."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something in the user's input, files or machine has to change; the command line prints it and exits with 2.

    The message names the place (file, row, key), what was found there, and what to do. Whatever reads input may raise it, so
    docstrings name it only where the reason is not plain.

    Args:
        message: one or two sentences; what was found, and where.
        hint: what to do about it; printed on a line of its own.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message}\n{hint}")
        self.message = message
        self.hint = hint


class Interrupted(Exception):
    """A command was asked to stop (Ctrl-C, SIGTERM) and did so in good order; the command line exits with 130.

    Args:
        message: what was kept, and how to go on.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@contextmanager
def optional(extra: str) -> Iterator[None]:
    """Import packages of an extra in the block: a UserError names the extra if one is missing."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("zephyr_lite"):
            raise
        raise UserError(f"this needs an optional package: {error}.", f'pip install "zephyr-lite[{extra}]"') from None
