"""`zephyr-lite distill`: dialogues against a real HTTP server, near-duplicates, seeds, resume."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import Act, ChatServer, Seen, error, ok
from tests.recipe.test_feedback import hidden_meter
from zephyr_lite.client.jobs import load_settings
from zephyr_lite.config.load import DatasetSpec
from zephyr_lite.data.load import load_rows
from zephyr_lite.errors import UserError
from zephyr_lite.recipe.distill import NEAR, DistillConfig, DistillJob
from zephyr_lite.recipe.prompts import read_prompts
from zephyr_lite.recipe.user_messages import read_message

GRID = """
topics: {tides: [spring tides, neap tides], bread: [sourdough], clocks: []}
kinds: {poem: a poem of four lines, guide: instructions}
"""


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" How do tides work? ", "How do tides work?"),
        ('"How do tides work?"', "How do tides work?"),
        ("**Message:** How do tides work?", "How do tides work?"),
        ("<think>a question on tides…</think>How do tides work?", "How do tides work?"),
    ],
)
def test_a_message_is_taken_out_of_what_stands_around_it(text: str, message: str) -> None:
    assert read_message(text) == message


# -- dialogues -------------------------------------------------------------------------------------------------------


def role_of(seen: Seen) -> str:
    """opening, question (a follow-up) or answer."""
    if "You write what a person types" not in seen.body["messages"][0]["content"]:
        return "answer"
    return "opening" if seen.question.startswith("Write one message") else "question"


def words_of(seen: Seen) -> str:
    """Ten words that belong to everything that was sent."""
    digest = hashlib.sha256(json.dumps(seen.body, sort_keys=True).encode()).hexdigest()
    return " ".join(digest[i : i + 6] for i in range(0, 60, 6))


def teacher(seen: Seen) -> Act:
    return ok(f"{role_of(seen)} {words_of(seen)}")


def run(folder: Path, url: str, out: str = "out", **changes: Any) -> DistillJob:
    (folder / "grid.yaml").write_text(GRID, encoding="utf-8")
    values = {
        "teacher": f"{url}#t",
        "out": str(folder / out),
        "grid": str(folder / "grid.yaml"),
        "count": 12,
        "rounds": 2,
    }
    config = load_settings(DistillConfig, None, {**values, "test_share": 0.0, **changes})
    job = DistillJob(config, None if config.seeds is None else read_prompts(config.seeds, seed=config.seed))
    job.run(hidden_meter())
    return job


def rows_of(result: DistillJob, split: str = "train_sft") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.out / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_dialogues_are_ultrachats_and_fill_the_grid(tmp_path: Path) -> None:
    with ChatServer(teacher) as server:
        result = run(tmp_path, server.url)
        asked = Counter(role_of(seen) for seen in server.seen)
    rows = rows_of(result)
    assert asked == {"opening": 12, "answer": 24, "question": 12}
    assert len(rows) == 12 == len({row["prompt"] for row in rows})
    for row in rows:
        assert list(row) == ["prompt", "prompt_id", "messages", "topic", "kind"]
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2
        assert [turn["content"].split()[0] for turn in row["messages"]] == ["opening", "answer", "question", "answer"]
        assert row["prompt"] == row["messages"][0]["content"]
        assert row["prompt_id"] == hashlib.sha256(row["prompt"].encode()).hexdigest()
    assert Counter((row["topic"], row["kind"]) for row in rows) == {
        (topic, kind): 2 for topic in ("tides", "bread", "clocks") for kind in ("poem", "guide")
    }
    # an assistant that answers sees the dialogue alone, and all of it
    for seen in server.seen:
        if role_of(seen) == "answer":
            turns = [(m["role"], m["content"]) for m in seen.body["messages"]]
            assert any(turns == [(t["role"], t["content"]) for t in row["messages"][: len(turns)]] for row in rows)
    # the parts of a topic take turns
    asked_for = " ".join(seen.question for seen in server.seen if role_of(seen) == "opening")
    assert Counter(re.findall(r"in particular (\w+)", asked_for)) == {"spring": 2, "neap": 2, "sourdough": 4}
    loaded = load_rows([DatasetSpec(path=str(result.out), split="train_sft")], "sft", seed=1)
    assert [row["messages"][0]["content"] for row in loaded.values()] == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (error(400, "refused"), "HTTP 400"),
        (ok("It is a long st", finish_reason="length"), "an answer cut at max_tokens"),
    ],
)
def test_a_dialogue_ends_with_its_last_whole_answer(tmp_path: Path, act: Act, reason: str) -> None:
    def fails(seen: Seen) -> Act:
        """On tides, at the second answer."""
        if role_of(seen) == "opening" and "tides" in seen.question:
            return ok(f"tide {words_of(seen)}")
        turns = [m["content"] for m in seen.body["messages"] if m["role"] == "user"]
        return act if role_of(seen) == "answer" and len(turns) == 2 and "tide" in turns[0] else teacher(seen)

    with ChatServer(fails) as server:
        result = run(tmp_path, server.url, rounds=3)
    rows = rows_of(result)
    assert len(rows) == 12
    assert {len(row["messages"]) for row in rows if row["topic"] == "tides"} == {2}
    assert {len(row["messages"]) for row in rows if row["topic"] != "tides"} == {6}
    assert result.ended == {reason: 4} and result.rounds == {3: 8, 1: 4}


def test_near_duplicates_are_replaced_with_any_number_of_requests_at_once(tmp_path: Path) -> None:
    def repeated(seen: Seen) -> Act:
        if role_of(seen) == "opening" and "asked already" not in seen.question:
            return ok("What is the best way to learn something about this subject in one week?")
        return teacher(seen)

    with ChatServer(repeated) as server:
        result = run(tmp_path, server.url)
        second = [seen for seen in server.seen if "asked already" in seen.question]
        other = run(tmp_path, server.url, "other", teacher=f"{server.url}#t,concurrency=16", user=f"{server.url}#u")
        assert {role_of(seen) for seen in server.seen if seen.body["model"] == "u"} == {"opening", "question"}
    cells = Counter((row["topic"], row["kind"]) for row in rows_of(result))
    assert len(cells) == 6 and set(cells.values()) == {2}
    assert result.turned_down == other.turned_down == {NEAR: 11} and result.openings == 12 + 11
    assert len(second) == 11 and all("What is the best way to learn" in seen.question for seen in second)


# -- seeds and the user ----------------------------------------------------------------------------------------------


def seeds_file(folder: Path, texts: list[str]) -> str:
    (folder / "seeds.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(folder / "seeds.txt")


def test_seeds_as_openings(tmp_path: Path) -> None:
    seeds = [
        "How do tides come about, and why twice a day?",
        "Write a letter to a baker who is always late.",
        "How do tides come about and why twice a day??",
        "Which clock is the most exact one ever built?",
    ]
    failed: list[str] = []

    def moody(seen: Seen) -> Act:
        if role_of(seen) == "answer" and seen.question == seeds[3] and not failed:
            failed.append(seen.question)
            return error(400, "not now")
        return teacher(seen)

    with ChatServer(moody) as server:
        result = run(
            tmp_path, server.url, grid=None, count=None, openings="seeds", **{"seeds.path": seeds_file(tmp_path, seeds)}
        )
        assert not any(role_of(seen) == "opening" for seen in server.seen)
    rows = rows_of(result)
    assert [row["prompt"] for row in rows] == [seeds[0], seeds[1], seeds[3]]
    assert result.turned_down == {NEAR: 1, "no first answer: HTTP 400": 1}
    assert {(row["topic"], row["kind"]) for row in rows} == {("", "")}


# -- interrupts and budget -------------------------------------------------------------------------------------------


def repeating(seen: Seen) -> Act:
    """Some openings are too near to others, some answers fail: everything that decides is in it."""
    if role_of(seen) == "opening" and "bread" in seen.question and "asked already" not in seen.question:
        return ok("How do I bake a sourdough bread with a good crust at home?")
    if role_of(seen) == "answer" and int(words_of(seen)[:2], 16) < 16:
        return error(400, "no")
    return teacher(seen)


def test_an_interrupted_job_ends_like_one_that_was_not(tmp_path: Path) -> None:
    after = 25
    with ChatServer(repeating) as server:
        whole = run(tmp_path, server.url, "whole")
        total = len(server.seen)
        server.seen.clear()
        server.script = lambda seen: repeating(seen) if seen.number < after else error(401, "who are you?")
        with pytest.raises(UserError):
            run(tmp_path, server.url)
        asked = {json.dumps(seen.body, sort_keys=True) for seen in server.seen[:after] if repeating(seen).status == 200}
        server.seen.clear()
        server.script = repeating
        result = run(tmp_path, server.url)
        again = {json.dumps(seen.body, sort_keys=True) for seen in server.seen}
    assert not asked & again and len(asked) + len(server.seen) >= total - after
    assert (result.out / "train_sft.jsonl").read_bytes() == (whole.out / "train_sft.jsonl").read_bytes()
    assert result.turned_down == whole.turned_down and result.turned_down[NEAR] == 3
