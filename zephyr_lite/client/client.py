"""Requests to several models: concurrency, rate limits, retries and a budget, around one request log.

A request whose reply the log holds costs nothing. Otherwise it waits for a slot of its endpoint, for the budget and for
the rate limit, is recorded as sent, and leaves; its reply is recorded before it is returned.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError
from .endpoints import EndpointSpec, Message, Question, TryFailed
from .request_log import Reply, RequestLog, Totals

if TYPE_CHECKING:
    from .local_model import LocalModel, Weights
    from .openai_client import OpenAIModel

T = TypeVar("T")
# A tokenizer makes at most one token of a byte. The chat template's own tokens are not known here.
TOKENS_OF_A_TURN = 16
TOKENS_OF_A_TEMPLATE = 128
MAX_BACK_OFF = 60.0  # seconds
MAX_FAILED_IN_A_ROW = 8  # requests of an endpoint; then the job stops
RETRY_TEMPERATURE = 0.5  # at least, where an unparsable reply is asked for again
MAX_SERVER_WAIT = 600.0  # seconds that a server may ask to wait before the job stops instead
GRACE = 20.0  # seconds that requests in flight get when a job is interrupted


@dataclass(frozen=True)
class Request:
    """One question to one endpoint.

    Attributes:
        key: names the question within the job ("completion/PROMPT_ID/2").
        endpoint: the endpoint's name.
        messages: the conversation; the endpoint's ``system`` is put before it unless it begins with a system turn.
        temperature, max_tokens: override the endpoint's.
        seed: for sampling, if the server takes one.
    """

    key: str
    endpoint: str
    messages: tuple[Message, ...]
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


class BudgetSpent(Exception):
    """The next request could exceed the budget, and was not sent."""


class RequestFailed(Exception):
    """One request has no reply: all tries failed, the server refuses it, or no reply could be parsed.

    Attributes:
        reason: the same few words for requests that failed alike ("HTTP 500"), for counting.
    """

    def __init__(self, message: str, reason: str = "failed") -> None:
        super().__init__(message)
        self.reason = reason


class _Endpoint:
    """A model's state within a job."""

    def __init__(self, model: OpenAIModel | LocalModel, answers: int) -> None:
        self.model, self.spec, self.answers = model, model.spec, answers
        # a server's first try is made alone: it shows whether the key, the model and the settings are right
        self.untried = self.spec.url is not None
        self.slots = asyncio.Semaphore(1 if self.untried else self.spec.concurrency)
        self.spacing = 60.0 / self.spec.requests_per_minute if self.spec.requests_per_minute else 0.0
        self.next_at = 0.0  # when the next request may leave, on the monotonic clock
        self.failed_in_a_row = 0
        self.excess = 0  # tokens by which the server's count exceeded the bound so far
        self.fatal: UserError | None = None


class ModelClient:
    """Asks the endpoints of a job; see ``open_client`` for the arguments.

    Attributes:
        totals: what the job has spent, live.
    """

    def __init__(
        self,
        models: Iterable[OpenAIModel | LocalModel],
        log: RequestLog,
        max_requests: int | None,
        max_tokens: int | None,
        on_progress: Callable[[Totals], None],
        back_off: float,
    ) -> None:
        self.totals = log.totals
        self._log, self._max_requests, self._max_tokens = log, max_requests, max_tokens
        self._on_progress, self._back_off = on_progress, back_off
        self._endpoints = {m.spec.name: _Endpoint(m, log.answers[m.spec.name]) for m in models}
        self._in_flight: set[asyncio.Task[Reply]] = set()
        self._budget_spent = ""
        self._failed_before = frozenset(self.totals.given_up)

    async def ask(self, request: Request) -> Reply:
        """The reply to a request.

        Cancelling the caller does not stop a try that has left: it is paid for, and its reply is recorded.

        Raises:
            BudgetSpent: the next try does not fit into the budget.
            RequestFailed: all tries failed, or the server refuses this request.
            UserError: no request to this endpoint can succeed (a wrong key or model, no server), or the disk is full.
        """
        endpoint = self._endpoints[request.endpoint]
        question = _resolve(request, endpoint.spec)
        digest = _digest(request, endpoint.model, question)
        reply = self._log.reply(digest)
        if reply is not None:
            self.totals.from_log += 1
            self._on_progress(self.totals)
            return reply
        async with endpoint.slots:
            failures, answers = 0, endpoint.answers
            while True:
                number = await self._send(endpoint, digest, request.key, question)
                task = asyncio.create_task(self._try(endpoint, number, question))
                self._in_flight.add(task)
                task.add_done_callback(self._ended)
                try:
                    return await asyncio.shield(task)
                except TryFailed as error:
                    if error.busy and endpoint.answers > answers:  # the endpoint answers others
                        failures, answers = 0, endpoint.answers
                    failures += not error.other_settings
                    if not error.retry or failures > endpoint.spec.retries or (error.wait or 0) > MAX_SERVER_WAIT:
                        self._log.give_up(number)
                        raise self._final_error(endpoint, error, failures, digest) from None
                    wait = self._wait(endpoint, error, failures)
                finally:
                    if endpoint.untried:
                        endpoint.untried = False
                        for _ in range(endpoint.spec.concurrency - 1):
                            endpoint.slots.release()
                await asyncio.sleep(wait)

    async def ask_parsed(self, request: Request, parse: Callable[[str], T], tries: int = 3) -> T:
        """Ask until ``parse`` accepts the reply's text.

        A further draw is a request of its own (key + "/again1") with the next seed and a temperature of at least
        ``RETRY_TEMPERATURE``, since a greedy server would repeat itself.

        Args:
            parse: raises ValueError for a text that it cannot parse.

        Raises:
            RequestFailed: no reply of ``tries`` could be parsed; or as ``ask``.
        """
        usual = (
            self._endpoints[request.endpoint].spec.temperature if request.temperature is None else request.temperature
        )
        problem: ValueError | None = None
        for draw in range(tries):
            asked = request
            if draw:
                self.totals.asked_again += 1
                asked = replace(
                    request,
                    key=f"{request.key}/again{draw}",
                    temperature=max(usual, RETRY_TEMPERATURE),
                    seed=None if request.seed is None else request.seed + draw,
                )
            reply = await self.ask(asked)
            try:
                return parse(reply.text)
            except ValueError as error:
                problem = error
        self.totals.given_up[request.key] = "unreadable reply"
        raise RequestFailed(f"{request.key}: no reply of {tries} could be read: {problem}", "unreadable reply")

    async def _send(self, endpoint: _Endpoint, digest: str, key: str, question: Question) -> int:
        """Wait for the budget and the rate limit, record the request as sent, and return its number in the log."""
        while True:
            if endpoint.fatal is not None:
                raise endpoint.fatal
            prompt = prompt_token_bound(question.messages) + endpoint.excess
            bound = prompt + question.max_tokens
            problem = self._budget_spent or self._over_budget(bound)
            if problem and (self._budget_spent or not self._in_flight):
                self._budget_spent = problem
                raise BudgetSpent(problem)
            if problem:  # requests in flight usually take less than their bound
                await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
            elif (delay := endpoint.next_at - time.monotonic()) > 0:
                await asyncio.sleep(delay)
            else:
                break
        endpoint.next_at = time.monotonic() + endpoint.spacing
        dollars = endpoint.spec.dollars(prompt, question.max_tokens)
        number = self._log.sent(digest, key, endpoint.spec.name, bound, dollars)
        self._on_progress(self.totals)
        return number

    async def _try(self, endpoint: _Endpoint, number: int, question: Question) -> Reply:
        try:
            answer = await endpoint.model.ask(question)
        except TryFailed as error:
            self._log.failed(number, error.reason, error.detail, charged=error.charged, reached=error.reached)
            self._on_progress(self.totals)
            raise
        bound = (prompt_token_bound(question.messages), question.max_tokens)
        used, counted = bound, False
        if answer.prompt_tokens is not None and answer.completion_tokens is not None:
            used, counted = (answer.prompt_tokens, answer.completion_tokens), True
            endpoint.excess = max(endpoint.excess, sum(used) - sum(bound))
        # a server may send half of a surrogate pair (a reply cut within an emoji), which UTF-8 cannot encode
        reply = Reply(answer.text.encode("utf-8", "replace").decode(), answer.finish_reason, *used)
        self._log.replied(number, reply, endpoint.spec.dollars(*used), counted)
        endpoint.answers += 1
        endpoint.failed_in_a_row = 0
        self._on_progress(self.totals)
        return reply

    def _ended(self, task: asyncio.Task[Reply]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have been cancelled

    def _wait(self, endpoint: _Endpoint, error: TryFailed, failures: int) -> float:
        """Seconds until the next try; a busy server makes all requests to it wait."""
        wait = min(MAX_BACK_OFF, self._back_off * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)
        if error.wait is not None:
            wait = error.wait + 0.1 * wait
        if error.busy:
            endpoint.next_at = max(endpoint.next_at, time.monotonic() + wait)
        return 0.0 if error.busy or error.other_settings else wait

    def _final_error(self, endpoint: _Endpoint, error: TryFailed, failures: int, digest: str) -> Exception:
        """The error of a request without further tries: UserError if the job has to end, else RequestFailed."""
        name = endpoint.spec.name
        if error.wait is not None and error.wait > MAX_SERVER_WAIT:
            endpoint.fatal = UserError(
                f"endpoint {name}: the server asks to wait {error.wait:,.0f} s ({error}).",
                "Run the same command then: it continues the job.",
            )
        elif error.fatal is not None:
            endpoint.fatal = error.fatal
        elif error.busy:
            endpoint.fatal = UserError(
                f"endpoint {name}: turned away {failures} times in a row ({error}).",
                "Lower `concurrency` or `requests_per_minute`, or wait: the same command continues the job.",
            )
        elif digest not in self._failed_before and (error.retry or not endpoint.answers):
            endpoint.failed_in_a_row += 1
            most = 1 if error.no_reply and not endpoint.answers else MAX_FAILED_IN_A_ROW
            if endpoint.failed_in_a_row >= most:
                endpoint.fatal = UserError(
                    f"endpoint {name}: no answer in {failures} tries, {most} requests in a row ({error}).",
                    "Is the model loaded, and `timeout` long enough? The same command continues the job.",
                )
        tries = "try" if failures == 1 else "tries"
        return endpoint.fatal or RequestFailed(f"{error} ({failures} {tries} at {name})", error.reason)

    def _over_budget(self, tokens: int) -> str:
        """Why a request of at most this many tokens does not fit into the budget; "" if it does."""
        totals = self.totals
        if self._max_requests is not None and totals.requests + 1 > self._max_requests:
            return f"the budget of {self._max_requests:,} requests is spent."
        if self._max_tokens is not None and totals.tokens + tokens > self._max_tokens:
            return (
                f"the next request may take {tokens:,} tokens, and {max(0, self._max_tokens - totals.tokens):,} of the "
                f"budget of {self._max_tokens:,} are left."
            )
        return ""

    async def close(self, grace: float) -> None:
        """Wait up to ``grace`` seconds for the requests in flight, which are paid for; then cancel them."""
        tasks = list(self._in_flight)
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=grace)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for endpoint in self._endpoints.values():
                await endpoint.model.close()


def prompt_token_bound(messages: Iterable[Mapping[str, str]]) -> int:
    """An upper bound of a conversation's tokens for any tokenizer: its UTF-8 bytes, and the template's own tokens."""
    return TOKENS_OF_A_TEMPLATE + sum(
        TOKENS_OF_A_TURN + len(m["content"].encode("utf-8", "surrogatepass")) for m in messages
    )


def seed_of(*parts: object) -> int:
    """A seed below 2³¹ derived from these values."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


@asynccontextmanager
async def open_client(
    specs: Sequence[EndpointSpec],
    folder: Path,
    *,
    weights: Mapping[str, Weights] | None = None,
    max_requests: int | None = None,
    max_tokens: int | None = None,
    on_progress: Callable[[Totals], None] = lambda totals: None,
    back_off: float = 1.0,
    grace: float = GRACE,
) -> AsyncIterator[ModelClient]:
    """The client of a job whose request log is in ``folder``.

    Args:
        specs: endpoints with different names. Endpoints of one folder share one loaded base.
        weights: ``path`` of an endpoint → its weights, where they are open already.
        max_requests, max_tokens: the job's budget over all its starts; None: no limit. Every try counts as a request.
            The upper bound of a request's tokens is reserved while it is in flight.
        on_progress: called with the totals whenever they change.
        back_off: seconds to wait after a first failure; doubled after each further one.
        grace: seconds that requests in flight get when the block is left.

    Raises:
        UserError: a key is not set, or another process works in the folder.
    """
    from .local_model import open_local_models
    from .openai_client import OpenAIModel

    models: list[OpenAIModel | LocalModel] = [OpenAIModel(spec) for spec in specs if spec.url is not None]
    models += open_local_models([spec for spec in specs if spec.path is not None], weights or {})
    log = RequestLog(folder)
    try:
        client = ModelClient(models, log, max_requests, max_tokens, on_progress, back_off)
        try:
            yield client
        finally:
            await client.close(grace)
    finally:
        log.close()


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


def _digest(request: Request, model: OpenAIModel | LocalModel, question: Question) -> str:
    parts: list[Any] = [request.key, request.endpoint, model.identity(), question.as_dict()]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
