"""The folder of a run that an older version (commit 5861e26) was killed in, after step 3 of 5, is resumed to the same end."""

import json
import shutil
from pathlib import Path

from tests.train.test_train import metrics
from zephyr_lite.config.load import load_config
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train.sft import run_sft

OLDER = Path(__file__).parent / "older" / "killed_sft"
SETTINGS = {
    "model_name_or_path": "base",
    "dataset.path": "chat.jsonl",
    "max_length": 128,
    "batch_size": 1,
    "lora_r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.1,
    "lora_target_modules": "[q_proj]",
    "learning_rate": 5e-3,
    "save_steps": 2,
    "num_train_epochs": 1,
    "samples": 0,
    "optim": "adamw_torch",
    "load_in_4bit": "false",
}


def sft(run):
    run_sft(load_config("sft", None, [f"{k}={v}" for k, v in {**SETTINGS, "output_dir": run}.items()]))


def test_a_run_of_an_older_version_is_resumed(tiny_base, chat_rows):
    shutil.copytree(tiny_base, "base")
    shutil.copy(chat_rows, "chat.jsonl")
    sft("whole")
    shutil.copytree(OLDER, "run")
    (Path("run") / ".lock").write_text('{"pid": 1}')  # of the killed process
    # the base's random weights may be rounded differently on another processor
    file = Path("run/sft/stage.json")
    info = json.loads(file.read_text())
    info["base"]["fingerprint"] = json.loads(Path("whole/sft/stage.json").read_text())["base"]["fingerprint"]
    file.write_text(json.dumps(info))
    sft("run")
    assert metrics(Path("run/sft"), "step") == metrics(Path("whole/sft"), "step") == [1, 2, 3, 4, 5]
    whole, run = (read_adapter(Path(name) / "sft/adapter").modules for name in ("whole", "run"))
    for name, module in whole.items():
        for mine, other in ((run[name].a, module.a), (run[name].b, module.b)):
            assert (mine - other).norm() <= 1e-5 * other.norm()
    info = json.loads(file.read_text())
    assert info["status"] == "complete" and info["resumed"][0]["step"] == 2
