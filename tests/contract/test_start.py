"""What the environment of a start says -> what the start makes of it."""

import os
import subprocess
import sys
import types

import pytest

from tests.messages import Logged
from tests.train.test_train import words
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import Interrupted
from zephyr_lite.io import interrupts as world
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.train.sft import run_sft

ONE_PROCESS = {
    "LOCAL_RANK": "0",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "29500",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "PMI_SIZE": "2",
    "PMI_RANK": "0",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "TORCHELASTIC_RUN_ID": "none",
}


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (ONE_PROCESS, set()),
        ({"LOCAL_RANK": "0"}, set()),
        ({"ACCELERATE_MIXED_PRECISION": "no", "PMIX": "x"}, {"ACCELERATE_MIXED_PRECISION", "PMIX"}),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, {"WORLD_SIZE", "RANK", "LOCAL_RANK"}),
    ],
)
def test_variables_of_launchers(monkeypatch, given, left):
    monkeypatch.setattr(world, "_launched_alone", False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    world.alone()
    assert {name for name in given if name in os.environ} == left
    assert world.echoes(float("-inf")) is False and world._launched_alone == ("RANK" in given and not left)


def test_variables_that_a_launcher_left_have_no_effect_on_one_process(tiny_base, chat_rows, tmp_path):
    given = words(tiny_base, tmp_path / "r", chat_rows, max_steps=1, load_in_4bit="false")
    command = [sys.executable, "-P", "-m", "zephyr_lite", "sft", *given]
    done = subprocess.run(command, env={**os.environ, **ONE_PROCESS}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert StageDir(tmp_path / "r/sft").complete()


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A package of that name that records what a run is begun with."""
    module = types.ModuleType("wandb")
    module.run, module.begun, module.steps = None, [], []

    def init(**given):
        module.begun.append(given)
        module.run = types.SimpleNamespace(id=given["id"], name=given["name"], summary={}, _label=lambda **given: None)

    module.init = init
    module.config = type("Config", (dict,), {"update": lambda self, *args, **given: None})()
    module.log = lambda logs: module.steps.append(logs["train/global_step"])
    error = types.ModuleType("wandb.sdk.lib.config_util")
    error.ConfigError = type("ConfigError", (Exception,), {})
    module.__spec__ = types.SimpleNamespace(origin="here")
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, name, error)
    return module


def test_a_resumed_stage_continues_its_wandb_run(tiny_base, chat_rows, tmp_path, wandb):
    def interrupt(step, metrics):
        if step == 2:
            raise KeyboardInterrupt

    given = words(
        tiny_base, tmp_path / "r", chat_rows, max_steps=4, save_steps=1, report_to="[wandb]", load_in_4bit="false"
    )
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        run_sft(load_config("sft", None, given), observers=[Logged(interrupt)])
    wandb.run = None  # another process
    run_sft(load_config("sft", None, given))
    first, second = wandb.begun
    assert first == second and first["resume"] == "allow" and first["name"] == "r-sft"
    assert first["id"] == f"{StageDir(tmp_path / 'r/sft').info()['id']}-sft"
    assert max(wandb.steps) == 4
