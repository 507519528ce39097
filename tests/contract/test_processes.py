"""Claim 4: a run on two processes is the run on one: losses, adapter, stop and resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.messages import messages_to
from zephyr_lite.config.load import load_config
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

ROOT = Path(__file__).parents[2]


def words(base, out, rows, **changes):
    settings = {
        "model_name_or_path": base,
        "output_dir": out,
        "dataset.path": rows,
        "eval_dataset.path": rows,
        "samples": 0,
        "dtype": "float64",
        "load_in_4bit": "false",
        "max_length": 128,
        "max_prompt_length": 64,
        "batch_size": 3,
        "lora_r": 4,
        "learning_rate": 5e-3,
        "save_steps": 2,
        "eval_steps": 2,
        "max_steps": 4,
        **changes,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def launched(arguments, folder, size=2):
    """The command that starts so many processes, and the environment for it."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def among_two(folder, *arguments, code=0):
    process = launched(arguments, folder)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, said
    return said


def logged(stage):
    """What does not depend on the clock or the machine."""
    records = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    skipped = ("seconds", "tokens_per_second", "pairs_per_second", "answers_per_second", "peak_memory_gib")
    return [{k: v for k, v in record.items() if k not in skipped} for record in records]


def close(stage, other):
    found, wanted = logged(stage), logged(other)
    assert [r.keys() for r in found] == [r.keys() for r in wanted]
    for record, right in zip(found, wanted):
        assert record == pytest.approx(right, rel=1e-9, abs=1e-12)
    one, two = (read_adapter(folder / "adapter").modules for folder in (stage, other))
    assert one.keys() == two.keys()
    for name in one:
        for part in ("a", "b"):
            x, y = (getattr(modules[name], part).double() for modules in (one, two))
            assert (x - y).norm() <= 1e-9 * y.norm(), name


# The commands, one after the other in the same processes. A signal comes to one of them alone during the first step.
BOTH = """
import json, os, signal, sys, time
from zephyr_lite.cli import app as cli
from zephyr_lite.train import loop
from zephyr_lite.train.distributed import joined
sft, dpo, kto = json.loads(sys.argv[1])
plain = loop.accumulate_gradients
def signalled(state, step):
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(state, step)
def command(words):
    code = cli.run(words)
    if here.is_main_process:
        time.sleep(0.3)  # the other's last words come first
        print("== next", flush=True)
    here.all_gather(0)
    return code
with joined() as here:
    loop.accumulate_gradients = signalled
    assert command(["sft", *sft]) == 130
    loop.accumulate_gradients = plain
    assert command(["sft", *sft]) == command(["dpo", *dpo]) == command(["dpo", *kto]) == 0
"""


@pytest.fixture(scope="module")
def runs(tiny_base, chat_rows, pair_rows, tmp_path_factory):
    """The stages in one process, and in two."""
    folder = tmp_path_factory.mktemp("world")
    sft = words(tiny_base, folder / "one", chat_rows, lora_dropout=0.1)
    run_sft(load_config("sft", None, sft))
    dpo = words(tiny_base, folder / "one", pair_rows, precompute_ref_log_probs="true", beta=0.1)
    run_dpo(load_config("dpo", None, dpo))
    labels = [{**json.loads(line), "label": True} for line in chat_rows.read_text().splitlines()]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    labelled = {"stage": "kto", "loss_type": "kto", "adapters": "none", "max_steps": 3}
    kto = words(tiny_base, folder / "one", folder / "labels.jsonl", **labelled)
    run_dpo(load_config("dpo", None, kto))
    lines = [[word.replace(str(folder / "one"), str(folder / "two")) for word in line] for line in (sft, dpo, kto)]
    (folder / "both.py").write_text(BOTH)
    text = among_two(folder, str(folder / "both.py"), json.dumps(lines))
    return folder, dict(zip(("stopped", "sft", "dpo", "kto"), text.split("== next")))


def test_two_processes_are_as_one(runs, tiny_base, chat_rows, tmp_path):
    """One test, so that one worker makes the runs."""
    for stage in ("sft", "dpo", "kto"):
        two_are_as_one(runs, stage)
    both_stopped_after_the_same_step(runs)
    a_checkpoint_of_two_goes_on_with_one(runs, tiny_base, chat_rows, tmp_path)


def two_are_as_one(runs, stage):
    folder, said = runs
    close(folder / "two" / stage, folder / "one" / stage)
    assert stage != "kto" or max(record.get("kl", 0) for record in logged(folder / "two" / stage)) > 0.1
    info = json.loads((folder / "two" / stage / "stage.json").read_text())
    assert info["status"] == "complete" and info["machine"]["processes"] == 2
    assert (
        said[stage].count("step 3/3" if stage == "kto" else "step 4/4") == 2
    )  # the step and its evaluation, by one of them alone
    assert "2 processes" in said[stage]


def a_checkpoint_of_two_goes_on_with_one(runs, tiny_base, chat_rows, tmp_path):
    folder, _ = runs
    shutil.copytree(folder / "two" / "sft", tmp_path / "run" / "sft")
    stage = tmp_path / "run" / "sft"
    shutil.rmtree(stage / "checkpoint-4")
    shutil.rmtree(stage / "adapter")
    info = json.loads((stage / "stage.json").read_text())
    (stage / "stage.json").write_text(json.dumps({**info, "status": "running"}))
    said = []
    with messages_to(said.append):
        run_sft(load_config("sft", None, words(tiny_base, tmp_path / "run", chat_rows, lora_dropout=0.1)))
    assert "going on from checkpoint-2" in said and any("processes 2 then, 1 now" in line for line in said)
    close(stage, folder / "one" / "sft")


def both_stopped_after_the_same_step(runs):
    _, said = runs
    assert said["stopped"].count("holds everything") == 1, said["stopped"]
    assert said["sft"].count("going on from checkpoint-") == 1
