"""Endpoints: which model answers, where it runs, and the settings of its requests."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import UserError
from ..io.text import expected

Message = dict[str, str]
Model = TypeVar("Model", bound=BaseModel)
_EXAMPLE = "http://localhost:11434/v1#llama3.2"
_URL = re.compile(r"https?://(\[[0-9a-f:]+\]|[^\s/@?#:]+)(:\d+)?(/[^\s@?#]*)?", re.IGNORECASE)


class EndpointSpec(BaseModel):
    """One model: on a server that speaks the OpenAI chat API (``url``), or in a local folder (``path``).

    Exactly one of ``url`` and ``path`` is set. ``name`` defaults to the model's or the folder's name.
    """

    # an error never repeats a value: it could be a key in the wrong place
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: str = ""  # in outputs
    url: str | None = None  # http://localhost:11434/v1
    model: str | None = None  # the server's name for it; of a run's folder: base, or a stage of its chain
    path: str | None = None  # a run's folder, a stage's, or a model's
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")  # environment variable with the key
    system: str | None = None  # a system turn for every request
    temperature: float = Field(1.0, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1)  # of a reply
    concurrency: int = Field(4, ge=1)  # requests in flight; a local model's batch size
    requests_per_minute: float | None = Field(None, gt=0)
    timeout: float = Field(120.0, gt=0)  # seconds for one try; not applied to a local model
    retries: int = Field(5, ge=0)  # further tries after 429, 5xx, a timeout or a broken connection
    input_price: float = Field(0.0, ge=0)  # US dollars per million tokens
    output_price: float = Field(0.0, ge=0)

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not _URL.fullmatch(value.strip()):
            raise ValueError("expected a URL such as http://localhost:11434/v1, without user, password, query or #")
        return value.strip().rstrip("/").removesuffix("/chat/completions")

    @model_validator(mode="after")
    def _one_of_two(self) -> EndpointSpec:
        if (self.url is None) == (self.path is None):
            raise ValueError("give either url (and model) or path")
        if self.url is not None and not self.model:
            raise ValueError("url names no model: give the model's name too, as the server calls it")
        if not self.name and self.path is not None:
            self.name = ("/".join(Path(self.path).parts[-2:]) or "local") + (f"#{self.model}" if self.model else "")
        self.name = self.name or self.model or ""
        return self

    def dollars(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of a request, in US dollars."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


_SETTINGS = [key for key in EndpointSpec.model_fields if key not in ("url", "model", "path", "system")]


def parse_endpoint(value: Any, where: str = "endpoint") -> EndpointSpec:
    """An endpoint from a mapping of a YAML file, or from one word: ``URL#MODEL``, ``FOLDER`` or ``FOLDER#MODEL``, then
    ``,key=value`` settings.

    ``http://localhost:11434/v1#llama3.2,concurrency=8`` · ``https://…/v1#NAME,api_key_env=MY_KEY`` ·
    ``runs/zephyr-7b,max_tokens=512``.

    Args:
        where: the key in the file, for errors.

    Raises:
        UserError: the word is none of these, or a setting is unknown or wrong; its value is not repeated.
    """
    if isinstance(value, dict | EndpointSpec):
        return validated(EndpointSpec, value, where)
    text = str(value)
    place, *words = [text] if Path(text).expanduser().exists() else text.split(",")
    settings: dict[str, Any] = dict(word.partition("=")[::2] for word in words)
    if not settings.keys() <= set(_SETTINGS):
        raise UserError(
            f"{where}: expected key=value after the comma.",
            f"Known keys: {', '.join(_SETTINGS)}; as in {_EXAMPLE},concurrency=8.",
        )
    folder, _, model = (place, "", "") if Path(place).expanduser().is_dir() else place.partition("#")
    settings |= {"model": model} if model else {}
    if re.match(r"https?://", place, re.IGNORECASE):
        settings["url"] = folder
    elif Path(folder).expanduser().is_dir():
        settings["path"] = folder
    else:
        raise UserError(
            f"{place}: no such folder, and no URL.",
            f"Give a run's or a model's folder (runs/NAME, runs/NAME#base), or URL#MODEL as in {_EXAMPLE}.",
        )
    return validated(EndpointSpec, settings, where)


# the type of a configuration's key that is an endpoint
EndpointKey = Annotated[EndpointSpec, BeforeValidator(lambda value, info: parse_endpoint(value, str(info.field_name)))]


def validated(kind: type[Model], values: Any, where: str, hint: str = "") -> Model:
    """Values of a YAML file as a model.

    Raises:
        UserError: with all faults, one a line.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                near = difflib.get_close_matches(place, kind.model_fields, n=1)
                problems.append(f"there is no key {place!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
                continue
            message = expected(item)
            if item["type"] != "missing" and not kind.model_config.get("hide_input_in_errors"):
                message += f" (found {str(item['input'])[:60]!r})"
            problems.append(f"{place}: {message}." if place else f"{message}.")
        raise UserError(f"{where}: " + "\n".join(problems), hint) from None
