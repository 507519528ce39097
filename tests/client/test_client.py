"""The client against a real HTTP server: requests, the ways in which servers fail, budgets."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import Act, ChatServer, answer_json, by_hash, disconnect, error, not_json, ok
from zephyr_lite.client.client import (
    MAX_FAILED_IN_A_ROW,
    BudgetSpent,
    ModelClient,
    Request,
    RequestFailed,
    prompt_token_bound,
)
from zephyr_lite.client.endpoints import EndpointSpec, parse_endpoint
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
        (error(404, "model not found"), "HTTP 404: no model m at"),
        (error(429, "tomorrow", retry_after="86400"), "HTTP 429: tomorrow"),
        (error(500, "broken model"), "in a row (HTTP 500: broken model)"),
    ],
)
def test_the_job_ends_where_no_request_can_succeed(tmp_path, act, found):
    with ChatServer(lambda seen: act) as server:
        endpoint = spec(server, concurrency=2, retries=1)
        replies, _ = run([endpoint], tmp_path, lambda d: ask_all(d, [str(i) for i in range(40)]))
    errors = [r for r in replies if isinstance(r, UserError)]
    assert errors and all(found in r.message and "endpoint m" in r.message and r.hint for r in errors), replies
    assert len(server.seen) <= 2 * (MAX_FAILED_IN_A_ROW + 2)  # of 80


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
