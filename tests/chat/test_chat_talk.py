"""Talking to a run: the stream's engine, sessions, votes, what is saved; see test_chat_terminal.py for the terminal."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from tests.train.test_train import dpo_words, words
from zephyr_lite.chat import Chat, load_chat
from zephyr_lite.chat.generate import Drawn, Sampling, Streamer
from zephyr_lite.chat.rows import append_rows, check_file, vote_rows
from zephyr_lite.chat.session import Session, Settings
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

QUESTIONS = ["Who are you?", "Name three rivers, and then three more of them.", "Hi"]
GREEDY = {"temperature": 0.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def chat(talk_run) -> Chat:
    return load_chat(talk_run)


def prompts(chat, questions=QUESTIONS):
    return [chat.template.prompt_ids([{"role": "user", "content": text}]) for text in questions]


def greedy(count, length=12):
    return [Sampling(length, 0.0)] * count


# The engine


def test_three_models_in_one_batch_answer_as_each_does_alone_by_generate(chat):
    models = chat.live.models
    assert models == {"base": [], "sft": ["sft"], "dpo": ["sft", "dpo"]}
    (ids,) = prompts(chat, ["Who are you?"])
    drawn = Streamer(chat, list(models.values())).draw([ids] * 3, greedy(3))
    for row, names in zip(drawn, models.values()):
        with chat.stack.only(names):
            prompt = torch.tensor([list(map(int, ids))])
            out = chat.stack.model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=chat.ends)
        want = out[0, prompt.shape[1] :].tolist()
        assert row.tokens == (want[:-1] if row.finish == "stop" else want)
    assert len({tuple(row.tokens) for row in drawn}) == 3  # the adapters do make a difference


@pytest.mark.parametrize("adapters", [[[], ["sft"], ["sft", "dpo"]], [["sft", "dpo"]]])
def test_rows_of_different_lengths_and_a_kept_cache_change_no_logit(chat, monkeypatch, adapters):
    """Conversations of different lengths that continue, shrink, and restart; every row's logits at every step equal those
    of a plain forward over its whole sequence (sliding window of 24). A row alone keeps its cache."""
    streamer = Streamer(chat, adapters)
    seen: list[torch.Tensor] = []
    forward = Streamer._forward
    monkeypatch.setattr(Streamer, "_forward", lambda self, *a: seen.append(forward(self, *a)) or seen[-1])
    monkeypatch.setattr("zephyr_lite.chat.generate.PREFILL", 16)  # in several pieces
    draw = random.Random(0)
    sequences = [list(map(int, ids)) for ids in prompts(chat)][: len(adapters)]
    reused = []
    for turn in range(5):
        seen.clear()
        rows = [Sampling(6 + 3 * row, 0.8, 0.9, seed=turn) for row in range(len(adapters))]
        drawn = streamer.draw(sequences, rows)
        reused.append([row.reused for row in drawn])
        steps = max(len(row.tokens) for row in drawn)
        pieces = len(seen) - max(len(row.tokens) + (row.finish == "stop") for row in drawn) + 1
        after = seen[pieces - 1 :]
        for place, (names, row) in enumerate(zip(adapters, drawn)):
            with torch.inference_mode(), chat.stack.only(names):
                whole = torch.tensor([[*sequences[place], *row.tokens]])
                logits = chat.stack.base(input_ids=whole).logits[0, len(sequences[place]) - 1 :].float()
            for step in range(min(len(row.tokens) + 1, len(after))):
                assert torch.allclose(after[step][place], logits[step], atol=2e-4), (turn, place, step)
        assert steps > 0
        for place, row in enumerate(drawn):
            sequences[place] += row.tokens + [draw.randrange(3, 400) for _ in range(3 + 4 * place)]
        if turn == 2:
            sequences[0] = sequences[0][:9]  # an undo
    assert reused[0] == [0] * len(adapters) and all((turn[0] > 5) == (len(adapters) == 1) for turn in reused[1:])


def test_an_interrupt_in_the_middle_leaves_a_cache_that_is_right(chat):
    (ids,) = prompts(chat, ["Name three rivers."])
    streamer = Streamer(chat, [["sft"]])
    plain = streamer.draw([ids], greedy(1))[0].tokens

    def boom(row, piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamer.draw([ids], greedy(1), boom)
    assert streamer.draw([ids], greedy(1))[0].tokens == plain
    told = []
    stopped = streamer.draw([ids], greedy(1), lambda row, piece: told.append(piece), lambda: len(told) >= 1)[0]
    count = len(stopped.tokens)
    assert stopped.finish == "interrupted" and 1 <= count < len(plain) and stopped.tokens == plain[:count]
    assert "".join(told) == stopped.text
    assert streamer.draw([ids], greedy(1), stop=lambda: True)[0].tokens == []
    again = streamer.draw([[*map(int, ids), *plain[:2], 17]], greedy(1))[0]
    assert again.tokens == Streamer(chat, [["sft"]]).draw([[*map(int, ids), *plain[:2], 17]], greedy(1))[0].tokens


# Sessions


def session(chat, models=("dpo",), **settings):
    return Session(chat, models, Settings(**{**GREEDY, **settings}))


def test_a_session_of_turns_equals_asking_for_the_whole_conversation(chat):
    talk = session(chat)
    pieces: list[str] = []
    for question in QUESTIONS:
        pieces.clear()
        (answer,) = talk.ask(question, lambda column, piece: pieces.append(piece))
        assert "".join(pieces) == answer.text
        messages = talk.columns[0].messages(None)
        assert chat.ask([messages[:-1]], max_new_tokens=12) == [answer.text] == [messages[-1]["content"]]
    assert answer.reused > 20


def test_undo_retry_and_seeds(chat):
    talk = session(chat, ("base", "sft", "dpo"), temperature=1.5, seed=4)

    def texts(question, **how):
        return [answer.text for answer in talk.ask(question, **how)]

    first, second = texts("Who are you?"), texts("Really?")
    retried, again = texts("Really?", again=True), texts("Really?", again=True)
    assert talk.turns == 2 and retried != second and again not in (retried, second)
    assert talk.undo() == "Really?" and texts("Really?") == second
    talk.reset()
    assert texts("Who are you?") == first

    def interrupt(column, piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask(talk.last_question(), interrupt, again=True)
    assert [c.turns[-1][1].text for c in talk.columns] == first  # a retry that fails costs nothing
    talk.undo()
    with pytest.raises(UserError, match="nothing was asked"):
        talk.undo()


# What is kept


def said(text, finish="stop"):
    return Drawn(text, [1, 2, 3], finish)


def test_a_saved_conversation_is_trained_on(chat, tmp_path):
    talk = session(chat, ("base", "dpo"), system="Be kind.")
    for question in ("Who are you?", "Name a river — 河."):
        talk.ask(question)
    for column in talk.columns:  # what a tiny model says may be empty
        column.turns = [(question, said(answer.text or "Hm.")) for question, answer in column.turns]
    file = tmp_path / "mine.jsonl"
    first = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file.write_text(json.dumps(first))  # without a newline at its end
    append_rows(file, talk.rows())
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row.get("model") for row in rows] == [None, "base", "dpo"]
    assert [turn["role"] for turn in rows[1]["messages"]] == ["system", *["user", "assistant"] * 2]
    base = chat.live.chain.base["name_or_path"]
    outcome = run_sft(load_config("sft", None, words(base, tmp_path / "r", file, load_in_4bit="false", max_steps=1)))
    assert outcome.step == 1


def test_votes_are_pairs_that_dpo_trains_on(chat, talk_run, tmp_path):
    file, models = tmp_path / "votes.jsonl", ["base", "sft", "dpo"]
    talk = Session(chat, models, Settings(**GREEDY), blind=True)
    for number, question in enumerate(("Who are you?", "Name three rivers.", "Tell me a joke.")):
        answers = [said(f"{answer.text} {place}") for place, answer in enumerate(talk.ask(question))]
        for column, answer in zip(talk.columns, answers):
            column.turns[-1] = (question, answer)
        talk.vote(str(talk.order.index(number) + 1), file)
    assert talk.pairs == 6 and talk.voted == dict.fromkeys(models, 1)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    voted = [(row["vote"]["chosen_model"], row["vote"]["rejected_model"]) for row in rows]
    assert len(rows) == 6 and voted[2:4] == [("sft", "base"), ("sft", "dpo")]
    assert rows[4]["chosen"][:-1] == rows[4]["rejected"][:-1] and len(rows[4]["chosen"]) == 6
    assert rows[4]["chosen"][1] == rows[0]["chosen"][1]  # the conversation continues from what was liked
    run = shutil.copytree(talk_run, tmp_path / "run")
    small = {"load_in_4bit": "false", "max_steps": 2, "max_prompt_length": 120, "max_length": 240}
    again = dpo_words(chat.live.chain.base["name_or_path"], run, file, stage="voted", **small)
    assert run_dpo(load_config("dpo", None, again)).step == 2


def test_a_vote_makes_no_pair_of_equal_or_empty_answers():
    prompt, models = [{"role": "user", "content": "Hi"}], ["a", "b", "c"]
    assert vote_rows(prompt, models, [said("x"), said("x"), said("")], 0, "runs/a") == []
    assert vote_rows(prompt, models, [said(""), said("y"), said("z")], 0, "runs/a") == []
    (row,) = vote_rows(prompt, models, [said("x", "length"), said("y")], 1, "runs/a")
    assert row["vote"]["rejected_finish"] == "length" and row["chosen"][-1]["content"] == "y"


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"messages": []}\n')
    for file, match in ((path, "has no chosen"), (tmp_path / "v.txt", "from a .jsonl file")):
        with pytest.raises(UserError, match=match):
            check_file(file, "chosen", "--vote")
    assert path.read_text() == '{"messages": []}\n'
