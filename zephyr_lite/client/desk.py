"""The desk where requests are handed in: journal, budget, pace and tries around the endpoints.

One request: the journal may hold its reply (it costs nothing); else it waits for its endpoint's turn, for room in the
budget, is recorded as sent, and leaves. What comes back is recorded before it is handed on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError
from .budget import Budget, Totals, dollars
from .journal import Journal, Record
from .keys import read_key
from .line import Line, Patience
from .types import BudgetSpent, Endpoint, EndpointSpec, Fault, Question, Reply, Request, RequestFailed

if TYPE_CHECKING:
    from .weights import Weights

T = TypeVar("T")
SAME_ANSWER = 0.5  # at least this temperature, where a reply that could not be read is asked for again


class DeskImpl:
    """See ``types.Desk`` and ``open_desk``.

    Attributes:
        totals: what the job has spent, live.
    """

    def __init__(
        self,
        lines: dict[str, Line],
        journal: Journal,
        budget: Budget,
        on_progress: Callable[[Totals], None] | None,
        longest_wait: float,
    ) -> None:
        self.totals = budget.totals
        self._lines, self._journal, self._budget = lines, journal, budget
        self._on_progress, self._longest_wait = on_progress, longest_wait
        self._tasks: dict[str, asyncio.Task[Reply]] = {}  # by digest: who asks the same gets the same
        self._waiters: dict[str, int] = {}
        self._sending: set[str] = set()  # with a server at this moment
        self._closing = False
        self._last_id = 0
        for record in journal.replay():
            self.totals.apply(record)
            self._last_id = max(self._last_id, record["id"])
            if record["event"] == "reply" and record["endpoint"] in lines:
                lines[record["endpoint"]].answers += 1
        self.totals.lose_all()
        self._failed_before = self.totals.given_up()

    # Asking

    async def ask(self, request: Request) -> Reply:
        """The reply to a request.

        A caller that is cancelled does not stop a request that has left: it is paid for, and its reply is recorded.

        Raises:
            BudgetSpent: the next try does not fit into the budget.
            RequestFailed: all tries failed, or the server refuses this request.
            UserError: no request to this endpoint can succeed (a wrong key or model, no server), or the disk is full.
        """
        line = self._line(request)
        question = _resolve(request, line.spec)
        digest = _digest(request, line.endpoint, question)
        found = self._journal.reply(digest)
        if found is not None:
            self.totals.from_journal += 1
            self._progress()
            return _reply(found)
        if self._closing:
            raise asyncio.CancelledError
        task = self._tasks.get(digest)
        if task is None:
            task = self._tasks[digest] = asyncio.create_task(self._answer(request.key, digest, question, line))
            task.add_done_callback(lambda done: self._forget(digest, done))
        self._waiters[digest] = self._waiters.get(digest, 0) + 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiters[digest] -= 1
            if not self._waiters[digest]:
                del self._waiters[digest]
                if digest not in self._sending and not task.done():
                    task.cancel()
                    self._tasks.pop(digest, None)  # who asks from now on asks anew

    async def ask_parsed(self, request: Request, parse: Callable[[str], T], tries: int = 3) -> T:
        """Ask until ``parse`` takes the text.

        The question is put again as a request of its own (key + "/again1"), with the next seed where it has one, and
        at a temperature that is not 0: a server that answers the same each time would only repeat itself.

        Raises:
            RequestFailed: no reply in ``tries`` could be read; or as ``ask``, whose errors these are too.
        """
        last: ValueError | None = None
        for again in range(max(1, tries)):
            asked = request if not again else self._another(request, again)
            if again:
                self.totals.asked_again += 1
            reply = await self.ask(asked)
            try:
                return parse(reply.text)
            except ValueError as error:
                last = error
        self.totals.give_up(request.key, "unreadable reply")
        self._progress()
        raise RequestFailed(f"{request.key}: no reply in {tries} could be read: {last}", "unreadable reply")

    def _another(self, request: Request, again: int) -> Request:
        usual = self._line(request).spec.temperature if request.temperature is None else request.temperature
        return Request(
            key=f"{request.key}/again{again}",
            endpoint=request.endpoint,
            messages=request.messages,
            temperature=max(usual, SAME_ANSWER),
            max_tokens=request.max_tokens,
            seed=None if request.seed is None else request.seed + again,
        )

    def most_tokens(self, request: Request) -> tuple[int, int]:
        """At most how many tokens one try of a request takes: of the prompt, of the reply."""
        line = self._line(request)
        return line.bound(_resolve(request, line.spec))

    def _line(self, request: Request) -> Line:
        if request.endpoint not in self._lines:
            raise KeyError(f"{request.endpoint}: no such endpoint (there are {', '.join(self._lines)})")
        return self._lines[request.endpoint]

    def _forget(self, digest: str, task: asyncio.Task[Reply]) -> None:
        if self._tasks.get(digest) is task:
            del self._tasks[digest]
        if not task.cancelled():
            task.exception()  # retrieved, whether or not somebody still waits

    # One request

    async def _answer(self, key: str, digest: str, question: Question, line: Line) -> Reply:
        async with line.pace.slots:
            patience = Patience()
            while True:
                async with line.way():
                    outcome = await self._try(key, digest, question, line, patience)
                if isinstance(outcome, Reply):
                    return outcome
                fault, strikes = outcome
                if self._closing or digest not in self._waiters:
                    raise asyncio.CancelledError
                await line.wait(fault, strikes)

    async def _try(
        self, key: str, digest: str, question: Question, line: Line, patience: Patience
    ) -> Reply | tuple[Fault, int]:
        """Raises what ends the request; returns a fault after which it is tried again, and its number."""
        prompt, completion = await self._leave(question, line)
        self._last_id += 1
        head: Record = {"id": self._last_id, "digest": digest, "key": key, "endpoint": line.spec.name}
        most = {"tokens": prompt + completion, "dollars": dollars(line.spec, prompt, completion)}
        self._sending.add(digest)
        try:
            await self._record({"event": "sent", **head, **most})
            answer = await line.endpoint.ask(question)
        except Fault as fault:
            strikes, final = patience.strike(fault, line), None
            if not self._closing:
                final = line.judge(fault, strikes, self._longest_wait, digest in self._failed_before)
            nothing = {"tokens": 0, "dollars": 0.0}
            told = {"reason": fault.reason, "detail": fault.detail, "sent": fault.sent, "final": final is not None}
            await self._record({"event": "failed", **head, **told, **(most if fault.charged else nothing)})
            if final is not None:
                if isinstance(final, RequestFailed):
                    raise RequestFailed(f"{key}: {final}", final.reason) from None
                raise final from None
            return fault, strikes
        else:
            record = {"event": "reply", **head, **line.counted(answer, question)}
            await self._record(record)
            return _reply(record)
        finally:
            self._sending.discard(digest)
            if self.totals.lose(head["id"]):  # cancelled, or the disk is full: nobody knows what became of it
                self._budget.changed()

    async def _leave(self, question: Question, line: Line) -> tuple[int, int]:
        """Wait until a request may leave, and how many tokens it may take then. Nothing comes between this and the
        record that it was sent."""
        while True:
            line.check()
            bound = line.bound(question)
            if not self._budget.fits(sum(bound)):
                await self._budget.change()
            elif (delay := line.pace.delay()) > 0:
                await asyncio.sleep(delay)
            else:
                line.pace.leave()
                return bound

    # The book

    async def _record(self, record: Record) -> None:
        self.totals.apply(record)
        if record["event"] != "sent":
            self._budget.changed()
        try:
            await self._journal.append(record)
        finally:
            self._progress()

    def _progress(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.totals)

    async def _close(self, grace: float) -> None:
        """Let what has left come back, for so long; what has not left stays."""
        self._closing = True
        tasks = dict(self._tasks)
        for digest, task in tasks.items():
            if digest not in self._sending:
                task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks.values(), timeout=grace)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            for line in self._lines.values():
                await line.endpoint.close()
            await self._journal.drain()


def _resolve(request: Request, spec: EndpointSpec) -> Question:
    messages = tuple({"role": m["role"], "content": m["content"]} for m in request.messages)
    if spec.system is not None and (not messages or messages[0]["role"] != "system"):
        messages = ({"role": "system", "content": spec.system}, *messages)
    return Question(
        messages=messages,
        max_tokens=spec.max_tokens if request.max_tokens is None else request.max_tokens,
        temperature=spec.temperature if request.temperature is None else request.temperature,
        top_p=spec.top_p,
        seed=request.seed,
    )


def _digest(request: Request, endpoint: Endpoint, question: Question) -> str:
    told: list[Any] = [request.key, request.endpoint, endpoint.identity(), question.as_dict()]
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()


def _reply(record: Record) -> Reply:
    return Reply(record["text"], record["finish_reason"], record["prompt_tokens"], record["completion_tokens"])


@asynccontextmanager
async def open_desk(
    specs: Sequence[EndpointSpec],
    folder: str | Path,
    *,
    weights: Mapping[str, Weights] | None = None,
    max_requests: int | None = None,
    max_tokens: int | None = None,
    on_progress: Callable[[Totals], None] | None = None,
    back_off: float = 1.0,
    longest_wait: float = 600.0,
    grace: float = 20.0,
) -> AsyncIterator[DeskImpl]:
    """The desk of a job, whose journal lies in ``folder`` (made where it is not there).

    Args:
        specs: the endpoints, with different names. Those of one folder share one loaded base.
        weights: ``path`` of an endpoint → what it holds, where that is known already (a stage that was chosen,
            explicit adapters); other folders are opened as they are.
        max_requests, max_tokens: of the whole job, those sent before a resume among them; None: no limit. Every try
            counts as a request. Of tokens, what a request can take at most must be left when it is sent; only a
            server that heeds no ``max_tokens`` can go beyond, and ``totals.beyond_bound`` says so.
        on_progress: is told the totals whenever they change.
        back_off: seconds to wait after the first failure.
        longest_wait: seconds that a server may ask to wait before the job stops instead.
        grace: seconds that requests which have left (they are paid for) get to come back when the block is left.

    Raises:
        UserError: two endpoints of one name, a key that is not set, a folder that another process works in, a damaged
            journal.
    """
    names = [spec.name for spec in specs]
    if not names:
        raise UserError("no endpoint is given.", "Name at least one model.")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two endpoints are called {name}.", "Give each a `name` of its own.")
    totals = Totals()
    budget = Budget(totals, max_requests, max_tokens)
    opened: dict[str, Weights] = {}
    lines = {spec.name: Line(_endpoint(spec, dict(weights or {}), opened), back_off) for spec in specs}
    journal = Journal(Path(folder))
    try:
        desk = DeskImpl(lines, journal, budget, on_progress, longest_wait)
        try:
            yield desk
        finally:
            await desk._close(grace)
    finally:
        journal.close()


def _endpoint(spec: EndpointSpec, known: Mapping[str, Weights], opened: dict[str, Weights]) -> Endpoint:
    """
    Args:
        opened: folders of endpoints before this one, by their real place; a new one is added.
    """
    if spec.url is not None:
        from .client import HttpEndpoint  # it needs an HTTP client, a local folder does not

        return HttpEndpoint(spec, read_key(spec))
    from .local import LocalEndpoint, weights_of

    assert spec.path is not None
    if spec.path in known:
        return LocalEndpoint(spec, known[spec.path])
    place = str(Path(spec.path).expanduser().resolve())
    if place not in opened:
        found = weights_of(spec)
        # a run and its last stage are the same models: one base in memory
        opened[place] = next((w for w in [*known.values(), *opened.values()] if w.is_same(found)), found)
    return LocalEndpoint(spec, opened[place])


__all__ = ["BudgetSpent", "DeskImpl", "Totals", "open_desk"]
