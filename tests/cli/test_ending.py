"""How a command ends when it does not end well: signals, what is said of an interruption, the machine's faults."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from zephyr_lite.cli import app as cli
from zephyr_lite.cli.app import interrupted_line
from zephyr_lite.errors import UserError
from zephyr_lite.monitor.console import Console

ROOT = Path(__file__).parents[2]


@pytest.fixture
def invoke(capsys):
    """Run a command: (exit code, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.run(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "main memory is full: MemoryError"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (OSError(errno.EACCES, "Permission denied", "runs/x"), "Permission denied: runs/x"),
        (type("SafetensorError", (Exception,), {})("No space left (os error 28)"), "No space left (os error 28)"),
        (RuntimeError("while generating"), "No space left on device: cache/x"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), "lower max_length"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{type(value).__name__}-{getattr(value, 'errno', '')}",
)
def test_what_is_the_machines_fault_is_no_fault_of_ours(invoke, monkeypatch, error, says):
    if type(error) is RuntimeError:
        error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "cache/x")

    def broken():
        raise error

    monkeypatch.setattr("zephyr_lite.cli.environment.survey", broken)
    code, out, err = invoke("env")
    assert code == 2 and says in err and err.startswith("error: ") and "Traceback" not in out + err
    assert invoke("env", "--verbose")[0] == 2


@pytest.mark.parametrize(
    ("words", "resumes"), [(["sft", "seed=1"], True), (["demo"], True), (["env"], False), (["sft", "--dry-run"], False)]
)
def test_an_interrupted_command_says_whether_it_resumes(words, resumes):
    assert ("from the last checkpoint" in interrupted_line(words)) == resumes


@pytest.mark.parametrize("words", [["sfft"], ["merge"]])
def test_wrong_usage_shows_its_traceback_on_request_only(invoke, words):
    code, _, err = invoke(*words)
    assert code == 2 and "Traceback" not in err and err.startswith("Usage: zephyr-lite")
    code, _, err = invoke(*words, "--verbose")
    assert code == 2 and "Traceback" in err


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


def test_an_output_that_cannot_be_written():
    version = [sys.executable, "-m", "zephyr_lite", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(version, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
        assert (
            done.returncode == 2
            and done.stderr.startswith("error: No space left on device: standard output")
            and "Traceback" not in done.stderr
        )
        wrong = subprocess.run([*version[:3], "sfft"], stdout=full, stderr=full, cwd=ROOT, check=False)
        assert wrong.returncode == 2


def test_control_characters_are_shown_as_they_are_written(capsys):
    console = Console()
    console.say("a\x1b[2Jb\x9b\u202e\ud800\nd")
    console.user_error(UserError("runs/\x07: no", "\x1b]0;title\x07"))
    out, err = capsys.readouterr()
    assert out == "a\\x1b[2Jb\\x9b\\u202e\\ud800\nd\n"
    assert err == "error: runs/\\x07: no\n\\x1b]0;title\\x07\n"


def test_what_fails_because_a_library_swallowed_the_interrupt_is_an_interruption():
    swallows = (
        f" try:\n  {HERE}\n except BaseException:\n  pass\n raise RecursionError('of modules that are half imported')"
    )
    process = started(swallows)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert (process.wait(timeout=30), process.stderr.read()) == (130, "interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_before_anything_is_imported_shows_no_traceback(number, tmp_path):
    (tmp_path / "typer.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "zephyr_lite", "env"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    assert (process.wait(timeout=30), process.stderr.read()) == (130, "interrupted\n")


def test_the_exit_code_of_an_interruption_stays_where_python_remembers_the_signal():
    """An interrupt within exec() of a text makes Python end itself by SIGINT at the very end, whatever exit code was set."""
    code = (
        "import zephyr_lite.cli.app as c, zephyr_lite.__main__ as m\n"
        "def body(**words): exec('raise KeyboardInterrupt')\n"
        "c.app = body\nm.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_output_folder_bears_a_name_that_every_library_can_write(invoke):
    for words in (["merge"], ["data", "chat", "rows.jsonl"], ["data", "pairs", "rows.jsonl"], ["demo"], ["feedback"]):
        code, _, err = invoke(*words, "--out", "m\udcff")
        assert code == 2 and "'m\\udcff' holds a control character, or bytes that are no UTF-8" in err, words


def test_help_that_nobody_reads_to_its_end_is_no_fault():
    there, here = os.pipe()
    os.close(there)  # whoever read has gone
    try:
        done = subprocess.run(
            [sys.executable, "-m", "zephyr_lite", "--help"], stdout=here, stderr=subprocess.PIPE, cwd=ROOT, check=False
        )
    finally:
        os.close(here)
    assert (done.returncode, done.stderr) == (141, b"")
