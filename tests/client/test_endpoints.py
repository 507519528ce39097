"""Replies that are parsed, progress, and the forms of an endpoint."""

from __future__ import annotations

import pytest

from tests.chat_server import ChatServer, ok
from tests.client.test_client import ask_all, records, request, run, spec
from zephyr_lite.client.client import RequestFailed
from zephyr_lite.client.endpoints import endpoint_spec, parse_endpoint
from zephyr_lite.errors import UserError

# Parsed


def number(text: str) -> int:
    return int(text)


def test_what_cannot_be_read_is_asked_for_again(tmp_path):
    with ChatServer(lambda seen: ok("a poem") if seen.number < 2 else ok("42")) as server:
        work = lambda d: d.ask_parsed(request("n", seed=3, temperature=0.0), number)  # noqa: E731
        found, totals = run([spec(server)], tmp_path, work)
        assert found == 42 and totals.asked_again == 2 and totals.failures == {}
        assert [r["key"] for r in records(tmp_path, "replied")] == ["key/n", "key/n/again1", "key/n/again2"]
        assert [(s.body["seed"], s.body["temperature"]) for s in server.seen] == [(3, 0.0), (4, 0.5), (5, 0.5)]
        found, totals = run([spec(server)], tmp_path, work)
    assert found == 42 and len(server.seen) == 3 and totals.from_log == 3 and totals.asked_again == 2


def test_what_can_never_be_read_is_counted_and_gone_past(tmp_path):
    with ChatServer(lambda seen: ok("a poem")) as server:

        async def work(desk):
            with pytest.raises(RequestFailed, match=r"no reply of 3 could be read.*poem") as info:
                await desk.ask_parsed(request("n"), number)
            return info.value.reason

        reason, totals = run([spec(server)], tmp_path, work)
    assert reason == "unreadable reply" and totals.failures == {"unreadable reply": 1} and len(server.seen) == 3


# Progress, and the ways in


def test_progress_is_told_at_every_change(tmp_path):
    told = []
    with ChatServer() as server:
        run([spec(server)], tmp_path, lambda d: ask_all(d, list("ab")), on_progress=lambda t: told.append(t.requests))
    assert told[0] == 1 and told[-1] == 2 and told == sorted(told) and len(told) == 4


def test_an_endpoint_in_one_word(tmp_path):
    found = parse_endpoint("http://localhost:11434/v1/#llama3.2:3b,concurrency=2")
    assert (found.url, found.model, found.name) == ("http://localhost:11434/v1", "llama3.2:3b", "llama3.2:3b")
    assert parse_endpoint("https://x.example/v1/chat/completions#org/model").url == "https://x.example/v1"
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    assert parse_endpoint(str(folder)).name == "runs/mine"
    for text, found in (("http://localhost:1/v1", "names no model"), (str(tmp_path / "nothing"), "no such folder")):
        with pytest.raises(UserError, match=found):
            parse_endpoint(text)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"url": "http://x/v1"}, "the model's name"),
        ({"url": "http://x/v1", "path": "y", "model": "m"}, "either url"),
        ({}, "either url"),
        ({"path": "y", "api_key_env": "KEY"}, "takes no api_key_env"),
        ({"url": "ftp://x/v1", "model": "m"}, "url: is not a URL"),
        ({"url": "http://:80/v1", "model": "m"}, "is not a URL"),
        ({"url": "http://x:port/v1", "model": "m"}, "is not a URL"),
        ({"url": "http://x/v1", "model": "m", "concurrency": 0}, "concurrency: "),
        ({"url": "http://x/v1", "model": "m", "modle": "m"}, "modle: "),
    ],
)
def test_what_is_no_endpoint(settings, found):
    with pytest.raises(UserError, match=found):
        endpoint_spec(settings)
