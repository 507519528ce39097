"""Every request and reply of a job, in one sqlite3 file, so that no answered request is sent twice.

A request is known by ``digest``, a hash of its key (which holds the number of the draw), its endpoint, the model and
everything that is sent. A row is committed as ``sent`` before the request leaves, and becomes ``replied`` or ``failed``
afterwards; a row that is still ``sent`` when the file is opened belongs to a process that died, and becomes ``lost``.
API keys and HTTP headers are never recorded.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError

NAME = "requests.sqlite"
JOURNAL = "journal.jsonl"  # written by earlier versions; imported when the log is created
SPARE = ".journal.spare"  # space that earlier versions reserved; left behind by a killed job
SCHEMA = """
CREATE TABLE requests (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,
    key TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    state TEXT NOT NULL,              -- sent, replied, failed, lost
    bound INTEGER NOT NULL,           -- tokens of prompt and reply, at most
    tokens INTEGER NOT NULL,          -- replied: counted; sent, lost: the bound; failed: the bound or 0
    dollars REAL NOT NULL,
    text TEXT,
    finish_reason TEXT,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    counted INTEGER,                  -- whether the server counted the tokens
    reason TEXT,
    detail TEXT,
    reached INTEGER NOT NULL DEFAULT 1,    -- whether the request reached a server
    given_up INTEGER NOT NULL DEFAULT 0    -- whether no further try followed
);
CREATE INDEX by_digest ON requests (digest);
"""


@dataclass(frozen=True)
class Reply:
    """A model's answer: its text, why it ended ("stop", "length"), and its tokens as the server counted them."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Totals:
    """What a job has spent so far, over all its starts.

    Attributes:
        requests: sent; every try counts, those in flight too.
        prompt_tokens, completion_tokens: of the replies, as the servers counted them (see ``uncounted``).
        lost_tokens, lost_dollars: upper bound of what was paid for without a reply (timeouts, broken replies, a kill).
        held: tokens reserved for the requests in flight.
        uncounted: replies whose server counted no tokens; their upper bound is used.
        beyond_bound: tokens that servers counted above the bound (servers that ignore ``max_tokens``).
        unanswered: requests in flight when a process died.
        failed_tries: failed tries by reason.
        given_up: request → reason why it has no reply.
        from_log: replies of this start that the log held.
        asked_again: questions of this start that were repeated because the reply could not be parsed.
    """

    requests: int = 0
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lost_tokens: int = 0
    dollars: float = 0.0
    lost_dollars: float = 0.0
    held: int = 0
    uncounted: int = 0
    beyond_bound: int = 0
    unanswered: int = 0
    failed_tries: Counter[str] = field(default_factory=Counter)
    given_up: dict[str, str] = field(default_factory=dict)
    from_log: int = 0
    asked_again: int = 0

    @property
    def tokens(self) -> int:
        """Tokens spent or reserved, which the budget limits."""
        return self.prompt_tokens + self.completion_tokens + self.lost_tokens + self.held

    @property
    def failures(self) -> dict[str, int]:
        return dict(Counter(self.given_up.values()).most_common())

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
            "replies_without_usage": self.uncounted,
            "tokens_beyond_the_bound": self.beyond_bound,
            "sent_and_never_answered": self.unanswered,
            "asked_again": self.asked_again,
            "failed_tries": dict(self.failed_tries.most_common()),
            "failures": self.failures,
        }

    def add(self, row: dict[str, Any]) -> None:
        """Count a row of the log."""
        self.requests += row["reached"]
        if row["state"] == "replied":
            self.replies += 1
            self.prompt_tokens += row["prompt_tokens"]
            self.completion_tokens += row["completion_tokens"]
            self.dollars += row["dollars"]
            self.uncounted += not row["counted"]
            self.beyond_bound += max(0, row["tokens"] - row["bound"])
            self.given_up.pop(row["digest"], None)
            return
        self.lost_tokens += row["tokens"]
        self.lost_dollars += row["dollars"]
        if row["state"] == "lost":
            self.unanswered += 1
            return
        self.failed_tries[row["reason"]] += 1
        if row["given_up"]:
            self.given_up[row["digest"]] = row["reason"]


class RequestLog:
    """The log of a job's folder, locked by this process until ``close`` (or its end, a SIGKILL included).

    Attributes:
        totals: of all rows.
        answers: endpoint → its replies so far.

    Raises:
        UserError: another process has the folder open, the file is no request log, or the disk fails.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.totals = Totals()
        self.answers: Counter[str] = Counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be created: {error.strerror}.", "Choose another folder.") from None
        with self._errors_named():
            self._db = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            with self._errors_named():
                self._open(folder / JOURNAL)
        except BaseException:
            self._db.close()
            raise

    def _open(self, journal: Path) -> None:
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # held until the connection is closed
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("BEGIN IMMEDIATE")
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'requests'").fetchone() is None:
            for statement in SCHEMA.split(";\n"):
                self._db.execute(statement)
            if journal.is_file():
                self._import(journal)
                journal.with_name(SPARE).unlink(missing_ok=True)
        self._db.execute("UPDATE requests SET state = 'lost' WHERE state = 'sent'")
        self._db.execute("COMMIT")
        for row in self._db.execute("SELECT * FROM requests ORDER BY id"):
            self.totals.add(dict(row))
            self.answers[row["endpoint"]] += row["state"] == "replied"

    def _import(self, journal: Path) -> None:
        """Take over the records of an earlier version's journal.jsonl, whose last line may be incomplete."""
        with journal.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    self._import_record(record)
                except (ValueError, KeyError, TypeError, sqlite3.Error):
                    raise UserError(
                        f"{journal}: line {number} is no record of a job.",
                        "Restore the file, or delete that line (a reply that it held is asked for, and paid, again).",
                    ) from None

    def _import_record(self, record: dict[str, Any]) -> None:
        event = record["event"]
        if event == "sent":
            values = [record[name] for name in ("id", "digest", "key", "endpoint", "tokens", "dollars")]
            self._insert(*values)
        elif event == "reply":
            known = record["counted_by"] == "server"
            reply = Reply(
                record["text"].encode("utf-8", "replace").decode(),
                record["finish_reason"],
                record["prompt_tokens"],
                record["completion_tokens"],
            )
            self._update(record["id"], **_replied(reply, record["dollars"], known))
        elif event == "failed":
            failure = {"reason": record["reason"], "detail": record.get("detail", ""), "reached": record["sent"]}
            spent = {"tokens": record["tokens"], "dollars": record["dollars"], "given_up": record["final"]}
            self._update(record["id"], state="failed", **failure, **spent)
        elif event != "journal":
            raise ValueError(event)

    def reply(self, digest: str) -> Reply | None:
        """The reply to a request, if the log holds it."""
        columns = "text, finish_reason, prompt_tokens, completion_tokens"
        query = f"SELECT {columns} FROM requests WHERE digest = ? AND state = 'replied'"
        row = self._db.execute(query, (digest,)).fetchone()
        return None if row is None else Reply(*row)

    def sent(self, digest: str, key: str, endpoint: str, bound: int, dollars: float) -> int:
        """Record a request that is about to leave; on the disk when this returns. Returns the row's number."""
        with self._errors_named():
            number = self._insert(None, digest, key, endpoint, bound, dollars)
        self.totals.requests += 1
        self.totals.held += bound
        return number

    def replied(self, number: int, reply: Reply, dollars: float, counted: bool) -> None:
        """Record a reply; on the disk when this returns."""
        self._end(number, **_replied(reply, dollars, counted))

    def failed(self, number: int, reason: str, detail: str, *, charged: bool, reached: bool) -> None:
        """Record a failed try.

        Args:
            charged: whether its tokens may have been paid for; the bound counts as spent then.
            reached: whether a server got the request; if not, it counts as no request.
        """
        spent = {} if charged else {"tokens": 0, "dollars": 0.0}
        self._end(number, state="failed", reason=reason, detail=detail, reached=reached, **spent)

    def give_up(self, number: int) -> None:
        """Record that no further try follows a failed one."""
        with self._errors_named():
            self._update(number, given_up=True)
        digest, reason = self._db.execute("SELECT digest, reason FROM requests WHERE id = ?", (number,)).fetchone()
        self.totals.given_up[digest] = reason

    def close(self) -> None:
        """Release the folder."""
        self._db.close()

    def _end(self, number: int, **values: Any) -> None:
        with self._errors_named():
            self._update(number, **values)
        row = dict(self._db.execute("SELECT * FROM requests WHERE id = ?", (number,)).fetchone())
        self.totals.requests -= 1  # counted as sent
        self.totals.held -= row["bound"]
        self.totals.add(row)
        self.answers[row["endpoint"]] += row["state"] == "replied"

    def _insert(self, number: int | None, digest: str, key: str, endpoint: str, bound: int, dollars: float) -> int:
        columns = "id, digest, key, endpoint, state, bound, tokens, dollars"
        values = (number, digest, key, endpoint, bound, bound, dollars)
        done = self._db.execute(f"INSERT INTO requests ({columns}) VALUES (?, ?, ?, ?, 'sent', ?, ?, ?)", values)
        assert done.lastrowid is not None
        return done.lastrowid

    def _update(self, number: int, **values: Any) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(f"UPDATE requests SET {columns} WHERE id = ?", (*values.values(), number))

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                message = f"{self.path.parent}: another process is working on it."
                raise UserError(message, "Wait until it has ended, or choose another folder.") from None
            if "not a database" in str(error):
                raise UserError(f"{self.path}: is no request log.", "Choose another folder, or move it away.") from None
            hint = "Free some space or choose another folder; the same command continues the job."
            raise UserError(f"{self.path}: cannot be written: {error}.", hint) from None


def _replied(reply: Reply, dollars: float, counted: bool) -> dict[str, Any]:
    return {
        "state": "replied",
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "counted": counted,
        "tokens": reply.prompt_tokens + reply.completion_tokens,
        "dollars": dollars,
    }
