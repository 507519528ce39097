"""One process at a time on a folder; a killed one leaves nothing locked."""

import platform
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from zephyr_lite.errors import UserError
from zephyr_lite.io.atomic import alone

HOLDER = """
import sys, time
from pathlib import Path
from zephyr_lite.io.atomic import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(folder, code=HOLDER):
    """Another process holds the lock of the folder; it is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_same_process_may_enter_again_and_nothing_is_left(tmp_path):
    with alone(tmp_path / "a" / "run"):
        with alone(tmp_path / "a" / ".." / "a" / "run"):
            pass
        assert (tmp_path / "a" / "run" / ".lock").is_file()
    assert not (tmp_path / "a").exists()
    with alone(tmp_path / "run"):
        (tmp_path / "run" / "x").write_text("1")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["x"]


def test_a_living_process_is_named_and_a_killed_one_holds_nothing(tmp_path):
    with held(tmp_path / "run") as holder, pytest.raises(UserError) as refused, alone(tmp_path / "run"):
        pass
    assert refused.value.message == f"{tmp_path / 'run'}: process {holder.pid} on {platform.node()} works here."
    with alone(tmp_path / "run"):
        pass


def test_a_forked_worker_that_outlives_its_parent_holds_nothing(tmp_path):
    """Loading and tokenizing fork workers."""
    forks = "import os\n    if os.fork() == 0:\n        os.close(1)\n        time.sleep(20)\n    time.sleep(60)"
    with held(tmp_path / "run", HOLDER.replace("time.sleep(60)", forks)):
        time.sleep(0.3)
    with alone(tmp_path / "run"):
        pass
