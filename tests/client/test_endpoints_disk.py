"""A disk that fills up while requests are under way: their replies are paid for, and still find a place."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

import pytest

from tests.chat_server import ChatServer, Seen, by_hash
from tests.client.test_endpoints import ask_all, records, run, spec
from zephyr_lite.client import journal as journal_module
from zephyr_lite.client.journal import ROOM, SPARE
from zephyr_lite.client.types import Reply
from zephyr_lite.errors import UserError

QUESTIONS = [f"q{number}" for number in range(24)]


def test_replies_that_are_under_way_when_the_disk_is_full_are_kept(tmp_path, monkeypatch):
    write, spare = os.write, tmp_path / SPARE
    seen_sizes = []

    def slow(seen: Seen) -> Any:
        time.sleep(0.05)
        return by_hash(seen)

    def full(handle: int, data: Any) -> int:
        if len(server.seen) >= 6 and spare.exists():  # there is room again when the spare room is given up
            seen_sizes.append(spare.stat().st_size)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    with ChatServer(slow) as server:
        monkeypatch.setattr(journal_module.os, "write", full)
        endpoint = spec(server, concurrency=4)
        replies, totals = run([endpoint], tmp_path, lambda desk: ask_all(desk, QUESTIONS))
        monkeypatch.undo()
        errors = [reply for reply in replies if not isinstance(reply, Reply)]
        assert errors and all(isinstance(e, UserError) and "No space left" in e.message for e in errors)
        assert seen_sizes == [ROOM] and not spare.exists()
        left = len(server.seen)
        assert 6 <= left < len(QUESTIONS)
        assert len(records(tmp_path, "sent")) == len(records(tmp_path, "reply")) == left  # all that left came back
        replies, totals = run([endpoint], tmp_path, lambda desk: ask_all(desk, QUESTIONS))
    assert all(isinstance(reply, Reply) for reply in replies)
    assert len(server.seen) == len(QUESTIONS) == totals.requests and totals.unanswered == 0  # nothing twice


def test_a_disk_without_room_is_named_before_anything_is_sent(tmp_path, monkeypatch):
    def none(path: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal_module, "_hold", none)
    with ChatServer() as server, pytest.raises(UserError, match="No space left") as caught:
        run([spec(server)], tmp_path, lambda desk: ask_all(desk, ["a"]))
    assert "1 MiB" in caught.value.hint and not server.seen
