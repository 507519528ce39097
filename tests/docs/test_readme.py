"""The README and its guides say what is true: their commands parse and run in small, their examples load, their links lead
somewhere, and their figures are the measured ones."""

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

from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import DatasetSpec, load_config
from zephyr_lite.data.load import load_rows

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

# what the README links to, under docs/
GUIDES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str, language: str = "bash") -> list[str]:
    lines = "".join(blocks(language, text)).replace("\\\n", " ").splitlines()
    lines = [line.split("  #")[0].rstrip() for line in lines]  # a remark behind a command
    return [line for line in lines if line.strip() and not line.startswith("#")]


EVERYWHERE = "\n".join((TEXT, *GUIDES.values()))
# torchrun and accelerate start the same command several times
STARTERS = r"(?:torchrun|accelerate launch)\b.*? -m zephyr_lite "
OURS = list(dict.fromkeys(re.sub(rf"^{STARTERS}", "zephyr-lite ", line) for line in commands(EVERYWHERE, "(?:ba)?sh")))
OURS = [line for line in OURS if line.startswith("zephyr-lite")]

GROUP = typer.main.get_command(cli.app)


def training() -> list[str]:
    """The commands that train, but those that are the same one in small."""
    found = {}
    for line in OURS:
        words = shlex.split(line)[1:]
        if words[0] in ("sft", "dpo") and "--smoke" not in words and "engine=trl" not in words:
            kept = [
                w for w in words if not re.match(r"(model_name_or_path|(eval_)?dataset|output_dir|adapters)[.=]", w)
            ]
            found.setdefault(tuple(w for w in kept if w not in ("--dry-run", "--quiet", "--json")), line)
    return list(found.values())


def parse(line: str) -> None:
    """With the command's own parser, and the schema where keys may follow."""
    _, name, *words = shlex.split(line)
    group = GROUP
    if name in ("data", "eval", "export"):
        group, name, *words = group.commands[name], *words
    context = group.commands[name].make_context(name, words)
    if name in ("sft", "dpo"):
        config = context.params["config"]
        load_config(name, None if config == "my.yaml" else config or f"zephyr-7b/{name}", context.args)


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_commands_parse():
    for line in OURS:
        parse(line.split(" | ")[0])


@pytest.mark.parametrize("line", training())
def test_training_commands_run_in_small(line, tmp_path, monkeypatch, tiny_base, chat_rows, pair_rows, capsys):
    """As dry runs, with the model, the rows and the sizes replaced."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(blocks("yaml", EVERYWHERE)[0])
    (tmp_path / "my").mkdir()
    shutil.copy(chat_rows, tmp_path / "my" / "held_out.jsonl")
    _, name, *words = shlex.split(line)
    words = [word for word in words if not word.startswith("dataset.")]
    rows = pair_rows if name == "dpo" else chat_rows
    small = [
        f"model_name_or_path={tiny_base}",
        f"dataset={rows}",
        "max_length=128",
        "max_prompt_length=64",
        "lora_r=4",
        "batch_size=2",
        *(["adapters=none"] if name == "dpo" else []),
    ]
    code = cli.run([name, *words, *small, *(["--dry-run"] if "--dry-run" not in words else [])])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "first step: loss" in captured.out


def test_configurations_in_yaml_load(tmp_path):
    for text in blocks("yaml", EVERYWHERE):
        (tmp_path / "my.yaml").write_text(text)
        load_config("sft", str(tmp_path / "my.yaml"))


@pytest.mark.parametrize("number", range(8))
def test_rows_of_every_format_are_read(number, tmp_path):
    lines = [line for block in blocks("json", GUIDES["your-own.md"]) for line in block.splitlines()]
    assert len(lines) == 8
    method = next(
        (kind for column, kind in (("label", "kto"), ("chosen", "dpo")) if column in json.loads(lines[number])), "sft"
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(lines[number] + "\n")
    rows = load_rows([DatasetSpec(path=str(path))], method, seed=0)
    assert len(rows.dataset) == 1
    row = next(rows.values())
    said = row["messages"] if method == "sft" else row["prompt"] + (row["chosen"] or row["rejected"])
    answer = "The Rhine." if method == "sft" or row["chosen"] else "Many."
    assert [turn["content"] for turn in said] == ["Name a river.", answer]


def test_the_line_for_trl_runs_in_small(tmp_path, tiny_base, chat_rows, monkeypatch):
    """The example as it stands, with the model, the rows and the sizes replaced."""
    (text,) = (block for block in blocks("python", EVERYWHERE) if "fuse(model)" in block)
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


def test_links_lead_somewhere():
    """Files of the checkout, and headings in them."""
    for file, text in {
        ROOT / "README.md": TEXT,
        ROOT / "CONTRIBUTING.md": CONTRIBUTING,
        **{ROOT / "docs" / name: text for name, text in GUIDES.items()},
    }.items():
        for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            place = (file.parent / target).resolve() if target else file
            assert place.exists(), f"{file.name}: {target}"
            if heading:
                assert heading in anchors(place.read_text(encoding="utf-8")), f"{file.name}: {target}#{heading}"


def test_the_figures_beside_trl_are_the_measured_ones():
    measured = json.loads((ROOT / "bench/results/compare-cpu.json").read_text())
    for name, stage, rate in (
        ("SFT, tokens/s", "sft", "tokens_per_second"),
        ("DPO, live reference, pairs/s", "dpo", "pairs_per_second"),
    ):
        written = re.search(rf"^\| {name} \| ([\d.]+) \| ([\d.]+) \|", TEXT, re.MULTILINE)
        found = [variant for variant in measured[stage]["variants"].values() if not variant["cached"]]
        for engine, text in zip(("fused", "trl"), written.groups()):
            best = max(variant[rate] for variant in found if variant["engine"] == engine)
            assert float(text) == pytest.approx(best, rel=0.01), (name, engine)
