"""What a run measured corrects the next plan on this machine."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.messages import messages_to
from tests.train.test_train import words
from zephyr_lite.config.load import load_config
from zephyr_lite.io.run_dir import StageDir, cache_dir
from zephyr_lite.memory.machine import add_run, earlier_runs
from zephyr_lite.train import main
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import run_sft


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ZEPHYR_LITE_CACHE", str(tmp_path / "cache"))


def test_the_next_plan_is_corrected_by_a_run(tiny_base, chat_rows, tmp_path, monkeypatch):
    """A run of enough steps; its own plan stays as it was made."""
    monkeypatch.setattr(main, "DISTURBED", math.inf)  # a tiny model on a busy machine
    changes = {"max_steps": 11, "eval_steps": 100, "save_steps": 100, "batch_size": 1, "load_in_4bit": "false"}
    run_sft(load_config("sft", None, words(tiny_base, tmp_path / "a", chat_rows, **changes)))
    info = StageDir(tmp_path / "a" / "sft").info()
    plan = setup_stage(
        "sft", load_config("sft", None, words(tiny_base, tmp_path / "b", chat_rows, **changes)), claim=False
    ).plan
    measured, predicted = info["result"]["tokens_per_second"], info["plan"]["tokens_per_second"]
    assert plan.earlier_runs == 1 and plan.speed_ratio == pytest.approx(measured / predicted, abs=1e-3)
    assert info["plan"]["earlier_runs"] == 0 and info["plan"]["speed_ratio"] == 1


@pytest.mark.parametrize("content", ['{"x": ', '{"x": "fast"}'])
def test_a_damaged_file_is_named_and_started_anew(content):
    shape, said = SimpleNamespace(layers=2, hidden=64), []
    job = SimpleNamespace(dtype=torch.float32, engine="fused", int8=False, shape=shape)
    file = cache_dir() / "measured.json"
    file.parent.mkdir()
    file.write_text(content)
    with messages_to(said.append):
        assert earlier_runs("here", job) == [] and said[0].startswith(f"{file}: damaged, ")
        add_run("here", job, 0.5)
    assert earlier_runs("here", job) == [0.5]
