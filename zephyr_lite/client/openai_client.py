"""A model on a server that speaks the OpenAI chat API, through the ``openai`` package."""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING, Any

from ..errors import UserError, optional
from ..io.redact import redact, remember
from ..io.text import shown
from .client import RequestFailed, prompt_token_bound
from .endpoints import EndpointSpec
from .request_log import Reply

if TYPE_CHECKING:
    import openai

MAX_SERVER_WAIT = 600.0  # seconds that a server may ask to wait before the job stops instead
BUSY = (429, 503, 529)  # the last one is not in the standard, but used
NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "ProxyError")  # of httpx: nothing was sent
# what to do where no other request would do better, by the status
HINTS = {
    401: "The key comes from the environment variable named in api_key_env: is it right for this server?",
    402: "The account has no credit left; the same command continues the job later.",
    **dict.fromkeys(
        (404, 405, 410),
        "Check the model's name and the URL (it usually ends with /v1); `ollama pull MODEL` fetches a model.",
    ),
    **dict.fromkeys(BUSY, "Lower `concurrency` or `requests_per_minute`, or wait: the same command continues the job."),
}


class OpenAIModel:
    """A server's model. The package's own retries are off: each try is recorded and counts before it leaves.

    Attributes:
        identity: of the model, for the request log. The server's address is no part of it: a server may move.
    """

    def __init__(self, spec: EndpointSpec) -> None:
        with optional("feedback"):
            import openai
        self.spec = spec
        self.identity = f"model {spec.model}"
        self._key = read_key(spec)
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=spec.url, timeout=spec.timeout, max_retries=0
        )
        self._reached = False  # whether the server has answered
        self._unknown: set[str] = set()  # settings that it does not know

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, body: dict[str, Any]) -> Reply:
        """The answer to ``Request.body``, by one try. Raises RequestFailed: with the server's message, without the key."""
        import openai

        sent = {"model": self.spec.model, **body}
        if "max_tokens" in self._unknown:  # OpenAI's newer models
            sent["max_completion_tokens"] = sent.pop("max_tokens")
        if "seed" in self._unknown:
            sent.pop("seed", None)
        try:
            async with asyncio.timeout(self.spec.timeout):  # httpx limits the time between two bytes only
                done: Any = await self._client.chat.completions.create(**sent)
            self._reached = True
            choice = done.choices[0]
            text = choice.message.content or choice.message.refusal or ""
            # a server may send half of a surrogate pair (a reply cut within an emoji), which UTF-8 cannot encode
            text = text.encode("utf-8", "replace").decode()
            if self._key and self._key in text:
                text = redact(text)
        except openai.APIStatusError as error:
            self._reached = True
            message = error.body.get("message") if isinstance(error.body, dict) else None
            message = _line(str(message or error.message))
            for name, complaint in (("max_tokens", "max_completion_tokens"), ("seed", "seed")):
                if error.status_code in (400, 422) and name in sent and complaint in message:
                    self._unknown.add(name)
                    raise RequestFailed(f"{name} is not known", message, adapted=True) from None
            raise self._refused(error, message) from None
        except (TimeoutError, openai.APIConnectionError) as error:
            if type(error.__cause__).__name__ in NOT_CONNECTED:
                hint = "Is the server running at that URL? `ollama serve` starts Ollama (port 11434)."
                # a server that answered before may come back; one that never did is a mistake in the command
                where = f"{self.spec.url}: {_line(str(error.__cause__))}"
                raise RequestFailed("cannot be reached", where, retry=self._reached, hint=hint) from None
            detail = f"nothing within {self.spec.timeout:g} s"
            raise RequestFailed("no reply", detail, retry=True, charged=True) from None
        except (ValueError, TypeError, LookupError, AttributeError):  # not JSON, or JSON of another form
            raise RequestFailed("reply holds no answer", retry=True, charged=True) from None
        usage, reason = done.usage, choice.finish_reason or "stop"
        prompt, completion = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
        if not (prompt and type(prompt) is type(completion) is int):  # the server does not count
            return Reply(text, reason, prompt_token_bound(body["messages"]), body["max_tokens"])
        # some servers count hidden reasoning in the total alone
        return Reply(text, reason, prompt, max(completion, (getattr(usage, "total_tokens", None) or 0) - prompt))

    def _refused(self, error: openai.APIStatusError, message: str) -> RequestFailed:
        status = error.status_code
        if status == 401:
            message = "the server refuses the key"  # servers repeat parts of the key here
        elif status in (404, 405, 410):
            message = f"no model {self.spec.model} at {self.spec.url}: {message}"
        try:
            wait = float(error.response.headers["retry-after"]) if status in BUSY else None
        except (KeyError, ValueError):
            wait = None
        return RequestFailed(
            f"HTTP {status}",
            message,
            retry=(status >= 500 or status in (408, 409, 425, 429)) and (wait or 0.0) <= MAX_SERVER_WAIT,
            # a server that breaks (500), or a gateway that stops waiting (502, 504), may have generated the reply
            charged=status >= 500 and status not in BUSY,
            wait=wait,
            hint=HINTS.get(status),
        )


def _line(text: str) -> str:
    """A server's message on one line, shortened, without keys."""
    return shown(redact(" ".join(text.split())), 300)


def read_key(spec: EndpointSpec) -> str | None:
    """The API key of an endpoint, or None if it names no variable.

    Raises:
        UserError: the variable is not set. Its name is not repeated: it could be the key itself, by mistake.
    """
    if spec.api_key_env is None:
        return None
    key = os.environ.get(spec.api_key_env, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"endpoint {spec.name}: the environment variable named in api_key_env is not set, or holds no key.",
            "export NAME=… with the key, and name the variable (not the key) in api_key_env.",
        )
    remember(key)
    return key
