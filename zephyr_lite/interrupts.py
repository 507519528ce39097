"""Ctrl-C and SIGTERM while something runs that has to come to an end first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the user's Ctrl-C; what a batch system or a cloud sends before it kills


class StopRequest:
    """As a context, it takes the process's SIGINT and SIGTERM: the first is remembered, a second one raises at once.

    Outside the main thread, where Python delivers no signals, nothing is taken and nothing is ever asked for; what whoever
    started the process wants ignored stays ignored.

    Args:
        finishing: what is told (on standard error) when the first one comes: what will be finished.

    Attributes:
        name: of the signal that came, or None.
    """

    def __init__(self, finishing: str) -> None:
        self.finishing = finishing
        self.name: str | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a background job
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, number: int, frame: FrameType | None) -> None:
        again, self.name = self.name is not None, self.name or signal.Signals(number).name
        if again or self._at_once:
            raise KeyboardInterrupt
        # a handler may stand in the middle of a print, which cannot be entered twice
        text = f"\n{self.name}: {self.finishing}; once more to stop at once\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, nothing has to be finished: a signal raises, and so does one that came before.

        Raises:
            KeyboardInterrupt: as told.
        """
        self._at_once = True
        try:
            if self.name is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False
