"""Ctrl-C, SIGTERM, a terminal that closes: while something runs that has to come to an end first."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ..train.distributed import echoes, speaks

# the user's Ctrl-C; what a batch system or a cloud sends before it kills; a terminal or a connection that was closed
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Output:
    """What is printed while something runs that has to come to an end first. ``sft | tee log`` and Ctrl-C: the reader dies of
    the same signal, and the next line that is printed would end the run in the middle of a step.

    Attributes:
        fault: why nothing can be printed any more (and nothing is); None as long as it can.
    """

    def __init__(self) -> None:
        self.fault: OSError | None = None

    def of(self, write: Callable[..., None]) -> Callable[..., None]:
        """The same function, which never raises an OSError."""

        def printed(*args: Any) -> None:
            if self.fault is None:
                try:
                    write(*args)
                except OSError as error:
                    self.fault = error

        return printed


class StopRequest:
    """As a context, it takes the process's SIGINT, SIGTERM and SIGHUP: the first is remembered, a second one raises at once
    (not the launcher's copy of the first: ``world.echoes``). Of several processes one says it.

    Outside the main thread, where Python delivers no signals, nothing is taken and nothing is ever asked for; what whoever
    started the process wants ignored stays ignored.

    Args:
        finishing: what is told (on standard error) when the first one comes: what will be finished; None: nothing is.

    Attributes:
        name: of the signal that came, or None.
    """

    def __init__(self, finishing: str | None) -> None:
        self.finishing = finishing
        self.name: str | None = None
        self._at_once = False
        self._first: float | None = None  # when it came
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
        copy = again and echoes(self._first)
        if not again:
            self._first = time.monotonic()
        if (again and not copy) or self._at_once:
            raise KeyboardInterrupt
        if self.finishing is None or copy or not speaks():
            return
        # a handler may stand in the middle of a print, which cannot be entered twice
        text = f"\n{self.name}: {self.finishing}; once more to stop at once\n"
        with suppress(OSError, ValueError):  # whoever read it got the same signal, or the terminal is gone
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
