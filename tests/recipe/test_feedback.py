"""`zephyr-lite feedback` against a real HTTP server: rows, ratings, failures, budget, a kill, on-policy sampling."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.chat_server import Act, ChatServer, Seen, by_hash, error, ok
from tests.client.test_client import records
from tests.conftest import make_model, make_tokenizer
from zephyr_lite.cli import app as cli
from zephyr_lite.client.jobs import Meter, load_settings
from zephyr_lite.config.load import DatasetSpec
from zephyr_lite.data.load import load_rows
from zephyr_lite.recipe.feedback import FeedbackConfig, FeedbackJob, make_pair_folder
from zephyr_lite.recipe.judge import ASPECTS
from zephyr_lite.recipe.prompts import read_prompts

COLUMNS = ["source", "instruction", "models", "completions", "correct_answers", "incorrect_answers"]
COMPLETION = ["annotations", "custom_system_prompt", "model", "principle", "response", "critique", "overall_score"]
COMPLETION.append("fine-grained_score")
ANSWERS = re.compile(r"\[Answer \d+\]\n(.*?)\n\[End of answer", re.DOTALL)


def hidden_meter() -> Meter:
    """A meter whose output is not shown."""
    return Meter(Console(file=io.StringIO()), 1, "prompts")


def is_judge(seen: Seen) -> bool:
    return '"ratings"' in seen.question or '"overall_score"' in seen.question


def aspect_of(seen: Seen) -> str:
    return next(a.name for a in ASPECTS if a.question in seen.question)


def worth(text: str, aspect: str) -> int:
    """What the test's judge thinks of a text, wherever it stands in the list."""
    return int(hashlib.sha256(f"{aspect} {text}".encode()).hexdigest(), 16) % 5 + 1


def judged(seen: Seen) -> Act:
    texts = ANSWERS.findall(seen.question)
    if not texts:
        return ok(json.dumps({"critique": "So be it.", "overall_score": 6}))
    entries = [{"id": n, "rationale": f"of {t}", "rating": worth(t, aspect_of(seen))} for n, t in enumerate(texts, 1)]
    return ok(json.dumps({"ratings": entries}))


def script(seen: Seen) -> Act:
    return judged(seen) if is_judge(seen) else by_hash(seen)


def prompts_file(folder: Path, count: int = 6) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question number {i}?"}) + "\n" for i in range(count)))
    return path


def settings(folder: Path, url: str, out: str = "out", count: int = 6, **changes: Any) -> FeedbackConfig:
    values = {
        "prompts.path": str(prompts_file(folder, count)),
        "models": [f"{url}#a", f"{url}#b"],
        "judge": f"{url}#judge",
        "out": str(folder / out),
        **changes,
    }
    return load_settings(FeedbackConfig, None, values)


def run(config: FeedbackConfig) -> FeedbackJob:
    job = FeedbackJob(config, read_prompts(config.prompts, seed=config.seed))
    job.run(hidden_meter())
    return job


def rows_of(config: FeedbackConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.out) / "train.jsonl").read_text().splitlines()]


def test_rows_are_ultrafeedbacks_and_in_the_prompts_order(tmp_path: Path) -> None:
    with ChatServer(script) as server:
        config = settings(tmp_path, server.url)
        run(config)
        assert len(server.seen) == 6 * (4 + 4)
        sent = {tuple(m["content"] for m in seen.body["messages"]) for seen in server.seen if not is_judge(seen)}
        models = [f"{server.url}#a,concurrency=1", f"{server.url}#b,concurrency=16"]
        other = settings(tmp_path, server.url, "other", models=models, judge=f"{server.url}#judge,concurrency=16")
        assert Path(run(other).out, "train.jsonl").read_bytes() == Path(config.out, "train.jsonl").read_bytes()
    rows = rows_of(config)
    assert [row["instruction"] for row in rows] == [f"Question number {i}?" for i in range(6)]
    for row in rows:
        assert list(row) == COLUMNS and row["source"] == "prompts"
        assert row["models"] == [c["model"] for c in row["completions"]] and Counter(row["models"]) == {"a": 2, "b": 2}
        assert len({c["principle"] for c in row["completions"]}) == 4
        for completion in row["completions"]:
            assert list(completion) == COMPLETION and completion["overall_score"] is None
            given = {name: a["Rating"] for name, a in completion["annotations"].items()}
            # whatever place it was shown at, a rating belongs to its own response
            assert given == {a.name: str(worth(completion["response"], a.name)) for a in ASPECTS}
            assert all(a["Rationale"] == f"of {completion['response']}" for a in completion["annotations"].values())
            assert completion["fine-grained_score"] == sum(map(int, given.values())) / 4
    # what the row says was sent is what was sent
    assert sent == {(c["custom_system_prompt"], row["instruction"]) for row in rows for c in row["completions"]}
    report = json.loads((Path(config.out) / "report.json").read_text())
    assert report["rows"] == 6 and report["completions"] == {"a": 12, "b": 12}
    assert sum(report["ratings"]["a"]["honesty"]["counts"].values()) == 12
    assert report["spent"]["requests"] == 48 == report["spent"]["replies"]


def test_pairs_are_ready_for_dpo(tmp_path: Path) -> None:
    with ChatServer(script) as server:
        config = settings(tmp_path, server.url)
        run(config)
    lines = make_pair_folder(config)
    assert lines[-1] == f"Next: zephyr-lite dpo dataset.path={config.out}/pairs dataset.split=train_prefs"
    pairs = load_rows([DatasetSpec(path=f"{config.out}/pairs", split="train_prefs")], "dpo", seed=1)
    rows = {row["instruction"]: row for row in rows_of(config)}
    assert 3 <= len(pairs.dataset) <= 6
    for pair in pairs.values():
        scores = {c["response"]: c["fine-grained_score"] for c in rows[pair["prompt"][0]["content"]]["completions"]}
        assert scores[pair["chosen"][0]["content"]] == max(scores.values())
        assert scores[pair["rejected"][0]["content"]] < max(scores.values())


def test_what_the_judge_garbles_is_asked_again_then_not_rated(tmp_path: Path) -> None:
    def garbled(seen: Seen) -> Act:
        if is_judge(seen) and aspect_of(seen) == "honesty":
            return ok('{"ratings": [{"id": 1')
        return script(seen)

    with ChatServer(garbled) as server:
        config = settings(tmp_path, server.url, count=2)
        result = run(config)
    asked = [seen for seen in server.seen if is_judge(seen) and aspect_of(seen) == "honesty"]
    assert len(asked) == 2 * 3
    for row in rows_of(config):
        for completion in row["completions"]:
            assert completion["annotations"]["honesty"] == {"Rating": "N/A", "Rationale": ""}
            others = [int(completion["annotations"][a.name]["Rating"]) for a in ASPECTS if a.name != "honesty"]
            assert completion["fine-grained_score"] == pytest.approx(sum(others) / 3)
    assert result.report()["failed"] == {"judge, honesty": 2}


def test_missing_completions_and_rows_that_cannot_be_made(tmp_path: Path) -> None:
    acts = {("b", "1"): error(400, "no"), ("b", "2"): ok("   "), ("a", "3"): error(400, "no"), ("b", "3"): ok("")}

    def failing(seen: Seen) -> Act:
        return script(seen) if is_judge(seen) else acts.get((seen.body["model"], seen.question[-2]), script(seen))

    with ChatServer(failing) as server:
        config = settings(tmp_path, server.url, count=5)
        result = run(config)
    rows = {row["instruction"][-2]: row for row in rows_of(config)}
    assert list(rows) == ["0", "1", "2", "4"]
    assert rows["1"]["models"] == rows["2"]["models"] == ["a", "a"]
    assert result.dropped == {"fewer than two completions": [f"{tmp_path}/prompts.jsonl row 4"]}
    # neither dropped prompts nor missing completions were rated
    assert sum(is_judge(seen) for seen in server.seen) == 4 * 4
    assert result.failed["b: an empty answer"] == 4 and sum(result.failed.values()) == 2 + 2 + 4


def test_a_budget_is_kept_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    with ChatServer(script) as server:
        whole = settings(tmp_path, server.url, "whole", count=12)
        run(whole)
        server.seen.clear()
        config = settings(tmp_path, server.url, count=12, **{"budget.requests": 50})
        result = run(config)
        assert len(server.seen) == 50
        assert 2 <= result.rows == 12 - result.unreached < 12
        assert "50 requests" in result.lines()[-1] and "larger budget" in result.lines()[-1]
        part = Path(config.out, "train.jsonl").read_bytes()
        assert set(part.splitlines()) < set(Path(whole.out, "train.jsonl").read_bytes().splitlines())
        assert run(config).rows == result.rows and len(server.seen) == 50  # nothing is asked, nothing is lost
        run(settings(tmp_path, server.url, count=12, **{"budget.requests": 500}))
        assert len(server.seen) == 12 * 8
    assert Path(config.out, "train.jsonl").read_bytes() == Path(whole.out, "train.jsonl").read_bytes()


# -- the command -----------------------------------------------------------------------------------------------------


def words(folder: Path, url: str, more: str = "", models: str = "") -> list[str]:
    """The command on two prompts."""
    models = models or f"--model {url}#a --model {url}#b"
    return (
        f"feedback --prompts {prompts_file(folder, 2)} {models} --judge {url}#judge --out {folder}/out {more}".split()
    )


def test_a_dry_run_bounds_what_is_spent_and_sends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ChatServer(script) as server:
        priced = f"--model {server.url}#a --model {server.url}#b,input_price=1,output_price=2"
        assert cli.run(words(tmp_path, server.url, "--overall --dry-run --max-requests 60", priced)) == 0
        assert not server.seen and not (tmp_path / "out").exists()
        said = capsys.readouterr().out
        assert "in all, every request answered at its first try: 24 requests" in said and "$" in said
        assert "budget: 60 requests, never exceeded" in said
        config = settings(tmp_path, server.url, count=2, overall=True)
        bounds = re.findall(r"^(\w+): (\d+) requests, ([\d,]+) tokens at most", said, re.MULTILINE)
        assert [(name, count) for name, count, _ in bounds] == [("a", "4"), ("b", "4"), ("judge", "16")]
        run(config)
    assert {(c["overall_score"], c["critique"]) for r in rows_of(config) for c in r["completions"]} == {
        (6, "So be it.")
    }
    assert {(is_judge(seen), seen.body["temperature"]) for seen in server.seen} == {(True, 0), (False, 1)}
    sizes: Counter[str] = Counter()
    for seen in server.seen:  # in bytes, of which there are at least as many as tokens
        sizes[seen.body["model"]] += sum(len(m["content"].encode()) for m in seen.body["messages"])
    assert all(sizes[name] <= int(tokens.replace(",", "")) for name, _, tokens in bounds)


def test_a_killed_command_continues(tmp_path: Path) -> None:
    with ChatServer(script) as server:
        whole = settings(tmp_path, server.url, "whole", count=10)
        run(whole)
        server.seen.clear()
        server.script = lambda seen: (time.sleep(0.05), script(seen))[1]
        config = settings(tmp_path, server.url, count=10)
        command = f"-m zephyr_lite feedback --config {whole.out}/config.yaml --out {config.out} --no-pairs".split()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        )
        deadline = time.monotonic() + 60
        while len(server.seen) < 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        said, _ = process.communicate(timeout=60)
        assert 20 <= len(server.seen) < 80, said
        answered = len(records(Path(config.out), "replied"))
        server.seen.clear()
        server.script = script
        run(config)
    assert len(server.seen) == 80 - answered
    assert Path(config.out, "train.jsonl").read_bytes() == Path(whole.out, "train.jsonl").read_bytes()


def test_a_folder_is_sampled_without_a_server_and_a_key_reaches_the_server_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "sk-test-3f9a77c1"
    monkeypatch.setenv("MY_TEST_KEY", key)
    folder = tmp_path / "model"
    make_model(make_tokenizer(folder)).save_pretrained(folder)
    with ChatServer(judged) as server:
        judge = f"--judge {server.url}#j,api_key_env=MY_TEST_KEY"
        assert cli.run(words(tmp_path, server.url, judge, f"--model {folder},max_tokens=12")) == 0
        assert {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {key}"}
        assert all(is_judge(seen) for seen in server.seen)
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert {c["custom_system_prompt"] for c in row["completions"]} == {""}
        assert len({c["response"] for c in row["completions"]}) > 1  # at temperature 1, with seeds of their own
    said = capsys.readouterr()
    assert key not in said.out + said.err and "mean" in said.out
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
