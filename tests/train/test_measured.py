"""What a run measured: its speed and peak beside the predicted ones, for the next plan on this machine."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.messages import messages_to
from tests.train.test_train import words
from zephyr_lite.config.load import load_config
from zephyr_lite.io.run_dir import StageDir, cache_dir
from zephyr_lite.memory.earlier import add_run, earlier_runs
from zephyr_lite.memory.plan import Plan
from zephyr_lite.train import main
from zephyr_lite.train.main import _compare, save_stage
from zephyr_lite.train.resume import machine_now
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import run_sft
from zephyr_lite.train.stage import Outcome


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


def test_the_speed_is_that_of_the_median_step_but_for_the_first(tiny_base, chat_rows, tmp_path):
    loaded = load_config("sft", None, words(tiny_base, tmp_path / "a", chat_rows, load_in_4bit="false"))
    stage = setup_stage("sft", loaded)
    outcome = Outcome(4, {}, None, 9)
    save_stage(stage, outcome, seconds=[50.0, 1.0, 2.0, 9.0])
    assert stage.dir.info()["result"]["tokens_per_second"] == stage.workload.step_tokens / 2
    assert not (cache_dir() / "measured.json").exists()  # too few steps


def test_only_a_plan_of_this_machine_is_compared_and_more_memory_than_planned_is_warned_of():
    now = machine_now(torch.float32)
    base = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    job = SimpleNamespace(dtype=torch.float32, engine="fused", shape=SimpleNamespace(layers=2, hidden=64))
    plan = Plan(1, (), account={"peak": 2 * 2**30}, tokens_per_second=50.0, speed_ratio=0.5)
    stage = SimpleNamespace(
        plan=plan, info={"machine": now}, base=base, workload=job, config=SimpleNamespace(engine="fused")
    )
    said: list[str] = []
    with messages_to(said.append):
        _compare(stage, 40.0, 2 * 2**30)
        assert not said
        _compare(stage, 40.0, 3 * 2**30)
        stage.info["resumed"] = [{"machine": {**now, "processor": "another"}}]
        _compare(stage, 99.0, 3 * 2**30)
        del stage.info["resumed"]
        _compare(stage, 900.0, 2**30)
    assert said == ["memory: 3.00 GiB at the peak, more than the 2.00 GiB of the plan"]
    assert earlier_runs(now["processor"], job) == [0.4, 0.4]


@pytest.mark.parametrize("content", ['{"x": ', '{"x": "fast"}', "[]"])
def test_a_damaged_file_is_named_and_started_anew(content):
    job, said = SimpleNamespace(dtype=torch.float32, engine="fused", shape=SimpleNamespace(layers=2, hidden=64)), []
    cache_dir().mkdir()
    (cache_dir() / "measured.json").write_text(content)
    with messages_to(said.append):
        assert earlier_runs("here", job) == [] and said[0].startswith(f"{cache_dir() / 'measured.json'}: damaged; ")
    add_run("here", job, 0.5)
    assert earlier_runs("here", job) == [0.5]
