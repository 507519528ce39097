"""What is checked before the weights of a base on the hub are downloaded (``tests/fake_hub.py``)."""

import pytest

from tests.fake_hub import FakeHub
from tests.train.test_train import killed_at, words
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.model import files
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
