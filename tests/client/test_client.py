"""The client against a real HTTP server: requests, every way of failing that servers have, budgets, rates."""

from __future__ import annotations

import asyncio
import email.utils
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import Act, ChatServer, answer_json, by_hash, disconnect, error, hang, not_json, ok
from zephyr_lite.client.client import (
    MAX_FAILED_IN_A_ROW,
    BudgetSpent,
    ModelClient,
    Request,
    RequestFailed,
    open_client,
    prompt_token_bound,
)
from zephyr_lite.client.endpoints import EndpointSpec
from zephyr_lite.client.openai_client import retry_after
from zephyr_lite.client.request_log import NAME, Reply
from zephyr_lite.errors import UserError

QUICK = {"back_off": 0.01, "grace": 2.0}


def spec(server: ChatServer, **settings: Any) -> EndpointSpec:
    return EndpointSpec(**{"url": server.url, "model": "m", "max_tokens": 50, "timeout": 5.0, **settings})


def request(text: str, **settings: Any) -> Request:
    return Request(f"key/{text}", "m", ({"role": "user", "content": text},), **settings)


async def ask_all(client: ModelClient, texts: Sequence[str], **settings: Any) -> list[Reply | BaseException]:
    return await asyncio.gather(*(client.ask(request(t, **settings)) for t in texts), return_exceptions=True)


def run(specs: Sequence[EndpointSpec], folder: Path, work: Callable[[ModelClient], Any], **settings: Any) -> Any:
    """What ``work`` returns, and the totals; limited to 30 s."""

    async def main() -> Any:
        async with asyncio.timeout(30), open_client(specs, folder, **{**QUICK, **settings}) as client:
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
    assert reply == Reply("Hello!", "length", 7, 5)
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    sampling = {"temperature": 0.3, "top_p": 0.9, "seed": 7, "max_tokens": 9}
    assert seen.body == {"model": "m", "messages": turns, **sampling, "stream": False}
    assert "authorization" not in seen.headers
    assert (totals.requests, totals.replies, totals.prompt_tokens, totals.completion_tokens) == (1, 1, 7, 5)


def test_a_system_turn_of_the_request_stands_before_the_endpoints(tmp_path):
    turns = ({"role": "system", "content": "mine"}, {"role": "user", "content": "hi"})
    with ChatServer() as server:
        run([spec(server, system="its")], tmp_path, lambda d: d.ask(Request("k", "m", turns)))
    assert server.seen[0].body["messages"] == list(turns)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": None}, ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": "half a pair \ud83d and ünï"}, "half a pair ? and ünï"),
    ],
)
def test_contents_of_other_shapes(tmp_path, message, text):
    with ChatServer(lambda seen: answer_json({"choices": [{"message": message, "finish_reason": None}]})) as server:
        reply, _ = one(server, tmp_path)
        again, totals = one(server, tmp_path)
    assert reply.text == text and reply.finish_reason == "stop"
    assert again == reply and totals.from_log == 1 and len(server.seen) == 1


def test_a_changed_question_is_asked_anew_and_a_moved_server_is_not(tmp_path):
    with ChatServer() as first:
        one(first, tmp_path)
    with ChatServer() as second:
        assert one(second, tmp_path)[1].requests == 1  # from the journal
        one(second, tmp_path, temperature=0.5)
        one(second, tmp_path, max_tokens=51)
        one(second, tmp_path, system="s")
        one(second, tmp_path, model="other", name="m")
    assert len(first.seen) == 1 and len(second.seen) == 4


# Failures that pass


PASSING = {
    "HTTP 429": lambda: error(429),
    "HTTP 500": lambda: error(500),
    "HTTP 503": lambda: error(503),
    "HTTP 502": lambda: Act(502, b"<html>bad gateway</html>"),
    "HTTP 408": lambda: error(408),
    "reply is not JSON": not_json,
    "HTTP 529": lambda: error(529),
    "HTTP 504": lambda: answer_json({"error": {"message": "upstream", "code": 504}}),  # in a 200, as gateways do
    "reply holds no answer": lambda: answer_json({"error": {"message": "upstream", "code": "odd"}}),
    "connection broken": lambda: disconnect(0),
    "no reply in time": lambda: hang(),
}
# what may have been paid for although nothing usable came
CHARGED = {
    "HTTP 500",
    "HTTP 502",
    "HTTP 504",
    "reply is not JSON",
    "reply holds no answer",
    "connection broken",
    "no reply in time",
}


@pytest.mark.parametrize("reason", PASSING)
def test_a_failure_that_passes_is_tried_again(tmp_path, reason):
    with ChatServer(lambda seen: PASSING[reason]() if seen.number in (1, 2) else by_hash(seen)) as server:
        work = lambda d: ask_all(d, ["a"])  # noqa: E731
        run([spec(server)], tmp_path / "before", work)  # the first request of all: the server is there
        (reply,), totals = run([spec(server, timeout=0.3)], tmp_path, work)
    assert isinstance(reply, Reply), reply
    assert totals.failed_tries == {reason: 2} and totals.failures == {}
    assert totals.requests == 3 and totals.replies == 1
    bound = prompt_token_bound([{"role": "user", "content": "a"}]) + 50
    assert totals.lost_tokens == (2 * bound if reason in CHARGED else 0)
    assert totals.tokens == totals.lost_tokens + 12


def test_a_server_that_drips_is_not_waited_for_forever(tmp_path):
    slow = Act(body=ok("slow").body, drip=0.05)
    with ChatServer(lambda seen: slow if seen.number == 0 else ok("quick")) as server:
        started = time.monotonic()
        reply, totals = one(server, tmp_path, timeout=0.4)
    assert reply.text == "quick" and time.monotonic() - started < 3
    assert totals.failed_tries == {"no reply in time": 1}


def test_all_tries_fail_then_the_request_is_given_up_and_the_others_go_on(tmp_path):
    with ChatServer(lambda seen: error(500, "boom") if seen.question == "bad" else by_hash(seen)) as server:
        replies, totals = run([spec(server, retries=2)], tmp_path, lambda d: ask_all(d, ["a", "bad", "b"]))
        assert [type(r) for r in replies] == [Reply, RequestFailed, Reply]
        assert replies[1].reason == "HTTP 500" and "boom" in str(replies[1]) and "3 tries" in str(replies[1])
        assert totals.failures == {"HTTP 500": 1} and totals.requests == 5
        # a resume tries it again, and pays for nothing else; a reply then clears the failure
        server.script = by_hash
        replies, totals = run([spec(server, retries=2)], tmp_path, lambda d: ask_all(d, ["a", "bad", "b"]))
    assert all(isinstance(r, Reply) for r in replies)
    assert totals.failures == {} and totals.requests == 6 and totals.from_log == 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_the_server_refuses_is_not_tried_again(tmp_path, status):
    script = lambda seen: error(status, "too long") if seen.question == "bad" else by_hash(seen)  # noqa: E731
    with ChatServer(script) as server:
        replies, totals = run([spec(server)], tmp_path, lambda d: ask_all(d, ["bad", "a"]))
    assert (
        isinstance(replies[0], RequestFailed)
        and "too long" in str(replies[0])
        and replies[0].reason == f"HTTP {status}"
    )
    assert isinstance(replies[1], Reply) and totals.requests == 2 and totals.lost_tokens == 0


def test_retry_after_is_honoured_by_everybody_who_asks_there(tmp_path):
    def script(seen):
        return error(429, "slow down", retry_after="1") if seen.number == 1 else by_hash(seen)

    with ChatServer(script) as server:
        replies, totals = run([spec(server, concurrency=1)], tmp_path, lambda d: ask_all(d, list("abcd")))
    assert all(isinstance(r, Reply) for r in replies) and totals.failed_tries == {"HTTP 429": 1}
    times = [seen.at for seen in server.seen]
    assert times[2] - times[1] >= 1.0
    assert len(times) == 5 and times[4] - times[2] < 1.0


def test_a_server_that_asks_for_too_long_a_wait_ends_the_job(tmp_path):
    with ChatServer(lambda seen: error(429, "tomorrow", retry_after="86400")) as server:
        replies, _ = run([spec(server)], tmp_path, lambda d: ask_all(d, list("abc")))
    assert all(isinstance(r, UserError) and "86,400 s" in r.message for r in replies)
    assert len(server.seen) == 1


def test_what_retry_after_may_say():
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "1"}) == 0.25
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 <= retry_after({"retry-after": soon}) <= 30
    assert retry_after({"retry-after": email.utils.formatdate(0)}) == 0
    for nothing in ({}, {"retry-after": "soon"}, {"retry-after": "-1"}, {"retry-after": "inf"}, {"retry-after": "nan"}):
        assert retry_after(nothing) is None


def test_settings_that_a_server_does_not_know_are_asked_for_in_another_way(tmp_path):
    def script(seen):
        if "max_tokens" in seen.body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return error(422, "seed: Extra inputs are not permitted") if "seed" in seen.body else by_hash(seen)

    with ChatServer(script) as server:
        endpoint = spec(server, concurrency=1, retries=0)
        replies, totals = run([endpoint], tmp_path, lambda d: ask_all(d, list("abc"), seed=1))
    assert all(isinstance(r, Reply) for r in replies)
    assert totals.requests == 5 and server.seen[-1].body["max_completion_tokens"] == 50


# Failures that do not


@pytest.mark.parametrize(
    ("act", "found"),
    [
        (error(401, "bad key"), "refuses the key (HTTP 401)."),
        (error(403, "no"), "refuses the key (HTTP 403)"),
        (error(402, "no credit"), "has no credit left"),
        (
            answer_json({"error": {"message": "quota", "code": "insufficient_quota"}}, 429),
            "has no credit left",
        ),
        (answer_json({"error": {"message": "bad key", "code": 401}}), "refuses the key (HTTP 401)."),
        (error(404, "model not found"), "no model m at"),
        (error(405), "no model m at"),
        (Act(308, headers={"Location": "https://elsewhere.example/v1"}), "redirects to https://elsewhere.example/v1"),
    ],
)
def test_what_nothing_can_succeed_after_ends_the_job_at_the_first_request(tmp_path, act, found):
    with ChatServer(lambda seen: act) as server:
        replies, totals = run([spec(server, concurrency=8)], tmp_path, lambda d: ask_all(d, list("abcdefgh")))
    assert all(isinstance(r, UserError) and found in r.message and r.hint for r in replies), replies
    assert len(server.seen) == 1 and totals.requests == 1


def test_a_403_from_a_server_that_has_answered_is_about_one_conversation(tmp_path):
    script = lambda seen: error(403, "flagged") if seen.question == "bad" else by_hash(seen)  # noqa: E731
    with ChatServer(script) as server:
        replies, _ = run([spec(server, concurrency=1)], tmp_path, lambda d: ask_all(d, ["a", "bad", "b"]))
    assert [type(r) for r in replies] == [Reply, RequestFailed, Reply]


def test_no_server_is_said_at_once_with_a_hint(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url, hint in (
        (f"http://127.0.0.1:{port}/v1", "Is the server running"),
        ("http://localhost:11434/v1", "Ollama"),
    ):
        started = time.monotonic()
        endpoint = EndpointSpec(url=url, model="m")
        replies, totals = run([endpoint], tmp_path / hint[:3], lambda d: ask_all(d, list("abc")), back_off=5.0)
        assert all(isinstance(r, UserError) and "cannot be reached" in r.message and hint in r.hint for r in replies)
        assert time.monotonic() - started < 5 and totals.requests == 0 and totals.tokens == 0


def test_a_server_that_goes_away_is_tried_again_and_then_ends_the_job_and_drops_nothing(tmp_path):
    with ChatServer() as server:

        async def work(client):
            first = await client.ask(request("a"))
            server.stop()
            return [first, *await ask_all(client, ["b", "c"])]

        replies, totals = run([spec(server, retries=2)], tmp_path, work)
    assert isinstance(replies[0], Reply)
    assert all(isinstance(r, UserError) and "cannot be reached" in r.message for r in replies[1:]), replies
    assert totals.failed_tries["cannot be reached"] >= 3 and totals.replies == 1


def test_a_server_that_comes_back_is_asked_again(tmp_path):
    with ChatServer() as server:

        async def work(client):
            await client.ask(request("a"))
            server.stop()
            waiting = asyncio.gather(client.ask(request("b")), client.ask(request("c")))
            await asyncio.sleep(0.3)
            with ChatServer(port=server.port):
                return await waiting

        replies, _ = run([spec(server, retries=6)], tmp_path, work, back_off=0.1)
    assert all(isinstance(r, Reply) for r in replies)


def test_a_server_that_never_answers_ends_the_job(tmp_path):
    with ChatServer(lambda seen: hang()) as server:
        replies, _ = run([spec(server, timeout=0.1, retries=2)], tmp_path, lambda d: ask_all(d, list("abc")))
    assert any(isinstance(r, UserError) and "no answer in 3 tries" in r.message for r in replies)


def test_a_server_that_fails_everything_ends_the_job_and_is_not_fed_all_prompts(tmp_path):
    texts = [str(i) for i in range(40)]
    with ChatServer(lambda seen: error(500, "broken model")) as server:
        replies, _ = run([spec(server, retries=0)], tmp_path, lambda d: ask_all(d, texts))
    kinds = [type(r) for r in replies]
    assert kinds.count(RequestFailed) == MAX_FAILED_IN_A_ROW - 1 and kinds.count(UserError) == 41 - MAX_FAILED_IN_A_ROW
    assert len(server.seen) < MAX_FAILED_IN_A_ROW + 4
    assert "broken model" in next(r for r in replies if isinstance(r, UserError)).message


def test_a_job_that_goes_on_does_not_stumble_over_the_same_failures_for_ever(tmp_path):
    """More requests than MAX_FAILED_IN_A_ROW fail whatever is done; all others are asked in the end."""
    bad = [f"bad{i}" for i in range(MAX_FAILED_IN_A_ROW + 1)]
    for status in (500, 400):
        script = lambda seen, s=status: error(s) if seen.question in bad else by_hash(seen)  # noqa: E731
        with ChatServer(script) as server:
            endpoint = spec(server, retries=0, concurrency=1)
            for _ in range(2):
                replies, totals = run([endpoint], tmp_path / str(status), lambda d: ask_all(d, ["a", *bad, "b"]))
        assert [type(r) for r in replies] == [Reply, *[RequestFailed] * len(bad), Reply]
        assert totals.failures == {f"HTTP {status}": len(bad)} and totals.replies == 2


def test_who_is_turned_away_while_others_are_answered_is_not_given_up(tmp_path):
    """A limit of one request in 50 ms, which 8 at a time run into again and again."""
    last = [0.0]

    def script(seen):
        now = time.monotonic()
        if now - last[0] < 0.05:
            return error(429)
        last[0] = now
        return by_hash(seen)

    with ChatServer(script) as server:
        endpoint = spec(server, concurrency=8)
        texts = [str(i) for i in range(24)]
        replies, totals = run([endpoint], tmp_path, lambda d: ask_all(d, texts), back_off=0.05)
    assert all(isinstance(r, Reply) for r in replies) and totals.failed_tries["HTTP 429"] > 8


def test_a_server_that_turns_everybody_away_ends_the_job_and_drops_nothing(tmp_path):
    with ChatServer(lambda seen: error(429, "slow down")) as server:
        replies, totals = run([spec(server, retries=2)], tmp_path, lambda d: ask_all(d, list("abcdef")))
    assert all(isinstance(r, UserError) and "turned away" in r.message and "slow down" in r.message for r in replies)
    assert totals.failures.get("HTTP 429", 0) <= 4 and totals.tokens == 0


@pytest.mark.parametrize("count", [10**12, 10**400, -3, "5", 1.5, True, None])
def test_a_count_of_tokens_that_cannot_be_is_none(tmp_path, count):
    usage = {"prompt_tokens": count, "completion_tokens": 5}
    with ChatServer(lambda seen: ok("fine", usage=usage)) as server:
        replies, totals = run([spec(server, input_price=1.5)], tmp_path, lambda d: ask_all(d, ["a"]))
    assert isinstance(replies[0], Reply) and totals.uncounted == 1
    assert totals.prompt_tokens + totals.completion_tokens == prompt_token_bound(request("a").messages) + 50


# Budget


@pytest.mark.parametrize("limit", [1, 7, 20])
def test_requests_never_exceed_their_budget_whatever_fails(tmp_path, limit):
    with ChatServer(lambda seen: error(500) if seen.number % 3 == 1 else by_hash(seen)) as server:
        texts = [str(i) for i in range(30)]
        endpoint = spec(server, concurrency=16)
        replies, totals = run([endpoint], tmp_path, lambda d: ask_all(d, texts), max_requests=limit)
        assert len(server.seen) == totals.requests == limit
        assert sum(isinstance(r, BudgetSpent) for r in replies) == 30 - totals.replies
        # the same command with the same budget sends nothing more; a larger one continues
        _, totals = run([endpoint], tmp_path, lambda d: ask_all(d, texts), max_requests=limit)
        assert len(server.seen) == limit and totals.requests == limit
        _, totals = run([endpoint], tmp_path, lambda d: ask_all(d, texts), max_requests=limit + 2)
    assert len(server.seen) == limit + 2


def test_tokens_never_exceed_their_budget_at_any_moment(tmp_path):
    """The server counts what it generates; it may use all of max_tokens, and its replies may be lost."""
    spent = []
    limit = 5_000

    def script(seen):
        tokens = 40 + seen.body["max_tokens"] if seen.number % 4 == 0 else 60
        spent.append(tokens)
        time.sleep(0.002 * (seen.number % 7))
        return (
            [not_json(), disconnect(5)][seen.number % 2]
            if seen.number % 5 == 4
            else ok("x", usage={"prompt_tokens": tokens - 20, "completion_tokens": 20})
        )

    heights = []
    with ChatServer(script) as server:
        texts = [f"question {i}" for i in range(200)]
        replies, totals = run(
            [spec(server, concurrency=16, max_tokens=100, retries=1)],
            tmp_path,
            lambda d: ask_all(d, texts),
            max_tokens=limit,
            on_progress=lambda t: heights.append(t.tokens),
        )
    assert server.most_at_once > 2
    assert sum(spent) <= limit and max(heights) <= limit and totals.tokens <= limit
    assert any(isinstance(r, BudgetSpent) for r in replies) and totals.replies > 10
    bound = prompt_token_bound([{"role": "user", "content": "question 100"}]) + 100
    assert totals.tokens > limit - bound - 1  # and it is used up: what was held and not used is given back


def test_a_prompt_larger_than_the_whole_budget_is_not_sent(tmp_path):
    with ChatServer() as server:
        (reply,), totals = run([spec(server)], tmp_path, lambda d: ask_all(d, ["x" * 1000]), max_tokens=500)
    assert isinstance(reply, BudgetSpent) and "1,194 tokens" in str(reply) and "500" in str(reply)
    assert server.seen == [] and totals.requests == 0


def test_a_spent_budget_is_said_at_once_even_where_the_pace_is_slow(tmp_path):
    with ChatServer() as server:
        endpoint = spec(server, requests_per_minute=1)
        started = time.monotonic()
        replies, _ = run([endpoint], tmp_path, lambda d: ask_all(d, list("abcdef")), max_requests=1)
    assert time.monotonic() - started < 5 and sum(isinstance(r, BudgetSpent) for r in replies) == 5


@pytest.mark.parametrize(
    "usage", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": -1, "completion_tokens": 4}]
)
def test_where_the_server_does_not_count_the_bound_stands_and_it_is_said(tmp_path, usage):
    with ChatServer(lambda seen: ok("text", usage=usage)) as server:
        reply, totals = one(server, tmp_path, output_price=10.0)
    bound = prompt_token_bound([{"role": "user", "content": "hello"}])
    assert (reply.prompt_tokens, reply.completion_tokens) == (bound, 50)
    assert totals.uncounted == 1 and totals.tokens == bound + 50 and totals.dollars == pytest.approx(50 * 10e-6)


def test_tokens_that_were_thought_and_not_shown_count(tmp_path):
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 45}
    with ChatServer(lambda seen: ok("text", usage=usage)) as server:
        assert one(server, tmp_path)[0].completion_tokens == 35


def test_a_server_that_heeds_no_limit_is_found_out_and_held_to_what_it_takes(tmp_path):
    with ChatServer(lambda seen: ok("long", usage={"prompt_tokens": 10, "completion_tokens": 1000})) as server:
        replies, totals = run(
            [spec(server)], tmp_path, lambda d: ask_all(d, [str(i) for i in range(10)]), max_tokens=3_500
        )
    bound = prompt_token_bound([{"role": "user", "content": "0"}]) + 50
    assert totals.beyond_bound == 1010 - bound  # the first one; after it the bound is as large as what it takes
    assert totals.tokens <= 3_500 and sum(isinstance(r, Reply) for r in replies) == 3


def test_no_tokenizer_makes_more_tokens_than_the_bound():
    from tests.conftest import TEXT

    assert prompt_token_bound([{"role": "user", "content": "äß漢"}]) == 128 + 16 + 7
    assert prompt_token_bound([{"role": "user", "content": "\ud83d"}]) == 128 + 16 + 3
    assert prompt_token_bound([{"role": "user", "content": TEXT[0]}] * 2) == 128 + 2 * (16 + len(TEXT[0]))


def test_dollars_are_counted_by_the_prices_of_the_time(tmp_path):
    with ChatServer(lambda seen: ok("x", usage={"prompt_tokens": 1000, "completion_tokens": 200})) as server:
        _, totals = one(server, tmp_path, "a", input_price=3.0, output_price=15.0, max_tokens=300)
        assert totals.dollars == pytest.approx(0.006)
        _, totals = one(server, tmp_path, "b", input_price=30.0, output_price=0.0, max_tokens=300)
    assert totals.dollars == pytest.approx(0.006 + 0.03)
    assert totals.as_dict()["dollars"] == pytest.approx(0.036)


# Pace


def test_no_more_than_so_many_at_once(tmp_path):
    with ChatServer(lambda seen: ok("x", sleep=0.03)) as server:
        run([spec(server, concurrency=3)], tmp_path, lambda d: ask_all(d, [str(i) for i in range(15)]))
    assert server.most_at_once == 3 and len(server.seen) == 15


def test_no_more_than_so_many_a_minute_tries_included(tmp_path):
    with ChatServer(lambda seen: error(500) if seen.number == 2 else by_hash(seen)) as server:
        started = time.monotonic()
        run([spec(server, requests_per_minute=600, concurrency=8)], tmp_path, lambda d: ask_all(d, list("abcde")))
    times = [seen.at for seen in server.seen]
    assert len(times) == 6
    for place, at in enumerate(times):  # 0.1 s apart: none comes before its time
        assert at - started >= 0.1 * place


def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with ChatServer() as server, pytest.raises(UserError) as caught:
        one(server, tmp_path)
    assert 'pip install "zephyr-lite[feedback]"' in caught.value.hint and not server.seen


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://u:secretword@localhost:1"),
        ("HTTP_PROXY", "ftp://u:secretword@h:1"),
        ("ALL_PROXY", "http://u:secretword@[::1"),
        ("SSL_CERT_FILE", "no"),
    ],
)
def test_an_environment_that_no_client_can_be_made_of_is_named(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with ChatServer() as server, pytest.raises(UserError, match="proxy or the certificates") as caught:
        run([spec(server)], tmp_path, lambda d: ask_all(d, ["a"]))
    assert "secretword" not in str(caught.value) and not server.seen
