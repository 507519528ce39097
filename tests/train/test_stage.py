"""A stage beside its steps: what is checked before weights are downloaded, ``push_to_hub``, and the speed for the next plan."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import RepoUrl

from tests.fake_hub import FakeHub
from tests.train.test_train import killed_at, words
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir, cache_dir
from zephyr_lite.memory.machine import add_run, earlier_runs
from zephyr_lite.model import files
from zephyr_lite.train import main
from zephyr_lite.train.resume import StageComplete
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import run_sft

# -- weights that are downloaded last (``tests/fake_hub.py``)


@pytest.fixture
def weights(tiny_base, tmp_path, monkeypatch):
    """The file of the weights of me/base in the hub's cache, which is empty."""
    hub = FakeHub()
    hub.repos["me/base"] = [{path.name: path.read_bytes() for path in tiny_base.iterdir()}]
    monkeypatch.setattr(files, "snapshot_download", hub.snapshots(tmp_path / "cache"))
    return tmp_path / "cache/me/base/model.safetensors"


def start(out, rows, **changes):
    run_sft(load_config("sft", None, words("me/base", out, rows, max_steps=2, save_steps=1, **changes)))


@pytest.mark.parametrize(
    ("key", "value", "says", "small"),
    [
        ("dataset.path", "data/chats.jsonl", "data/chats.jsonl: there is no such file", False),
        ("adapters", "runs/x/sft/adapter", "runs/x/sft/adapter: there is no such folder", False),
        ("lora_target_modules", "[k_prj]", "k_prj", True),
        ("eval_dataset.split", "test", "there is no split 'test'", True),
    ],
)
def test_a_mistake_downloads_no_weights(weights, chat_rows, tmp_path, key, value, says, small):
    with pytest.raises(UserError, match=says):
        start(tmp_path / "run", chat_rows, **{key: value})
    assert not weights.exists() and (weights.parent / "config.json").exists() == small
    assert not (tmp_path / "run").exists()


def test_the_weights_come_last_and_a_resumed_run_is_compared_before_they_come(weights, chat_rows, tmp_path):
    with killed_at(1):
        start(tmp_path / "run", chat_rows)
    assert weights.exists()
    weights.unlink()  # another machine, to which the run was copied
    with pytest.raises(UserError, match="lora_r: 4 then, 8 now"):
        start(tmp_path / "run", chat_rows, lora_r=8)
    assert not weights.exists()
    start(tmp_path / "run", chat_rows)
    assert weights.exists() and (tmp_path / "run/sft/adapter").is_dir()


# -- push_to_hub


class Hub:
    def __init__(self):
        self.away, self.uploads = True, []

    def create_repo(self, name, private, exist_ok):
        if self.away:
            raise OSError("the network is away")
        self.private = private
        return RepoUrl(f"https://huggingface.co/{name if '/' in name else f'me/{name}'}")

    def upload_folder(self, *, repo_id, folder_path):
        self.uploads.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_a_failed_push_is_made_again_by_the_same_command(loaded, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(main, "HfApi", lambda: hub)
    given = loaded("r", max_steps=1, push_to_hub="model", hub_private_repo="true")
    with pytest.raises(UserError, match="push_to_hub model: the network is away") as failed:
        run_sft(given)
    assert "the same command then pushes it" in failed.value.hint and StageDir(tmp_path / "r/sft").complete()
    hub.away = False
    for _ in range(2):  # the second time there is nothing left to do
        with pytest.raises(StageComplete):
            run_sft(given)
    assert len(hub.uploads) == 1 and hub.uploads[0][0] == "me/model" and hub.private is True
    assert {"adapter_model.safetensors", "tokenizer.json"} <= set(hub.uploads[0][1])


@pytest.mark.parametrize("name", ["a/b/c/d", "me/a--b"])
def test_a_name_that_no_repository_has_is_refused_before_training(loaded, tmp_path, name):
    with pytest.raises(UserError, match=f"push_to_hub {re.escape(name)}: "):
        run_sft(loaded("r", max_steps=1, push_to_hub=name))
    assert not list((tmp_path / "r").rglob("*.safetensors"))


# -- the speed of earlier runs


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ZEPHYR_LITE_CACHE", str(tmp_path / "cache"))


def test_the_next_plan_is_corrected_by_a_run(loaded, tmp_path, monkeypatch):
    """A run of enough steps; its own plan stays as it was made."""
    monkeypatch.setattr(main, "DISTURBED", math.inf)  # a tiny model on a busy machine
    changes = {"max_steps": 11, "eval_steps": 100, "save_steps": 100, "batch_size": 1, "load_in_4bit": "false"}
    run_sft(loaded("a", **changes))
    info = StageDir(tmp_path / "a" / "sft").info()
    plan = setup_stage("sft", loaded("b", **changes), claim=False).plan
    measured, predicted = info["result"]["tokens_per_second"], info["plan"]["tokens_per_second"]
    assert plan.earlier_runs == 1 and plan.speed_ratio == pytest.approx(measured / predicted, abs=1e-3)
    assert info["plan"]["earlier_runs"] == 0 and info["plan"]["speed_ratio"] == 1


@pytest.mark.parametrize("content", ['{"x": ', '{"x": "fast"}'])
def test_a_damaged_file_is_started_anew(content):
    shape = SimpleNamespace(layers=2, hidden=64)
    job = SimpleNamespace(dtype=torch.float32, engine="fused", int8=False, shape=shape)
    file = cache_dir() / "measured.json"
    file.parent.mkdir()
    file.write_text(content)
    assert earlier_runs("here", job) == []
    add_run("here", job, 0.5)
    assert earlier_runs("here", job) == [0.5]
