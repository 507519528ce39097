"""Several processes train as one does: the same losses, the same adapter, one writer; whoever fails tells the others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zephyr_lite import cli, world
from zephyr_lite.config import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.interrupts import StopRequest
from zephyr_lite.model.peft_files import read_adapter
from zephyr_lite.train import reference
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft
from zephyr_lite.world import World, deal

ROOT = Path(__file__).parent.parent


def quiet(*args):
    pass


def words(base, out, rows, **changes):
    settings = {
        "model_name_or_path": base, "output_dir": out, "dataset.path": rows, "eval_dataset.path": rows, "samples": 0,
        "dtype": "float64", "load_in_4bit": "false", "max_length": 128, "max_prompt_length": 64, "batch_size": 3,
        "lora_r": 4, "learning_rate": 5e-3, "save_steps": 2, "eval_steps": 2, "max_steps": 4, **changes,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items()]


def launched(arguments, folder, size=2):
    """The command that starts so many processes, and the environment for it."""
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
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
    skipped = ("seconds", "tokens_per_second", "pairs_per_second", "peak_memory_gib")
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
from zephyr_lite import cli
from zephyr_lite.train.stepper import Stepper
from zephyr_lite.world import joined
sft, dpo = json.loads(sys.argv[1])
plain = Stepper.prepare
def signalled(self, step):
    if self.world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(self, step)
def command(words):
    code = cli.run(words)
    if here.writes:
        time.sleep(0.3)  # the other's last words come first
        print("== next", flush=True)
    here.gather(0)
    return code
with joined() as here:
    Stepper.prepare = signalled
    assert command(["sft", *sft]) == 130
    Stepper.prepare = plain
    assert command(["sft", *sft]) == command(["dpo", *dpo]) == 0
"""


@pytest.fixture(scope="module")
def runs(tiny_base, chat_rows, pair_rows, tmp_path_factory):
    """Both stages in one process, and in two."""
    folder = tmp_path_factory.mktemp("world")
    sft = words(tiny_base, folder / "one", chat_rows, lora_dropout=0.1)
    run_sft(load_config("sft", None, sft), say=quiet)
    dpo = words(tiny_base, folder / "one", pair_rows, precompute_ref_log_probs="true", beta=0.1)
    run_dpo(load_config("dpo", None, dpo), say=quiet)
    sft, dpo = ([word.replace(str(folder / "one"), str(folder / "two")) for word in line] for line in (sft, dpo))
    (folder / "both.py").write_text(BOTH)
    text = among_two(folder, str(folder / "both.py"), json.dumps([sft, dpo]))
    return folder, dict(zip(("stopped", "sft", "dpo"), text.split("== next")))


def test_two_processes_are_as_one(runs, tiny_base, chat_rows, tmp_path):
    """One test, so that one worker makes the runs."""
    for stage in ("sft", "dpo"):
        two_are_as_one(runs, stage)
    both_stopped_after_the_same_step(runs)
    a_checkpoint_of_two_goes_on_with_one(runs, tiny_base, chat_rows, tmp_path)


def two_are_as_one(runs, stage):
    folder, said = runs
    close(folder / "two" / stage, folder / "one" / stage)
    info = json.loads((folder / "two" / stage / "stage.json").read_text())
    assert info["status"] == "complete" and info["machine"]["processes"] == 2
    assert said[stage].count("step 4/4") == 2  # the step and its evaluation, by one of them alone
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
    run_sft(load_config("sft", None, words(tiny_base, tmp_path / "run", chat_rows, lora_dropout=0.1)), say=said.append)
    assert "going on from checkpoint-2" in said and any("processes 2 then, 1 now" in line for line in said)
    close(stage, folder / "one" / "sft")


def both_stopped_after_the_same_step(runs):
    _, said = runs
    assert said["stopped"].count("holds everything") == 1, said["stopped"]
    assert said["sft"].count("going on from checkpoint-") == 1


def test_rows_are_dealt_by_length_and_each_once():
    lengths = [100, 1, 90, 10, 50, 40, 3]
    parts = deal(range(7), lengths, 3)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) <= 4 / 3 * sum(lengths) / 3
    assert deal([5], lengths, 2) == [[5], []]


def test_alone_everything_is_as_without():
    here = World()
    value = torch.ones(3)
    here.add(value)
    assert here.writes and value.tolist() == [1, 1, 1] and here.gather(4) == [4]
    assert here.lead(lambda: 1) == here.in_turn(lambda: 1) == here.together(lambda: 1) == 1
    assert here.sums(lambda: {"a": 2.0}) == {"a": 2.0} and here.share([3, 1], [0] * 4) == [3, 1]


TOGETHER = """
import os, signal, sys
from zephyr_lite.errors import UserError
from zephyr_lite.world import PeerEnded, joined, sees
with joined() as here:
    import torch
    value = torch.full((2,), float(here.rank + 1))
    here.add(value)
    assert value.tolist() == [3, 3]
    assert here.gather(here.rank) == [0, 1] and here.lead(lambda: here.rank) == 0
    assert here.sums(lambda: {"a": here.rank + 1.0}) == {"a": 3.0}
    turns = sys.argv[1]
    here.in_turn(lambda: open(turns, "a").write(str(here.rank)))
    def fails():
        if here.rank == 1:
            raise UserError("a row of mine")
    try:
        here.together(fails)
        raise SystemExit("nobody noticed")
    except UserError:
        assert here.rank == 1
    except PeerEnded as ended:
        assert here.rank == 0 and ended.code == 2 and "a row of mine" in ended.message
    try:
        sees("." if here.rank == 0 else "nowhere")
        raise SystemExit("nobody noticed")
    except UserError as error:
        assert "is not there on" in str(error)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which may come before the connection's end is noticed
    if here.rank == 1:
        os.kill(os.getpid(), 9)
    try:
        here.gather(0)
        raise SystemExit("nobody noticed")
    except PeerEnded as ended:
        print("gone:", ended.message, flush=True)
"""


def test_whoever_fails_tells_the_others_and_whoever_dies_is_missed(tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    said = among_two(tmp_path, str(tmp_path / "together.py"), str(tmp_path / "turns"), code=1)
    assert "gone: another process of the run is gone" in said
    assert (tmp_path / "turns").read_text() == "01"


def test_what_runs_in_one_process_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (["plan"], ["sft", "--dry-run"], ["dpo", "--smoke"]):
        assert cli.run(arguments) == 2
        assert "runs in one process; 2 were started" in capsys.readouterr().err


def test_the_launchers_copy_of_a_signal_is_no_second_request(monkeypatch):
    monkeypatch.setenv("RANK", "0")  # systemd and scancel signal torchrun and its processes; torchrun passes it on
    with StopRequest("the step is finished") as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM"
        monkeypatch.setattr(world, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(world, "ECHO", 5.0)
    with StopRequest("the step is finished"):  # alone the second is a person's
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_who_leaves_an_exchange_half_way_begins_no_other(monkeypatch):
    import torch.distributed as dist

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "_left", False)
    monkeypatch.setattr(dist, "all_gather_object", interrupted)
    with pytest.raises(KeyboardInterrupt):
        World(0, 2).gather(1)
    monkeypatch.setattr(dist, "all_gather_object", lambda *args: pytest.fail("another exchange"))
    with pytest.raises(KeyboardInterrupt):
        World(0, 2).gather(1)


def test_what_all_know_one_says(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert cli.run(["sft", "batch_sizes=3"]) == 2
        assert capsys.readouterr().err.count("there is no key") == said
        assert world.everywhere(UserError("x")).said_elsewhere == (rank == 1)
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first of another machine, which has files of its own
    assert cli.run(["sft", "batch_sizes=3"]) == 2 and "there is no key" in capsys.readouterr().err


def test_an_interrupted_reference_keeps_what_all_have_computed(monkeypatch, tmp_path):
    cache, other = (reference.ReferenceCache(tmp_path, "k" * 16, 3) for _ in range(2))
    cache.sums[0], other.sums[2] = 1.0, 2.0

    class Two(World):
        def together(self, work):
            raise KeyboardInterrupt

        def gather(self, value):
            return [value, other.sums]

    monkeypatch.setattr(reference, "world", lambda: Two(0, 2))
    with pytest.raises(KeyboardInterrupt):
        cache.compute(None, None, None)
    monkeypatch.undo()
    again = reference.ReferenceCache(tmp_path, "k" * 16, 3)
    assert not again.load() and again.missing == 1 and again.sums[[0, 2]].tolist() == [[1, 1], [2, 2]]
