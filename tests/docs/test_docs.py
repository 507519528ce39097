"""What is written beside the README: the list of keys is the schema's, every command's help ends with an example that it
understands, the guides name files that exist, the drawings can be read, and what the README says to do afterwards works."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shlex
import shutil

import pytest
import typer

from tests.docs.test_readme import GROUP, GUIDES, OURS, ROOT, parse
from zephyr_lite.cli import app as cli
from zephyr_lite.cli.examples import EXAMPLES

KEYS = GUIDES["configuration.md"]


def every_command(group=GROUP, prefix: str = ""):
    """{"data chat": click's command}, the groups and the root ("") included."""
    found = {prefix.strip(): group}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= every_command(command, f"{prefix}{name} ")
        else:
            found[prefix + name] = command
    return found


# The keys


def test_the_list_of_keys_is_the_schemas():
    script = runpy.run_path(str(ROOT / "docs" / "list_keys.py"))
    between = KEYS.split(script["BEGIN"])[1].split(script["END"])[0].strip()
    assert between == script["keys_as_markdown"]().strip(), "python docs/list_keys.py"


# Help


def test_every_command_has_an_example_and_no_example_is_of_no_command():
    assert set(EXAMPLES) == set(every_command())


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_are_in_the_help_and_parse(name, capsys):
    words = name.split()
    command = every_command()[name]
    printed = command.get_help(typer.Context(command, info_name="zephyr-lite " + name)) or ""
    shown = " ".join((printed + capsys.readouterr().out).split())  # long lines are broken at the terminal's width
    assert "Example" in shown
    for line in (f"zephyr-lite {line}" for line in EXAMPLES[name]):
        assert line in shown and len(line) <= 100
        assert shlex.split(line)[1 : 1 + len(words)] == words
        parse(line)


# Guides and drawings


@pytest.mark.parametrize("name", ["architecture.md", "numerics.md", "memory.md", "CONTRIBUTING.md"])
def test_files_and_tests_that_a_guide_names_exist(name):
    text = GUIDES.get(name) or (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text)) | set(re.findall(r"`(\w+\.py)`", text))
    for path in named:
        places = [ROOT / path, ROOT / "zephyr_lite" / path, ROOT / "zephyr_lite/train" / path]
        assert any(place.exists() for place in places), path
    tests = set(re.findall(r"`(test_\w+)`", text))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")) if tests else ""
    assert all(f"def {test}(" in sources for test in tests)
    assert named


# What the README says to do afterwards, on a tiny run


@pytest.fixture
def afterwards(talk_run, chat_rows, pair_rows, tmp_path, monkeypatch):
    shutil.copytree(talk_run, tmp_path / "runs/zephyr-7b")
    shutil.copytree(talk_run, tmp_path / "runs/mine")
    for stage in tmp_path.glob("runs/mine/*/stage.json"):
        os.utime(stage, (0, 0))
    (tmp_path / "my").mkdir()
    shutil.copy(chat_rows, tmp_path / "my/chats.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_line(line: str, capsys, ends_with: int = 0) -> str:
    assert line in OURS, f"no guide says {line} any more"
    code = cli.run(shlex.split(line)[1:])
    found = capsys.readouterr()
    assert code == ends_with, f"{line}: {found.err}"
    return found.out


def test_what_comes_after_training_runs_as_written(afterwards, capsys, monkeypatch):
    assert "torch" in run_line("zephyr-lite env", capsys)
    assert "dpo" in run_line("zephyr-lite eval loss", capsys)
    assert "accuracy" in run_line("zephyr-lite eval preference", capsys)
    # these adapters are drawn, not trained: the check finds that they end no answer
    assert "verdict" in run_line("zephyr-lite check runs/zephyr-7b/dpo", capsys, ends_with=2)
    run_line("zephyr-lite merge --out model/", capsys)
    assert json.loads((afterwards / "model/config.json").read_text())["architectures"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who are you?")))
    assert run_line("zephyr-lite chat", capsys).strip()
