"""What MT-Bench and AlpacaEval share: the models that answer, the judge, the job, and the result's file."""

from __future__ import annotations

import datetime
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar, cast

from pydantic import Field, field_validator

from .. import __version__
from ..client.client import BudgetSpent, ModelClient, Request, open_client
from ..client.cost import Bound, Meter, prompt_bound
from ..client.endpoints import EndpointSpec, Message, endpoint_spec, parse_endpoint
from ..client.jobs import JobConfig, claim_folder, in_order, refuse_equal_names, run_job
from ..client.local_model import Weights
from ..client.request_log import Totals
from ..errors import UserError
from ..io.atomic import make_folder, write_json

T = TypeVar("T")
R = TypeVar("R")
JUDGE_TOKENS = 2048  # of a judge's reply, unless its endpoint says otherwise
JUDGE_TRIES = 2  # draws of a judgment that cannot be parsed


class JudgedConfig(JobConfig):
    """The keys of both evaluations. ``out`` is the results' folder; the job has a folder of its own in it."""

    out: str = ""  # eval/ in the stage's folder by default
    source: str | None = None  # of the models: a run's folder, a stage's, a model's; the newest run by default
    stage: str | None = None
    adapters: list[str] = []
    base: str | None = None
    chat_template: str | None = None
    models: list[str] = []  # of the source, by name, or endpoints; the source's policy, reference and base by default
    judge: EndpointSpec | None = None
    max_new_tokens: int = Field(1024, ge=1)  # of an answer, unless its endpoint says otherwise
    concurrency: int = Field(8, ge=1)  # batch size of the source's models

    @field_validator("judge", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return value if value is None else endpoint_spec(value, "judge")


@dataclass
class Answering:
    """The models that answer, and the judge.

    Attributes:
        specs: name → endpoint, in the order of the tables; the first is compared with the others.
        weights: of the source; None where only endpoints answer.
        judge: under a name that no model has; None where nothing is judged.
    """

    specs: dict[str, EndpointSpec]
    weights: Weights | None
    judge: EndpointSpec | None

    def endpoints(self) -> list[EndpointSpec]:
        return [*self.specs.values(), *([self.judge] if self.judge is not None else [])]


def who_answers(config: JudgedConfig, temperature: float) -> Answering:
    """The models that answer; nothing is loaded yet. A name of the source's models takes precedence over a folder.

    Args:
        temperature: of an endpoint that sets none, in requests that set none.

    Raises:
        UserError: there is no such source or model, it has no chat template, or two models have one name.
    """
    words = [word for word in config.models if _is_endpoint(word)]
    weights = None
    if config.source or config.stage or config.adapters or len(words) < len(config.models) or not config.models:
        weights = Weights(
            config.source,
            stage=config.stage,
            adapters=config.adapters,
            base=config.base,
            chat_template=config.chat_template,
        )
        _template(weights, config.chat_template)
    else:
        refuse_unused(config, "only endpoints answer")
    specs = []
    for word in config.models or _default_models(weights):
        usual = {"max_tokens": config.max_new_tokens, "temperature": temperature}
        if word in words and not (weights is not None and word in weights.models):
            spec = parse_endpoint(word)
            spec = spec.model_copy(update={k: v for k, v in usual.items() if k not in spec.model_fields_set})
        else:
            assert weights is not None
            weights.identity(word)  # raises for an unknown name
            place: dict[str, Any] = {"name": word, "path": weights.source, "model": word}
            spec = EndpointSpec(**place, **usual, concurrency=config.concurrency)
        specs.append(spec)
    refuse_equal_names(specs)
    by_name = {spec.name: spec for spec in specs}
    return Answering(by_name, weights, choose_judge(config, list(by_name)))


def choose_judge(config: JudgedConfig, names: Sequence[str]) -> EndpointSpec | None:
    """The judge, under a name that is none of ``names``."""
    judge = config.judge
    if judge is None:
        return None
    if "max_tokens" not in judge.model_fields_set:
        judge = judge.model_copy(update={"max_tokens": JUDGE_TOKENS})
    return judge.model_copy(update={"name": f"{judge.name} (judge)"}) if judge.name in names else judge


def _default_models(weights: Weights | None) -> list[str]:
    """Policy, reference and base, without repetitions."""
    assert weights is not None
    names = list(weights.models)
    return list(dict.fromkeys([names[-1], names[max(0, len(names) - 2)], names[0]]))


def _is_endpoint(word: str) -> bool:
    place = word.split(",")[0]
    return bool(re.match(r"https?://", word, re.IGNORECASE)) or "#" in place or Path(place).expanduser().is_dir()


def _template(weights: Weights, choice: str | None) -> Any:
    from ..model.base import load_tokenizer
    from ..model.loaded import template_of_folder

    return template_of_folder(weights.tokenizer_from, load_tokenizer(weights.tokenizer_from), choice)


def refuse_unused(config: JudgedConfig, why: str, *also: str) -> None:
    """Raise a UserError for a setting of the source's models, or one of ``also``, where no model of a source answers."""
    for key in ("base", "chat_template", "concurrency", *also):
        if key in config.model_fields_set:
            raise UserError(
                f"{why}: --{key.replace('_', '-')} changes nothing.",
                "Leave it out. An endpoint's own settings follow it: URL#MODEL,concurrency=4.",
            )


def refuse_no_judge(config: JudgedConfig) -> None:
    if config.judge is None:
        raise UserError(
            "no judge is given.",
            "Add --judge URL#MODEL, as in http://localhost:11434/v1#llama3.2 (or a folder with a model).",
        )


# -- results ---------------------------------------------------------------------------------------------------------


def results_folder(config: JudgedConfig, answering: Answering) -> Path:
    """``--out``, or the source's folder for results.

    Raises:
        UserError: there is neither, as no model of a run answers.
    """
    if config.out:
        return Path(config.out)
    if answering.weights is None:
        raise UserError("no model of a run answers, so there is no place for the result.", "Add --out FOLDER.")
    from .results import result_folder

    return result_folder(cast(Any, _described(answering.weights, None)))


def write_judged(
    folder: Path, kind: str, body: dict[str, Any], answering: Answering | None, chat_template: str | None = None
) -> Path:
    """Write ``folder/KIND.json`` with the head that every evaluation's result has."""
    if answering is not None and answering.weights is not None:
        from .results import write_result  # it imports torch

        described = _described(answering.weights, _template(answering.weights, chat_template))
        return write_result(folder, kind, body, cast(Any, described))
    make_folder(folder)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(folder / f"{kind}.json", {"kind": kind, "version": __version__, "created": now, **body})
    return folder / f"{kind}.json"


def _described(weights: Weights, template: Any) -> SimpleNamespace:
    """What ``results`` reads of a ``LoadedModel``: nothing may be loaded where all answers are in the log."""
    chain = weights.chain
    base = chain.base["name_or_path"] if chain is not None else str(weights.path)
    fingerprint = next(iter(weights.models.values()))[0]
    return SimpleNamespace(
        source=weights.source,
        chain=chain,
        base=SimpleNamespace(name_or_path=base, fingerprint=fingerprint),
        template=template,
    )


def part_name(asked: int, whole: int, names: Sequence[str] = ()) -> str:
    """Suffix of the files of a run on a part of the data, which replace no complete result."""
    return "" if asked == whole else "".join(f"-{name}" for name in names) + f"-limit-{asked}"


def settings_of_result(answering: Answering, prompts: str, seed: int) -> dict[str, Any]:
    """The settings that both results hold.

    Args:
        prompts: whose wording the judge got.
    """
    judge = answering.judge
    assert judge is not None
    return {
        "judge": {k: v for k, v in (("name", judge.name), ("model", judge.model)) if v},
        "judge_temperature": 0.0,
        "judge_prompts": prompts,
        "max_new_tokens": {name: spec.max_tokens for name, spec in answering.specs.items()},
        "seed": seed,
    }


def differences(
    answering: Answering, models: Mapping[str, Any], of: Callable[[str, str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """``of(first, other)`` for the first model and each other one that has a result."""
    first, *others = [*answering.specs, ""]
    return {f"{first} - {other}": of(first, other) for other in others if first in models and other in models}


# -- asking ----------------------------------------------------------------------------------------------------------


@dataclass
class Asked(Generic[T, R]):
    """The outcome of a job.

    Attributes:
        results: of the items that are done, in order.
        unreached: items that the budget did not reach, or reached in part.
        budget_message: why it did not, or "".
    """

    results: list[tuple[T, R]] = field(default_factory=list)
    unreached: int = 0
    budget_message: str = ""
    totals: Totals = field(default_factory=Totals)

    def hint(self) -> str:
        """For an error where there is no result at all."""
        what = "Give a larger budget" if self.unreached else "Look at the reasons"
        return f"{what}; the same command continues the job, and all replies so far are kept."

    def unfinished(self, unit: str) -> str:
        """What is missing, or ""."""
        if not self.unreached:
            return ""
        return (
            f"{self.unreached:,} {unit} are not done: {self.budget_message} The same command with a larger budget "
            "continues the job and sends no answered request again. No result is written before all are done."
        )


def ask_all(
    config: JudgedConfig,
    answering: Answering,
    job: Path,
    command: str,
    items: Sequence[T],
    work: Callable[[ModelClient, T], Awaitable[R]],
    meter: Meter,
    say: Callable[[str], None],
    back_off: float = 1.0,
) -> Asked[T, R]:
    """Do the work for every item with one client, whose request log is in ``job``.

    Args:
        command: "eval mt-bench", which the folder is marked with.

    Raises:
        UserError: the folder holds something else, or an endpoint cannot answer at all.
    """
    claim_folder(job, command, config)
    asked: Asked[T, R] = Asked()
    # enough items to keep every endpoint busy, and few enough that little is half done when a budget ends
    window = 2 * max(spec.concurrency for spec in answering.endpoints())

    async def main() -> None:
        async with open_client(
            answering.endpoints(),
            job,
            weights={answering.weights.source: answering.weights} if answering.weights else {},
            max_requests=config.budget.requests,
            max_tokens=config.budget.tokens,
            on_progress=meter.totals,
            back_off=back_off,
        ) as client:
            asked.totals = client.totals

            async def one(item: T) -> tuple[R] | None:
                try:
                    return (await work(client, item),)
                except BudgetSpent as spent:
                    asked.budget_message = str(spent)
                    return None

            async for item, done in in_order(items, one, window):
                if done is None:
                    asked.unreached += 1
                else:
                    asked.results.append((item, done[0]))
                meter.advance()

    run_job(main(), say)
    return asked


class Bounds:
    """Upper bounds of what a job costs, by endpoint."""

    def __init__(self, answering: Answering) -> None:
        self._specs = {spec.name: spec for spec in answering.endpoints()}
        self.of = {name: Bound() for name in self._specs}

    def add(self, name: str, messages: Sequence[Message], more_tokens: int = 0, tries: int = 1) -> None:
        """Add one request, whose prompt has ``more_tokens`` beside the messages."""
        spec = self._specs[name]
        self.of[name].add(spec, prompt_bound(spec, messages, more_tokens), spec.max_tokens, tries=tries)


def judge_request(key: str, judge: EndpointSpec, messages: Sequence[Message]) -> Request:
    """A judge's request, greedy at its first draw."""
    return Request(key, judge.name, tuple(messages), temperature=0.0)
