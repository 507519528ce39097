"""What a job has spent, and what it may: requests, tokens, dollars.

Nothing is sent unless its upper bound still fits: the bound counts as spent from the moment the request leaves, and is
replaced by what the server counted when the reply is there. So the budget holds at every instant, whatever is under
way, and after a kill: the journal's records are the only book that is kept.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from .types import BudgetSpent, EndpointSpec, Message

# A tokenizer makes at most one token of a byte. What a chat template puts around a turn, and around all of them (a
# system prompt of its own, a date), is not seen from here.
TOKENS_OF_A_TURN = 16
TOKENS_OF_A_TEMPLATE = 128


def most_prompt_tokens(messages: Iterable[Message]) -> int:
    """At most how many tokens a conversation has, whatever the tokenizer: its UTF-8 bytes and the template's own."""
    return TOKENS_OF_A_TEMPLATE + sum(
        TOKENS_OF_A_TURN + len(text.encode("utf-8", "surrogatepass")) for m in messages for text in (m["content"],)
    )


def dollars(spec: EndpointSpec, prompt_tokens: int, completion_tokens: int) -> float:
    return (prompt_tokens * spec.input_price + completion_tokens * spec.output_price) / 1e6


@dataclass
class Totals:
    """What a job has spent so far, in this session and in those before it.

    Attributes:
        requests: sent, each try counted, those under way too.
        replies: that came back.
        prompt_tokens, completion_tokens: of the replies, as the servers counted them (see ``uncounted``).
        lost_tokens: at most so many were paid for without a reply (hangs, broken replies, a kill in between).
        dollars: for the replies.
        lost_dollars: for ``lost_tokens``, at most.
        uncounted: replies whose server counted no tokens; the upper bound stands for them.
        beyond_bound: tokens that servers counted above the bound (one that heeds no ``max_tokens``).
        unanswered: requests that a process which died had sent; whether they were paid for is not known.
        failed_tries: tries that failed, by reason.
        failures: requests that were given up, by reason.
        from_journal: replies of this session that were there already.
        asked_again: questions of this session that were put again, for the reply could not be read.
    """

    requests: int = 0
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lost_tokens: int = 0
    dollars: float = 0.0
    lost_dollars: float = 0.0
    uncounted: int = 0
    beyond_bound: int = 0
    unanswered: int = 0
    failed_tries: Counter[str] = field(default_factory=Counter)
    from_journal: int = 0
    asked_again: int = 0
    _under_way: dict[int, tuple[int, float]] = field(default_factory=dict, repr=False)
    _given_up: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """Spent, or held for what is under way: what the budget is compared with."""
        held = sum(tokens for tokens, _ in self._under_way.values())
        return self.prompt_tokens + self.completion_tokens + self.lost_tokens + held

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    @property
    def failures(self) -> dict[str, int]:
        return dict(Counter(self._given_up.values()).most_common())

    def given_up(self) -> frozenset[str]:
        """The questions that have no reply."""
        return frozenset(self._given_up)

    def give_up(self, what: str, reason: str) -> None:
        """A question that will have no reply."""
        self._given_up[what] = reason

    def apply(self, record: dict[str, Any]) -> None:
        """Count a record of the journal."""
        event = record["event"]
        if event == "sent":
            self.requests += 1
            self._under_way[record["id"]] = (record["tokens"], record["dollars"])
        elif event == "reply":
            bound, _ = self._under_way.pop(record["id"], (record["tokens"], 0.0))
            self.beyond_bound += max(0, record["tokens"] - bound)
            self._given_up.pop(record["digest"], None)
            self.replies += 1
            self.prompt_tokens += record["prompt_tokens"]
            self.completion_tokens += record["completion_tokens"]
            self.dollars += record["dollars"]
            self.uncounted += record["counted_by"] != "server"
        elif event == "failed":
            self._under_way.pop(record["id"], None)
            self.requests -= not record["sent"]
            self.lost_tokens += record["tokens"]
            self.lost_dollars += record["dollars"]
            self.failed_tries[record["reason"]] += 1
            if record["final"]:
                self.give_up(record["digest"], record["reason"])

    def lose(self, number: int) -> bool:
        """A request that was sent will have no record of its end: it counts as spent. Whether there was such a one."""
        held = self._under_way.pop(number, None)
        if held is None:
            return False
        self.unanswered += 1
        self.lost_tokens += held[0]
        self.lost_dollars += held[1]
        return True

    def lose_all(self) -> None:
        """What was under way when the process before this one died."""
        for number in list(self._under_way):
            self.lose(number)

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {
            "requests": self.requests,
            "replies": self.replies,
            "replies_from_journal": self.from_journal,
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


class Budget:
    """Lets a request go if it fits.

    Raises:
        UserError: a limit is no positive number.
    """

    def __init__(self, totals: Totals, max_requests: int | None, max_tokens: int | None) -> None:
        for name, value in (("max_requests", max_requests), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} lets nothing be asked.", "Give a positive number, or leave it out.")
        self.totals, self.max_requests, self.max_tokens = totals, max_requests, max_tokens
        self._waiting: list[asyncio.Future[None]] = []

    def fits(self, tokens: int) -> bool:
        """Whether a request of at most so many tokens may be sent; the caller records it before it waits for anything.

        Raises:
            BudgetSpent: it may not, and nothing is under way that could turn out smaller than its bound.
        """
        why = self._too_much(tokens)
        if why is not None and not self.totals.under_way:
            raise BudgetSpent(why)
        return why is None

    async def change(self) -> None:
        """Wait until something has come back."""
        changed = asyncio.get_running_loop().create_future()
        self._waiting.append(changed)
        await changed

    def changed(self) -> None:
        """Something came back."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _too_much(self, tokens: int) -> str | None:
        totals = self.totals
        if self.max_requests is not None and totals.requests + 1 > self.max_requests:
            return f"the budget of {self.max_requests:,} requests is spent."
        if self.max_tokens is not None and totals.tokens + tokens > self.max_tokens:
            return (
                f"the next request may take {tokens:,} tokens, and {max(0, self.max_tokens - totals.tokens):,} of the budget "
                f"of {self.max_tokens:,} are left."
            )
        return None
