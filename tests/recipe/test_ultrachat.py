"""``zephyr-lite data chat`` from outside: raw sets in the hub's schema, folders out, errors with their cure."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest

from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import DatasetSpec
from zephyr_lite.data.load import load_rows
from zephyr_lite.recipe import ultrachat
from zephyr_lite.recipe.lexicon import Lexicon
from zephyr_lite.recipe.ultrachat import Options, clean_chat

_WORDS = """
river stone garden window music letter engine winter pepper ladder forest market planet copper silver orange velvet
meadow harbor bridge kitchen castle shadow thunder pocket basket candle mirror button carpet
"""
WORDS = _WORDS.split()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def talk(number: int, turns: int = 4) -> list[str]:
    """A well-written dialogue that no other number gives."""
    draw = random.Random(number)

    def sentence() -> str:
        return "The " + " ".join(draw.choice(WORDS) for _ in range(12)) + " is in Ouagadougou, as they said."

    return [
        f"{sentence()} Why is it {number}?" if place % 2 == 0 else f"{sentence()} {sentence()}"
        for place in range(turns)
    ]


BROKEN = ["Hello. how do i get to ouagadougou? is it far?", "Hi! it is far. you have to fly there."]
DODGE = "As an AI language model, I don't have personal opinions."


def write_raw(path: Path, dialogues: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": str(n), "data": d}) + "\n" for n, d in enumerate(dialogues)))
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two numbered files, as raw UltraChat has ten."""
    first = [talk(n) for n in range(30)]
    first[3] = BROKEN
    first[5] = [*talk(5)[:2], "Which is best?", DODGE, "And now?", "The red one is the best one."]
    first[7] = ["Which is best?", DODGE]
    first[8] = []
    first[9] = ["only a question"]
    first[11] = [text.upper() for text in talk(10)]  # the same but for the case
    first[13] = [talk(12)[0], talk(12)[1], talk(12)[2], talk(12)[3].replace("said", "say")]
    second = [talk(n) for n in range(30, 60)]
    second[4] = [f"Tell me: {' '.join(WORDS[:14])}, please.", "It is so, as they all said before."]
    write_raw(tmp_path / "raw" / "train_1.jsonl", second)
    write_raw(tmp_path / "raw" / "train_0.jsonl", first)
    return tmp_path / "raw"


def rows_of(folder: Path, split: str = "train_sft") -> list[dict[str, Any]]:
    files = [str(p) for p in sorted(folder.glob(f"{split}*.parquet"))]
    return list(datasets.Dataset.from_parquet(files)) if files else []


def test_the_whole_command(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "question.jsonl").write_text(json.dumps({"turns": [" ".join(WORDS[:14]).upper() + "!"]}) + "\n")
    out = tmp_path / "out"
    report = clean_chat(str(raw), out, Options(decontaminate=(str(tmp_path / "question.jsonl"),)))
    label = f"{raw}/train_0.jsonl line"
    assert [line.split("\t")[:2] for line in (out / "dropped.tsv").read_text().splitlines()[1:]] == [
        ["cut before a refusal (as_an_ai); the rest stays", f"{label} 6"],
        ["begins with a refusal (as_an_ai)", f"{label} 8"],
        ["no assistant turn", f"{label} 9"],
        ["no assistant turn", f"{label} 10"],
        ["an exact duplicate", f"{label} 12"],
        ["a near duplicate", f"{label} 14"],
        [f"overlaps with {tmp_path / 'question.jsonl'}", f"{raw}/train_1.jsonl line 5"],
    ]
    details = [line.split("\t")[2] for line in (out / "dropped.tsv").read_text().splitlines()]
    assert details[-3:] == [f"of {label} 11", f"of {label} 13", " ".join(WORDS[:13])]
    assert report["rows"] == 60 and report["kept"] == 54 and report["broken_capitals"] == 1
    splits = {split: rows_of(out, split) for split in ("train_sft", "test_sft")}
    assert report["splits"] == {split: len(rows) for split, rows in splits.items()}
    rows = splits["train_sft"] + splits["test_sft"]
    by_prompt = {row["prompt"]: row for row in rows}
    assert len(rows) == 54
    assert by_prompt["Hello. How do I get to Ouagadougou? Is it far?"]["messages"] == [
        {"content": "Hello. How do I get to Ouagadougou? Is it far?", "role": "user"},
        {"content": "Hi! It is far. You have to fly there.", "role": "assistant"},
    ]
    assert [m["content"] for m in by_prompt[talk(5)[0]]["messages"]] == talk(5)[:2]
    for row in rows:
        assert list(row) == ["prompt", "prompt_id", "messages"]
        assert row["prompt_id"] == hashlib.sha256(row["prompt"].encode()).hexdigest()
        assert row["prompt"] == row["messages"][0]["content"]
    stored = json.loads((out / "report.json").read_text())
    assert stored["restored"]["words"] == {"after_terminator": 4, "lone_i": 1, "known_name": 1}
    example = stored["examples"]["lone_i"][0]
    assert example["place"] == f"{label} 4" and "do i get" in example["before"] and "do I get" in example["after"]
    text = (out / "report.md").read_text()
    assert all(word in text for word in ("(as_an_ai)", "do I get", "an exact duplicate"))
    assert Lexicon.load(out / "lexicon.txt").names["ouagadougou"] == "Ouagadougou"


def test_the_same_files_for_any_number_of_processes(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ultrachat, "BLOCK", 7)
    monkeypatch.setattr(ultrachat, "SHARD_ROWS", 10)
    seen = []
    for processes in (1, 3):
        out = tmp_path / f"out{processes}"
        clean_chat(str(raw), out, Options(), num_proc=processes)
        seen.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert len([name for name in seen[0] if name.startswith("train_sft-")]) > 1
    assert seen[0] == seen[1]


def test_a_prompt_is_in_one_split_and_a_number_of_test_rows_is_kept(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw.jsonl", [[talk(n % 20)[0], *talk(n + 100)[1:]] for n in range(60)])
    for test, low, high in ((0.3, 3, 36), (9, 7, 9), (0, 0, 0)):
        out = tmp_path / f"out{test}"
        report = clean_chat(str(source), out, Options(test=test))
        train, held = ({row["prompt"] for row in rows_of(out, split)} for split in ("train_sft", "test_sft"))
        assert not train & held and report["kept"] == 60
        assert low <= report["splits"]["test_sft"] <= high
        assert (out / "test_sft.parquet").is_file() == bool(test)


def test_other_sets_of_conversations(tmp_path: Path) -> None:
    said = {"system": "Be brief.", "user": BROKEN[0], "assistant": "Yes."}
    turns = [{"role": role, "content": content} for role, content in said.items()]
    rows = [{"messages": turns, "id": 1}, {"messages": turns[2:], "id": 2}, {"messages": turns[:2], "id": 3}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = clean_chat(str(tmp_path / "set.jsonl"), tmp_path / "out", Options(test=0))
    assert report["dropped"] == {"the user says nothing": 1, "no assistant turn": 1}
    (row,) = rows_of(tmp_path / "out")
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["prompt"] == row["messages"][1]["content"] == "Hello. How do I get to ouagadougou? Is it far?"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("broken.jsonl", "line 2"),
        ("other.jsonl", "conversations are needed"),
        ("two", "--split train_sft"),
        ("raw --ngram 1", "ngram"),
        ("raw --test 60", "test rows"),
    ],
)
def test_errors(raw: Path, tmp_path: Path, monkeypatch, capsys, words: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"id": "0", "data": ["a", "b"]}\n{"id": \n')
    Path("other.jsonl").write_text('{"text": "a"}\n')
    Path("labels.txt").write_text("yes\nno\n")
    for split in ("train_sft", "test_sft"):
        write_raw(Path("two") / f"{split}.jsonl", [talk(1)])
    assert cli.run(["data", "chat", "--out", "out", *words.split()]) == 2
    assert says in capsys.readouterr().err and not Path("out").exists()


def test_on_the_command_line(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["data", "chat", str(raw), "--out", str(out), "--format", "jsonl", "--test", "5", "--near", "0.9"]
    assert cli.run(arguments) == 0
    said = capsys.readouterr().out
    assert "read as raw UltraChat, 60 rows" in said and "capitals restored in 1 dialogues" in said
    splits = {"train_sft.jsonl", "test_sft.jsonl"}
    others = {"dropped.tsv", "lexicon.txt", "report.json", "report.md"}
    assert {p.name for p in out.iterdir()} == splits | others
    loaded = load_rows([DatasetSpec(path=str(out), split="train_sft")], "sft", seed=0)
    assert len(loaded.dataset) == json.loads((out / "report.json").read_text())["splits"]["train_sft"]
    left = tmp_path / ".out.01234567"  # of a process that was killed
    left.mkdir()
    assert cli.run(arguments) == 0 and not left.exists()
    capsys.readouterr()
    assert cli.run(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{out} is complete already.")
    assert cli.run([*arguments, "--no-refusals"]) == 2
    assert cli.run([*arguments, "--no-refusals", "--overwrite"]) == 0
    assert cli.run(["data", "chat", str(raw), "--split", "train_1", "--out", str(tmp_path / "one")]) == 0
    assert "30 rows" in capsys.readouterr().out
