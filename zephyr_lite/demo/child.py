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
from typing import Any

POLL_SECONDS = 0.02


def start(words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start ``python -m zephyr_lite WORDS``; by default without standard input, with one stream of output, and in a session of
    its own, so that Ctrl-C in the terminal is not for it. ``options``: of Popen."""
    usual: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "zephyr_lite", *words],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # the log of a killed process would lack what it had buffered
        **usual | options,
    )


def child(
    words: Sequence[str],
    *,
    log: Path | None = None,
    asked: Path | None = None,
    answer: Path | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> int:
    """Run a command, and wait for its end.

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
        output = files.enter_context(log.open("ab")) if log else None
        stdin = files.enter_context(asked.open("rb")) if asked else subprocess.DEVNULL
        stdout = files.enter_context(answer.open("wb")) if answer else output
        process = start(words, stdin=stdin, stdout=stdout, stderr=output)
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
