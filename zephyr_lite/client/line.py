"""An endpoint as the desk sees it: those who wait for it, what it has shown, and what a failed try means for the next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..errors import UserError
from .budget import dollars, most_prompt_tokens
from .journal import Record
from .pace import Pace
from .types import Answer, Endpoint, Fault, Question, RequestFailed

# Requests in a row that an endpoint fails before the job stops: a server that is down would otherwise eat every prompt.
FAILURES_IN_A_ROW = 8


class Patience:
    """One request's: how many tries have failed.

    Being turned away (429, 503) says nothing of the request, and is counted apart: only what happens in a row, while
    nobody else is answered either.
    """

    def __init__(self) -> None:
        self._failed = self._turned_away = self._answers = 0

    def strike(self, fault: Fault, line: Line) -> int:
        """A try has failed; which one of its kind it was."""
        if not fault.busy:
            self._failed += 1
            return self._failed
        self._turned_away = 1 if line.answers > self._answers else self._turned_away + 1
        self._answers = line.answers
        return self._turned_away


class Line:
    """An endpoint, and those who wait for it.

    Attributes:
        answers: how many it has given, in sessions before this one too.
        hopeless: why nothing more can be asked of it.
    """

    def __init__(self, endpoint: Endpoint, back_off: float) -> None:
        self.endpoint, self.spec = endpoint, endpoint.spec
        self.pace = Pace(self.spec.concurrency, self.spec.requests_per_minute, back_off)
        self.answers = 0
        self.hopeless: UserError | None = None
        # the first try is made alone: a wrong key is not tried by everybody at once (a local model has none)
        self._first = asyncio.Lock()
        self._tried = self.spec.path is not None
        self._failed_in_a_row = 0
        self._excess = 0  # tokens by which the server's count was above the bound

    @asynccontextmanager
    async def way(self) -> AsyncIterator[None]:
        """The way to the endpoint: one at a time until the first has been there."""
        if not self._tried:
            async with self._first:
                if not self._tried:
                    try:
                        yield
                    finally:
                        self._tried = True
                    return
        yield

    def check(self) -> None:
        if self.hopeless is not None:
            raise UserError(self.hopeless.message, self.hopeless.hint)

    def bound(self, question: Question) -> tuple[int, int]:
        """At most so many tokens: of the prompt, of the reply."""
        return most_prompt_tokens(question.messages) + self._excess, question.max_tokens

    def judge(
        self, fault: Fault, strikes: int, longest_wait: float, failed_before: bool
    ) -> UserError | RequestFailed | None:
        """What ends the request, or None where another try may help.

        Args:
            strikes: tries that failed in this way, this one among them (``Patience``).
            failed_before: the request was given up in an earlier session: it says nothing new about the endpoint, and
                a job that goes on would otherwise stumble over the same ones each time.
        """
        name, given_up = self.spec.name, strikes > self.spec.retries
        if fault.wait is not None and fault.wait > longest_wait:
            self.hopeless = UserError(
                f"endpoint {name}: the server asks to wait {fault.wait:,.0f} s ({fault}).",
                "Come back then: the same command goes on, and asks nothing twice.",
            )
        elif fault.hopeless is not None and (not fault.again or given_up):
            self.hopeless = fault.hopeless
        elif fault.other_way or (fault.again and not given_up):
            return None
        elif fault.busy:  # which is never about this one request
            self.hopeless = UserError(
                f"endpoint {name}: turned away {strikes} times, and answered nobody in between ({fault}).",
                "Ask less at once (`concurrency`, `requests_per_minute`), or later: the same command goes on.",
            )
        elif fault.again and not fault.answered and not self.answers:
            self.hopeless = UserError(
                f"endpoint {name}: no answer in {strikes} tries ({fault}).",
                "Is the model there and loaded? A larger `timeout` waits longer.",
            )
        elif not failed_before and (fault.again or not self.answers):  # else it refuses this conversation
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= FAILURES_IN_A_ROW:
                self.hopeless = UserError(
                    f"endpoint {name}: the last {FAILURES_IN_A_ROW} requests all failed; this one with {fault}.",
                    "What is there stays; when the endpoint is well again, the same command goes on.",
                )
        if self.hopeless is not None:
            return UserError(self.hopeless.message, self.hopeless.hint)
        return RequestFailed(f"{fault} ({strikes} {'try' if strikes == 1 else 'tries'} at {name})", fault.reason)

    async def wait(self, fault: Fault, strikes: int) -> None:
        """Before the next try."""
        if fault.other_way:
            return
        wait = self.pace.wait_after(strikes)
        if fault.wait is not None:
            wait = fault.wait + wait * 0.1  # never before the time that it named, and not all at once
        if fault.busy:
            self.pace.pause(wait)
        else:
            await asyncio.sleep(wait)

    def counted(self, answer: Answer, question: Question) -> Record:
        """A reply's record. Where the server counted nothing, the bound stands for it."""
        self.answers += 1
        self.pace.answered()
        self._failed_in_a_row = 0
        prompt, completion = most_prompt_tokens(question.messages), question.max_tokens
        known = answer.prompt_tokens is not None and answer.completion_tokens is not None
        if known:
            used = (answer.prompt_tokens or 0, answer.completion_tokens or 0)
            # a template longer than we allow for, or a server that heeds no max_tokens: the next one is held to it
            self._excess = max(self._excess, sum(used) - prompt - completion)
        else:
            used = (prompt, completion)
        return {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": used[0],
            "completion_tokens": used[1],
            "counted_by": "server" if known else "bound",
            "tokens": sum(used),
            "dollars": dollars(self.spec, *used),
        }
