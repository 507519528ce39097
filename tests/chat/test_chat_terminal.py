"""`zephyr-lite chat` as it is used: in a terminal, through a pipe, with a file."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

from zephyr_lite.chat import Chat, load_chat
from zephyr_lite.chat.generate import Drawn, Streamer
from zephyr_lite.cli import talk
from zephyr_lite.monitor.console import visible

SHORT = ["--max-new-tokens", "8", "--temperature", "0"]


@pytest.fixture
def loaded(monkeypatch, talk_run):
    """The run's models, loaded once."""
    live = load_chat(talk_run).live
    monkeypatch.setattr("zephyr_lite.model.loaded.open_live", lambda *a, **k: live)
    return live


@pytest.fixture
def typed(monkeypatch, talk_run, invoke, loaded):
    """A function: run a session in which these lines are typed; an exception is raised in the place of a line."""
    monkeypatch.setattr(talk, "in_terminal", lambda: True)

    def run(*lines, options=()):
        given = iter([*lines, EOFError()])

        def line(prompt):
            found = next(given)
            if isinstance(found, BaseException):
                raise found
            return found

        monkeypatch.setattr("builtins.input", line)
        return invoke("chat", talk_run, *SHORT, *options)

    return run


def test_a_session_and_its_commands(typed, tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = ["/help", "Who are you?", '"""Name', 'three rivers."""', "/undo", "/temperature 0.5", "/top-p 2"]
    lines += ["/temperature hot", "/seed 1.5", "/max-new-tokens 5", "/system", "/system Be kind.", "/system </s>"]
    lines += [
        "/model",
        "/model sft",
        "/settings",
        "/retry",
        f"/save {file}",
        "/save",
        "/nonsense",
        "/undo 3",
        "end</s>",
        "/history",
    ]
    code, out, err = typed(*lines, "/reset", "/undo", "/history", "", "word " * 300)
    assert code == 0, err
    shown = [
        *(
            "/system TEXT",
            "taken back: 'Name\\nthree rivers.'",
            "temperature: 0.5",
            "max-new-tokens: 5",
            "system: none",
        ),
        *("system: Be kind.", "base, sft, dpo (this one)", "base, sft (this one), dpo", f"saved to {file}"),
        *("> Who are you?", "a new conversation"),
    ]
    assert [text for text in shown if text not in out] == []
    refused = [
        *("top-p 2: expected a number less", "temperature hot: expected a number", "seed 1.5: expected a whole"),
        *("control token </s>", "/save needs a file", "no command '/nonsense'", "/undo takes nothing"),
        *("nothing was asked yet", "the model's context is 256"),
    ]
    assert [text for text in refused if text not in err] == []
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"] and row["model"] == "sft"


def test_a_vote_hides_whose_answer_is_whose(typed, tmp_path, monkeypatch):
    """The answers are made to name their models, so that what is shown can be told apart."""

    def named(streamer, prompts, *rest):
        same = "All?" in streamer._chat.decode(list(prompts[0])).rpartition("<|user|>")[2]
        return [Drawn("Same." if same else f"[I am {name}]", [1, 2], "stop") for name in streamer._chat.live.models]

    monkeypatch.setattr(Streamer, "draw", named)
    file, saved = tmp_path / "votes.jsonl", tmp_path / "mine.jsonl"
    options = ["--vote", str(file)]
    lines = [
        "Who?",
        "4",
        "x",
        "1",
        f"/save {saved}",
        "And?",
        "t",
        "Hm?",
        "s",
        "/retry",
        "2",
        "All?",
        "/history",
        "Last?",
    ]
    code, out, err = typed("/system Be kind.", "/system ''", *lines, EOFError(), options=options)
    assert code == 0, err
    body, _, end = out.partition("liked best")
    shown = [re.findall(r"\[I am (\w+)\]", part) for part in body.split("Answer 1")[1:]]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["vote"]["chosen_model"] for row in rows] == [shown[0][0]] * 2 + [shown[3][1]] * 2
    assert {row["vote"]["rejected_model"] for row in rows[:2]} == {"base", "sft", "dpo"} - {shown[0][0]}
    assert all(row["chosen"][-1]["content"] == f"[I am {row['vote']['chosen_model']}]" for row in rows)
    assert "'x' is none of these" in body and "the answers are all the same" in body
    assert not re.search(r"\b(base|sft|dpo)\b", re.sub(r"\[I am \w+\]|/dpo: 3 models", "", body))
    assert "votes: 3; skipped: 2; pairs added to" in end and "(ties)" in end
    assert re.search(r"Next: zephyr-lite dpo dataset=\S+votes.jsonl output_dir=\S+ stage=voted\n", end)
    # one conversation of the answers that were liked; '' is no system turn, as with --system
    (row,) = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] and "model" not in row
    again = typed(options=options)
    assert again[0] == 0 and "votes: 0; skipped: 0" in again[1] and len(file.read_text().splitlines()) == 4


def test_ctrl_c_twice_ends_a_session(typed):
    code, out, err = typed("/settings", KeyboardInterrupt(), "/seed 3", KeyboardInterrupt(), "", KeyboardInterrupt())
    assert code == 0 and "seed: 3" in out, err
    code, out, err = typed('"""a', KeyboardInterrupt(), KeyboardInterrupt(), "/seed 3")
    assert code == 130 and "Ctrl-C once more" in out and "seed" not in out


def test_a_prompt_on_stdin_is_answered_on_stdout(talk_run, monkeypatch, invoke, loaded):
    def piped(given, *options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        return invoke("chat", talk_run, *SHORT, *options)

    expected = {
        name: visible(Chat(loaded).ask(["Who\nare you?"], max_new_tokens=8, adapters=names)[0])
        for name, names in loaded.models.items()
    }
    code, out, err = piped(b"Who\nare you?\n")
    assert code == 0 and out == expected["dpo"] + "\n" and "cut at 8 tokens" in err
    code, out, err = piped(b"Who\nare you?", "--compare")
    assert out == "".join(f"## {name}\n\n{text}\n\n" for name, text in expected.items())
    assert [piped(given)[0] for given in (b"", b" \n", b"\xff\xfe")] == [2] * 3
    assert piped(b"Hi", "--vote", "v.jsonl")[0] == 2
    code, out, err = piped(b"word " * 300)
    assert code == 2 and out == "" and "the model's context is 256" in err


def test_a_file_of_prompts_is_answered_in_batches(talk_run, invoke, loaded, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    asked = ["Who are you?", "end</s>", "Hi", "word " * 300, "Name three rivers."]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    given = ["chat", talk_run, *SHORT, "--prompts", prompts, "--batch-size", "2", "--out", out]
    code, said, _ = invoke(*given, "--compare")
    assert code == 0 and "prompt 2 ('end</s>') is left out" in said and "prompt 4" in said
    assert said.endswith("o.jsonl; prompts left out: 2\n") and "\n9 answers are in " in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    told = [(row["prompt_number"], row["model"]) for row in rows]
    assert told[:4] == [(1, "base"), (3, "base"), (1, "sft"), (3, "sft")] and len(told) == 9
    for row in rows:
        text = Chat(loaded).ask([row["messages"][:-1]], max_new_tokens=8, adapters=loaded.models[row["model"]])
        assert text == [row["messages"][-1]["content"]]
    code, _, err = invoke(*given)
    assert code == 2 and "is there already" in err
    prompts.write_text(json.dumps({"prompt": "</s>"}))
    assert invoke(*given[:-1], tmp_path / "x.jsonl")[0] == 2 and not (tmp_path / "x.jsonl").exists()
