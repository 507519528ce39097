"""``bench.evidence``: a tiny run of every stage on a CPU, and commands that the benches take."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import contest, evidence

ROOT = Path(__file__).parents[2]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")


class Forked:
    """A stage's process that is forked from this one, which has imported everything: most of a tiny stage is imports."""

    def __init__(self, words, log, environment):
        sys.stdout.flush()
        if pid := os.fork():
            self.pid, self.code = pid, None
            return
        code = 1
        try:
            os.setsid()
            os.chdir(ROOT)
            os.environ.update(environment)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False, buffering=1) for n in (1, 2))
            sys.argv = words
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code)
            code = int(end.code) if end.code is None or isinstance(end.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self, seconds):
        until = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                raise subprocess.TimeoutExpired("forked", seconds)
            else:
                time.sleep(0.02)
        return self.code


@NO_CUDA
def test_the_whole_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    for name in ("bench.contest", "bench.memory", "bench.cases", "zephyr_lite.engines.trl"):
        importlib.import_module(name)
    monkeypatch.setattr(evidence, "start", Forked)
    code = evidence.main(["--out", str(tmp_path), "--tiny", "--minutes", "30"])
    found = json.loads((tmp_path / "evidence.json").read_text())
    red = {n: s.get("last_lines") for n, s in found["stages"].items() if s["status"] != "ok"}
    assert not red and code == 0
    names = [stage.name for stage in evidence.STAGES]
    assert list(found["stages"]) == names
    told = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names if name != "tests"}
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["imports"]["trl"].startswith("in ")
    assert told["base"]["base"]["built_now"] and not told["gpu"]["base"]["built_now"]
    assert " passed" in (tmp_path / "tests.log").read_text()
    assert told["ops"]["operations"] and told["memory"]["cases"]["sft at 24 GB"]["measured"]
    assert [m["method"] for m in told["gpu"]["matches"]] == ["sft", "dpo"]
    assert "unsloth" in told["cap12"]["matches"][0]["not_run"]
    assert "cap12     ok" in capsys.readouterr().out


def test_a_stage_that_fails_or_hangs_is_named(tmp_path):
    (tmp_path / "hangs.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "fails.py").write_text("raise SystemExit('no card')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for name, seconds, status, last in (("fails", 60, "failed", "no card"), ("hangs", 3, "timed out", "begun")):
        record = evidence.run_stage([name], tmp_path / "log", seconds, environment)
        assert record["status"] == status and record["last_lines"] == [last]


def test_the_commands_are_ones_that_the_benches_take(tmp_path):
    args = evidence.argparse.Namespace(tiny=False, out=tmp_path, base=tmp_path / "base")
    for stage in evidence.STAGES:
        module, *words = evidence.command(stage, args, 100)
        if module == "bench.gpu":
            assert contest.arguments(words).base == tmp_path / "base"


@NO_CUDA
def test_the_selection_reaches_every_topic(tmp_path):
    """Names of GPU tests may change: what is to be run must still be found. (Collecting needs no card.)"""
    words = ["pytest", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu", "-k", evidence.TESTS]
    with (tmp_path / "log").open("wb") as log:
        assert Forked([*words, "tests/test_gpu.py", "tests/memory/test_gpu_memory.py"], log, {}).wait(600) == 0
    found = (tmp_path / "log").read_text()
    topics = (
        "attention_kernel decoder_on step_0 nf4 keep_policies streamed_and_offloaded redone a_twentieth under_a_cap"
    )
    assert [topic for topic in topics.split() if topic not in found] == []
    assert found.count("::test_") < 100
