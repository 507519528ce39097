"""A model on a server that speaks the OpenAI chat API, through the ``openai`` package."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError
from ..io.redact import remember
from .endpoints import Answer, EndpointSpec, Question, TryFailed

SHOWN_CHARACTERS = 300  # of a server's error message
MAX_COUNT = 10**9  # tokens of one request; a larger count is ignored
SHORT_KEY = 8  # characters; a shorter key is a placeholder ("ollama"), and not removed from replies
OLLAMA_PORT = 11434
BUSY = {429, 503, 529}  # the last one is not in the standard, but used
NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "ProxyError")  # of httpx: nothing was sent


class OpenAIModel:
    """A server's model.

    The package's own retries are off: ``client.py`` repeats failed tries, because each try is recorded and counts
    against the budget before it leaves. Redirects are not followed: the key must not reach another server.

    Raises:
        UserError: the package ``openai`` is missing, the key is not set, or the environment names an unusable proxy or certificate.
    """

    def __init__(self, spec: EndpointSpec) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                f"endpoint {spec.name}: the package openai is not installed.", 'pip install "zephyr-lite[feedback]"'
            ) from None
        self.spec = spec
        self._key = read_key(spec)
        # the user's environment may name OpenAI's organization, which other servers need not know
        names = ["OpenAI-Organization", "OpenAI-Project", *(["Authorization"] if self._key is None else [])]
        self._headers: Any = {name: openai.Omit() for name in names}
        try:
            http_client = openai.DefaultAsyncHttpxClient(follow_redirects=False)
        except Exception as error:  # of httpx or httpx2, ssl, or a missing package
            raise UserError(  # the error's own text may hold a proxy's password
                f"endpoint {spec.name}: the proxy or the certificates that the environment names cannot be used "
                f"({type(error).__name__}).",
                "Check HTTP_PROXY, HTTPS_PROXY and ALL_PROXY (http:// or https://; SOCKS needs the package socksio; "
                "NO_PROXY=localhost excludes this machine), SSL_CERT_FILE and SSL_CERT_DIR.",
            ) from None
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=spec.url,
            timeout=spec.timeout,
            max_retries=0,
            http_client=http_client,
        )
        # learned from the server's answers
        self._reached = self._answered = self._newer_limit = self._no_seed = False

    def identity(self) -> str:
        """The model's name. The server's address is no part of it, so that a server may move."""
        return f"model {self.spec.model}"

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, question: Question) -> Answer:
        """One try.

        Raises:
            TryFailed: with the server's message, without the key.
        """
        import openai

        body: dict[str, Any] = {"model": self.spec.model, **question.as_dict(), "stream": False}
        if self._newer_limit:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if self._no_seed:
            body.pop("seed", None)
        try:
            async with asyncio.timeout(self.spec.timeout):  # httpx limits the time between two bytes only
                done = await self._client.chat.completions.with_raw_response.create(**body, extra_headers=self._headers)
            response = done.http_response
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            raise self._not_answered(error) from None
        except TimeoutError:
            raise self._no_reply() from None
        self._reached = True
        return self._read(body, response.status_code, response.headers, response.text)

    def _no_reply(self) -> TryFailed:
        return TryFailed("no reply in time", f"nothing within {self.spec.timeout:g} s", charged=True, no_reply=True)

    def _not_answered(self, error: Exception) -> TryFailed:
        cause = error.__cause__
        text = self._shown(str(cause or error))
        if type(cause).__name__ in NOT_CONNECTED:
            message = f"endpoint {self.spec.name}: {self.spec.url} cannot be reached: {text}."
            fatal = UserError(message, _hint(self.spec.url or ""))
            # a server that answered before may come back; one that never did is a mistake in the command
            return TryFailed("cannot be reached", text, retry=self._reached, reached=False, no_reply=True, fatal=fatal)
        if "Timeout" in type(cause).__name__:
            return self._no_reply()
        return TryFailed("connection broken", text, charged=True, no_reply=True)

    def _read(self, asked: dict[str, Any], status: int, headers: Mapping[str, str], text: str) -> Answer:
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            body = None
        error = body.get("error") if isinstance(body, dict) else None
        code = error.get("code") or error.get("type") if isinstance(error, dict) else None
        if status == 200 and isinstance(code, int) and 400 <= code < 600 and not body.get("choices"):
            status = code  # a gateway wraps the error of the server behind it into a 200
        message = self._shown(_error_text(body, text))
        if not 200 <= status < 300:
            raise self._other_settings(asked, status, message) or self._refused(status, code, headers, message)
        if body is None:
            raise TryFailed("reply is not JSON", message, charged=True)
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
            raise TryFailed("reply holds no answer", message, charged=True) from None
        self._answered = True
        reason = choice.get("finish_reason")
        counts = _usage(body.get("usage"), content)
        return Answer(self._without_key(content), reason if isinstance(reason, str) else "stop", *counts)

    def _other_settings(self, asked: dict[str, Any], status: int, message: str) -> TryFailed | None:
        """For a server that does not know ``max_tokens`` or ``seed``: the next try goes without it."""
        if status not in (400, 422):
            return None
        if "max_tokens" in asked and "max_completion_tokens" in message:  # OpenAI's newer models
            self._newer_limit = True
        elif "seed" in asked and re.search(r"\bseed\b", message):
            self._no_seed = True
        else:
            return None
        return TryFailed(f"HTTP {status}", message, other_settings=True)

    def _refused(self, status: int, code: Any, headers: Mapping[str, str], message: str) -> TryFailed:
        spec, reason = self.spec, f"HTTP {status}"
        said = f" and says: {message}" if message else ""
        problem = None
        if 300 <= status < 400:
            target = self._shown(headers.get("location", "nowhere"))
            problem = f"{spec.url} redirects to {target}.", "Give that URL, if it is the right one."
        elif status == 401 or (status == 403 and not self._answered):  # later it refuses one conversation
            if status == 401:  # servers repeat parts of the key here
                said = message = ""
            hint = (
                f"The key comes from the environment variable {spec.api_key_env}: is it the right one, for this server?"
                if self._key is not None
                else "Put a key into an environment variable, and name the variable in api_key_env."
            )
            problem = f"the server refuses the key ({reason}){said}.", hint
        elif status == 402 or code == "insufficient_quota":
            problem = f"the account has no credit left ({reason}){said}.", "The same command continues the job later."
        elif status in (404, 405, 410, 501):
            hint = "Check the model's name and the URL (it usually ends with /v1)."
            if urlsplit(spec.url or "").port == OLLAMA_PORT:
                hint += f" Ollama fetches a model with `ollama pull {spec.model}`."
            problem = f"no model {spec.model} at {spec.url} ({reason}){said}.", hint
        if problem is not None:
            fatal = UserError(f"endpoint {spec.name}: {problem[0]}", problem[1])
            return TryFailed(reason, message, retry=False, fatal=fatal)
        if status < 500 and status not in (408, 425, 429):
            return TryFailed(reason, message, retry=False)
        busy = status in BUSY
        # a server that breaks (500), or a gateway that stops waiting (502, 504), may have generated the reply
        return TryFailed(reason, message, charged=status >= 500 and not busy, busy=busy, wait=retry_after(headers))

    def _without_key(self, text: str) -> str:
        if self._key is None or len(self._key) < SHORT_KEY:
            return text
        return text.replace(self._key, "[key]").replace(json.dumps(self._key)[1:-1], "[key]")

    def _shown(self, text: str) -> str:
        """A server's message on one line, shortened, without the key or a masked form of it (``sk-ab****yz``)."""
        text = self._without_key(" ".join(text.split()))
        text = re.sub(r"\S*\*{3,}\S*", "[key]", text)
        return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def read_key(spec: EndpointSpec) -> str | None:
    """The API key of an endpoint, or None if it names no variable.

    Raises:
        UserError: the variable is not set, or holds characters that no header can.
    """
    if spec.api_key_env is None:
        return None
    # api_key_env may hold the key itself by mistake: only a text that looks like a variable's name is repeated
    is_name = re.fullmatch(r"[A-Z][A-Z0-9_]{0,60}", spec.api_key_env) is not None
    shown = spec.api_key_env if is_name else "named in api_key_env"
    key = os.environ.get(spec.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"endpoint {spec.name}: the environment variable {shown} is not set.",
            f"export {shown if is_name else 'NAME'}=… with the key, and name the variable (not the key) in api_key_env.",
        )
    if not all("!" <= letter <= "~" for letter in key):
        raise UserError(
            f"endpoint {spec.name}: the environment variable {shown} holds a space or a non-ASCII character.",
            "Set it to the key alone.",
        )
    remember(key)
    return key


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: ``retry-after-ms``, or ``retry-after`` in seconds or as a date (RFC 9110)."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        when = parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError, TypeError):
        return None
    return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - time.time())


def _hint(url: str) -> str:
    parts = urlsplit(url)
    if parts.hostname not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
        return "Check the URL and the network."
    if parts.port == OLLAMA_PORT:
        return "Is Ollama running? `ollama serve` starts it."
    return f"Is the server running there? (Ollama listens on port {OLLAMA_PORT}, llama.cpp on 8080, vLLM on 8000.)"


def _error_text(body: Any, text: str) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    if error is None:
        return text
    return error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)


def _usage(usage: Any, text: str) -> tuple[int | None, int | None]:
    """(prompt, completion) tokens as the server counted them; None where it did not, or cannot have."""
    if not isinstance(usage, dict):
        return None, None
    values = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    prompt, completion, total = (v if type(v) is int and 0 <= v <= MAX_COUNT else None for v in values)
    if not prompt or completion is None or (completion == 0 and text):
        return None, None
    if total is not None:
        completion = max(completion, total - prompt)  # some servers count hidden reasoning in the total alone
    return prompt, completion
