"""How a command ends when it does not end well: signals, the machine's faults."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from zephyr_lite.errors import UserError
from zephyr_lite.monitor.console import Console

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.EACCES, "Permission denied", "runs/x"), 2, "error: Permission denied: runs/x"),
        (RuntimeError("while generating"), 2, "error: No space left on device: cache/x"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), 2, "lower max_length"),
        (ValueError("[bold]a [/wrong] thing"), 1, "failed: ValueError: [bold]a [/wrong] thing\nThis is a bug in"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_faults_of_the_machine_end_with_2_and_ours_with_1(invoke, monkeypatch, error, code, says):
    if type(error) is RuntimeError:
        error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "cache/x")

    def broken():
        raise error

    monkeypatch.setattr("zephyr_lite.cli.environment.survey", broken)
    found, out, err = invoke("env")
    assert found == code and says in err and "Traceback" not in out + err
    found, _, err = invoke("env", "--verbose")
    assert found == code and says in err and "Traceback" in err


def started(body: str) -> subprocess.Popen[str]:
    """A command in a process of its own, with another body; torch is not imported."""
    code = (
        "import time, zephyr_lite.cli.app as c, zephyr_lite.__main__ as m\n"
        f"def body(**words):\n{body}\nc.app = body\nm.main(['env'])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


HERE = "print('here', flush=True); time.sleep(60)"
WAITS = f" {HERE}"
CLEANS = f" try:\n  {HERE}\n finally:\n  {HERE}"
LINGERS = f" import threading\n threading.Thread(target=time.sleep, args=(60,)).start()\n {HERE}"


def test_signals_end_a_command_and_a_second_one_at_once():
    processes = one, two, three = [started(body) for body in (WAITS, CLEANS, LINGERS)]
    assert [process.stdout.readline() for process in processes] == ["here\n"] * 3
    one.send_signal(signal.SIGTERM)
    two.send_signal(signal.SIGINT)
    three.send_signal(signal.SIGTERM)
    assert two.stdout.readline() == "here\n"  # it is cleaning up, and never ready
    two.send_signal(signal.SIGTERM)
    assert three.stderr.readline() == "interrupted\n"  # all is said, and it waits for a thread
    time.sleep(0.1)
    three.send_signal(signal.SIGINT)
    assert [process.wait(timeout=30) for process in processes] == [130] * 3
    assert [process.stderr.read() for process in processes] == ["interrupted\n", "interrupted\n", ""]


def test_control_characters_are_shown_as_they_are_written(capsys):
    console = Console()
    console.say("a\x1b[2Jb\x9b\u202e\ud800\nd")
    console.user_error(UserError("runs/\x07: no", "\x1b]0;title\x07"))
    out, err = capsys.readouterr()
    assert out == "a\\x1b[2Jb\\x9b\\u202e\\ud800\nd\n"
    assert err == "error: runs/\\x07: no\n\\x1b]0;title\\x07\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed):
    command = f"exec {sys.executable} -P -m zephyr_lite keys {closed}"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True).returncode == 0
