"""The terminal's keys and signals around a conversation."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ..errors import Interrupted


def use_readline() -> None:
    """Keys to edit a line and to get earlier ones back, where the system has them; a pasted text stays one question."""
    with suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")


@contextmanager
def quiet_keys() -> Iterator[None]:
    """Within, the terminal does not write what is typed (^C above all) into the answers; it is there at the next prompt."""
    restore = _without_echo()
    try:
        yield
    finally:
        restore()


def _without_echo() -> Callable[[], None]:
    """Gives what undoes it; nothing is done where stdin is no terminal, or the system knows no termios."""
    try:
        import termios
    except ImportError:
        return lambda: None
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
        termios.tcsetattr(number, termios.TCSADRAIN, [*before[:3], before[3] & ~termios.ECHO, *before[4:]])
    except (termios.error, OSError, ValueError):
        return lambda: None

    def restore() -> None:
        with suppress(termios.error, OSError, ValueError):  # the terminal is gone
            termios.tcsetattr(number, termios.TCSADRAIN, before)

    return restore


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM ends the session, where Ctrl-C takes back a line."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted("SIGTERM: the session ended")

    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
