"""`zephyr-lite serve`, asked by the client of OpenAI and by the client of `zephyr-lite eval`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time

import httpx
import openai
import pytest
import torch

from zephyr_lite.chat import Chat, load_chat
from zephyr_lite.chat.generate import RowSampler, Streamer
from zephyr_lite.chat.serve import listen, make_server
from zephyr_lite.chat.session import Session, Settings
from zephyr_lite.cli import app as cli
from zephyr_lite.client.client import ModelClient, Request
from zephyr_lite.client.endpoints import EndpointSpec
from zephyr_lite.errors import UserError

HI = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def chat(talk_run) -> Chat:
    return load_chat(talk_run)


@pytest.fixture(scope="module")
def url(chat):
    with listen("127.0.0.1", 0) as listener:
        server = make_server(chat)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def ask(url):
    """A function: ask, streaming or not; the text, why it ended, and the usage."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)

    def asked(messages=HI, stream=False, **settings):
        settings = {"model": "dpo", "max_tokens": 12, "temperature": 0, "messages": messages, **settings}
        if not stream:
            done = client.chat.completions.create(**settings)
            return done.choices[0].message.content, done.choices[0].finish_reason, done.usage
        chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].choices == [] and {chunk.id for chunk in chunks} == {chunks[0].id}
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
        return text, chunks[-2].choices[0].finish_reason, chunks[-1].usage

    asked.client = client
    return asked


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("model", ["base", "sft", "dpo"])
def test_a_conversation_is_answered_as_by_chat_from_the_ids_of_training(chat, ask, model, monkeypatch):
    assert [each.id for each in ask.client.models.list()] == ["dpo", "sft", "base"]
    settings = {"temperature": 1.2, "top_p": 0.9, "seed": 4}
    session = Session(chat, [model], Settings(**settings, max_new_tokens=12, system="Answer in one line."))
    seen, draw = [], Streamer.draw
    monkeypatch.setattr(Streamer, "draw", lambda self, ids, *rest: seen.append(ids[0]) or draw(self, ids, *rest))
    for question in ("Who are you?", "Name three rivers."):
        (answer,) = session.ask(question)
        *messages, said = session.columns[0].messages("Answer in one line.")
        ids, _ = chat.template.encode([*messages, {"role": "assistant", "content": said["content"] or "Hm."}])
        text, reason, usage = ask(messages, model=model, **settings)
        assert (text, reason) == (answer.text, answer.finish_reason)
        assert (usage.prompt_tokens, usage.completion_tokens) == (answer.prompt_tokens, answer.completion_tokens)
        assert seen[-1].tolist() == ids[: usage.prompt_tokens].tolist()
        parts = [{"type": "text", "text": messages[-1]["content"][:3]}, {"type": "text", "text": question[3:]}]
        streamed = ask([*messages[:-1], {"role": "user", "content": parts}], True, model=model, **settings)
        assert streamed == (text, reason, usage) and seen[-1].tolist() == seen[-2].tolist()


def test_variables_of_the_template_as_other_servers_take_them(chat, ask, monkeypatch):
    written = "{% if enable_thinking is false %}{{ 'Do not think.' }}{% endif %}"
    monkeypatch.setattr(chat.template, "text", chat.template.text + written)
    size = ask()[2].prompt_tokens
    given = {"enable_thinking": False, "messages": []}  # the messages stay
    assert ask(extra_body={"chat_template_kwargs": given})[2].prompt_tokens > size == ask()[2].prompt_tokens


def test_a_stop_sequence_ends_the_answer_before_it(ask):
    whole, reason, _ = ask(max_tokens=40)
    assert reason == "length" and len(whole) > 20
    for stop in (whole[9:13], ["never said", whole[12:14], whole[9:13]], whole[:1]):
        sequences = [stop] if isinstance(stop, str) else stop
        want = whole[: min(whole.find(each) for each in sequences if each in whole)]
        assert ask(max_tokens=40, stop=stop)[:2] == ask(stream=True, max_tokens=40, stop=stop)[:2] == (want, "stop")
    assert ask(stream=True, max_tokens=40, stop="never said")[0] == whole
    assert len({ask(temperature=1.5)[0] for _ in range(5)}) > 1  # without a seed


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"model": "gpt-4"}, 404, "no model 'gpt-4'; there are base, sft, dpo"),
        ({"messages": [*HI, {"role": "assistant", "content": "I am"}]}, 400, "a user's turn at the end"),
        (
            {"messages": [*HI, {"role": "system", "content": "Be kind."}, *HI]},
            400,
            "a system turn at most at the begin",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages: a turn is empty."),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "the model's context is 256"),
        ({"temperature": -1}, 400, "temperature: expected a number greater"),
        ({"logprobs": True}, 400, "logprobs: not supported"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(ask, changes, status, said):
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as error:
            ask(stream=stream, **changes)
        assert error.value.status_code == status and said in error.value.body["message"]
        assert error.value.type == "invalid_request_error"
    assert ask(n=1, logprobs=False, response_format={"type": "text"}, frequency_penalty=0, user="me")[0] == ask()[0]


def test_other_paths_methods_and_hosts_are_refused(url):
    for path, status in (("/nothing", 404), ("/chat/completions", 405)):
        answer = httpx.get(url + path)
        error = answer.json()["error"]
        assert answer.status_code == status and error["type"] == "invalid_request_error" and path in error["message"]
    torn = httpx.post(f"{url}/chat/completions", content=b'{"mess', headers={"Content-Type": "application/json"})
    assert torn.status_code == 400 and torn.json()["error"]["message"].startswith("the request: ")
    port = url.split(":")[-1].removesuffix("/v1")
    assert httpx.get(f"http://localhost:{port}/v1/models").status_code == 200
    assert httpx.get(f"{url}/models", headers={"Host": f"evil.example:{port}"}).status_code == 400


def test_a_client_that_leaves_ends_its_answer(chat, ask, monkeypatch, said):
    choose, eos = RowSampler.choose, torch.tensor([chat.template.tokenizer.eos_token_id])

    def endless(self, scores):
        time.sleep(0.05)
        return choose(self, scores.index_fill(-1, eos, -1e9))

    monkeypatch.setattr(RowSampler, "choose", endless)
    settings = {"model": "base", "messages": HI, "max_tokens": 200, "temperature": 3.0}
    with ask.client.chat.completions.create(**settings, stream=True) as stream:
        next(stream)
    with pytest.raises(openai.APITimeoutError):
        ask.client.with_options(timeout=0.5).chat.completions.create(**settings)
    until(lambda: sum("interrupted" in line for line in said) == 2)
    monkeypatch.undo()
    assert ask()[1] in ("stop", "length")


def test_evaluations_ask_it_as_they_ask_the_folder(url, talk_run, tmp_path):
    usual = {"name": "m", "model": "sft", "max_tokens": 12, "temperature": 0.0}

    def replies(folder, **where):
        async def main():
            async with ModelClient([EndpointSpec(**usual, **where)], tmp_path / folder) as client:
                asked = [Request(text, "m", ({"role": "user", "content": text},), seed=7) for text in ("Hi", "Who?")]
                return await asyncio.gather(*map(client.ask, asked)), client.totals.from_log

        return asyncio.run(main())

    assert replies("served", url=url)[0] == replies("folder", path=str(talk_run))[0]
    assert replies("served", url=url)[1] == 2


def test_the_command_serves_until_ctrl_c(chat, talk_run, monkeypatch, capsys):
    monkeypatch.setattr("zephyr_lite.model.loaded.open_live", lambda *a, **k: chat.live)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert cli.run(["serve", str(talk_run), "--port", str(port)]) == 2
        assert f"--port {port}: Address already in use" in capsys.readouterr().err
    models = []

    def interrupt():
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        try:
            models.extend(each.id for each in client.models.list())
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert cli.run(["serve", str(talk_run), "--port", str(port)]) == 130
    assert models == ["dpo", "sft", "base"] and f"http://127.0.0.1:{port}/v1" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "zephyr_lite.chat.serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.run(["serve", str(talk_run)]) == 2 and "zephyr-lite[serve]" in capsys.readouterr().err
    with pytest.raises(UserError, match="Cannot assign requested address"):
        listen("203.0.113.1", 0)
