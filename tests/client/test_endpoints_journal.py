"""Nothing is paid for twice: the journal through kills, torn lines, a full disk, a second process, Ctrl-C."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chat_server import ChatServer, Seen, answer_json, by_hash, error, ok
from tests.client.test_endpoints import ask_all, one, records, request, run, spec
from zephyr_lite.client import journal as journal_module
from zephyr_lite.client.budget import most_prompt_tokens
from zephyr_lite.client.desk import open_desk
from zephyr_lite.client.journal import Journal
from zephyr_lite.client.types import BudgetSpent, Reply
from zephyr_lite.errors import UserError

# A job in a process of its own: asks so many questions, and prints the answers in order.
JOB = """
import asyncio, json, sys
from zephyr_lite.client.desk import open_desk
from zephyr_lite.client.types import EndpointSpec, Request
url, folder, count, concurrency = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
async def main():
    spec = EndpointSpec(url=url, model="m", concurrency=concurrency, max_tokens=50)
    async with open_desk([spec], folder, back_off=0.01, grace=5.0) as desk:
        print("open", flush=True)
        asked = [Request(f"k{i}", "m", ({"role": "user", "content": f"q{i}"},), seed=i) for i in range(count)]
        replies = await asyncio.gather(*(desk.ask(r) for r in asked))
        print(json.dumps({"replies": [r.text for r in replies], "totals": desk.totals.as_dict()}), flush=True)
asyncio.run(main())
"""


def job(server: ChatServer, folder: Path, count: int = 40, concurrency: int = 8) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", JOB, server.url, str(folder), str(count), str(concurrency)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder.parent
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


def slow_hash(seen: Seen) -> Any:
    act = by_hash(seen)
    act.sleep = 0.01 * (1 + seen.number % 5)
    return act


@pytest.mark.parametrize("when", [1, 13, 30])
def test_a_job_killed_in_the_middle_goes_on_and_pays_for_no_reply_twice(tmp_path, when):
    with ChatServer(by_hash) as server:
        whole = finish(job(server, tmp_path / "whole"))
    with ChatServer(slow_hash) as server:
        process = job(server, tmp_path / "killed")
        wait_for(lambda: len(server.seen) >= when)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.1)  # what had left arrives
        text = (tmp_path / "killed" / "journal.jsonl").read_text()
        there = [json.loads(line) for line in text.split("\n")[:-1]]
        replied = {record["digest"]: record["key"] for record in there if record["event"] == "reply"}
        sent = {record["digest"] for record in there if record["event"] == "sent"}
        before = len(server.seen)
        assert len(sent) >= before >= when  # nothing leaves that is not written down
        resumed = finish(job(server, tmp_path / "killed"))
    again = [f"k{seen.question[1:]}" for seen in server.seen[before:]]
    assert not set(again) & set(replied.values()) and len(again) == 40 - len(replied) == len(set(again))
    assert resumed["replies"] == whole["replies"]
    totals = resumed["totals"]
    assert totals["requests"] == len(sent) + len(again) and totals["replies"] == 40
    assert totals["sent_and_never_answered"] == len(sent) - len(replied)
    assert totals["replies_from_journal"] == len(replied)


def test_what_was_under_way_at_a_kill_counts_against_the_budget(tmp_path):
    bound = most_prompt_tokens([{"role": "user", "content": "q0"}]) + 50
    folder = tmp_path / "job"
    with ChatServer(lambda seen: ok("late", sleep=30) if seen.number >= 1 else by_hash(seen)) as server:
        process = job(server, folder, count=6, concurrency=4)
        wait_for(lambda: len(server.seen) == 5)
        process.kill()
        process.communicate()
        server.script = by_hash

        async def nothing(desk):
            return desk.totals.tokens

        tokens, totals = run([spec(server)], folder, nothing)
        assert tokens == 12 + 4 * bound and totals.requests == 5 and totals.unanswered == 4
        limit = tokens + bound + 5
        replies, totals = run(
            [spec(server, concurrency=1)], folder, lambda d: ask_all(d, list("abcdefg")), max_tokens=limit
        )
        assert totals.tokens <= limit and sum(isinstance(r, Reply) for r in replies) == 1
        replies, totals = run([spec(server)], folder, lambda d: ask_all(d, list("hij")), max_requests=7)
    assert totals.requests == 7 and sum(isinstance(r, BudgetSpent) for r in replies) == 2


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
        first = Journal(folder)  # nor do two desks of one process
        with pytest.raises(UserError, match="another process"):
            Journal(folder)
        first.close()


def test_ctrl_c_lets_what_is_paid_for_come_back(tmp_path):
    folder = tmp_path / "job"
    with ChatServer(lambda seen: ok(f"slow {seen.question}", sleep=0.5 if seen.number else 0.0)) as server:
        process = job(server, folder, count=40, concurrency=4)
        wait_for(lambda: len(server.seen) == 5)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert len(server.seen) == 5  # nothing new has left
        assert len(records(folder, "reply")) == 5 and len(records(folder, "sent")) == 5


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    folder = tmp_path / "job"
    with ChatServer(lambda seen: ok("x", sleep=20 if seen.number else 0.0)) as server:
        process = job(server, folder, count=10, concurrency=4)
        wait_for(lambda: len(server.seen) == 5)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        assert time.monotonic() - started < 4
        server.script = by_hash
        _, totals = one(server, folder)
    assert totals.unanswered == 4 and totals.replies == 2


def test_a_caller_that_gives_up_does_not_lose_the_reply(tmp_path):
    with ChatServer(lambda seen: ok("late", sleep=0.3)) as server:

        async def work(desk):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await desk.ask(request("a"))
            return await desk.ask(request("a"))  # the same request, still under way

        reply, totals = run([spec(server)], tmp_path, work)
    assert reply.text == "late" and len(server.seen) == 1 and totals.requests == 1


def test_who_gives_up_while_waiting_is_not_sent(tmp_path):
    with ChatServer(lambda seen: ok("x", sleep=0.2)) as server:

        async def work(desk):
            first = asyncio.create_task(desk.ask(request("a")))
            second = asyncio.create_task(desk.ask(request("b")))
            await asyncio.sleep(0.05)
            second.cancel()
            await first
            await asyncio.sleep(0.1)
            return await desk.ask(request("c"))

        run([spec(server, concurrency=1)], tmp_path, work)
    assert [seen.question for seen in server.seen] == ["a", "c"]


def test_a_block_that_fails_lets_what_has_left_come_back(tmp_path):
    with ChatServer(lambda seen: ok("x", sleep=0.3)) as server:

        async def work(desk):
            task = asyncio.create_task(desk.ask(request("a")))
            await asyncio.sleep(0.1)
            assert not task.done()
            raise RuntimeError("a fault of the caller")

        with pytest.raises(RuntimeError):
            run([spec(server)], tmp_path, work)
        _, totals = one(server, tmp_path, "a")
    assert totals.from_journal == 1 and len(server.seen) == 1


def test_the_grace_has_an_end(tmp_path):
    with ChatServer(lambda seen: ok("x", sleep=20)) as server:

        async def work(desk):
            task = asyncio.create_task(desk.ask(request("a")))
            await asyncio.sleep(0.1)
            assert not task.done()

        started = time.monotonic()
        run([spec(server, timeout=60.0)], tmp_path, work, grace=0.3)
    assert time.monotonic() - started < 3


# The file


def three(folder: Path) -> Path:
    with ChatServer() as server:
        run([spec(server, concurrency=1)], folder, lambda d: ask_all(d, list("abc")))
    return folder / "journal.jsonl"


def resume(folder: Path) -> int:
    """How many of the three are asked again."""
    with ChatServer() as server:
        replies, _ = run([spec(server, concurrency=1)], folder, lambda d: ask_all(d, list("abc")))
        assert all(isinstance(r, Reply) for r in replies)
        return len(server.seen)


def test_what_was_sent_is_written_down_before_it_leaves(tmp_path):
    lines = []

    def script(seen):
        lines.append((tmp_path / "journal.jsonl").read_text().splitlines())
        return by_hash(seen)

    with ChatServer(script) as server:
        one(server, tmp_path)
    assert [json.loads(line)["event"] for line in lines[0]] == ["journal", "sent"]
    assert [r["event"] for r in records(tmp_path)] == ["journal", "sent", "reply"]
    assert set(records(tmp_path, "sent")[0]) == {"event", "id", "digest", "key", "endpoint", "tokens", "dollars"}


@pytest.mark.parametrize("torn", range(1, 200, 33))
def test_a_torn_last_line_is_mended(tmp_path, torn):
    path = three(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-torn])
    assert resume(tmp_path) == 1
    assert len(records(tmp_path, "reply")) == 3 and resume(tmp_path) == 0


def test_zeros_that_a_power_cut_leaves_are_mended(tmp_path):
    path = three(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0" * 5000)
    assert resume(tmp_path) == 0


@pytest.mark.parametrize("head", [b"", b'{"event": "jour'])
def test_a_journal_that_was_hardly_begun(tmp_path, head):
    (tmp_path / "journal.jsonl").write_bytes(head)
    assert resume(tmp_path) == 3 and resume(tmp_path) == 0


@pytest.mark.parametrize(
    "line",
    [b"{torn", b"[]", b'"x"', b"\xff\xfe", b'{"event": "reply"}', b'{"event": "paid", "id": 1}', b"", b"[" * 100_000],
)
def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_touched(tmp_path, line):
    path = three(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[3] = line
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with ChatServer() as server, pytest.raises(UserError, match=r"journal\.jsonl: line 4 ") as info:
        one(server, tmp_path)
    assert "delete that line" in info.value.hint and server.seen == [] and path.read_bytes() == before
    Journal(tmp_path).close()  # it is not held any more


@pytest.mark.parametrize("content", [b'{"a": 1}\n{"b": ', b"my notes", b'{"event": "sent"}\n'])
def test_somebody_elses_file_is_not_touched(tmp_path, content):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with ChatServer() as server, pytest.raises(UserError, match="line 1"):
        one(server, tmp_path)
    assert path.read_bytes() == content


def test_a_journal_of_another_version_is_refused(tmp_path):
    path = three(tmp_path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with ChatServer() as server, pytest.raises(UserError, match="version 2; this one reads 1"):
        one(server, tmp_path)


def test_a_full_disk_is_an_error_and_leaves_whole_lines(tmp_path, monkeypatch):
    write, full = os.write, []

    def some(handle: int, data: Any) -> int:
        if full and len(data) > 1:
            if len(full) == 1:
                full.append(True)
                return write(handle, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    with ChatServer(
        lambda seen: [full.append(True), by_hash(seen)][1] if seen.question == "b" else by_hash(seen)
    ) as server:
        monkeypatch.setattr(journal_module.os, "write", some)
        endpoint = spec(server, concurrency=1)
        replies, _ = run([endpoint], tmp_path, lambda d: ask_all(d, list("abcd")))
        assert isinstance(replies[0], Reply)
        assert all(isinstance(r, UserError) and "No space left" in r.message for r in replies[1:]), replies
        assert len(server.seen) == 2  # nothing leaves that cannot be written down
        monkeypatch.undo()
        replies, totals = run([endpoint], tmp_path, lambda d: ask_all(d, list("abcd")))
    assert all(isinstance(r, Reply) for r in replies) and totals.requests == 5 and totals.unanswered == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with ChatServer() as server, pytest.raises(UserError, match="cannot be"):
        one(server, tmp_path / "file" / "job")


def test_failures_are_written_down_with_what_the_server_said(tmp_path):
    with ChatServer(lambda seen: error(400, "x" * 5000)) as server:
        run([spec(server)], tmp_path, lambda d: ask_all(d, ["a"]))
    (failed,) = records(tmp_path, "failed")
    assert failed["final"] and failed["reason"] == "HTTP 400" and 300 <= len(failed["detail"]) <= 301


def test_a_reply_of_many_lines_and_odd_letters_comes_back_as_it_was(tmp_path):
    text = 'line\nline\r\n\u2028 \0 \x85 ünï 漢 🦊 \ud83d\t"quoted" \\u0041'
    with ChatServer(lambda seen: answer_json({"choices": [{"message": {"content": text}}]})) as server:
        assert one(server, tmp_path)[0].text == text
        assert one(server, tmp_path)[0].text == text
        assert len(server.seen) == 1


def test_many_replies_at_once_are_one_wait_for_the_disk(tmp_path, monkeypatch):
    syncs = []
    fsync = os.fsync
    monkeypatch.setattr(journal_module.os, "fsync", lambda handle: (time.sleep(0.01), syncs.append(1), fsync(handle)))

    async def main() -> None:
        journal = Journal(tmp_path)
        head = {"event": "sent", "digest": "d", "key": "k", "endpoint": "m", "tokens": 1, "dollars": 0.0}
        await asyncio.gather(*(journal.append({**head, "id": i}) for i in range(500)))
        journal.close()

    asyncio.run(main())
    assert len(records(tmp_path, "sent")) == 500 and len(syncs) < 10


def test_an_answer_is_there_after_closing_without_waiting(tmp_path):
    async def main() -> None:
        journal = Journal(tmp_path)
        head = {"event": "sent", "digest": "d", "key": "k", "endpoint": "m", "tokens": 1, "dollars": 0.0}
        tasks = [asyncio.create_task(journal.append({**head, "id": i})) for i in range(3)]
        await asyncio.sleep(0)
        journal.close()
        for task in tasks:
            task.cancel()

    asyncio.run(main())
    assert [r["id"] for r in records(tmp_path, "sent")] == [0, 1, 2]


def test_the_desk_is_usable_after_an_error_of_its_opening(tmp_path):
    async def main() -> None:
        with ChatServer() as server:
            for _ in range(2):
                with pytest.raises(UserError, match="not set"):
                    async with open_desk([spec(server, api_key_env="ZL_NOT_SET")], tmp_path):
                        pass
            async with open_desk([spec(server)], tmp_path) as desk:
                await desk.ask(request("a"))

    asyncio.run(main())
