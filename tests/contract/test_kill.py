"""Invariant 7: a run killed at any instant and started again ends with the same files. (At more instants, and as a user
starts it: ``python -m tests.kill``.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.test_train import killed_at, metrics, words
from zephyr_lite.config.load import load_config
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train.sft import run_sft


def test_both_stages_and_the_merge_survive_being_stopped_anywhere():
    words = [sys.executable, "-m", "tests.kill", "--scenario", "whole", "--stops", "3"]
    done = subprocess.run(
        words,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs ended, all equal to the undisturbed one" in done.stdout
    assert sum(int(word) for word in done.stdout.replace(",", " ").replace(";", " ").split() if word.isdigit()) >= 3


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_killed_run_goes_on_to_the_same_adapter(tiny_base, chat_rows, tmp_path, at, optim):
    """Invariant 7 at the seams: the same bits, and metrics without gaps or doubles."""
    settings = {"lora_dropout": 0.1, "optim": optim, "batch_size": 1, "num_train_epochs": 1, "lora_r": 64}
    run_sft(load_config("sft", None, words(tiny_base, tmp_path / "whole", chat_rows, **settings)))
    loaded = load_config("sft", None, words(tiny_base, tmp_path / "killed", chat_rows, **settings))
    with killed_at(at):
        run_sft(loaded)
    run_sft(loaded)
    whole, killed = (read_adapter(tmp_path / n / "sft" / "adapter") for n in ("whole", "killed"))
    assert whole.sha256 == killed.sha256
    assert metrics(tmp_path / "killed" / "sft") == metrics(tmp_path / "whole" / "sft")
