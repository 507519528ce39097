"""What is asked of an endpoint, what comes back, and what can go wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import UserError

Message = dict[str, str]
T = TypeVar("T")


class EndpointSpec(BaseModel):
    """One model that answers: a server that speaks the OpenAI chat API (``url``), or a local folder (``path``), which
    may hold several (``model``).

    Exactly one of ``url`` and ``path`` is set. ``name`` is filled in where it is left out.
    """

    # no value is repeated in an error: it could be a key that stands in the wrong place
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: str = ""  # how it is called in outputs; the model's name by default
    url: str | None = None  # http://localhost:11434/v1
    model: str | None = None  # what the server calls it; of a run's folder: base, or a stage of its chain
    path: str | None = None  # a run's folder, a stage's, or a model's
    api_key_env: str | None = None  # the environment variable that holds the key
    system: str | None = None  # a system turn for every request
    temperature: float = Field(1.0, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1)  # of a reply
    concurrency: int = Field(4, ge=1)  # requests under way at once; a local model's batch
    requests_per_minute: float | None = Field(None, gt=0)
    timeout: float = Field(120.0, gt=0)  # seconds for one try; a local model takes its time
    retries: int = Field(5, ge=0)  # further tries after 429, 5xx, a hang or a broken connection
    input_price: float = Field(0.0, ge=0)  # US dollars for a million tokens
    output_price: float = Field(0.0, ge=0)

    @field_validator("name", mode="before")
    @classmethod
    def _no_name(cls, value: Any) -> Any:
        return "" if value is None else value

    @field_validator("api_key_env")
    @classmethod
    def _a_variable(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("is the name of an environment variable that holds the key (not the key itself)")
        return value

    @field_validator("url")
    @classmethod
    def _a_bare_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value.strip())
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise ValueError("is not a URL such as http://localhost:11434/v1") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("is not a URL such as http://localhost:11434/v1")
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError("may hold no user, password or query: keys come from the variable named in api_key_env")
        if parts.fragment:
            raise ValueError("ends with #…: the model's name goes into `model`")
        return value.strip().rstrip("/").removesuffix("/chat/completions")

    @model_validator(mode="after")
    def _one_of_two(self) -> EndpointSpec:
        if (self.url is None) == (self.path is None):
            raise ValueError("give either url (and model) or path")
        if self.url is not None and not self.model:
            raise ValueError("give the model's name too, as the server calls it")
        if self.path is not None and self.api_key_env is not None:
            raise ValueError("a local folder (path) takes no api_key_env")
        if not self.name and self.path is not None:
            self.name = ("/".join(Path(self.path).parts[-2:]) or "local") + (f"#{self.model}" if self.model else "")
        elif not self.name:
            self.name = self.model or ""
        return self


def parse_endpoint(text: str, **settings: Any) -> EndpointSpec:
    """An endpoint in one word: ``URL#MODEL``, a folder, or ``FOLDER#MODEL`` for a model along a run's chain.

    Args:
        settings: further fields of the endpoint.

    Raises:
        UserError: it is neither, or a field is wrong.
    """
    if re.match(r"https?://", text, re.IGNORECASE):
        url, _, model = text.partition("#")
        if not model:
            raise UserError(
                "an endpoint's URL names no model.", "Write URL#MODEL, as in http://localhost:11434/v1#llama3.2."
            )
        settings = {"url": url, "model": model, **settings}
    elif Path(text).expanduser().is_dir():
        settings = {"path": text, **settings}
    elif "#" in text and Path(text.rpartition("#")[0]).expanduser().is_dir():
        folder, _, model = text.rpartition("#")
        if not model:
            raise UserError(f"{text}: names no model behind the #.", f"Write {folder}, or as in {folder}#base.")
        settings = {"path": folder, "model": model, **settings}
    else:
        raise UserError(
            f"{text}: no such folder, and no URL.",
            "Give a run's or a model's folder (runs/NAME, runs/NAME#base), or URL#MODEL as in "
            "http://localhost:11434/v1#llama3.2.",
        )
    return endpoint_spec(settings)


def endpoint_spec(settings: dict[str, Any], where: str = "endpoint") -> EndpointSpec:
    """An endpoint from a mapping (a part of a YAML file).

    Args:
        where: names the place in an error.

    Raises:
        UserError: a key is unknown, missing or wrong; the value is not repeated, for it could be a key.
    """
    try:
        return EndpointSpec.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join([where, *(str(part) for part in first["loc"])])
        message = first["msg"].removeprefix("Value error, ")
        known = ", ".join(EndpointSpec.model_fields)
        raise UserError(f"{place}: {message}.", f"An endpoint has {known}.") from None


@dataclass(frozen=True)
class Request:
    """One question to one endpoint.

    Attributes:
        key: names the question within the job ("completion/PROMPT_ID/2"); the journal knows it by this and by a hash
            of everything that is sent, so a changed question is asked anew.
        endpoint: the endpoint's name.
        messages: the conversation, its last turn a user's; the endpoint's own ``system`` is put before it by the desk
            where it begins with no system turn.
        temperature, max_tokens: instead of the endpoint's.
        seed: for sampling, where the server takes one.
    """

    key: str
    endpoint: str
    messages: tuple[Message, ...]
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Reply:
    """What came back: the text, why it ended ("stop", "length"), tokens as the server counts them."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class BudgetSpent(Exception):
    """The next request could exceed the budget, so it was not sent. What is there stays; a larger budget goes on."""


class RequestFailed(Exception):
    """This one request cannot be answered (all tries failed, or the server refuses it). Counted, and gone past.

    Attributes:
        reason: in few words, the same for requests that failed alike ("HTTP 500"): what a report counts by.
    """

    def __init__(self, message: str, reason: str = "failed") -> None:
        super().__init__(message)
        self.reason = reason


class Desk(Protocol):
    """Where requests are handed in; answers that the journal holds cost nothing."""

    async def ask(self, request: Request) -> Reply:
        """Raises BudgetSpent, RequestFailed; UserError where nothing could ever be answered (a wrong key, no server)."""
        ...

    async def ask_parsed(self, request: Request, parse: Callable[[str], T], tries: int = 3) -> T:
        """Ask until ``parse`` takes the text. It raises ValueError for what it cannot read; then the question is asked
        again (as a request of its own: key + "/again1"), and after ``tries`` this raises RequestFailed."""
        ...


# What passes between the desk and an endpoint.


@dataclass(frozen=True)
class Question:
    """A request as it is sent: all settings resolved.

    Attributes:
        max_tokens: of the reply.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float
    top_p: float | None
    seed: int | None

    def as_dict(self) -> dict[str, Any]:
        told = {"messages": list(self.messages), "max_tokens": self.max_tokens, "temperature": self.temperature}
        return told | {k: v for k, v in (("top_p", self.top_p), ("seed", self.seed)) if v is not None}


@dataclass(frozen=True)
class Answer:
    """What an endpoint gave; tokens are None where it did not count them."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Fault(Exception):
    """One try failed.

    Attributes:
        reason: in few words, the same for faults of a kind ("HTTP 500", "no reply in time").
        detail: what was found, without keys.
        again: whether another try can help.
        charged: whether the tokens may have been paid for all the same (a hang, a broken reply).
        sent: False where nothing reached the server.
        answered: whether a server answered at all.
        wait: seconds that the server asks to wait.
        busy: the server has too much to do: everybody waits, not this request alone.
        other_way: the endpoint will send the next try in another way, which this one taught it.
        hopeless: why no request to this endpoint can succeed.
    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        again: bool,
        charged: bool = False,
        sent: bool = True,
        answered: bool = True,
        wait: float | None = None,
        busy: bool = False,
        other_way: bool = False,
        hopeless: UserError | None = None,
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.again, self.charged = reason, detail, again, charged
        self.sent, self.answered, self.wait, self.busy, self.hopeless = sent, answered, wait, busy, hopeless
        self.other_way = other_way


class Endpoint(Protocol):
    """A model that can be asked."""

    spec: EndpointSpec

    def identity(self) -> str:
        """What tells this model from another in the journal.

        Raises:
            UserError: there is no such model.
        """
        ...

    async def ask(self, question: Question) -> Answer:
        """One try. Raises Fault."""
        ...

    async def close(self) -> None:
        """Let go of what is held; whatever is under way ends."""
        ...
