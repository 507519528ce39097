"""What is checked before the weights of a base on the hub are downloaded (``tests/fake_hub.py``)."""

import pytest
import torch

from tests.fake_hub import FakeHub
from tests.train.test_train import killed_at, words
from zephyr_lite.config.load import MemorySpec, load_config
from zephyr_lite.errors import UserError
from zephyr_lite.memory.gpus import CARDS
from zephyr_lite.memory.machine import of_card
from zephyr_lite.model import files
from zephyr_lite.model.peft_io import LoraWeights, write_adapter
from zephyr_lite.train import setup
from zephyr_lite.train.sft import run_sft


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
        ("eval_dataset.path", "./held", "held: there is no such file", False),
        ("adapters", "runs/x/sft/adapter", "runs/x/sft/adapter: there is no such folder", False),
        ("chat_template", "mine.jinja", "mine.jinja'?: neither a template", False),
        ("lora_target_modules", "[k_prj]", "k_prj", True),
        ("dataset.columns.messages", "chats", "there is no column 'chats'", True),
        ("eval_dataset.split", "test", "there is no split 'test'", True),
        ("chat_template", "chatml", "does not know", True),
    ],
)
def test_a_mistake_downloads_no_weights(weights, chat_rows, tmp_path, key, value, says, small):
    with pytest.raises(UserError, match=says):
        start(tmp_path / "run", chat_rows, **{key: value})
    assert not weights.exists() and (weights.parent / "config.json").exists() == small
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_and_a_run_too_large_download_no_weights(weights, chat_rows, tmp_path, monkeypatch):
    weights_of_another = {"model.layers.7.mlp.up_proj": LoraWeights(torch.ones(2, 64), torch.ones(128, 2), 1.0)}
    write_adapter(tmp_path / "theirs", weights_of_another, base_model_name="me/base")
    with pytest.raises(UserError, match="it has no linear layer of this name"):
        start(tmp_path / "run", chat_rows, adapters=tmp_path / "theirs")
    monkeypatch.setattr(
        setup, "this_machine", lambda *_, **__: of_card(CARDS["4090"], torch.float32, MemorySpec(vram="0.75GiB"))
    )
    with pytest.raises(UserError, match="MiB are missing"):
        start(tmp_path / "run", chat_rows)
    assert not weights.exists() and not (tmp_path / "run").exists()


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
