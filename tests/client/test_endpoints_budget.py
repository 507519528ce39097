"""The budget that is never exceeded, and the pace, against a real HTTP server."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from tests.chat_server import ChatServer, by_hash, disconnect, error, not_json, ok
from tests.client.test_endpoints import ask_all, one, run, spec
from zephyr_lite.client import pace as pace_module
from zephyr_lite.client.budget import most_prompt_tokens
from zephyr_lite.client.pace import Pace
from zephyr_lite.client.types import BudgetSpent, Reply, Request
from zephyr_lite.errors import UserError

# Budget


@pytest.mark.parametrize("limit", [1, 7, 20])
def test_requests_never_exceed_their_budget_whatever_fails(tmp_path, limit):
    with ChatServer(lambda seen: error(500) if seen.number % 3 == 1 else by_hash(seen)) as server:
        texts = [str(i) for i in range(30)]
        endpoint = spec(server, concurrency=16)
        replies, totals = run([endpoint], tmp_path, lambda d: ask_all(d, texts), max_requests=limit)
        assert len(server.seen) == totals.requests == limit
        assert sum(isinstance(r, BudgetSpent) for r in replies) == 30 - totals.replies
        # the same command with the same budget sends nothing more; a larger one goes on
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
    assert server.most_at_once > 4
    assert sum(spent) <= limit and max(heights) <= limit and totals.tokens <= limit
    assert any(isinstance(r, BudgetSpent) for r in replies) and totals.replies > 10
    bound = most_prompt_tokens([{"role": "user", "content": "question 100"}]) + 100
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
    bound = most_prompt_tokens([{"role": "user", "content": "hello"}])
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
    bound = most_prompt_tokens([{"role": "user", "content": "0"}]) + 50
    assert totals.beyond_bound == 1010 - bound  # the first one; after it the bound is as large as what it takes
    assert totals.tokens <= 3_500 and sum(isinstance(r, Reply) for r in replies) == 3


def test_no_tokenizer_makes_more_tokens_than_the_bound():
    from tests.conftest import TEXT

    assert most_prompt_tokens([{"role": "user", "content": "äß漢"}]) == 128 + 16 + 7
    assert most_prompt_tokens([{"role": "user", "content": "\ud83d"}]) == 128 + 16 + 3
    assert most_prompt_tokens([{"role": "user", "content": TEXT[0]}] * 2) == 128 + 2 * (16 + len(TEXT[0]))


def test_dollars_are_counted_by_the_prices_of_the_time(tmp_path):
    with ChatServer(lambda seen: ok("x", usage={"prompt_tokens": 1000, "completion_tokens": 200})) as server:
        _, totals = one(server, tmp_path, "a", input_price=3.0, output_price=15.0, max_tokens=300)
        assert totals.dollars == pytest.approx(0.006)
        _, totals = one(server, tmp_path, "b", input_price=30.0, output_price=0.0, max_tokens=300)
    assert totals.dollars == pytest.approx(0.006 + 0.03)
    assert totals.as_dict()["dollars"] == pytest.approx(0.036)


@pytest.mark.parametrize("limits", [{"max_requests": 0}, {"max_tokens": -5}])
def test_a_budget_that_lets_nothing_through_is_refused(tmp_path, limits):
    with ChatServer() as server, pytest.raises(UserError, match="lets nothing be asked"):
        one(server, tmp_path, desk=limits)


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


def test_who_was_turned_away_does_not_come_back_all_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = Pace(4, None, 0.4)
    assert pace.delay() == 0
    pace.leave()
    assert pace.delay() == 0  # no space between requests so far
    for _ in range(4):  # all four are turned away: it is one event
        pace.pause(5.0)
    assert pace.delay() == 5
    now[0] += 5
    pace.leave()
    assert pace.delay() == pytest.approx(0.1)  # 0.4 / 4
    pace.pause(5.0)
    now[0] += 5
    pace.leave()
    assert pace.delay() == pytest.approx(0.2)
    for _ in range(40):
        pace.answered()
    now[0] += 1
    pace.leave()
    assert pace.delay() == 0


def test_endpoints_have_a_pace_of_their_own(tmp_path):
    with ChatServer(lambda seen: ok("slow", sleep=1.5)) as slow, ChatServer() as quick:
        specs = [spec(slow, name="slow", concurrency=1), spec(quick, name="quick", concurrency=1)]

        async def work(desk):
            turns = ({"role": "user", "content": "x"},)
            waiting = asyncio.gather(*(desk.ask(Request(f"s{i}", "slow", turns)) for i in range(1)))
            started = time.monotonic()
            await asyncio.gather(*(desk.ask(Request(f"q{i}", "quick", turns)) for i in range(5)))
            took = time.monotonic() - started
            await waiting
            return took

        took, totals = run(specs, tmp_path, work)
    assert took < 1.5 and totals.replies == 6
