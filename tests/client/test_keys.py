"""API keys come from the environment, go into one header, and appear nowhere else."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path

import pytest

from tests.chat_server import Act, ChatServer, answer_json, error, ok
from tests.client.test_client import ask_all, run, spec
from zephyr_lite.client.client import Request, RequestFailed
from zephyr_lite.client.endpoints import EndpointSpec, parse_endpoint
from zephyr_lite.client.request_log import Reply
from zephyr_lite.errors import UserError

KEY = "sk-proj-Ab3dEf6hIj9kLm2nOp5qRs8tUv1wXy4z"
PIECE = 8  # letters of it that may not appear in a row


@pytest.fixture(autouse=True)
def key_in_the_environment(monkeypatch):
    monkeypatch.setenv("ZL_TEST_KEY", f" {KEY}\n")  # as `export KEY="$(cat file)"` may leave it


def leaks(text: str) -> bool:
    return any(KEY[i : i + PIECE] in text for i in range(len(KEY) - PIECE + 1))


def shown(error: BaseException) -> str:
    """Everything that a traceback with all variables shows."""
    return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()) + repr(error)


ECHOES = {
    "refused": lambda: error(401, f"Incorrect API key provided: {KEY}. See the manual."),
    "masked": lambda: error(401, f"Incorrect API key provided: {KEY[:7]}**********{KEY[-4:]}. See the manual."),
    "quoted": lambda: error(400, f"header 'Bearer {KEY}' and again {KEY}"),
    "long": lambda: error(500, "x" * 280 + KEY),
    "not JSON": lambda: Act(body=f'{{"key": "{KEY}'.encode()),
    "no answer": lambda: answer_json({"echo": {"authorization": f"Bearer {KEY}"}}),
    "redirect": lambda: Act(307, headers={"Location": f"http://localhost:1/?key={KEY}"}),
    "reply": lambda: ok(f"Your key is {KEY}, is it not?"),
}


@pytest.mark.parametrize("echo", ECHOES)
def test_a_key_that_the_server_echoes_reaches_no_log_no_file_and_no_error(tmp_path, caplog, capfd, echo):
    caplog.set_level(logging.INFO)
    with ChatServer(lambda seen: ECHOES[echo]()) as server:
        endpoint = spec(server, api_key_env="ZL_TEST_KEY", timeout=0.2, retries=1)
        (reply,), totals = run([endpoint], tmp_path, lambda d: ask_all(d, ["hello"]))
    assert KEY in server.seen[0].headers["authorization"]  # otherwise nothing could leak
    if echo == "reply":
        assert isinstance(reply, Reply) and reply.text == "Your key is ***, is it not?"
    else:
        assert isinstance(reply, RequestFailed | UserError), reply
        assert not leaks(shown(reply))
    files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert files and not any(KEY[:PIECE].encode() in path.read_bytes() for path in files)
    assert not leaks(caplog.text) and not leaks("".join(capfd.readouterr()))
    assert not leaks(repr(totals) + json.dumps(totals.as_dict()))


def test_each_server_gets_its_own_key_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("ZL_OTHER_KEY", "another-key-123456")
    with ChatServer() as a, ChatServer() as b, ChatServer() as c:
        specs = [
            spec(a, name="a", api_key_env="ZL_TEST_KEY"),
            spec(b, name="b", api_key_env="ZL_OTHER_KEY"),
            spec(c, name="c"),
        ]

        async def work(client):
            for name in "abc":
                await client.ask(Request("k", name, ({"role": "user", "content": "x"},)))

        run(specs, tmp_path, work)
    sent = [server.seen[0].headers.get("authorization") for server in (a, b, c)]
    assert sent == [f"Bearer {KEY}", "Bearer another-key-123456", "Bearer none"]


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "http://x/v1", "model": "m", "api_key_env": KEY},
        {"url": "http://x/v1", "model": "m", "api_key": KEY},
        {"url": f"http://x/v1?key={KEY}", "model": "m"},
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_repeated(settings):
    with pytest.raises(UserError) as info:
        parse_endpoint(settings)
    assert not leaks(str(info.value))
    with pytest.raises(ValueError) as info:
        EndpointSpec(**settings)
    assert not leaks(str(info.value))
