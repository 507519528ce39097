"""Engine unsloth: a missing or unsuitable Unsloth is reported before anything is loaded; where Unsloth starts, its runs equal
the other engines'. It has to be imported before transformers, so every run is a process of its own, as a user's is."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.test_baselines import settings
from zephyr_lite.engines import unsloth as early
from zephyr_lite.errors import UserError

ROOT = Path(__file__).parents[2]
EXTRA = 'pip install "zephyr-lite[unsloth]"'


def python(*arguments):
    """A process without a GPU: its exit code, what it printed, what it complained about."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("UNSLOTH_ALLOW_CPU", None)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=280
    )
    return done.returncode, done.stdout, done.stderr


# What stands in its way


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is not None, reason="unsloth is installed here")
def test_a_missing_unsloth_is_reported_before_anything_is_loaded(tmp_path):
    """There is no such model either; the engine's error comes first, and nothing is written."""
    words = ["engine=unsloth", f"output_dir={tmp_path / 'run'}", f"model_name_or_path={tmp_path / 'nowhere'}"]
    code, _, complaint = python("-m", "zephyr_lite", "sft", *words)
    assert code == 2
    assert "is not installed" in complaint and EXTRA in complaint and "nowhere" not in complaint
    assert not (tmp_path / "run").exists()


class Metadata:
    """Distributions as they might be installed."""

    def __init__(self, monkeypatch, **versions):
        self.versions = {"unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", **versions}
        monkeypatch.setattr(early, "version", self.version)

    def version(self, name):
        if self.versions.get(name) is None:
            raise early.PackageNotFoundError(name)
        return self.versions[name]


def test_versions_that_do_not_fit(monkeypatch):
    Metadata(monkeypatch)
    assert early.unsloth_conflicts() == []
    Metadata(monkeypatch, unsloth_zoo=None)
    assert early.unsloth_conflicts() == [f"unsloth_zoo {early.WANTED} is not installed"]
    Metadata(monkeypatch, unsloth="2025.1.1")
    with pytest.raises(UserError, match=re.escape(f"unsloth 2025.1.1 is installed, wanted is {early.WANTED}")):
        early.start_unsloth()


# Where it starts


@pytest.fixture(scope="module")
def starts():
    """Skips where Unsloth does not start without a GPU. Its CPU fallback is what is tested here."""
    if conflicts := early.unsloth_conflicts():
        pytest.skip("; ".join(conflicts))
    code, _, complaint = python("-c", "from zephyr_lite.engines import start_unsloth; start_unsloth()")
    if code:
        pytest.skip(complaint.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def run(starts, tiny_base, chat_rows, pair_rows, tmp_path_factory):
    """Runs a stage through the command line, once, and returns its folder and what was said."""
    root = tmp_path_factory.mktemp("runs")
    done = {}

    def go(method, engine, name, *words, code=0):
        if (method, engine, name, words) in done:
            return done[method, engine, name, words]
        rows = chat_rows if method == "sft" else pair_rows
        file, out = root / f"{method}.yaml", root / f"{engine}-{name}"
        file.write_text(settings(method, tiny_base, rows, engine=engine, output_dir=str(out), max_steps=4))
        found, said, complaint = python("-m", "zephyr_lite", method, "--config", file, *words)
        assert found == code, said + complaint
        result = out / method, said + complaint
        if not code:
            done[method, engine, name, words] = result
        return result

    return go


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def assert_same_run(found, wanted, tolerance):
    """Every step's loss, gradient norm and rewards, and the evaluations."""
    ours, theirs = metrics(found), metrics(wanted)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] and len(ours) == 6
    for a, b in zip(ours, theirs):
        names = {"loss", "grad_norm", "eval_loss", "rewards/margins", "logps/chosen", "learning_rate", "num_tokens"}
        shared = names & a.keys() & b.keys() - ({"num_tokens"} if "logps/chosen" in b else set())
        assert shared & {"loss", "eval_loss"}
        for name in shared:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)


def test_sft_is_the_other_engines_run(run):
    found, said = run("sft", "unsloth", "nf4")
    assert "Unsloth" in said and "trained by TRL and Unsloth" in said
    for engine in ("trl", "fused"):
        assert_same_run(found, run("sft", engine, "nf4")[0], 1e-5)
    info = json.loads((found / "stage.json").read_text())
    assert info["status"] == "complete" and info["engine"] == "unsloth"
    assert info["versions"]["unsloth"] == early.version("unsloth")
    assert info["base"]["load_in_4bit"] and info["base"]["dtype"] == "float32"
    # its own loss ran, which leaves TRL's entropy and accuracy of the training pass out
    assert "entropy" not in metrics(found)[0]
    assert not (Path.cwd() / "unsloth_compiled_cache").exists()
