"""The configuration of the two commands that ask other models: a YAML file, options of the command line over it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from ...client.types import EndpointSpec, endpoint_spec, parse_endpoint
from ...config.presets import not_found, preset_configs
from ...config.strict_yaml import read_yaml
from ...errors import UserError
from ...io.reading import is_file, refuse_special

Settings = TypeVar("Settings", bound="JobConfig")


class PromptsSpec(BaseModel):
    """Where prompts come from: a hub id, a folder in the hub's layout, a file (JSONL, JSON, CSV, Parquet, or text)."""

    model_config = ConfigDict(extra="forbid")

    path: str
    name: str | None = None  # the hub's configuration of the data set, where it has several
    split: str | None = None
    revision: str | None = None
    limit: int | None = Field(None, ge=1)  # so many rows, by a seeded draw
    column: str | None = None  # the column that holds the prompt, where its name does not say so


class Budget(BaseModel):
    """What may be spent in all, over every start of the job; None is no limit."""

    model_config = ConfigDict(extra="forbid")

    requests: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)


class JobConfig(BaseModel):
    """What both commands have."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    out: str
    seed: int = Field(42, ge=0, lt=2**31)
    budget: Budget = Budget()

    def endpoints(self) -> dict[str, EndpointSpec]:
        """{name: endpoint}, every endpoint once."""
        raise NotImplementedError


class FeedbackConfig(JobConfig):
    """Completions of several models, rated by a judge."""

    prompts: PromptsSpec
    models: list[EndpointSpec] = Field(min_length=1)
    judge: EndpointSpec
    completions: int = Field(4, ge=2, le=16)  # for each prompt
    # system prompts that ask for one virtue: auto = where a server's model answers a prompt more than once, as a draw
    # from the policy itself (a local folder) must not be steered; all = always, as UltraFeedback did
    principles: Literal["auto", "all", "none"] = "auto"
    principles_file: str | None = None  # YAML, {name: [system prompts]}, instead of the built-in ones
    overall: bool = False  # a critique and a score from 1 to 10 for each completion: one more request for each

    @field_validator("prompts", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("models", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        values = value if isinstance(value, list) else [value]
        return [_endpoint(v, f"models[{number}]") for number, v in enumerate(values)]

    @field_validator("judge", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return _endpoint(value, "judge")

    @model_validator(mode="after")
    def _named(self) -> FeedbackConfig:
        _no_name_twice(self.models)
        self.judge = _beside(self.judge, self.models, "judge")
        return self

    def endpoints(self) -> dict[str, EndpointSpec]:
        return {spec.name: spec for spec in [*self.models, self.judge]}


class DistillConfig(JobConfig):
    """Dialogues that a teacher writes."""

    teacher: EndpointSpec  # answers
    user: EndpointSpec | None = None  # writes the user's turns; the teacher by default
    count: int | None = Field(None, ge=1)  # dialogues; one for each cell of the grid (600), or for each seed
    rounds: int = Field(3, ge=1, le=20)  # question and answer, at most, in a dialogue
    tries: int = Field(4, ge=1, le=20)  # openings asked for one place before it is left empty
    similarity: float = Field(0.7, gt=0, le=1)  # Jaccard similarity from which two openings are near-duplicates
    grid: str | None = None  # YAML with topics, kinds, manners, moves, instead of the built-in one
    # grid: the first questions are written for the grid's cells; seeds: they are the seeds themselves, one after the other
    openings: Literal["grid", "seeds"] = "grid"
    seeds: PromptsSpec | None = None  # prompts of one's own: shown as examples, or taken as first questions
    examples: int = Field(2, ge=1, le=8)  # how many of them are shown at a time
    test_share: float = Field(0.02, ge=0, lt=1)  # of the dialogues, by a hash of their first question

    @field_validator("seeds", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("teacher", "user", mode="before")
    @classmethod
    def _word(cls, value: Any, info: ValidationInfo) -> Any:
        return None if value is None else _endpoint(value, str(info.field_name))

    @model_validator(mode="after")
    def _named(self) -> DistillConfig:
        if self.openings == "seeds" and self.seeds is None:
            raise UserError("openings: seeds needs seeds.", "Give --seeds FILE, or leave openings out.")
        if self.openings == "seeds" and self.grid is not None:
            raise UserError("openings: seeds has no use for a grid.", "Leave one of them out.")
        self.user = self.teacher if self.user is None else _beside(self.user, [self.teacher], "user")
        return self

    def endpoints(self) -> dict[str, EndpointSpec]:
        assert self.user is not None
        return {spec.name: spec for spec in (self.teacher, self.user)}


# -- endpoints -------------------------------------------------------------------------------------------------------


def endpoint_from_word(word: str) -> EndpointSpec:
    """``URL#MODEL`` or a folder, with ``,key=value`` behind it for what else an endpoint has.

    ``http://localhost:11434/v1#llama3.2,concurrency=8`` · ``https://…/v1#NAME,api_key_env=MY_KEY`` ·
    ``runs/zephyr-7b,max_tokens=512``.

    Raises:
        UserError: it is neither, or a setting is unknown or wrong. No value is repeated: it could be a key.
    """
    place, *settings = [word] if Path(word).expanduser().exists() else word.split(",")
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in _SETTINGS:
            raise UserError(
                "behind an endpoint, after a comma: found something else than key=value.",
                f"Known keys: {', '.join(_SETTINGS)}; as in http://localhost:11434/v1#llama3.2,concurrency=8.",
            )
        values[key] = value
    return parse_endpoint(place, **values)


_SETTINGS = [key for key in EndpointSpec.model_fields if key not in ("url", "model", "path", "system")]


def _endpoint(value: Any, where: str) -> EndpointSpec:
    if isinstance(value, str):
        return endpoint_from_word(value)
    if isinstance(value, EndpointSpec):
        return value
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: expected an endpoint, found {type(value).__name__}.",
            "Write URL#MODEL, a folder, or a mapping with url and model (or path).",
        )
    return endpoint_spec(value, where)


def _no_name_twice(specs: list[EndpointSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise UserError(
                f"two models are called {spec.name!r}.",
                "Name each once; for the same model on two servers or with two settings add a name: name=OTHER.",
            )
        seen.add(spec.name)


def _beside(spec: EndpointSpec, others: list[EndpointSpec], role: str) -> EndpointSpec:
    """An endpoint that may be one of the others: the same one then; otherwise it gets a name of its own."""
    for other in others:
        if spec == other:
            return other
    taken = {other.name for other in others}
    return spec.model_copy(update={"name": f"{spec.name} ({role})"}) if spec.name in taken else spec


# -- files and options -----------------------------------------------------------------------------------------------


def load_settings(kind: type[Settings], file: str | None, options: dict[str, Any]) -> Settings:
    """A YAML file, and what the command line says over it.

    Args:
        kind: ``FeedbackConfig`` or ``DistillConfig``.
        file: a path, or the name of a shipped file.
        options: ``{"key": value}`` or ``{"key.nested": value}``; None leaves the file's value.

    Raises:
        UserError: a file that cannot be read, an unknown key (with the nearest one), a value that does not fit.
    """
    path = _find(file) if file else None
    values = read_yaml(path) if path else {}
    for key, value in options.items():
        if value is None:
            continue
        head, _, nested = key.partition(".")
        if not nested:
            values[head] = value
            continue
        inner = values.get(head)
        inner = {"path": inner} if isinstance(inner, str) else {} if inner is None else inner
        if not isinstance(inner, dict):
            raise UserError(
                f"{path}: {head}: expected `key: value` lines, found {type(inner).__name__}.",
                f"Write it as in `{head}: {{{nested}: …}}`.",
            )
        values[head] = {"path": value} if nested == "path" and inner.get("path") != value else {**inner, nested: value}
    missing = [key for key, field in kind.model_fields.items() if field.is_required() and key not in values]
    if missing:
        first = missing[0]
        raise UserError(
            f"{path or 'the command line'}: {', '.join(missing)} missing.",
            f"Give --{'model' if first == 'models' else first}, or {first}: in the file of --config.",
        )
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path or 'the command line'}: {_explain(error, kind)}") from None
    except UserError as error:  # of an endpoint's form
        raise UserError(f"{path}: {error.message}" if path else error.message, error.hint) from None


def _find(name: str) -> Path:
    refuse_special(Path(name), name)
    if is_file(Path(name)):
        return Path(name)
    shipped = preset_configs("feedback")
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    raise not_found(f"configuration {name[:300]}", Path(name), f"a shipped one: {', '.join(shipped)}")


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            known = (
                [*kind.model_fields]
                if len(item["loc"]) == 1
                else [*EndpointSpec.model_fields, *PromptsSpec.model_fields, *Budget.model_fields]
            )
            near = difflib.get_close_matches(key, known, n=1)
            lines.append(f"there is no key {place!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
        else:
            lines.append(f"{place}: {item['msg'].removeprefix('Value error, ')} (found {str(item['input'])[:60]!r}).")
    return "\n".join(lines)
