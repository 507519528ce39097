"""Every request and reply of a job, in one sqlite3 file, so that no answered request is sent twice.

A request is identified by ``digest``, a hash of its key (which holds the number of the draw), its endpoint, the model and
everything that is sent. A row is committed as ``sent`` before the request leaves, and becomes ``replied`` or ``failed``
afterwards; a row that is still ``sent`` when the file is opened belongs to a killed process, and has failed. API keys and HTTP
headers are never recorded.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError

NAME = "requests.sqlite"
KILLED = "killed before the reply"  # reason of a failed try
OPENING = f"""
PRAGMA locking_mode = EXCLUSIVE;      -- until the connection is closed
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,
    key TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    state TEXT NOT NULL,              -- sent, replied, failed
    bound INTEGER NOT NULL,           -- tokens of prompt and reply, at most
    tokens INTEGER NOT NULL,          -- replied: counted; sent: the bound; failed: the bound or 0
    dollars REAL NOT NULL,
    text TEXT,
    finish_reason TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    reason TEXT,
    detail TEXT
);
CREATE INDEX IF NOT EXISTS by_digest ON requests (digest);
UPDATE requests SET state = 'failed', reason = '{KILLED}' WHERE state = 'sent';
COMMIT;
"""


@dataclass(frozen=True)
class Reply:
    """A model's answer."""

    text: str
    finish_reason: str  # "stop", "length"
    prompt_tokens: int  # upper bounds if the server counts no tokens
    completion_tokens: int


@dataclass
class Totals:
    """What a job has spent so far, over all its starts."""

    requests: int = 0  # sent; every try counts, those in flight too
    replies: int = 0
    prompt_tokens: int = 0  # of the replies
    completion_tokens: int = 0
    lost_tokens: int = 0  # upper bound of what was paid for without a reply (timeouts, broken replies, a kill)
    dollars: float = 0.0
    lost_dollars: float = 0.0
    held: int = 0  # tokens reserved for the requests in flight
    failed_tries: Counter[str] = field(default_factory=Counter)  # by reason
    from_log: int = 0  # in this start: replies that the log held

    @property
    def tokens(self) -> int:
        """Tokens spent or reserved, which the budget limits."""
        return self.prompt_tokens + self.completion_tokens + self.lost_tokens + self.held

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {
            "requests": self.requests,
            "replies": self.replies,
            "replies_from_journal": self.from_log,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "lost_tokens_at_most": self.lost_tokens,
            "dollars": round(self.dollars, 6),
            "lost_dollars_at_most": round(self.lost_dollars, 6),
            "failed_tries": dict(self.failed_tries.most_common()),
        }


class RequestLog:
    """The log of a job's folder, locked by this process until ``close`` (or its end, a SIGKILL included).

    Attributes:
        totals: of all rows.

    Raises:
        UserError: another process has the folder open, the file is no request log, or the disk fails.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.totals = Totals()
        folder.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        with self._errors_named():
            self._db.executescript(OPENING)
            for row in self._db.execute("SELECT * FROM requests ORDER BY id"):
                self.totals.requests += 1
                self._count(row)

    def reply(self, digest: str) -> Reply | None:
        """The reply to a request, if the log holds it."""
        columns = "text, finish_reason, prompt_tokens, completion_tokens"
        query = f"SELECT {columns} FROM requests WHERE digest = ? AND state = 'replied'"
        row = self._db.execute(query, (digest,)).fetchone()
        return None if row is None else Reply(*row)

    def sent(self, digest: str, key: str, endpoint: str, bound: int, dollars: float) -> int:
        """Record a request that is about to leave; on the disk when this returns. Returns the row's number."""
        columns = "digest, key, endpoint, state, bound, tokens, dollars"
        values = (digest, key, endpoint, bound, bound, dollars)
        with self._errors_named():
            done = self._db.execute(f"INSERT INTO requests ({columns}) VALUES (?, ?, ?, 'sent', ?, ?, ?)", values)
        self.totals.requests += 1
        self.totals.held += bound
        assert done.lastrowid is not None
        return done.lastrowid

    def end(self, number: int, **values: Any) -> None:
        """Record a reply or a failure: values of the row's columns; on the disk when this returns."""
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._errors_named():
            self._db.execute(f"UPDATE requests SET {columns} WHERE id = ?", (*values.values(), number))
        row = self._db.execute("SELECT * FROM requests WHERE id = ?", (number,)).fetchone()
        self.totals.held -= row["bound"]
        self._count(row)

    def close(self) -> None:
        """Release the folder."""
        self._db.close()

    def _count(self, row: sqlite3.Row) -> None:
        """Add a request that has ended."""
        totals = self.totals
        if row["state"] == "replied":
            totals.replies += 1
            totals.prompt_tokens += row["prompt_tokens"]
            totals.completion_tokens += row["completion_tokens"]
            totals.dollars += row["dollars"]
        else:
            totals.lost_tokens += row["tokens"]
            totals.lost_dollars += row["dollars"]
            totals.failed_tries[row["reason"]] += 1

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                message = f"{self.path.parent}: another process is working on it."
                raise UserError(message, "Wait until it has ended, or choose another folder.") from None
            hint = "Free some space or choose another folder; the same command continues the job."
            raise UserError(f"{self.path}: cannot be read or written: {error}.", hint) from None
