"""A command of this program in a process of its own: its memory is free again when it ends, and it can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..io.interrupts import SIGNALS

LOOK = 0.01  # seconds between two looks at whether the child is to be killed


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code; below zero: the number of the signal that ended it.
        seconds: how long it took.
        killed: it was killed from here.
    """

    code: int
    seconds: float
    killed: bool = False


def child(
    words: Sequence[str],
    *,
    log: Path | None = None,
    asked: Path | None = None,
    answer: Path | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> Ended:
    """Run ``python -m zephyr_lite WORDS`` and wait for its end.

    The child has a session of its own, so a signal reaches it once: from here, where every one is passed on.

    Args:
        log: what it says is added to this file; None: it says so where this process does.
        asked: a file that it reads as standard input; nothing by default.
        answer: a file for its standard output alone.
        kill_when: asked again and again; when it is true for the first time, the child and its workers are killed
            (SIGKILL), as a power cut would.

    Raises:
        KeyboardInterrupt: a signal came; the child has ended.
    """
    begun = time.monotonic()
    with _files(log, asked, answer) as (stdin, stdout, stderr), _passed_on() as (came, holder):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zephyr_lite", *words],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            # of one that is killed, the log would lack what it had not written yet
            env=os.environ | ({"PYTHONUNBUFFERED": "1"} if log is not None else {}),
        )
        holder.append(process)
        if came:  # between the handlers and the process
            process.send_signal(signal.SIGTERM)
        killed = False
        if kill_when is not None:
            while process.poll() is None and not came and not killed:
                if killed := kill_when():
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                else:
                    time.sleep(LOOK)
        code = process.wait()
    if came:
        raise KeyboardInterrupt
    return Ended(code, time.monotonic() - begun, killed and code == -signal.SIGKILL)


@contextmanager
def _files(log: Path | None, asked: Path | None, answer: Path | None) -> Iterator[tuple[Any, Any, Any]]:
    """Standard input, output and error."""
    opened = []

    def opening(path: Path, mode: str) -> Any:
        opened.append(path.open(mode))
        return opened[-1]

    try:
        stderr = opening(log, "ab") if log is not None else None
        stdout = opening(answer, "wb") if answer is not None else stderr
        yield opening(asked, "rb") if asked is not None else subprocess.DEVNULL, stdout, stderr
    finally:
        for file in opened:
            file.close()


@contextmanager
def _passed_on() -> Iterator[tuple[list[int], list[subprocess.Popen[bytes]]]]:
    """Signals of this process go to the child; which came, and where the child is to be put once it is there."""
    came: list[int] = []
    holder: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for process in holder:
            process.send_signal(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, pass_on)
    try:
        yield came, holder
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
