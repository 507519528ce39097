"""Configuration of ``zephyr-lite feedback`` and ``zephyr-lite distill``: the keys of --config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ...client.endpoints import EndpointSpec, endpoint_spec
from ...client.jobs import JobConfig, distinct_name, refuse_equal_names
from ...errors import UserError


class PromptsSpec(BaseModel):
    """Where prompts come from: a hub id, a folder in the hub's layout, a file (JSONL, JSON, CSV, Parquet, or text)."""

    model_config = ConfigDict(extra="forbid")

    path: str
    name: str | None = None  # the data set's configuration on the hub
    split: str | None = None
    revision: str | None = None
    limit: int | None = Field(None, ge=1)  # number of rows, by a seeded draw
    column: str | None = None  # the prompt's column, if its name does not say so


def _from_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _from_word(value: Any, info: ValidationInfo) -> EndpointSpec:
    return endpoint_spec(value, str(info.field_name))


PromptsKey = Annotated[PromptsSpec, BeforeValidator(_from_path)]
EndpointKey = Annotated[EndpointSpec, BeforeValidator(_from_word)]


class FeedbackConfig(JobConfig):
    """Completions of several models, rated by a judge."""

    prompts: PromptsKey
    models: list[EndpointSpec] = Field(min_length=1)
    judge: EndpointKey
    completions: int = Field(4, ge=2, le=16)  # for each prompt
    # system prompts that ask for one virtue. auto: where a server's model answers a prompt more than once (a local folder
    # is sampled without, on-policy); all: always, as UltraFeedback did
    principles: Literal["auto", "all", "none"] = "auto"
    principles_file: str | None = None  # YAML, {name: [system prompts]}, instead of the built-in ones
    overall: bool = False  # a critique and a score from 1 to 10 for each completion: one more request for each

    @field_validator("models", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        values = value if isinstance(value, list) else [value]
        return [endpoint_spec(each, f"models[{number}]") for number, each in enumerate(values)]

    @model_validator(mode="after")
    def _named(self) -> FeedbackConfig:
        refuse_equal_names(self.models)
        self.judge = distinct_name(self.judge, self.models, "judge")
        return self

    def endpoints(self) -> dict[str, EndpointSpec]:
        """{name: endpoint}, every endpoint once."""
        return {spec.name: spec for spec in [*self.models, self.judge]}


class DistillConfig(JobConfig):
    """Dialogues written by a teacher."""

    teacher: EndpointKey  # answers
    user: EndpointKey | None = None  # writes the user's turns; the teacher by default
    count: int | None = Field(None, ge=1)  # dialogues; one for each cell of the grid (600), or for each seed
    rounds: int = Field(3, ge=1, le=20)  # question and answer, at most, in a dialogue
    tries: int = Field(4, ge=1, le=20)  # openings asked for one dialogue before it is left out
    similarity: float = Field(0.7, gt=0, le=1)  # Jaccard similarity from which two openings are near-duplicates
    grid: str | None = None  # YAML with topics, kinds, manners, moves, instead of the built-in one
    # grid: the first questions are written for the grid's cells; seeds: they are the seeds themselves, in order
    openings: Literal["grid", "seeds"] = "grid"
    seeds: PromptsKey | None = None  # one's own prompts: shown as examples, or taken as first questions
    examples: int = Field(2, ge=1, le=8)  # number of seeds shown at a time
    test_share: float = Field(0.02, ge=0, lt=1)  # of the dialogues, by a hash of their first question

    @model_validator(mode="after")
    def _named(self) -> DistillConfig:
        if self.openings == "seeds" and self.seeds is None:
            raise UserError("openings: seeds needs seeds.", "Give --seeds FILE, or leave openings out.")
        if self.openings == "seeds" and self.grid is not None:
            raise UserError("openings: seeds uses no grid.", "Leave one of them out.")
        self.user = self.teacher if self.user is None else distinct_name(self.user, [self.teacher], "user")
        return self

    @property
    def user_endpoint(self) -> EndpointSpec:
        """The endpoint that writes the user's turns."""
        assert self.user is not None
        return self.user

    def endpoints(self) -> dict[str, EndpointSpec]:
        """{name: endpoint}, every endpoint once."""
        return {spec.name: spec for spec in (self.teacher, self.user_endpoint)}
