"""A command that is killed leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = """
import os, sys, time
import datasets
from zephyr_lite.data.workers import interruptible

def work(row):
    print(os.getpid(), flush=True)
    time.sleep(600)

with interruptible():
    datasets.Dataset.from_dict({"row": [0, 1]}).map(work, num_proc=2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends the children of a killed process on request")
def test_workers_end_with_a_killed_parent():
    process = subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(set(workers)) == 2 and {*map(str, workers)} <= {*children}
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 60
    while (left := [pid for pid in children if is_running(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert not left


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # not yet waited for
    except FileNotFoundError:
        return False
