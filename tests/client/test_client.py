"""The client against a real HTTP server: requests, every way of failing that servers have, budgets, rates."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import Act, ChatServer, answer_json, by_hash, disconnect, error, not_json, ok
from zephyr_lite.client import client
from zephyr_lite.client.client import (
    MAX_FAILED_IN_A_ROW,
    BudgetSpent,
    ModelClient,
    Request,
    RequestFailed,
    prompt_token_bound,
)
from zephyr_lite.client.endpoints import EndpointSpec, endpoint_spec, parse_endpoint
from zephyr_lite.client.request_log import NAME, Reply
from zephyr_lite.errors import UserError


def spec(server: ChatServer, **settings: Any) -> EndpointSpec:
    return EndpointSpec(**{"url": server.url, "model": "m", "max_tokens": 50, "timeout": 5.0, **settings})


def request(text: str, **settings: Any) -> Request:
    return Request(f"key/{text}", "m", ({"role": "user", "content": text},), **settings)


async def ask_all(client: ModelClient, texts: Sequence[str], **settings: Any) -> list[Reply | BaseException]:
    return await asyncio.gather(*(client.ask(request(t, **settings)) for t in texts), return_exceptions=True)


def run(specs: Sequence[EndpointSpec], folder: Path, work: Callable[[ModelClient], Any], **settings: Any) -> Any:
    """What ``work`` returns, and the totals; limited to 30 s."""

    async def main() -> Any:
        async with asyncio.timeout(30), ModelClient(specs, folder, **settings) as client:
            return await work(client), client.totals

    return asyncio.run(main())


def one(
    server: ChatServer, folder: Path, text: str = "hello", job: dict[str, Any] | None = None, **settings: Any
) -> Any:
    return run([spec(server, **settings)], folder, lambda client: client.ask(request(text)), **(job or {}))


def records(folder: Path, state: str | None = None) -> list[dict[str, Any]]:
    """The rows of a job's request log."""
    database = sqlite3.connect(folder / NAME)
    database.row_factory = sqlite3.Row
    try:
        rows = [dict(row) for row in database.execute("SELECT * FROM requests ORDER BY id")]
    finally:
        database.close()
    return [row for row in rows if state in (None, row["state"])]


# What is sent, and what comes back


def test_a_request_is_sent_as_the_api_wants_it(tmp_path):
    with ChatServer(lambda seen: ok("Hello!", finish_reason="length")) as server:
        settings = {"system": "Be brief.", "top_p": 0.9, "temperature": 0.3}
        reply, totals = run([spec(server, **settings)], tmp_path, lambda d: d.ask(request("hi", seed=7, max_tokens=9)))
        own = ({"role": "system", "content": "mine"}, {"role": "user", "content": "hi"})
        run([spec(server, system="its")], tmp_path, lambda d: d.ask(Request("k", "m", own)))
    assert reply == Reply("Hello!", "length", 7, 5)
    first, second = server.seen
    assert first.path == "/v1/chat/completions"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert first.body == {"model": "m", "messages": turns, "temperature": 0.3, "top_p": 0.9, "seed": 7, "max_tokens": 9}
    assert (totals.requests, totals.replies, totals.prompt_tokens, totals.completion_tokens) == (1, 1, 7, 5)
    assert second.body["messages"] == list(own)  # a system turn of the request replaces the endpoint's


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": None}, ""),
        ({"content": "half a pair \ud83d \r\n\u2028 \0 漢 🦊 \\u0041"}, "half a pair ? \r\n\u2028 \0 漢 🦊 \\u0041"),
    ],
)
def test_replies_come_back_from_the_log_as_they_were(tmp_path, message, text):
    with ChatServer(lambda seen: answer_json({"choices": [{"message": message, "finish_reason": None}]})) as server:
        reply, _ = one(server, tmp_path)
        again, totals = one(server, tmp_path)
    assert reply.text == text and reply.finish_reason == "stop"
    assert again == reply and totals.from_log == 1 and len(server.seen) == 1


def test_a_changed_question_is_asked_again_and_a_moved_server_is_not(tmp_path):
    with ChatServer() as first:
        one(first, tmp_path)
    with ChatServer() as second:
        assert one(second, tmp_path)[1].requests == 1
        one(second, tmp_path, temperature=0.5)
        one(second, tmp_path, max_tokens=51)
        one(second, tmp_path, system="s")
        one(second, tmp_path, model="other", name="m")
    assert len(first.seen) == 1 and len(second.seen) == 4


# Failures


PASSING = {
    "HTTP 429": (lambda: error(429), False),
    "HTTP 500": (lambda: error(500), True),
    "HTTP 502": (lambda: Act(502, b"<html>bad gateway</html>"), True),
    "reply holds no answer": (not_json, True),
    "no reply": (lambda: disconnect(0), True),
}


@pytest.mark.parametrize("reason", PASSING)
def test_a_temporary_failure_is_tried_again(tmp_path, reason):
    act, charged = PASSING[reason]
    with ChatServer(lambda seen: act() if seen.number < 2 else by_hash(seen)) as server:
        (reply,), totals = run([spec(server, timeout=1)], tmp_path, lambda d: ask_all(d, ["a"]))
    assert isinstance(reply, Reply), reply
    assert totals.failed_tries == {reason: 2}
    assert totals.requests == 3 and totals.replies == 1
    bound = prompt_token_bound([{"role": "user", "content": "a"}]) + 50
    assert totals.lost_tokens == (2 * bound if charged else 0)
    assert totals.tokens == totals.lost_tokens + 12


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (400, 1)])
def test_a_request_without_a_reply_leaves_the_others_alone_and_is_asked_again_later(tmp_path, status, tries):
    with ChatServer(lambda seen: error(status, "boom") if seen.question == "bad" else by_hash(seen)) as server:
        endpoint = spec(server, retries=2)
        replies, totals = run([endpoint], tmp_path, lambda d: ask_all(d, ["a", "bad", "b"]))
        assert [type(r) for r in replies] == [Reply, RequestFailed, Reply]
        assert replies[1].reason == f"HTTP {status}" and "boom" in str(replies[1])
        assert totals.failed_tries == {f"HTTP {status}": tries} and totals.requests == tries + 2
        server.script = by_hash
        replies, totals = run([endpoint], tmp_path, lambda d: ask_all(d, ["a", "bad", "b"]))
    assert all(isinstance(r, Reply) for r in replies)
    assert totals.requests == tries + 3 and totals.from_log == 2


def test_retry_after_holds_for_all_requests_to_the_server(tmp_path):
    def script(seen):
        return error(429, "slow down", retry_after="1") if seen.number == 1 else by_hash(seen)

    with ChatServer(script) as server:
        replies, totals = run([spec(server, concurrency=2)], tmp_path, lambda d: ask_all(d, list("abcd")))
    assert all(isinstance(r, Reply) for r in replies) and totals.failed_tries == {"HTTP 429": 1}
    times = [seen.at for seen in server.seen]
    assert len(times) == 5 and times[4] - times[1] >= 1.0


def test_settings_that_a_server_does_not_know_are_sent_in_another_form(tmp_path):
    def script(seen):
        if "max_tokens" in seen.body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return error(422, "seed: Extra inputs are not permitted") if "seed" in seen.body else by_hash(seen)

    with ChatServer(script) as server:
        endpoint = spec(server, concurrency=1, retries=0)
        replies, totals = run([endpoint], tmp_path, lambda d: ask_all(d, list("abc"), seed=1))
    assert all(isinstance(r, Reply) for r in replies)
    assert len(server.seen) == totals.requests == 5 and server.seen[-1].body["max_completion_tokens"] == 50


@pytest.mark.parametrize(
    ("act", "found"),
    [
        (error(401, "bad key"), "HTTP 401: the server refuses the key"),
        (error(402, "no credit"), "HTTP 402: no credit"),
        (error(404, "model not found"), "HTTP 404: no model m at"),
        (error(429, "slow down"), "HTTP 429: slow down"),
        (error(429, "tomorrow", retry_after="86400"), "HTTP 429: tomorrow"),
        (error(500, "broken model"), "in a row (HTTP 500: broken model)"),
        (error(400, "no such parameter"), "requests in a row (HTTP 400: no such parameter)"),
    ],
)
def test_the_job_ends_where_no_request_can_succeed(tmp_path, act, found):
    with ChatServer(lambda seen: act) as server:
        endpoint = spec(server, concurrency=2, retries=1)
        replies, _ = run([endpoint], tmp_path, lambda d: ask_all(d, [str(i) for i in range(40)]))
    errors = [r for r in replies if isinstance(r, UserError)]
    assert errors and all(found in r.message and "endpoint m" in r.message and r.hint for r in errors), replies
    assert len(server.seen) <= 2 * (MAX_FAILED_IN_A_ROW + 2)  # of 80


def test_a_server_that_is_not_there_is_named_and_one_that_goes_away_is_tried_again(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = EndpointSpec(url=f"http://127.0.0.1:{port}/v1", model="m")
    replies, totals = run([endpoint], tmp_path / "never", lambda d: ask_all(d, list("abc")))
    assert all(isinstance(r, UserError) and "cannot be reached" in r.message for r in replies)
    assert "ollama serve" in replies[0].hint and totals.requests <= 4 and totals.tokens == 0
    monkeypatch.setattr(client, "BACK_OFF", 0.1)
    with ChatServer() as server:

        async def work(client):
            await client.ask(request("a"))
            server.stop()
            waiting = asyncio.gather(client.ask(request("b")), client.ask(request("c")), return_exceptions=True)
            await asyncio.sleep(0.3)
            with ChatServer(port=server.port):
                return await waiting

        replies, _ = run([spec(server, retries=6)], tmp_path / "back", work)
    assert all(isinstance(r, Reply) for r in replies), replies


# Budget


def test_requests_never_exceed_their_budget_whatever_fails(tmp_path):
    limit = 7
    with ChatServer(lambda seen: error(500) if seen.number % 3 == 1 else by_hash(seen)) as server:
        texts = [str(i) for i in range(30)]
        endpoint = spec(server, concurrency=16)
        replies, totals = run([endpoint], tmp_path, lambda d: ask_all(d, texts), max_requests=limit)
        assert len(server.seen) == totals.requests == limit
        assert sum(isinstance(r, BudgetSpent) for r in replies) == 30 - totals.replies
        # the same command with the same budget sends nothing more; a larger one continues
        _, totals = run([endpoint], tmp_path, lambda d: ask_all(d, texts), max_requests=limit)
        assert len(server.seen) == limit and totals.requests == limit
        run([endpoint], tmp_path, lambda d: ask_all(d, texts), max_requests=limit + 2)
    assert len(server.seen) == limit + 2


def test_tokens_never_exceed_their_budget_at_any_moment(tmp_path):
    """The server counts what it generates; it may use all of max_tokens, and its replies may be lost."""
    spent = []
    limit = 5_000

    def script(seen):
        tokens = 40 + seen.body["max_tokens"] if seen.number % 4 == 0 else 60
        spent.append(tokens)
        if seen.number % 5 == 4:
            return [not_json(), disconnect(5)][seen.number % 2]
        return ok("x", usage={"prompt_tokens": tokens - 20, "completion_tokens": 20}, sleep=0.01)

    with ChatServer(script) as server:
        replies, totals = run(
            [spec(server, concurrency=16, max_tokens=100, retries=1)],
            tmp_path,
            lambda d: ask_all(d, [f"question {i}" for i in range(100)]),
            max_tokens=limit,
        )
    assert server.most_at_once > 2
    assert sum(spent) <= limit and totals.tokens <= limit
    assert any(isinstance(r, BudgetSpent) for r in replies) and totals.replies > 10
    bound = prompt_token_bound([{"role": "user", "content": "question 100"}]) + 100
    assert totals.tokens > limit - bound - 1  # and it is used up: what was held and not used is given back


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 0, "completion_tokens": 0}])
def test_the_bound_counts_where_the_server_counts_no_tokens(tmp_path, usage):
    with ChatServer(lambda seen: ok("text", usage=usage)) as server:
        reply, totals = one(server, tmp_path, output_price=10.0)
    bound = prompt_token_bound([{"role": "user", "content": "hello"}])
    assert (reply.prompt_tokens, reply.completion_tokens) == (bound, 50)
    assert totals.tokens == bound + 50 and totals.dollars == pytest.approx(50 * 10e-6)


# Pace


def test_concurrency_and_requests_per_minute_are_limits(tmp_path):
    with ChatServer(lambda seen: ok("x", sleep=0.03)) as server:
        run([spec(server, concurrency=3)], tmp_path / "a", lambda d: ask_all(d, [str(i) for i in range(15)]))
        assert server.most_at_once == 3 and len(server.seen) == 15
    with ChatServer(lambda seen: error(500) if seen.number == 2 else by_hash(seen)) as server:
        endpoint = spec(server, requests_per_minute=600, concurrency=8)
        run([endpoint], tmp_path / "b", lambda d: ask_all(d, list("abcde")))
    times = [seen.at for seen in server.seen]
    assert len(times) == 6 and times[5] - times[0] >= 0.4  # 0.1 s apart, tries included


# Parsed replies


def test_a_reply_that_cannot_be_parsed_is_asked_for_again(tmp_path):
    def work(client):
        return client.ask_parsed(request("n", seed=3, temperature=0.0), int)

    with ChatServer(lambda seen: ok("a poem") if seen.number < 2 else ok("42")) as server:
        found, totals = run([spec(server)], tmp_path, work)
        assert found == 42
        assert [r["key"] for r in records(tmp_path, "replied")] == ["key/n", "key/n/again1", "key/n/again2"]
        assert [(s.body["seed"], s.body["temperature"]) for s in server.seen] == [(3, 0.0), (4, 0.5), (5, 0.5)]
        found, totals = run([spec(server)], tmp_path, work)
    assert found == 42 and len(server.seen) == 3 and totals.from_log == 3
    with ChatServer(lambda seen: ok("a poem")) as server:
        (failed,), totals = run(
            [spec(server)],
            tmp_path / "b",
            lambda client: asyncio.gather(client.ask_parsed(request("m"), int), return_exceptions=True),
        )
    assert isinstance(failed, RequestFailed) and failed.reason == "unreadable reply" and "poem" in str(failed)
    assert totals.replies == len(server.seen) == 3


# Endpoints


def test_an_endpoint_in_one_word(tmp_path):
    found = parse_endpoint("http://localhost:11434/v1/#llama3.2:3b,concurrency=2")
    assert (found.url, found.model, found.name) == ("http://localhost:11434/v1", "llama3.2:3b", "llama3.2:3b")
    assert parse_endpoint("https://x.example/v1/chat/completions#org/model").url == "https://x.example/v1"
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    assert parse_endpoint(str(folder)).name == "runs/mine"
    for text, found in (("http://localhost:1/v1", "the model's name"), (str(tmp_path / "nothing"), "no such folder")):
        with pytest.raises(UserError, match=found):
            parse_endpoint(text)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"url": "http://x/v1"}, "the model's name"),
        ({"url": "http://x/v1", "path": "y", "model": "m"}, "either url"),
        ({"url": "ftp://x/v1", "model": "m"}, "url: expected a URL"),
        ({"url": "http://x/v1", "model": "m", "concurrency": 0}, "concurrency: "),
        ({"url": "http://x/v1", "model": "m", "modle": "m"}, "no key 'modle'"),
    ],
)
def test_a_wrong_endpoint_is_named_by_its_key(settings, found):
    with pytest.raises(UserError, match=found):
        endpoint_spec(settings)


def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with ChatServer() as server, pytest.raises(UserError) as caught:
        one(server, tmp_path)
    assert 'pip install "zephyr-lite[feedback]"' in caught.value.hint and not server.seen
