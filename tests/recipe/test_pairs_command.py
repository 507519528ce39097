"""``zephyr-lite data pairs`` from outside: real files through the real loading code, folders out, errors with their cure."""

from __future__ import annotations

import json
import random
from pathlib import Path

import datasets
import pytest

from tests.contract.test_ultrafeedback import completion, row
from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import DatasetSpec
from zephyr_lite.data.load import load_rows
from zephyr_lite.recipe.ultrafeedback import SCHEMA, make_pairs


def raw_rows(count: int, first: int = 0) -> list[dict]:
    """Rows in the schema of openbmb/UltraFeedback."""
    rng = random.Random(first)
    rows = []
    for i in range(first, first + count):
        ratings = [[rng.choice("12345") for _ in range(4)] for _ in range(4)]
        completions = [completion(f"answer {j} to {i} — ünïcode\u2028", r, j + 1.0) for j, r in enumerate(ratings)]
        rows.append(row(f"question {i}?", *completions) | {"correct_answers": ["None"]})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def read(folder: Path, split: str = "train_prefs") -> list[dict]:
    (path,) = folder.glob(f"{split}.*")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return datasets.Dataset.from_parquet(str(path), keep_in_memory=True).to_list()


@pytest.fixture
def invoke(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(words: str, fails: bool = False) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = cli.run(["data", "pairs", *words.split()])
        captured = capsys.readouterr()
        assert code == (2 if fails else 0), captured
        assert not fails or sorted(tmp_path.rglob("*")) == before
        return captured.err if fails else captured.out

    return run


def test_a_folder_that_dpo_reads(invoke, tmp_path):
    raw = raw_rows(60)
    write(tmp_path / "raw.jsonl", raw)
    said = invoke("raw.jsonl --out out --format jsonl --rejected worst --test 10")
    assert "Next: zephyr-lite dpo dataset.path=out dataset.split=train_prefs" in said
    others = {"report.json", "report.md", "dropped.tsv"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"train_prefs.jsonl", "test_prefs.jsonl", *others}
    train, test = read(tmp_path / "out"), read(tmp_path / "out", "test_prefs")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(test) == report["test"] == 10 and len(train) == report["train"] == report["pairs"] - 10
    order = {r["instruction"]: place for place, r in enumerate(raw)}
    for split in (train, test):
        places = [order[pair["prompt"]] for pair in split]
        assert places == sorted(places)
        for place, pair in zip(places, split):
            assert list(pair) == list(SCHEMA) and pair["score_chosen"] > pair["score_rejected"]
            assert pair["chosen"][1]["content"] in [c["response"] for c in raw[place]["completions"]]
    rows = load_rows([DatasetSpec(path=str(tmp_path / "out"), split="train_prefs")], "dpo", seed=0)
    assert len(rows.dataset) == len(train) and not rows.dropped and not rows.changed


def test_the_number_of_processes_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("zephyr_lite.recipe.ultrafeedback.BLOCK", 20)
    source = write(tmp_path / "raw.jsonl", raw_rows(50))
    for processes in (1, 3):
        make_pairs([str(source)], tmp_path / f"out{processes}", num_proc=processes)
    one, three = ({p.name: p.read_bytes() for p in (tmp_path / f"out{n}").iterdir()} for n in (1, 3))
    assert one == three


def test_a_clone_of_the_raw_set_is_read_whole_and_its_truthful_qa_counts_everywhere(invoke, tmp_path):
    """The hub's repository has a file a source, which are no splits."""
    clone = tmp_path / "UltraFeedback"
    write(clone / "evol_instruct.jsonl", raw_rows(6))
    questions = raw_rows(3, first=100)
    for each, text in zip(questions, ("Is it so?", "What do all the old cats of Rome dream about?", "Why?")):
        each |= {"source": "truthful_qa", "instruction": text}
    write(clone / "truthful_qa.jsonl", questions)
    again = raw_rows(4, first=200)
    again[1]["instruction"] = "Question: what do all the old cats of Rome dream about? Answer:"
    again[2]["instruction"] = "IS it so"
    for each in again:  # another schema than the first file's, as far as Arrow is concerned
        each["more"] = 1
        each["completions"][0]["overall_score"] = 3
    write(clone / "flan.jsonl", again)
    said = invoke(f"{clone} --out out --rejected worst --test 0")
    assert "left out, source is truthful_qa: 3 (" in said and "truthful_qa.jsonl row 1" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"] == 13 and report["questions"] == 3 and report["test"] == 0
    (contained,) = report["dropped"]["contains an excluded question"]["first"]
    (whole,) = report["dropped"]["is an excluded question"]["first"]
    assert contained.endswith("flan.jsonl row 2") and whole.endswith("flan.jsonl row 3")
    tsv = (tmp_path / "out" / "dropped.tsv").read_text().splitlines()
    assert len(tsv) == report["rows"] - report["pairs"] and f"contains an excluded question\t{contained}" in tsv


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", "question 3?\n\nQuestion 5\n"),
        ("list.jsonl", '{"question_id": 1, "turns": ["Question 3?", "question 5?"]}\n'),
    ],
)
def test_excluded_questions_come_from_any_file(tmp_path, name, content):
    source = write(tmp_path / "raw.jsonl", raw_rows(8))
    (tmp_path / name).write_text(content)
    report = make_pairs([str(source)], tmp_path / "out", exclude=[str(tmp_path / name)], test=0)
    places = report["dropped"]["is an excluded question"]["first"]
    assert [place.split()[-1] for place in places] == ["4", "6"]


def test_equal_prompts_are_held_out_together_and_stay_held_out_as_the_set_grows(tmp_path):
    rows = raw_rows(80)
    for place, each in enumerate(rows):
        each["instruction"] = f"question {place % 20 + place // 40 * 20}?"
    held, train = [], []
    for count in (40, 80):
        source = write(tmp_path / f"{count}.jsonl", rows[:count])
        make_pairs([str(source)], tmp_path / str(count), test=0.2)
        for found, split in ((held, "test_prefs"), (train, "train_prefs")):
            found.append({pair["prompt"] for pair in read(tmp_path / str(count), split)})
        assert held[-1] and not train[-1] & held[-1]
    assert held[0] <= held[1] and train[0] <= train[1]


def test_an_earlier_result_is_replaced_only_when_asked_and_nothing_else_ever(invoke, tmp_path):
    write(tmp_path / "raw.jsonl", raw_rows(10))
    invoke("raw.jsonl --out out")
    said = invoke("raw.jsonl --out out --num-proc 1")
    assert said.startswith("out is complete already.") and "Next: zephyr-lite dpo" in said
    write(tmp_path / "raw.jsonl", raw_rows(11))
    assert "of other files" in invoke("raw.jsonl --out out", fails=True)
    invoke("raw.jsonl --out out --overwrite --format jsonl")
    assert not list((tmp_path / "out").glob("*.parquet"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "(it holds thesis.txt)" in invoke("raw.jsonl --out mine --overwrite", fails=True)
    assert "would replace" in invoke("raw.jsonl --out . --overwrite", fails=True)
    assert "raw.jsonl: cannot be created" in invoke("raw.jsonl --out raw.jsonl/below", fails=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("raw.jsonl --margin 1", "--rejected margin"),
        ("raw.jsonl --test 400", "would be held out"),
        ("raw.jsonl --exclude two", "--exclude two:train"),
        ("two", "--split train"),
        ("pairs.jsonl", "zephyr-lite dpo dataset.path=pairs.jsonl"),
    ],
)
def test_wrong_arguments_and_inputs(invoke, tmp_path, words, says):
    for name in ("raw", "two/train", "two/test"):
        write(tmp_path / f"{name}.jsonl", raw_rows(4))
    write(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert says in invoke(f"{words} --out out", fails=True)
