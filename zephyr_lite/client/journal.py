"""What was sent and what came back, one JSON object a line, only ever appended: so that nothing is paid for twice.

Records (``event``): ``journal`` (the first line), ``sent`` (on the disk before the request leaves), then for the same
``id`` either ``reply`` or ``failed``. A ``sent`` with neither was under way when the process died. Questions are known
by ``digest``, a hash of the request's key and of everything that is sent; keys and headers of HTTP are never recorded.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..errors import UserError

Record = dict[str, Any]
VERSION = 1
NAME = "journal.jsonl"
LOCK = ".journal.lock"
# Room that is held while a job runs, and given up when the disk is full: what is under way then is paid for, and its
# replies must still find a place.
SPARE, ROOM = ".journal.spare", 2**20
_ALL = {"id": int, "digest": str, "key": str, "endpoint": str, "tokens": int, "dollars": (int, float)}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_HINT = "Make room there; the same command goes on."
FIELDS: dict[str, dict[str, Any]] = {
    "journal": {"version": int},
    "sent": _ALL,
    "reply": {
        **_ALL,
        "text": str,
        "finish_reason": str,
        "prompt_tokens": int,
        "completion_tokens": int,
        "counted_by": str,
    },
    "failed": {**_ALL, "reason": str, "sent": bool, "final": bool},
}


class Journal:
    """The journal of a job's folder, held by this process alone until ``close``.

    Replies stay on the disk; what is in memory is where each one lies.

    Raises:
        UserError: another process holds it, it is no journal, or a line of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror}.", "Choose another folder.") from None
        # beside the journal: the lock file is emptied by whoever takes it. The kernel lets go of it at a kill -9.
        self._lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"{folder}: another process is working on it.", "Wait until it has ended, or choose another folder."
            ) from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be locked: {error.strerror}.", "Choose another folder.") from None
        self._file = -1
        self._places: dict[str, int] = {}  # digest of a question -> where its reply begins
        self._size = 0
        self._waiting: list[tuple[Record, asyncio.Future[None]]] = []
        self._under_way: list[tuple[Record, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._batch = b""  # being written
        self._mutex = threading.Lock()
        self._broken: str | None = None
        self._full: str | None = None  # the spare room is in use: replies are recorded, nothing more leaves
        self._spare = folder / SPARE
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
            self._mend()
            _hold(self._spare)
        except OSError as error:
            self.close()
            hint = "Choose another folder."
            if error.errno in _NO_ROOM:
                hint = f"A job wants {ROOM // 2**20} MiB to begin with, and room for what it makes. {_HINT}"
            raise UserError(f"{self.path}: cannot be written: {error.strerror}.", hint) from None
        except BaseException:
            self.close()
            raise

    # Reading

    def replay(self) -> Iterator[Record]:
        """All records from the beginning, in order; call it once, before anything is asked.

        Raises:
            UserError: a line is damaged, or the file is no journal.
        """
        place = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = self._record(line, f"line {number}")
                if number > 1 and record["event"] == "journal":
                    raise self._damaged(f"line {number}")
                if record["event"] == "reply":
                    self._places[record["digest"]] = place
                if number > 1:
                    yield record
                place += len(line)

    def _record(self, line: bytes, where: str) -> Record:
        try:
            record = json.loads(line)
            for name, kinds in FIELDS[record["event"]].items():
                if not isinstance(record[name], kinds):
                    raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._damaged(where) from None
        return record

    def _damaged(self, where: str) -> UserError:
        return UserError(
            f"{self.path}: {where} is no record of a journal, or a damaged one.",
            "Restore the file; or delete that line (a reply that it recorded is then asked for, and paid, again).",
        )

    def reply(self, digest: str) -> Record | None:
        """The reply to a question, where there is one."""
        place = self._places.get(digest)
        if place is None:
            return None
        with self.path.open("rb") as file:
            file.seek(place)
            return self._record(file.readline(), f"the line at byte {place}")

    def _mend(self) -> None:
        """A process that dies while it writes leaves a last line without its end. Nothing followed from that line:
        a request leaves when its ``sent`` is on the disk, and a reply is handed on when it is. It is cut off."""
        first = _line({"event": "journal", "version": VERSION})
        self._size = os.fstat(self._file).st_size
        with self.path.open("rb") as file:
            head = file.readline(2**16)
            if not head.endswith(b"\n"):
                if not first.startswith(head):  # somebody else's file is not touched
                    raise self._damaged("line 1")
                end = 0
            else:
                self._check_head(head)
                end = _end_of_last_line(file, self._size)
        if end < self._size:
            os.ftruncate(self._file, end)
        if not end:
            self._write(first)
            _sync_folder(self.path.parent)
        self._size = os.fstat(self._file).st_size

    def _check_head(self, line: bytes) -> None:
        record = self._record(line, "line 1")
        if record["event"] != "journal":
            raise self._damaged("line 1")
        if record["version"] != VERSION:
            raise UserError(
                f"{self.path}: is of version {record['version']}; this one reads {VERSION}.",
                "Choose another folder, or move that file away.",
            )

    # Writing

    async def append(self, record: Record) -> None:
        """Returns when the record is on the disk. It will be, from the moment of the call, even if nobody waits.

        Records that come while the disk is busy go there together.

        Raises:
            UserError: the disk is full, or fails.
        """
        self._check()
        if self._full is not None and record["event"] == "sent":
            raise UserError(self._full, _HINT)
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((record, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._flush())
        await asyncio.shield(done)

    async def _flush(self) -> None:
        while self._waiting:
            self._under_way, self._waiting = self._waiting, []
            lines = [_line(record) for record, _ in self._under_way]
            self._batch = b"".join(lines)
            try:
                await asyncio.to_thread(self._write_batch)
            except OSError as error:
                self._broken = f"{self.path}: cannot be written: {error.strerror}."
            self._settle(lines)

    def _write_batch(self) -> None:
        """In a thread, or in ``close``, whichever comes first."""
        with self._mutex:
            if self._batch:
                self._write_somehow(self._batch)
                self._batch = b""

    def _write_somehow(self, data: bytes) -> None:
        try:
            self._write(data)
        except OSError as error:
            if self._full is not None or error.errno not in _NO_ROOM:
                raise
            self._full = f"{self.path}: cannot be written: {error.strerror}."
            self._spare.unlink(missing_ok=True)
            self._write(data)

    def _settle(self, lines: list[bytes]) -> None:
        place = self._size
        for (record, done), line in zip(self._under_way, lines):
            if self._broken is None and record["event"] == "reply":
                self._places[record["digest"]] = place
            place += len(line)
            if not done.done():
                if self._broken is None:
                    done.set_result(None)
                else:
                    done.set_exception(self._failure())
                    done.exception()  # retrieved: whoever waits hears of it, and nobody has to
        if self._broken is None:
            self._size = place
        self._under_way = []

    def _write(self, data: bytes) -> None:
        """Append and wait for the disk; on failure the file ends where it ended before."""
        before = os.fstat(self._file).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, before)
            raise

    def _failure(self) -> UserError:
        return UserError(self._broken or "", _HINT)

    def _check(self) -> None:
        if self._broken is not None:
            raise self._failure()

    async def drain(self) -> None:
        """Wait until everything is on the disk."""
        while self._writer is not None and not self._writer.done():
            await asyncio.wait([self._writer])

    def close(self) -> None:
        """Write what still waits, and let others have the folder."""
        try:
            if self._file >= 0 and self._broken is None:
                self._write_batch()
                if self._waiting:
                    self._write_somehow(b"".join(_line(record) for record, _ in self._waiting))
                    self._waiting = []
        finally:
            with self._mutex:
                if self._file >= 0:
                    os.close(self._file)
                self._file, self._batch = -1, b""
            with suppress(OSError):
                self._spare.unlink(missing_ok=True)
            self._lock.release()


def _hold(path: Path) -> None:
    """Take up ``ROOM`` bytes, of noise: some file systems keep no zeros."""
    with path.open("wb") as file:
        file.write(os.urandom(ROOM))
        file.flush()
        os.fsync(file.fileno())


def _end_of_last_line(file: BinaryIO, size: int) -> int:
    """Where the last line that has an end ends."""
    end = size
    while end:
        start = max(0, end - 2**16)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _line(record: Record) -> bytes:
    # half of a surrogate pair, which a server may send, becomes its own JSON escape
    text = json.dumps(record, ensure_ascii=False, separators=(", ", ": "))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _sync_folder(folder: Path) -> None:
    """So that a file made there is there after a power cut, where the system knows how."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
