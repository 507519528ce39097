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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError

NAME = "requests.sqlite"
KILLED = "killed before the reply"  # reason of a failed try
SCHEMA = """
CREATE TABLE requests (
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
CREATE INDEX by_digest ON requests (digest);
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
        answered: the endpoints that have replied in earlier starts.

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
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # held until the connection is closed
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("BEGIN IMMEDIATE")
            if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'requests'").fetchone() is None:
                for statement in SCHEMA.split(";\n"):
                    self._db.execute(statement)
            self._db.execute("UPDATE requests SET state = 'failed', reason = ? WHERE state = 'sent'", (KILLED,))
            self._db.execute("COMMIT")
            rows = self._db.execute("SELECT * FROM requests ORDER BY id").fetchall()
        for row in rows:
            self._count(row)
        self.answered = {row["endpoint"] for row in rows if row["state"] == "replied"}

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

    def replied(self, number: int, reply: Reply, dollars: float) -> None:
        """Record a reply; on the disk when this returns."""
        tokens = reply.prompt_tokens + reply.completion_tokens
        self._end(number, state="replied", tokens=tokens, dollars=dollars, **asdict(reply))

    def failed(self, number: int, reason: str, detail: str, *, charged: bool) -> None:
        """Record a failed try.

        Args:
            charged: whether its tokens may have been paid for; the bound counts as spent then.
        """
        spent = {} if charged else {"tokens": 0, "dollars": 0.0}
        self._end(number, state="failed", reason=reason, detail=detail, **spent)

    def close(self) -> None:
        """Release the folder."""
        self._db.close()

    def _end(self, number: int, **values: Any) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._errors_named():
            self._db.execute(f"UPDATE requests SET {columns} WHERE id = ?", (*values.values(), number))
        row = self._db.execute("SELECT * FROM requests WHERE id = ?", (number,)).fetchone()
        self.totals.requests -= 1  # counted as sent
        self.totals.held -= row["bound"]
        self._count(row)

    def _count(self, row: sqlite3.Row) -> None:
        totals = self.totals
        totals.requests += 1
        if row["state"] == "replied":
            totals.replies += 1
            totals.prompt_tokens += row["prompt_tokens"]
            totals.completion_tokens += row["completion_tokens"]
            totals.dollars += row["dollars"]
            return
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
