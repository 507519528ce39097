"""What MT-Bench and AlpacaEval share: the models that answer, the judge, the job, and the result's file."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import Field, field_validator

from ..client.client import BudgetSpent, ModelClient, Request, open_client
from ..client.cost import Bound, Meter, prompt_bound
from ..client.endpoints import EndpointSpec, Message, endpoint_spec, parse_endpoint
from ..client.jobs import JobConfig, claim_folder, in_order, refuse_equal_names, run_job
from ..client.local_model import Weights
from ..client.request_log import Totals
from ..errors import UserError
from .results import head_of, result_folder

T = TypeVar("T")
R = TypeVar("R")
JUDGE_TOKENS = 2048  # of a judge's reply, unless its endpoint says otherwise
JUDGE_TRIES = 2  # draws of a judgment that cannot be parsed


class JudgedConfig(JobConfig):
    """The keys of both evaluations. ``out`` is the results' folder; the job has its own folder in it."""

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
    def _parse_judge(cls, value: Any) -> Any:
        return value if value is None else endpoint_spec(value, "judge")


@dataclass
class Answering:
    """The models that answer, and the judge.

    Attributes:
        specs: name → endpoint, in the order of the tables; the first is compared with the others.
        weights: of the source; None if only endpoints answer.
        judge: its name differs from those of all models.
    """

    specs: dict[str, EndpointSpec]
    weights: Weights | None
    judge: EndpointSpec

    def endpoints(self) -> list[EndpointSpec]:
        return [*self.specs.values(), self.judge]


@dataclass
class Judged:
    """A result.

    Attributes:
        models: name → scores.
        body: of the JSON file.
        unfinished: what the budget did not reach, or "".
        files: that were written; none if the result is not complete.
    """

    models: dict[str, dict[str, Any]]
    body: dict[str, Any]
    unfinished: str = ""
    files: list[Path] = field(default_factory=list)


def judge_of(config: JudgedConfig) -> EndpointSpec:
    """The judge of a configuration.

    Raises:
        UserError: there is none.
    """
    judge = config.judge
    if judge is None:
        raise UserError(
            "no judge is given.",
            "Add --judge URL#MODEL, as in http://localhost:11434/v1#llama3.2 (or a folder with a model).",
        )
    return judge if "max_tokens" in judge.model_fields_set else judge.model_copy(update={"max_tokens": JUDGE_TOKENS})


def who_answers(config: JudgedConfig, temperature: float) -> Answering:
    """The models that answer, and the judge; nothing is loaded yet. A name of the source's models takes precedence over a
    folder.

    Args:
        temperature: of an endpoint that sets none, in requests that set none.

    Raises:
        UserError: there is no judge, no such source or model, no chat template, or two models have one name.
    """
    judge = judge_of(config)
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
    usual = {"max_tokens": config.max_new_tokens, "temperature": temperature}
    specs = []
    for word in config.models or _default_models(weights):
        if word in words and not (weights is not None and word in weights.models):
            spec = parse_endpoint(word)
            spec = spec.model_copy(update={k: v for k, v in usual.items() if k not in spec.model_fields_set})
        else:
            assert weights is not None
            weights.identity(word)  # raises for an unknown name
            own = {"name": word, "path": weights.source, "model": word, "concurrency": config.concurrency}
            spec = EndpointSpec.model_validate({**own, **usual})
        specs.append(spec)
    refuse_equal_names(specs)
    by_name = {spec.name: spec for spec in specs}
    if judge.name in by_name:
        judge = judge.model_copy(update={"name": f"{judge.name} (judge)"})
    return Answering(by_name, weights, judge)


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
    return result_folder(answering.weights.source, answering.weights.chain)


def head_of_weights(weights: Weights | None, chat_template: str | None) -> dict[str, Any]:
    """``results.head_of`` the source's models, which need not be loaded; {} if there is none."""
    if weights is None:
        return {}
    fingerprint = next(iter(weights.models.values()))[0]
    template = _template(weights, chat_template).text
    return head_of(weights.source, weights.chain, str(weights.path), fingerprint, template)


def part_name(asked: int, whole: int, names: Sequence[str] = ()) -> str:
    """Suffix of the files of a run on a part of the data, which do not replace the complete result."""
    return "" if asked == whole else "".join(f"-{name}" for name in names) + f"-limit-{asked}"


def settings_of_result(answering: Answering, prompts: str, seed: int) -> dict[str, Any]:
    """The settings that both results hold.

    Args:
        prompts: origin of the judge's prompts.
    """
    judge = answering.judge
    return {
        "judge": {k: v for k, v in (("name", judge.name), ("model", judge.model)) if v},
        "judge_temperature": 0.0,
        "judge_prompts": prompts,
        "max_new_tokens": {name: spec.max_tokens for name, spec in answering.specs.items()},
        "seed": seed,
    }


def differences(
    answering: Answering, models: Iterable[str], of: Callable[[str, str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """``of(first, other)`` for the first model and each other one that has a result."""
    first, *others = [*answering.specs, ""]
    return {f"{first} - {other}": of(first, other) for other in others if first in models and other in models}


# -- asking ----------------------------------------------------------------------------------------------------------


@dataclass
class Asked(Generic[T, R]):
    """The outcome of a job.

    Attributes:
        results: model → (item, result) of the items that are done, in order.
        unreached: number of items that the budget did not reach, or reached in part.
        budget_message: why it did not, or "".
    """

    results: dict[str, list[tuple[T, R]]]
    unreached: int = 0
    budget_message: str = ""
    totals: Totals = field(default_factory=Totals)

    def no_result(self, message: str, reasons: Iterable[str]) -> UserError:
        """The error if nothing has a score, with the most frequent reasons."""
        why = [f"{reason} ({count})" for reason, count in Counter(filter(None, reasons)).most_common(3)]
        what = "Give a larger budget" if self.unreached else "Look at the reasons"
        return UserError(
            f"{message}: {'; '.join(filter(None, [*why, self.budget_message]))}",
            f"{what}; the same command continues the job, and all replies so far are kept.",
        )

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
    models: Sequence[str],
    items: Sequence[T],
    work: Callable[[ModelClient, str, T], Awaitable[R]],
    meter: Meter,
) -> Asked[T, R]:
    """Do the work for every model and item with one client, whose request log is in ``job``.

    Args:
        command: "eval mt-bench", which the folder is marked with.

    Raises:
        UserError: the folder holds something else, or an endpoint cannot answer at all.
    """
    claim_folder(job, command, config)
    asked: Asked[T, R] = Asked({model: [] for model in models})
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
        ) as client:
            asked.totals = client.totals

            async def one(pair: tuple[str, T]) -> tuple[R] | None:
                try:
                    return (await work(client, *pair),)
                except BudgetSpent as spent:
                    asked.budget_message = str(spent)
                    return None

            pairs = [(model, item) for model in models for item in items]
            async for (model, item), done in in_order(pairs, one, window):
                if done is None:
                    asked.unreached += 1
                else:
                    asked.results[model].append((item, done[0]))
                meter.advance()

    run_job(main())
    return asked


class Bounds:
    """Upper bounds of what a job costs, by endpoint."""

    def __init__(self, answering: Answering) -> None:
        self._specs = {spec.name: spec for spec in answering.endpoints()}
        self.of = {name: Bound() for name in self._specs}

    def add(self, name: str, messages: Sequence[Message], more_tokens: int = 0, tries: int = 1) -> None:
        """Add one request, whose prompt has ``more_tokens`` besides the messages."""
        spec = self._specs[name]
        self.of[name].add(spec, prompt_bound(spec, messages, more_tokens), spec.max_tokens, tries=tries)


def judge_request(key: str, judge: EndpointSpec, messages: Sequence[Message]) -> Request:
    """A judge's request, greedy at its first draw."""
    return Request(key, judge.name, tuple(messages), temperature=0.0)


def framed(parts: Sequence[tuple[str, str]]) -> str:
    """(title, text) pairs between marks that an answer cannot forge: they are a hash of all texts."""
    mark = hashlib.blake2b(repr(parts).encode("utf-8", "replace"), digest_size=4).hexdigest()
    return "\n\n".join(f"<<{mark} {title}>>\n{text}\n<<{mark} end>>" for title, text in parts)
