"""``push_to_hub``: a failed upload loses nothing, and the same command makes it again."""

import re

import pytest
from huggingface_hub import RepoUrl

from tests.train.test_train import words
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.train import main
from zephyr_lite.train.resume import StageComplete
from zephyr_lite.train.sft import run_sft


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


def test_a_failed_push_is_made_again_by_the_same_command(tiny_base, chat_rows, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(main, "HfApi", lambda: hub)
    more = {"max_steps": 1, "push_to_hub": "model", "hub_private_repo": "true"}
    loaded = load_config("sft", None, words(tiny_base, tmp_path / "r", chat_rows, **more))
    with pytest.raises(UserError, match="push_to_hub model: the network is away") as failed:
        run_sft(loaded)
    assert "the same command then pushes it" in failed.value.hint and StageDir(tmp_path / "r/sft").complete()
    hub.away = False
    for _ in range(2):  # the second time there is nothing left to do
        with pytest.raises(StageComplete):
            run_sft(loaded)
    assert len(hub.uploads) == 1 and hub.uploads[0][0] == "me/model" and hub.private is True
    assert {"adapter_model.safetensors", "tokenizer.json"} <= set(hub.uploads[0][1])


@pytest.mark.parametrize("name", ["a/b/c/d", "me/a--b"])
def test_a_name_that_no_repository_has_is_refused_before_training(tiny_base, chat_rows, tmp_path, name):
    given = words(tiny_base, tmp_path / "r", chat_rows, max_steps=1, push_to_hub=name)
    with pytest.raises(UserError, match=f"push_to_hub {re.escape(name)}: "):
        run_sft(load_config("sft", None, given))
    assert not list((tmp_path / "r").rglob("*.safetensors"))
