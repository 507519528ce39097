"""No answered request is sent twice: the request log through kills, interrupts, a second process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import Act, ChatServer, Seen, by_hash, disconnect, error, hang, not_json, ok
from tests.client.test_client import one, records
from zephyr_lite.client.request_log import KILLED, NAME, RequestLog
from zephyr_lite.errors import UserError

# A job in a process of its own: sends ``count`` requests, and prints the replies in order.
JOB = """
import asyncio, json, sys
from pathlib import Path
from zephyr_lite.client import client
from zephyr_lite.client.client import ModelClient, Request
from zephyr_lite.client.endpoints import EndpointSpec
from zephyr_lite.io.interrupts import pythons_ctrl_c
client.BACK_OFF = 0.01
url, folder, count, settings, limits = *sys.argv[1:3], *map(json.loads, sys.argv[3:])
async def main():
    spec = EndpointSpec(url=url, model="m", max_tokens=50, **settings)
    async with ModelClient([spec], Path(folder), **limits) as client:
        print("open", flush=True)
        asked = [Request(f"k{i}", "m", ({"role": "user", "content": f"q{i}"},), seed=i) for i in range(count)]
        found = await asyncio.gather(*(client.ask(r) for r in asked), return_exceptions=True)
        replies = [getattr(each, "text", type(each).__name__) for each in found]
        print(json.dumps({"replies": replies, "totals": client.totals.as_dict()}), flush=True)
with pythons_ctrl_c():
    asyncio.run(main())
"""


def job(
    server: ChatServer, folder: Path, count: int = 40, limits: dict[str, int] | None = None, **settings: Any
) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", JOB, server.url, str(folder), *map(json.dumps, (count, settings, limits or {}))]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_two_processes_do_not_share_a_folder(tmp_path):
    folder = tmp_path / "job"
    with ChatServer(lambda seen: ok("x", sleep=0.2)) as server:
        process = job(server, folder, count=12, concurrency=1)
        assert process.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process is working on it"):
            one(server, folder)
        process.kill()
        process.communicate()
        reply, _ = one(server, folder)  # the lock went with its holder
        assert reply.text == "x"
        first = RequestLog(folder)  # nor do two clients of one process
        with pytest.raises(UserError, match="another process"):
            RequestLog(folder)
        first.close()


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_waits_for_what_is_paid_for_and_a_second_one_does_not(tmp_path, again):
    slow = 20.0 if again else 0.5
    with ChatServer(lambda seen: ok("x", sleep=slow if seen.number else 0.0)) as server:
        process = job(server, tmp_path, count=40, concurrency=4)
        wait_for(lambda: len(server.seen) == 5)
        process.send_signal(signal.SIGINT)
        if again:
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        assert len(server.seen) == 5  # nothing new has left
        states = sorted(row["state"] for row in records(tmp_path))
        assert states == ["replied", *["sent" if again else "replied"] * 4]
        server.script = by_hash
        _, totals = one(server, tmp_path)
    assert totals.failed_tries == ({KILLED: 4} if again else {})


KILLS = int(os.environ.get("ZEPHYR_LITE_KILLS", "5"))


@pytest.mark.parametrize(("seed", "share", "tokens", "requests"), [(1, 0.3, 10**6, 10**6), (3, 0.1, 3_000, 100)])
def test_a_job_that_is_killed_again_and_again_pays_once_and_keeps_its_budget(tmp_path, seed, share, tokens, requests):
    draws = random.Random(seed)
    spent: list[int] = []

    def script(seen: Seen) -> Act:
        usage = {"prompt_tokens": draws.randrange(20, 120), "completion_tokens": draws.randrange(1, 51)}
        fails = draws.random() < share
        kind = draws.randrange(8)
        if fails and kind < 2:
            return [error(429), error(503, retry_after="0.05")][kind]
        spent.append(sum(usage.values()))  # generated, whether or not it arrives
        if fails:
            acts = [error(500), disconnect(0), disconnect(5), hang(0.4), not_json(), ok("x", usage=None)]
            return acts[kind - 2]
        return ok("x" * draws.randrange(40), usage=usage, sleep=0.03 * draws.random())

    folder = tmp_path / "job"
    with ChatServer(script) as server:
        for session in range(KILLS + 1):
            paid = {row["key"] for row in records(folder, "replied")} if (folder / NAME).exists() else set()
            before = len(server.seen)
            limits = {"max_tokens": tokens, "max_requests": requests}
            process = job(server, folder, 60, limits, concurrency=16, timeout=0.2, retries=4)
            if session < KILLS:
                target = before + draws.randrange(1, 15)
                deadline = time.monotonic() + 3  # of a budget that is spent, nothing more comes
                while len(server.seen) < target and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
                process.kill()
                process.communicate(timeout=60)
            else:
                kinds = finish(process)["replies"]
            time.sleep(0.1)  # requests that had left arrive
            assert not {f"k{seen.question[1:]}" for seen in server.seen[before:]} & paid
            assert sum(spent) <= tokens and len(server.seen) <= requests
    assert tokens <= 5_000 or kinds.count("BudgetSpent") + kinds.count("RequestFailed") < 20
