"""Requests to several models: concurrency, rate limits, retries and a budget, around one request log.

A request whose reply the log holds costs nothing. Otherwise it waits for a slot of its endpoint, for the budget and for
the rate limit, is recorded as sent, and leaves; its reply is recorded before it is returned.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError
from .endpoints import EndpointSpec, Message
from .request_log import Reply, RequestLog

if TYPE_CHECKING:
    from .local_model import LocalModel, Weights
    from .openai_client import OpenAIModel

logger = logging.getLogger(__name__)

T = TypeVar("T")
# A tokenizer makes at most one token of a byte. The chat template's own tokens are not known here.
TOKENS_OF_A_TURN = 16
TOKENS_OF_A_TEMPLATE = 128
BACK_OFF, MAX_BACK_OFF = 1.0, 60.0  # seconds to wait after a first failure, doubled after each further one
MAX_FAILED_IN_A_ROW = 8  # requests of an endpoint; then the job stops
RETRY_TEMPERATURE = 0.5  # at least, where an unparsable reply is asked for again
GRACE = 20.0  # seconds that requests in flight, which are paid for, get when a job ends early


@dataclass(frozen=True)
class Request:
    """One question to one endpoint."""

    key: str  # names the question within the job ("completion/PROMPT_ID/2")
    endpoint: str  # its name
    messages: tuple[Message, ...]  # the endpoint's ``system`` is put before a conversation without a system turn
    temperature: float | None = None  # instead of the endpoint's
    max_tokens: int | None = None  # instead of the endpoint's
    seed: int | None = None  # for sampling, if the server takes one

    def body(self, spec: EndpointSpec) -> dict[str, Any]:
        """What is sent: messages, max_tokens, temperature, and top_p and seed if they are set."""
        messages = list(self.messages)
        if spec.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": spec.system})
        body = {
            "messages": messages,
            "max_tokens": spec.max_tokens if self.max_tokens is None else self.max_tokens,
            "temperature": spec.temperature if self.temperature is None else self.temperature,
            "top_p": spec.top_p,
            "seed": self.seed,
        }
        return {key: value for key, value in body.items() if value is not None}


class BudgetSpent(Exception):
    """The next request could exceed the budget, and was not sent."""

    reason = "the budget"  # as ``RequestFailed.reason``


@dataclass(eq=False)
class RequestFailed(Exception):
    """A request has no usable reply: all tries failed, the server refuses it, or the reply cannot be used."""

    reason: str  # the same few words for requests that failed alike ("HTTP 500"), for counting
    detail: str = ""  # the server's message, without keys
    retry: bool = False  # whether another try can help
    charged: bool = False  # whether the tokens may have been paid for
    adapted: bool = False  # a setting that the server does not know is left out from the next try on
    wait: float | None = None  # seconds that the server asks to wait
    hint: str | None = None  # what to do, where the job cannot continue; None: only this request has no reply

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class _Endpoint:
    """A model's state within a job."""

    def __init__(self, model: OpenAIModel | LocalModel) -> None:
        self.model, self.spec = model, model.spec
        self.slots = asyncio.Semaphore(self.spec.concurrency)
        self.next_at = 0.0  # when the next request may leave, on the monotonic clock
        self.answered, self.failed_in_a_row = False, 0
        self.fatal: UserError | None = None


class ModelClient:
    """Asks the endpoints of a job whose request log is in ``folder``; an asynchronous context manager.

    Args:
        specs: endpoints with different names. Endpoints of one folder share one loaded base.
        weights: of some of the endpoints' folders, if they are open already.
        max_requests, max_tokens: the job's budget over all its starts; None: no limit. Every try counts as a request.
            The upper bound of a request's tokens is reserved while it is in flight.

    Attributes:
        totals: what the job has spent, live.

    Raises:
        UserError: a key is not set, or another process works in the folder.
    """

    def __init__(
        self,
        specs: Sequence[EndpointSpec],
        folder: Path,
        *,
        weights: Weights | None = None,
        max_requests: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        from .local_model import open_local_models
        from .openai_client import OpenAIModel

        models: list[OpenAIModel | LocalModel] = [OpenAIModel(spec) for spec in specs if spec.url is not None]
        models += open_local_models([spec for spec in specs if spec.path is not None], weights)
        self._log = RequestLog(folder)
        self._endpoints = {model.spec.name: _Endpoint(model) for model in models}
        self.totals = self._log.totals
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._in_flight: set[asyncio.Task[Reply | RequestFailed]] = set()

    async def __aenter__(self) -> ModelClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        try:
            if self._in_flight:
                count = len(self._in_flight)
                logger.info(f"waiting up to {GRACE:.0f} s for {count} replies in flight (Ctrl-C again: stop at once)")
                await asyncio.wait(self._in_flight, timeout=GRACE)
        finally:
            for task in self._in_flight:
                task.cancel()
            closing = [endpoint.model.close() for endpoint in self._endpoints.values()]
            await asyncio.gather(*self._in_flight, *closing, return_exceptions=True)
            self._log.close()

    async def ask(self, request: Request) -> Reply:
        """The reply to a request.

        Cancelling the caller does not stop a try that has left: it is paid for, and its reply is recorded.

        Raises:
            BudgetSpent: the next try does not fit into the budget.
            RequestFailed: all tries failed, or the server refuses this request.
            UserError: no request to this endpoint can succeed (a wrong key or model, no server), or the disk is full.
        """
        endpoint = self._endpoints[request.endpoint]
        spec, body = endpoint.spec, request.body(endpoint.spec)
        parts = [request.key, spec.name, endpoint.model.identity, body]
        digest = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
        if (reply := self._log.reply(digest)) is not None:
            endpoint.answered = True
            self.totals.from_log += 1
            return reply
        prompt = prompt_token_bound(body["messages"])
        bound, dollars = prompt + body["max_tokens"], spec.dollars(prompt, body["max_tokens"])
        async with endpoint.slots:
            attempt = 1
            while True:
                await self._wait_for_turn(endpoint, bound)
                number = self._log.sent(digest, request.key, spec.name, bound, dollars)
                task = asyncio.create_task(self._try(endpoint, number, body))
                self._in_flight.add(task)
                task.add_done_callback(self._in_flight.discard)
                outcome = await asyncio.shield(task)
                if isinstance(outcome, Reply):
                    return outcome
                if outcome.adapted:
                    continue
                if not outcome.retry or attempt > spec.retries:
                    raise self._final_error(endpoint, outcome)
                if outcome.wait is not None:  # a busy server makes all requests to it wait
                    endpoint.next_at = max(endpoint.next_at, time.monotonic() + outcome.wait)
                await asyncio.sleep(min(MAX_BACK_OFF, BACK_OFF * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0))
                attempt += 1

    async def ask_parsed(self, request: Request, parse: Callable[[str], T], tries: int = 3) -> T:
        """Ask until ``parse``, which raises ValueError, accepts the reply's text; RequestFailed after ``tries``.

        A further draw is a request of its own (key + "/again1") with the next seed and a temperature of at least
        ``RETRY_TEMPERATURE``, since a greedy server would repeat itself.
        """
        usual = (
            self._endpoints[request.endpoint].spec.temperature if request.temperature is None else request.temperature
        )
        for draw in range(tries):
            asked = request
            if draw:
                seed = None if request.seed is None else request.seed + draw
                warm = max(usual, RETRY_TEMPERATURE)
                asked = replace(request, key=f"{request.key}/again{draw}", temperature=warm, seed=seed)
            reply = await self.ask(asked)
            try:
                return parse(reply.text)
            except ValueError as error:
                failed = RequestFailed("unreadable reply", f"{request.key}: no reply of {tries} could be read: {error}")
        raise failed

    async def _wait_for_turn(self, endpoint: _Endpoint, bound: int) -> None:
        """Wait until a request of at most ``bound`` tokens fits into the budget and the rate limit."""
        while True:
            if endpoint.fatal is not None:
                raise endpoint.fatal
            spent = ""
            if self._max_requests is not None and self.totals.requests >= self._max_requests:
                spent = f"the budget of {self._max_requests:,} requests is spent."
            elif self._max_tokens is not None and self.totals.tokens + bound > self._max_tokens:
                spent = f"the budget of {self._max_tokens:,} tokens has no room for a request of up to {bound:,}."
            if spent and not self._in_flight:
                raise BudgetSpent(spent)
            now = time.monotonic()
            if spent:  # requests in flight usually take less than their bound
                await asyncio.wait(self._in_flight, return_when=asyncio.FIRST_COMPLETED)
            elif now < endpoint.next_at:
                await asyncio.sleep(endpoint.next_at - now)
            else:
                per_minute = endpoint.spec.requests_per_minute
                endpoint.next_at = now + (60.0 / per_minute if per_minute else 0.0)
                return

    async def _try(self, endpoint: _Endpoint, number: int, body: dict[str, Any]) -> Reply | RequestFailed:
        """Send a request once, and record what comes back."""
        try:
            reply = await endpoint.model.ask(body)
        except RequestFailed as error:
            spent = {} if error.charged else {"tokens": 0, "dollars": 0.0}  # else the bounds count as spent
            self._log.end(number, state="failed", reason=error.reason, detail=error.detail, **spent)
            return error.with_traceback(None)  # whose variables hold the server's words, which may repeat the key
        dollars = endpoint.spec.dollars(reply.prompt_tokens, reply.completion_tokens)
        tokens = reply.prompt_tokens + reply.completion_tokens
        self._log.end(number, state="replied", tokens=tokens, dollars=dollars, **asdict(reply))
        endpoint.answered, endpoint.failed_in_a_row = True, 0
        return reply

    def _final_error(self, endpoint: _Endpoint, error: RequestFailed) -> Exception:
        """The error of a request without a reply: UserError if the job has to end, else RequestFailed."""
        where = f"endpoint {endpoint.spec.name}"
        if error.hint is not None:
            endpoint.fatal = UserError(f"{where}: {str(error).rstrip('.')}.", error.hint)
        elif error.charged or not endpoint.answered:  # else a working server refuses this conversation
            endpoint.failed_in_a_row += 1
            if endpoint.failed_in_a_row >= MAX_FAILED_IN_A_ROW:
                endpoint.fatal = UserError(
                    f"{where}: no reply, {MAX_FAILED_IN_A_ROW} requests in a row ({error}).",
                    "Is the model loaded, and `timeout` long enough? The same command continues the job.",
                )
        return endpoint.fatal or error


def prompt_token_bound(messages: Iterable[Mapping[str, str]]) -> int:
    """An upper bound of a conversation's tokens for any tokenizer: its UTF-8 bytes, and the template's own tokens."""
    return TOKENS_OF_A_TEMPLATE + sum(
        TOKENS_OF_A_TURN + len(m["content"].encode("utf-8", "surrogatepass")) for m in messages
    )


def seed_of(*parts: object) -> int:
    """A seed below 2³¹ derived from these values."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
