"""Everything at once: a server that fails at random, a job that is killed and interrupted, a small budget."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chat_server import Act, ChatServer, Seen, disconnect, error, hang, not_json, ok

JOB = """
import asyncio, json, sys
from zephyr_lite.client.desk import open_desk
from zephyr_lite.client.types import EndpointSpec, Request
url, folder, tokens, requests = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def check(totals):
    assert totals.tokens <= tokens and totals.requests <= requests, totals
async def main():
    settings = {"url": url, "model": "m", "max_tokens": 30, "timeout": 0.2, "retries": 4}
    specs = [EndpointSpec(name=name, concurrency=n, **settings) for name, n in (("a", 16), ("b", 3))]
    limits = {"max_tokens": tokens, "max_requests": requests, "on_progress": check}
    async with open_desk(specs, folder, back_off=0.005, grace=1.0, **limits) as desk:
        asked = [Request(f"k{i}", "ab"[i % 2], ({"role": "user", "content": f"q{i}"},), seed=i) for i in range(60)]
        found = await asyncio.gather(*(desk.ask(r) for r in asked), return_exceptions=True)
        print(json.dumps({"kinds": [type(f).__name__ for f in found], "tokens": desk.totals.tokens}))
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("seed", "share", "tokens", "requests"), [(1, 0.3, 9_000, 100), (2, 0.6, 10**6, 10**6), (3, 0.1, 3_000, 10**6)]
)
def test_nothing_is_paid_twice_and_no_budget_is_exceeded(tmp_path, seed, share, tokens, requests):
    draws = random.Random(seed)
    spent: list[int] = []

    def script(seen: Seen) -> Act:
        prompt, completion = draws.randrange(20, 120), draws.randrange(1, 31)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        fails = draws.random() < share
        kind = draws.randrange(8)
        if fails and kind < 2:
            return [error(429), error(503, retry_after="0.05")][kind]
        spent.append(prompt + completion)  # whatever comes of it: it was generated
        if fails:
            acts = [error(500), disconnect(0), disconnect(5), hang(0.4), not_json(), ok("x", usage=None)]
            return acts[kind - 2]
        return ok("x" * draws.randrange(40), usage=usage, sleep=0.03 * draws.random())

    folder = tmp_path / "job"
    journal = folder / "journal.jsonl"
    with ChatServer(script) as server:
        for session in range(6):
            there = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
            paid = {record["key"] for record in map(json.loads, there) if record["event"] == "reply"}
            before = len(server.seen)
            words = [sys.executable, "-c", JOB, server.url, str(folder), str(tokens), str(requests)]
            process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
            )
            if session < 5:
                time.sleep(0.3 + 0.4 * draws.random())
                process.send_signal(draws.choice([signal.SIGKILL, signal.SIGINT]))
            out, err = process.communicate(timeout=60)
            asked = {f"k{seen.question[1:]}" for seen in server.seen[before:]}
            assert not asked & paid
            assert sum(spent) <= tokens and len(server.seen) <= requests
            assert "AssertionError" not in err and "AssertionError" not in out
            if process.returncode == 0:
                break
        assert process.returncode == 0, err
    kinds = json.loads(out)["kinds"]
    assert set(kinds) <= {"Reply", "BudgetSpent", "RequestFailed"} and kinds.count("Reply") > (
        10 if tokens > 5_000 else 0
    )
