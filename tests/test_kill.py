"""Invariant 7: a run killed at any instant and started again ends with the same files. (At more instants, and as a user
starts it: ``python -m tests.kill``.)"""

import os
import subprocess
import sys
from pathlib import Path


def test_both_stages_and_the_merge_survive_being_stopped_anywhere():
    words = [sys.executable, "-m", "tests.kill", "--scenario", "whole", "--stops", "3"]
    done = subprocess.run(
        words,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs ended, all equal to the undisturbed one" in done.stdout
    assert sum(int(word) for word in done.stdout.replace(",", " ").replace(";", " ").split() if word.isdigit()) >= 3
