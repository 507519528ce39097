"""One try at a server that speaks the OpenAI chat API: what is sent, and what each way of failing means."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any
from urllib.parse import urlsplit

import httpx2

from .. import __version__
from ..errors import UserError
from .keys import Key
from .pace import retry_after
from .types import Answer, EndpointSpec, Fault, Question

LONGEST_REPLY = 64 * 2**20  # bytes
LONGEST_COMPLAINT = 300  # letters of a server's text that an error repeats
CONNECT = 10.0  # seconds
MOST_TOKENS = 10**9  # of one request; a count above it is none
# Shorter than what servers grant an idle connection (uvicorn's 5 s), so that none is closed under a request's feet.
KEEP_ALIVE = 2.5
OLLAMA = 11434  # its port
PASSING = {408, 425, 429}
BUSY = {429, 503, 529}  # the last one is not in the standard, and used

# At level DEBUG a server's headers would be logged, and a key that it echoes there.
for _name in ("httpcore2.http11", "httpcore2.http2"):
    logging.getLogger(_name).addFilter(lambda record: not record.getMessage().startswith("receive_response"))


class HttpEndpoint:
    """A server.

    Redirects are not followed: a POST does not survive most of them, and the key must not go elsewhere.
    """

    def __init__(self, spec: EndpointSpec, key: Key | None) -> None:
        assert spec.url is not None
        self.spec, self._key = spec, key
        # what the server has shown to be so
        self._reached = self._answered = self._newer_limit = self._no_seed = False
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE)
        timeout = httpx2.Timeout(spec.timeout, connect=min(CONNECT, spec.timeout))
        try:
            self._client = httpx2.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)
        except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
            # what the error says is not repeated: a proxy's password may stand in it
            raise UserError(
                f"endpoint {spec.name}: the proxy or the certificates that the environment names cannot be used "
                f"({type(error).__name__}).",
                "Look at HTTP_PROXY, HTTPS_PROXY and ALL_PROXY (http:// or https://, no SOCKS; NO_PROXY=localhost leaves this "
                "machine out), SSL_CERT_FILE and SSL_CERT_DIR.",
            ) from None

    def identity(self) -> str:
        """The model. Where it is served is not part of it: a server that moves has not forgotten anything."""
        return f"model {self.spec.model}"

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, question: Question) -> Answer:
        """One try. Raises Fault, and nothing that holds a header."""
        body = {"model": self.spec.model, **question.as_dict(), "stream": False}
        if self._newer_limit:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if self._no_seed:
            body.pop("seed", None)
        try:
            async with asyncio.timeout(self.spec.timeout):  # for all of it: a server may drip
                status, headers, content = await self._post(json.dumps(body).encode())
        except TimeoutError:
            fault = self._no_reply()
        except httpx2.HTTPError as error:
            fault = self._broken(error)
        except BaseException as error:
            # the frames below hold the headers: they end here
            error.__context__ = error.__cause__ = None
            raise error.with_traceback(None) from None
        else:
            self._reached = True
            return self._read(body, status, headers, content)
        raise fault

    async def _post(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {"Content-Type": "application/json", "User-Agent": f"zephyr-lite/{__version__}"}
        request = self._client.build_request(
            "POST", f"{self.spec.url}/chat/completions", content=content, headers=headers
        )
        if self._key is not None:
            request.headers.update(self._key.header())
        response = await self._client.send(request, stream=True)
        try:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > LONGEST_REPLY:
                    raise httpx2.ReadError(f"more than {LONGEST_REPLY:,} bytes")
        finally:
            await response.aclose()
        return response.status_code, {k.lower(): v for k, v in response.headers.items()}, b"".join(parts)

    # What went wrong

    def _no_reply(self) -> Fault:
        return Fault(
            "no reply in time", f"nothing within {self.spec.timeout:g} s", again=True, charged=True, answered=False
        )

    def _broken(self, error: httpx2.HTTPError) -> Fault:
        text = self._clean(str(error))
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            hopeless = UserError(f"endpoint {self.spec.name}: {self.spec.url} cannot be reached: {text}.", self._hint())
            # a server that was there may come back; one that never was is a mistake in the command
            return Fault("cannot be reached", text, again=self._reached, sent=False, answered=False, hopeless=hopeless)
        if isinstance(error, httpx2.TimeoutException):
            return self._no_reply()
        reason = "reply cannot be decoded" if isinstance(error, httpx2.DecodingError) else "connection broken"
        return Fault(reason, text, again=True, charged=True, answered=False)

    def _hint(self) -> str:
        parts = urlsplit(self.spec.url or "")
        if parts.hostname not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
            return "Check the URL and the network."
        if parts.port == OLLAMA:
            return "Is Ollama running? `ollama serve` starts it."
        return f"Is the server running there? (Ollama listens on port {OLLAMA}, llama.cpp on 8080, vLLM on 8000.)"

    def _read(self, asked: dict[str, Any], status: int, headers: dict[str, str], content: bytes) -> Answer:
        text = content.decode("utf-8", "replace")
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            body = None
        inner = _code(body)
        if status == 200 and isinstance(inner, int) and 400 <= inner < 600 and not body.get("choices"):
            status = inner  # a gateway's answer that holds the refusal of the server behind it
        if not 200 <= status < 300:
            raise self._another_way(asked, status, body, text) or self._refusal(status, headers, body, text)
        answer = self._answer(body, text)
        self._answered = True
        return answer

    def _another_way(self, asked: dict[str, Any], status: int, body: Any, text: str) -> Fault | None:
        """A setting that this server does not take, and there is another way to ask."""
        told = self._complaint(body, text)
        if status not in (400, 422):
            return None
        if "max_tokens" in asked and "max_completion_tokens" in told:  # OpenAI's newer models know only that name
            self._newer_limit = True
        elif "seed" in asked and re.search(r"\bseed\b", told):
            self._no_seed = True
        else:
            return None
        return Fault(f"HTTP {status}", told, again=True, other_way=True)

    def _answer(self, body: Any, text: str) -> Answer:
        if body is None:
            raise Fault("reply is not JSON", self._clean(text), again=True, charged=True)
        try:
            choice = body["choices"][0]
            content = choice["message"].get("content")
            if isinstance(content, list):  # parts, as some servers send them
                content = "".join(part.get("text", "") for part in content if part.get("type") == "text")
            if content is None:
                content = choice["message"].get("refusal") or ""
            if not isinstance(content, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            told = self._complaint(body, text)
            raise Fault("reply holds no answer", told, again=True, charged=True) from None
        prompt_tokens, completion_tokens = _usage(body.get("usage"), content)
        reason = choice.get("finish_reason")
        reason = reason if isinstance(reason, str) else "stop"
        if self._key is not None:
            content, reason = self._key.redact(content), self._key.redact(reason)
        return Answer(content, reason, prompt_tokens, completion_tokens)

    def _refusal(self, status: int, headers: dict[str, str], body: Any, text: str) -> Fault:
        told, where = self._complaint(body, text), f"endpoint {self.spec.name}"
        reason = f"HTTP {status}"
        said = f" and says: {told}" if told else ""
        if 300 <= status < 400:
            target = self._clean(headers.get("location", "nowhere"))
            hint = "Give that URL, if it is the right one: keys are not sent on to other places."
            hopeless = UserError(f"{where}: {self.spec.url} redirects to {target}.", hint)
            return Fault(reason, told, again=False, hopeless=hopeless)
        # a server that has answered before refuses this one conversation (moderation)
        if status == 401 or (status == 403 and not self._answered):
            hint = (
                f"The key comes from the environment variable {self.spec.api_key_env}: is it the right one, and for this server?"
                if self._key is not None
                else "It wants a key: put it into an environment variable, and name that in api_key_env."
            )
            hopeless = UserError(f"{where}: the server refuses the key (HTTP {status}){said}.", hint)
            return Fault(reason, told, again=False, hopeless=hopeless)
        if status == 402 or (status == 429 and _code(body) == "insufficient_quota"):
            hopeless = UserError(
                f"{where}: nothing is left to pay with (HTTP {status}){said}.", "The same command goes on later."
            )
            return Fault(reason, told, again=False, hopeless=hopeless)
        if status in (404, 405, 410, 501):
            hint = "Check the model's name and the URL (it usually ends with /v1)."
            if urlsplit(self.spec.url or "").port == OLLAMA:
                hint += f" Ollama fetches a model with `ollama pull {self.spec.model}`."
            what = f"no model {self.spec.model} at {self.spec.url}"
            return Fault(reason, told, again=False, hopeless=UserError(f"{where}: {what} (HTTP {status}){said}.", hint))
        if status < 500 and status not in PASSING:
            return Fault(reason, told, again=False)
        busy = status in BUSY
        # a gateway that gives up (502, 504) or a server that breaks (500) may have generated before
        return Fault(reason, told, again=True, charged=status >= 500 and not busy, wait=retry_after(headers), busy=busy)

    def _complaint(self, body: Any, text: str) -> str:
        error = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail") or error
        if error is not None:
            text = error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)
        return self._clean(text)

    def _clean(self, text: str) -> str:
        text = " ".join(text.split())[: 20 * LONGEST_COMPLAINT]
        if self._key is not None:
            text = self._key.redact_error(text)
        return text if len(text) <= LONGEST_COMPLAINT else text[:LONGEST_COMPLAINT] + "…"


def _code(body: Any) -> Any:
    error = body.get("error") if isinstance(body, dict) else None
    return error.get("code") or error.get("type") if isinstance(error, dict) else None


def _usage(usage: Any, text: str) -> tuple[int | None, int | None]:
    """Tokens as the server counted them, or None where it did not, or cannot have."""
    if not isinstance(usage, dict):
        return None, None
    counted = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    prompt, completion, total = (
        n if isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST_TOKENS else None for n in counted
    )
    if prompt is None or completion is None or prompt == 0 or (completion == 0 and text):
        return None, None
    if total is not None:
        completion = max(completion, total - prompt)  # some count what was thought, and not shown, in the total alone
    return prompt, completion
