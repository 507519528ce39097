"""Signals, and the environment variables that ``torchrun``, ``accelerate launch`` and MPI set in what they start.

SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt by default, and set a flag (``StopRequest``) while a training loop runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

RANK, SIZE, LOCAL_RANK, LOCAL_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
_LAUNCHERS = (
    *(RANK, SIZE, LOCAL_RANK, LOCAL_SIZE, "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK", "NODE_RANK"),
    *("MPI_LOCAL", "OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_", "TORCHELASTIC_"),
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON"),
    *("ACCELERATE_USE_PARALLELISM", "ACCELERATE_USE_TP"),
)
# Ctrl-C; sent by a batch system or a cloud before it kills; sent when a terminal or a connection is closed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds within which a second signal is the launcher's copy of the first.
ECHO = 5.0
# A library that catches KeyboardInterrupt, during its import above all, fails of something else within this many seconds.
_AFTERMATH = 60.0

_launched_alone = False  # ``alone`` removed a launcher's variables
_interrupted_at: float | None = None  # time.monotonic() of the last KeyboardInterrupt raised by ``_interrupt``


def launched() -> int:
    """The number of processes that were started; 1 without a launcher."""
    return int(os.environ.get(SIZE, "1"))


def alone() -> None:
    """Remove the launchers' variables where one process was started: a shell or a container may have kept some, and
    accelerate and torch would wait for processes that do not exist."""
    global _launched_alone
    if launched() > 1:
        return
    _launched_alone = _launched_alone or RANK in os.environ
    for name in list(os.environ):
        if name.startswith(_LAUNCHERS):
            del os.environ[name]


def speaks() -> bool:
    """Whether this is the first process, which prints what all of them know."""
    return launched() == 1 or os.environ.get(RANK, "0") == "0"


def echoes(first: float | None) -> bool:
    """Whether a signal that comes now is the launcher's copy of an earlier one: Ctrl-C, systemd and scancel signal torchrun
    and its processes alike, and torchrun passes the signal on.

    Args:
        first: time of the earlier signal (time.monotonic), None without one.
    """
    return first is not None and (_launched_alone or RANK in os.environ) and time.monotonic() - first < ECHO


def take_signals() -> None:
    """Make SIGTERM act as Ctrl-C does at that moment, and remember both (``just_interrupted``).

    Signals that the parent process ignores (nohup) stay ignored. Forked workers have SIGTERM's default: Python would not
    run a handler while a worker waits for a lock.
    """
    for number, handler in ((signal.SIGINT, _interrupt), (signal.SIGTERM, _terminate)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    os.register_at_fork(after_in_child=_default_in_child)


def _default_in_child() -> None:
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    at_ctrl_c = signal.getsignal(signal.SIGINT)  # asyncio's, where it runs
    (at_ctrl_c if callable(at_ctrl_c) else _interrupt)(number, frame)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted_at
    if echoes(_interrupted_at):
        return
    _interrupted_at = time.monotonic()
    raise KeyboardInterrupt


def just_interrupted() -> bool:
    """Whether KeyboardInterrupt was raised within the last minute: an error now is most likely its consequence."""
    return _interrupted_at is not None and time.monotonic() - _interrupted_at < _AFTERMATH


@contextmanager
def pythons_ctrl_c() -> Iterator[None]:
    """Within, SIGINT has Python's handler: ``asyncio.run`` cancels its main task only where it finds that one."""
    before = signal.getsignal(signal.SIGINT)
    if before is not _interrupt:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class StopRequest:
    """A context that takes SIGINT, SIGTERM and SIGHUP: the first sets ``name``, a second one raises KeyboardInterrupt (the
    launcher's copy of the first aside). Outside the main thread, which gets no signals in Python, it does nothing.

    Args:
        finishing: printed on standard error when the first signal comes: what will be finished; None: nothing.

    Attributes:
        name: of the signal that came, or None.
    """

    def __init__(self, finishing: str | None) -> None:
        self.finishing = finishing
        self.name: str | None = None
        self._at_once = False
        self._first: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, number: int, frame: FrameType | None) -> None:
        copy, again = echoes(self._first), self.name is not None
        if not again:
            self.name, self._first = signal.Signals(number).name, time.monotonic()
        if (again and not copy) or self._at_once:
            raise KeyboardInterrupt
        if again or self.finishing is None or not speaks():
            return
        # os.write: the handler may run in the middle of a print, which cannot be entered twice
        text = f"\n{self.name}: {self.finishing}; once more to stop at once\n"
        with suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal raises KeyboardInterrupt at once, and so does one that came before."""
        self._at_once = True
        try:
            if self.name is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False
