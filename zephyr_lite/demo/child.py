"""A command of this program in its own process: its memory is freed when it ends, and it can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

POLL_SECONDS = 0.02


def child(
    words: Sequence[str],
    *,
    log: Path | None = None,
    asked: Path | None = None,
    answer: Path | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> int:
    """Run ``python -m zephyr_lite WORDS`` in its own session, and wait for its end.

    Args:
        log: a file to which its output is appended; None: its output is this process's.
        asked: a file for its standard input; nothing by default.
        answer: a file for its standard output alone.
        kill_when: polled; once true, the child and its workers are killed (SIGKILL).

    Returns:
        its exit code, or minus the number of the signal that ended it.

    Raises:
        KeyboardInterrupt: this process was interrupted; the child was too, and has ended.
    """
    with ExitStack() as files:
        stderr = files.enter_context(log.open("ab")) if log else None
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "zephyr_lite", *words],
            stdin=files.enter_context(asked.open("rb")) if asked else subprocess.DEVNULL,
            stdout=files.enter_context(answer.open("wb")) if answer else stderr,
            stderr=stderr,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # the log of a killed process would lack what it had buffered
        )
        interrupted = False
        while process.poll() is None:
            try:
                if kill_when is not None and kill_when():
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                interrupted = True
                process.send_signal(signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode
