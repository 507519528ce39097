"""What is asked of an endpoint, what comes back, and what can go wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Message = dict[str, str]
T = TypeVar("T")


class EndpointSpec(BaseModel):
    """One model that answers: a server that speaks the OpenAI chat API (``url``), or a local folder (``path``).

    Exactly one of ``url`` and ``path`` is set.
    """

    model_config = ConfigDict(extra="forbid")

    name: str | None = None  # how it is called in outputs; the model's name by default
    url: str | None = None  # http://localhost:11434/v1
    model: str | None = None  # what the server calls it
    path: str | None = None  # a run's folder, a stage's, or a model's
    api_key_env: str | None = None  # the environment variable that holds the key
    system: str | None = None  # a system turn for every request
    temperature: float = Field(1.0, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1)  # of a reply
    concurrency: int = Field(4, ge=1)  # requests under way at once
    requests_per_minute: float | None = Field(None, gt=0)
    timeout: float = Field(120.0, gt=0)  # seconds for one try
    retries: int = Field(5, ge=0)  # further tries after 429, 5xx, a hang or a broken connection
    input_price: float = Field(0.0, ge=0)  # US dollars for a million tokens
    output_price: float = Field(0.0, ge=0)


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
    """This one request cannot be answered (all tries failed, or the server refuses it). Counted, and gone past."""


class Desk(Protocol):
    """Where requests are handed in; answers that the journal holds cost nothing."""

    async def ask(self, request: Request) -> Reply:
        """Raises BudgetSpent, RequestFailed; UserError where nothing could ever be answered (a wrong key, no server)."""
        ...

    async def ask_parsed(self, request: Request, parse: Callable[[str], T], tries: int = 3) -> T:
        """Ask until ``parse`` takes the text. It raises ValueError for what it cannot read; then the question is asked
        again (as a request of its own: key + "/again1"), and after ``tries`` this raises RequestFailed."""
        ...
