"""Secrets of the environment are in nothing that is printed or written."""

from __future__ import annotations

import json

import pytest

from tests.contract.test_safety import SECRETS, STORED, leaks
from zephyr_lite.cli import app as cli
from zephyr_lite.io import redact
from zephyr_lite.io.atomic import write_json
from zephyr_lite.io.redact import HIDDEN


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


@pytest.mark.parametrize("form", ["{0}", "https://host/?key={0}"])
def test_a_value_is_hidden_in_every_writing(secrets, form):
    for name, value in secrets.items():
        if name == "SOME_SERVERS_KEY":  # a name like any other; what is read as a server's key is remembered
            redact.remember(value)
        for text in (form.format(value), json.dumps({"x": form.format(value)}), repr(form.format(value))):
            assert not leaks(redact.redact(text).encode(), {name: value})
            assert HIDDEN in redact.redact(text)


def test_honest_text_stays_as_it_is_and_a_password_in_a_url_does_not(monkeypatch):
    monkeypatch.setenv("API_KEY", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-or-true")
    for text in ("a short text, false-or-true", "https://host:8000/v1 me@host", "hf_hub_download_config_of_it", ""):
        assert redact.redact(text) == text
    assert redact.redact("see https://me:pass:word@host/x and a@b") == f"see https://me:{HIDDEN}@host/x and a@b"


@pytest.mark.parametrize(
    "value", ["assistant", "20260101", "2026-01-01", "<|im_end|>", "tokens_per_second", "not-needed"]
)
def test_a_plain_word_or_number_changes_no_file(monkeypatch, tmp_path, value):
    monkeypatch.setenv("DB_PASSWORD", value)
    honest = {"seed": 20260101, "learning_rate": 1e-4, "template": f"a {value} b", value: [value]}
    write_json(tmp_path / "stage.json", honest)
    assert json.loads((tmp_path / "stage.json").read_text(encoding="utf-8")) == honest


def test_a_configuration_that_holds_a_secret_is_refused_before_anything_is_written(
    monkeypatch, tmp_path, capsys, tiny_base, chat_rows
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_PASSWORD", "s3cret/path")
    common = ["sft", f"model_name_or_path={tiny_base}"]
    for words, place, what in (
        ([f"dataset={chat_rows}", "output_dir=runs/s3cret/path"], "output_dir", "the environment variable MY_PASSWORD"),
        (["dataset=s3cret/path/chat.jsonl"], "dataset.path", "the environment variable MY_PASSWORD"),
        ([f"dataset={chat_rows}", "system=Ask http://me:pass@host"], "system", "a password in a URL"),
    ):
        assert cli.run([*common, *words]) == 2
        err = capsys.readouterr().err
        assert f"error: the configuration: {place} holds " in err and what in err and "s3cret" not in err
    assert not (tmp_path / "runs").exists()


SECRET = ("OPENAI_KEY", "AZURE_STORAGE_KEY", "NGROK_AUTHTOKEN", "DATABASE_PASS", "MYSQL_PWD", "MY_CREDENTIALS", "TOKEN")
PUBLIC = ("OLDPWD", "PWD", "KEYBOARD", "TOKENIZERS_PARALLELISM", "BYPASS", "MONKEY")


@pytest.mark.parametrize("name", [*SECRET, *PUBLIC])
def test_the_names_that_secrets_have(monkeypatch, name):
    monkeypatch.setenv(name, "x0123456789abcdef")
    assert (redact.redact("a x0123456789abcdef b") == f"a {HIDDEN} b") is (name in SECRET)


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "--out", "model", "--run", "runs/x0123456789"],
        ["data", "chat", "x0123456789.jsonl", "--out", "made"],
        ["feedback", "--prompts", "rows.jsonl", "--model", "base", "--judge", "base", "--out", "x0123456789"],
    ],
)
def test_a_secret_in_what_a_command_writes_down_is_refused(words, monkeypatch, tmp_path, tiny_base, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_TOKEN", "x0123456789")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Name a river."}\n')
    (tmp_path / "base").symlink_to(tiny_base)
    before = sorted(tmp_path.iterdir())
    assert cli.run(words) == 2
    said = capsys.readouterr()
    assert "holds the value of the environment variable MY_TOKEN" in said.err
    assert "x0123456789" not in said.err + said.out
    assert sorted(tmp_path.iterdir()) == before
