"""Claim 12: only safetensors are opened, a model's code never runs, no link leads out of a folder, no secret is written."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from tests.chat_server import ChatServer, error
from tests.malformed import make_adapter
from tests.recipe.test_feedback import prompts_file, script
from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import RunConfig
from zephyr_lite.errors import UserError
from zephyr_lite.io import redact
from zephyr_lite.io.safetensors import SafetensorsFile
from zephyr_lite.merge import merge
from zephyr_lite.model import files as fetch
from zephyr_lite.model.base import load_base
from zephyr_lite.model.files import PATTERNS, SINGLE, fetch_base, open_shards
from zephyr_lite.model.peft_io import read_adapter


class Bomb:
    """Pickled, it makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def loaded(base: Path, **changes: object):
    return load_base(RunConfig(model_name_or_path=str(base), **{"load_in_4bit": False, **changes}))


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_a_pickle_beside_safetensors_is_never_opened(base, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "went off"))
    for name in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "consolidated.00.pth"):
        (base / name).write_bytes(bomb)
    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_model.bin").write_bytes(bomb)
    loaded(base)
    loaded(base, load_in_4bit=True)
    merge(base, [read_adapter(adapter)], tmp_path / "out")
    assert not (tmp_path / "went off").exists() and not list((tmp_path / "out").glob("*.bin"))


def test_pickles_are_never_fetched(monkeypatch, tmp_path):
    assert not any(
        pattern.endswith((".bin", ".pt", ".pth", ".pkl", "*")) for pattern in PATTERNS if "token" not in pattern
    )
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(fetch, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(UserError, match="model o/n: has no safetensors file on the hub; pickles"):
        fetch_base("o/n")
    assert fetch_base("o/n", weights=False) == tmp_path


def test_no_pipe_or_device_is_read(base):
    import os

    (base / SINGLE).unlink()
    os.mkfifo(base / SINGLE)
    with pytest.raises(UserError, match="is not a file"):
        open_shards(base)
    with pytest.raises(UserError, match="is not a file"):
        SafetensorsFile("/dev/zero")


def test_code_beside_a_known_model_is_never_run(base, tmp_path):
    """The family is known, so its code is not needed, and is not asked about either."""
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    told = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"}
    edit(base / "config.json", auto_map=told)
    edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.C", "own.C"]})
    loaded(base)
    merge(base, [read_adapter(make_adapter(tmp_path / "a"))], tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_leads_elsewhere_is_refused(tmp_path, name):
    folder = make_adapter(tmp_path / "a")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="link out of its folder"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["NOTICE", "tokenizer.model", "additional_chat_templates/x.jinja"])
def test_no_file_from_elsewhere_is_merged_in(base, tmp_path, name):
    (tmp_path / "id_rsa").write_text("private")
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UserError, match="link out of its folder"):
        merge(base, [read_adapter(make_adapter(tmp_path / "a"))], tmp_path / "out")
    assert not (tmp_path / "out").exists()


SECRETS = {
    "HF_TOKEN": "hf_QwErTyUiOpAsDfGhJkLzXcVbNm",
    "HUGGING_FACE_HUB_TOKEN": "hf_older5678901234567890",
    "OPENAI_API_KEY": 'sk-"quoted"/and+slashed=äö',
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "MLFLOW_TRACKING_PASSWORD": "correct horse battery staple",
    "SOME_SERVERS_KEY": "sk-plain-key-of-a-server-0001",
}


STORED = "hf_stored9876543210zyxwvut"


@pytest.fixture
def secrets(monkeypatch, tmp_path) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    home = tmp_path / "home-of-the-hub"
    home.mkdir()
    (home / "token").write_text(STORED)
    monkeypatch.setenv("HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(redact, "_remembered", set())
    return {**SECRETS, "stored": STORED}


def leaks(data: bytes, secrets: dict[str, str]) -> list[str]:
    """The names of the secrets of which at least the first eight letters are there, in any writing."""
    found = []
    for name, value in secrets.items():
        start = value[:12]
        if any(form.encode() in data for form in (start, json.dumps(start)[1:-1], start.replace('"', "%22"))):
            found.append(name)
    return found


def test_the_whole_recipe_and_its_errors_keep_secrets(
    secrets, tiny_base, chat_rows, pair_rows, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    key, token = secrets["SOME_SERVERS_KEY"], secrets["HF_TOKEN"]
    common = ["max_length=128", "batch_size=4", "lora_r=4", "max_steps=1", "output_dir=runs/t"]
    sft = ["sft", f"model_name_or_path={tiny_base}", f"dataset={chat_rows}", *common]
    for words in (sft, ["dpo", f"dataset={pair_rows}", "max_prompt_length=64", *common]):
        assert cli.run([*words, "--verbose"]) == 0
    assert cli.run(["merge", "--run", "runs/t", "--out", "model", "--no-check"]) == 0
    wrong = [
        ["sft", token],
        ["sft", f"dataset=https://me:{token}@host/rows.jsonl"],
        ["sft", f"hub_token={token}", "--verbose"],
        ["sft", f"{token}=1"],
        ["sft", f"seed={token}", "--verbose"],
        ["sft", "--config", f"{token}.yaml"],
        [token],
        [token, "--verbose"],
        ["merge", "--out", "x", "--run", f"runs/{token}"],
        ["feedback", "--config", f"{token}"],
    ]
    for words in wrong:
        assert cli.run(words) == 2, words

    def echoes(seen):  # a server that repeats the key it was sent, in the middle of a job
        return error(400, f"no: {seen.headers['authorization']}") if "number 3" in seen.question else script(seen)

    with ChatServer(echoes) as server:
        models = [{"url": server.url, "model": name, "api_key_env": "SOME_SERVERS_KEY"} for name in "ab"]
        job = {
            "prompts": {"path": str(prompts_file(tmp_path, 4))},
            "models": models,
            "judge": {**models[0], "model": "judge"},
            "out": "job",
        }
        Path("job.yaml").write_text(json.dumps(job))
        assert cli.run(["feedback", "--config", "job.yaml"]) in (0, 2)
        assert any(key in seen.headers["authorization"] for seen in server.seen)
    out, err = capfd.readouterr()
    assert not leaks((out + err).encode(), secrets)
    files = [path for folder in ("runs", "model", "job") for path in Path(folder).rglob("*") if path.is_file()]
    assert len(files) > 30
    assert {str(path): found for path in files if (found := leaks(path.read_bytes(), secrets))} == {}
