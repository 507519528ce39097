"""The README says what is true: its commands parse and run in small, its examples load, its table has every key."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from datasets import Dataset
from transformers import AutoTokenizer

from zephyr_lite import cli
from zephyr_lite.config import DPO_DEFAULTS, DatasetSpec, RunConfig, load_config
from zephyr_lite.data.sources import load_rows

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


# what the README links to, under docs/
GUIDES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    lines = "".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    lines = [line.split("  #")[0].rstrip() for line in lines]  # a remark behind a command
    return [line for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = [line for text in (TEXT, *GUIDES.values()) for line in commands(text)]
OURS = list(dict.fromkeys(line for line in COMMANDS if line.startswith("zephyr-lite")))
TRAINING = [line for line in OURS if line.split()[1] in ("sft", "dpo")]


def test_every_command_is_one_of_these():
    assert {line.split()[0] for line in COMMANDS} == {"make", "pip", "zephyr-lite"}
    assert {line.split()[1] for line in OURS} >= {"sft", "dpo", "merge", "env"}


@pytest.mark.parametrize("line", OURS)
def test_commands_parse(line, tmp_path):
    _, name, *words = shlex.split(line)
    group = typer.main.get_command(cli.app)
    if name in ("data", "eval", "export"):
        group, name, *words = group.commands[name], *words
    context = group.commands[name].make_context(name, words)
    if name in ("sft", "dpo"):
        config = context.params["config"]
        file = None if config == "my.yaml" else config or f"zephyr-7b/{name}"
        load_config(name, file, context.args)


@pytest.mark.parametrize("line", TRAINING)
def test_training_commands_run_in_small(line, tmp_path, monkeypatch, tiny_base, chat_rows, pair_rows, capsys):
    """As dry runs, with the model, the rows and the sizes replaced."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "my").mkdir()
    shutil.copy(chat_rows, tmp_path / "my" / "held_out.jsonl")
    _, name, *words = shlex.split(line)
    words = [word for word in words if not word.startswith("dataset.")]
    rows = pair_rows if name == "dpo" else chat_rows
    small = [
        f"model_name_or_path={tiny_base}", f"dataset={rows}", "max_length=128", "max_prompt_length=64", "lora_r=4",
        "batch_size=2", *(["adapters=none"] if name == "dpo" else []),
    ]  # fmt: skip
    code = cli.run([name, *words, *small, *(["--dry-run"] if "--dry-run" not in words else [])])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "first step: loss" in captured.out


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for line in re.findall(r"make [a-z]+", TEXT) for word in line.split()[1:]}
    assert named - {"of"} <= targets and {"demo", "test", "setup", "lint"} <= targets


def test_configurations_in_yaml_load(tmp_path):
    for text in blocks("yaml"):
        (tmp_path / "my.yaml").write_text(text)
        load_config("sft", str(tmp_path / "my.yaml"))


@pytest.mark.parametrize("number", range(6))
def test_rows_of_every_format_are_read(number, tmp_path):
    lines = [line for block in blocks("json") for line in block.splitlines()]
    assert len(lines) == 6
    method = "dpo" if "chosen" in json.loads(lines[number]) else "sft"
    path = tmp_path / "rows.jsonl"
    path.write_text(lines[number] + "\n")
    rows = load_rows([DatasetSpec(path=str(path))], method, seed=0)
    assert len(rows.dataset) == 1
    row = rows.dataset[0]
    said = row["messages"] if method == "sft" else row["prompt"] + row["chosen"]
    assert [turn["content"] for turn in said] == ["Name a river.", "The Rhine."]


def test_python_examples_are_python():
    for text in blocks("python"):
        compile(text, "README.md", "exec")


def test_the_line_for_trl_runs_in_small(tmp_path, tiny_base, chat_rows, monkeypatch):
    """The example as it stands, with the model, the rows and the sizes replaced."""
    (text,) = (block for block in blocks("python") if "fuse(model)" in block)
    text = text.replace("mistralai/Mistral-7B-v0.1", str(tiny_base))
    text = text.replace('load_dataset("HuggingFaceH4/ultrachat_200k", split="train_sft")', "rows")
    text = text.replace(
        "args=SFTConfig(", "processing_class=tokenizer, args=SFTConfig(use_cpu=True, bf16=False, max_steps=2, "
    )
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.pad_token = tokenizer.eos_token
    messages = [json.loads(line)["messages"] for line in chat_rows.read_text().splitlines()]
    found = {"rows": Dataset.from_list([{"messages": m} for m in messages]), "tokenizer": tokenizer}
    exec(text, found)
    assert len(found["trainer"].state.log_history) > 0 and found["trainer"].state.global_step == 2


def test_the_table_has_every_key_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", TEXT, re.MULTILINE))
    assert list(rows) == list(RunConfig.model_fields)
    for name, field in RunConfig.model_fields.items():
        if name in ("dataset", "eval_dataset", "memory", "eval_steps", "save_steps"):
            continue
        sft = field.default if name != "stage" else "sft"
        values = [sft] + ([DPO_DEFAULTS[name]] if DPO_DEFAULTS.get(name, sft) != sft else [])
        written = [part.strip() for part in rows[name].split(";")]
        assert len(written) == len(values), name
        for text, value in zip(written, values):
            assert text in (str(value), json.dumps(value)) or float(text) == value, name


def test_links_into_the_checkout_exist():
    for file, text in {ROOT / "README.md": TEXT, **GUIDES}.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_every_guide_is_linked():
    assert all(f"(docs/{path.name})" in TEXT for path in GUIDES)
