"""What evaluations with a judge have in common: who answers, the job's folder, and asking them all through one desk."""

from __future__ import annotations

import asyncio
import datetime
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar, cast

from pydantic import Field, field_validator

from .. import __version__
from ..client.budget import Totals
from ..client.desk import open_desk
from ..client.types import BudgetSpent, Desk, EndpointSpec, Message, Request, endpoint_spec
from ..client.weights import Weights
from ..errors import UserError
from ..io.atomic import make_folder, write_json
from ..io.interrupts import pythons_ctrl_c
from ..recipe.feedback.estimate import Bound, prompt_bound
from ..recipe.feedback.files import claim, write_config
from ..recipe.feedback.meter import Meter
from ..recipe.feedback.pool import grace_said, in_order
from ..recipe.feedback.specs import JobConfig, endpoint_from_word

T = TypeVar("T")
R = TypeVar("R")
JUDGE_TOKENS = 2048  # of a judge's reply, where its endpoint says nothing else
JUDGE_TRIES = 2  # a reply that cannot be read is asked for once more


class JudgedConfig(JobConfig):
    """What both evaluations have. ``out`` is the results' folder; the job lies in a folder of its own in it."""

    out: str = ""  # eval/ in the stage's folder by default
    source: str | None = None  # whose models answer: a run's folder, a stage's, a model's; the newest run by default
    stage: str | None = None
    adapters: list[str] = []
    base: str | None = None
    chat_template: str | None = None
    models: list[str] = []  # of the source, by name, or endpoints; policy, reference and base of the source by default
    judge: EndpointSpec | None = None
    max_new_tokens: int = Field(1024, ge=1)  # of an answer, where an endpoint says nothing else
    concurrency: int = Field(8, ge=1)  # answers of the source's models in one batch

    @field_validator("judge", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        if isinstance(value, str):
            return endpoint_from_word(value)
        return endpoint_spec(value, "judge") if isinstance(value, dict) else value


@dataclass
class Answering:
    """Who answers, and what of it lies in a folder.

    Attributes:
        specs: name → endpoint, in the order of the tables.
        weights: of the source; None where only endpoints answer.
        judge: beside them, with a name of its own; None where nothing is judged.
        pairs: names (of, against) whose difference is of interest: the policy against the reference and the base.
    """

    specs: dict[str, EndpointSpec]
    weights: Weights | None
    judge: EndpointSpec | None
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def endpoints(self) -> list[EndpointSpec]:
        return [*self.specs.values(), *([self.judge] if self.judge is not None else [])]


def who_answers(config: JudgedConfig, temperature: float) -> Answering:
    """The models that answer, nothing loaded yet. ``sft`` is the source's model also where a folder ``sft`` lies here.

    Args:
        temperature: of the evaluation, where an endpoint's word says nothing else and no request does.

    Raises:
        UserError: the source is none, has no such model, or has no chat template; two models of one name.
    """
    words = [word for word in config.models if _is_endpoint(word)]
    named = bool(config.source or config.stage or config.adapters)
    weights = None
    if named or len(words) < len(config.models) or not config.models:
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
    specs: dict[str, EndpointSpec] = {}
    for word in config.models or _usual(weights):
        if word in words and not (weights is not None and word in weights.models):
            spec = endpoint_from_word(word)
            usual = {"max_tokens": config.max_new_tokens, "temperature": temperature}
            spec = spec.model_copy(update={k: v for k, v in usual.items() if k not in spec.model_fields_set})
        else:
            assert weights is not None
            weights.identity(word)
            spec = EndpointSpec(
                name=word,
                path=weights.source,
                model=word,
                max_tokens=config.max_new_tokens,
                temperature=temperature,
                concurrency=config.concurrency,
            )
        if spec.name in specs:
            raise UserError(f"two models are called {spec.name!r}.", "Name each once, or add a name: …,name=OTHER.")
        specs[spec.name] = spec
    first, *others = specs
    pairs = [(first, other) for other in others]
    return Answering(specs, weights, chosen_judge(config, list(specs)), pairs)


def chosen_judge(config: JudgedConfig, names: Sequence[str]) -> EndpointSpec | None:
    """The judge, with a name that none of ``names`` is."""
    judge = config.judge
    if judge is None:
        return None
    if "max_tokens" not in judge.model_fields_set:
        judge = judge.model_copy(update={"max_tokens": JUDGE_TOKENS})
    return judge.model_copy(update={"name": f"{judge.name} (judge)"}) if judge.name in names else judge


def _usual(weights: Weights | None) -> list[str]:
    """Policy, reference, base; one that is two of these stands once."""
    assert weights is not None
    names = list(weights.models)
    return list(dict.fromkeys([names[-1], names[max(0, len(names) - 2)], names[0]]))


def _is_endpoint(word: str) -> bool:
    place = word.split(",")[0]
    return bool(re.match(r"https?://", word, re.IGNORECASE)) or "#" in place or Path(place).expanduser().is_dir()


def _template(weights: Weights, choice: str | None) -> Any:
    """The template, before hours are spent on answers."""
    from ..model.base import load_tokenizer
    from ..model.loaded import template_of_folder

    return template_of_folder(weights.tokenizer_from, load_tokenizer(weights.tokenizer_from), choice)


# -- where results lie -----------------------------------------------------------------------------------------------


def results_folder(config: JudgedConfig, answering: Answering) -> Path:
    """``--out``, or where the source's results lie.

    Raises:
        UserError: there is no such place: no model of a run answers.
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
    """``folder/KIND.json``, as every evaluation's."""
    if answering is not None and answering.weights is not None:
        from .results import write_result  # here, as ``live`` elsewhere: endpoints alone need no torch

        described = _described(answering.weights, _template(answering.weights, chat_template))
        return write_result(folder, kind, body, cast(Any, described))
    make_folder(folder)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(folder / f"{kind}.json", {"kind": kind, "version": __version__, "created": now, **body})
    return folder / f"{kind}.json"


def _described(weights: Weights, template: Any) -> SimpleNamespace:
    """What ``results`` wants to know of a ``Live``, without one: judging goes on where no model is loaded."""
    chain = weights.chain
    base = chain.base["name_or_path"] if chain is not None else str(weights.path)
    known = next(iter(weights.models.values()))[0]
    return SimpleNamespace(
        source=weights.source,
        chain=chain,
        base=SimpleNamespace(name_or_path=base, fingerprint=known),
        template=template,
    )


def part(asked: int, whole: int, names: Sequence[str] = ()) -> str:
    """Behind the names of what is written: a trial replaces no complete result, and no trial of other ``names``."""
    return "" if asked == whole else "".join(f"-{name}" for name in names) + f"-limit-{asked}"


def slugs(names: Sequence[str]) -> dict[str, str]:
    """Name → what a file can be called by, different for each."""
    result: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", name).strip("._") or "model"
        taken, number = plain, 2
        while taken in result.values():
            taken, number = f"{plain}-{number}", number + 1
        result[name] = taken
    return result


# -- asking ----------------------------------------------------------------------------------------------------------


@dataclass
class Asked(Generic[T, R]):
    """What came of a job.

    Attributes:
        results: of the items that are done, in order.
        unreached: how many the budget did not reach, or reached in part.
        why: what the budget said, or "".
    """

    results: list[tuple[T, R]] = field(default_factory=list)
    unreached: int = 0
    why: str = ""
    totals: Totals = field(default_factory=Totals)

    def hint(self) -> str:
        """Where nothing came out."""
        what = "Give a larger budget" if self.unreached else "Look at the reasons"
        return f"What was answered is in the journal there. {what}; the same command goes on."

    def unfinished(self, unit: str) -> str:
        """A line that says what is missing, or ""."""
        if not self.unreached:
            return ""
        return (
            f"{self.unreached:,} {unit} are not done: {self.why} The same command with a larger budget goes on; what the "
            "journal holds is not asked again. No result is written before all are done."
        )


def ask_all(
    config: JudgedConfig,
    answering: Answering,
    job: Path,
    command: str,
    items: Sequence[T],
    work: Callable[[Desk, T], Awaitable[R]],
    meter: Meter,
    say: Callable[[str], None],
    back_off: float = 1.0,
) -> Asked[T, R]:
    """Do the work for every item through one desk, whose journal lies in ``job``.

    Args:
        command: "eval mt-bench", by which the folder is known.
        work: raises BudgetSpent, UserError.

    Raises:
        UserError: the folder holds something else, or an endpoint cannot answer at all. What was answered is in the
            journal in each case.
    """
    claim(job, command, config)
    asked: Asked[T, R] = Asked()

    async def all_of_them() -> None:
        window = _window(answering)
        stop = len(items)  # once the budget is spent nothing new is begun

        async with open_desk(
            answering.endpoints(),
            job,
            weights={answering.weights.source: answering.weights} if answering.weights else {},
            max_requests=config.budget.requests,
            max_tokens=config.budget.tokens,
            on_progress=meter.totals,
            back_off=back_off,
        ) as desk:
            asked.totals = desk.totals
            write_config(job, command, config)
            meter.totals(desk.totals)

            async def one(number: int) -> tuple[R] | None:
                nonlocal stop
                if number >= stop:
                    return None
                try:
                    return (await work(desk, items[number]),)
                except BudgetSpent as spent:
                    stop = min(stop, number + window)
                    asked.why = asked.why or str(spent)
                    return None

            with grace_said(say):
                async for number, done in in_order(range(len(items)), one, window):
                    if done is None:
                        asked.unreached += 1
                    else:
                        asked.results.append((items[number], done[0]))
                    meter.advance()

    with pythons_ctrl_c():
        asyncio.run(all_of_them())
    return asked


def _window(answering: Answering) -> int:
    """How many items are under way: every endpoint is busy, and little is half done when a budget ends."""
    busiest = max((spec.concurrency for spec in answering.specs.values()), default=1)
    return 2 * max(busiest, answering.judge.concurrency if answering.judge is not None else 1)


class Bounds:
    """What a job can cost at most, by endpoint (``feedback.estimate``)."""

    def __init__(self, answering: Answering) -> None:
        self._specs = {spec.name: spec for spec in answering.endpoints()}
        self.of = {name: Bound() for name in self._specs}

    def add(
        self,
        name: str,
        messages: Sequence[Message],
        more_tokens: int = 0,
        max_tokens: int | None = None,
        tries: int = 1,
    ) -> None:
        """One request; ``more_tokens`` of its prompt are known by their number only."""
        spec = self._specs[name]
        reply = spec.max_tokens if max_tokens is None else max_tokens
        self.of[name].add(spec, prompt_bound(spec, messages, more_tokens), reply, tries=tries)


def judge_request(key: str, judge: EndpointSpec, messages: Sequence[Message]) -> Request:
    """Greedy; the second try of one that could not be read is drawn (``Desk.ask_parsed``)."""
    return Request(key, judge.name, tuple(messages), temperature=0.0)


def judged_settings(answering: Answering, prompts: str, seed: int) -> dict[str, Any]:
    """Of a result: who judged, in whose words, and how long answers might be."""
    assert answering.judge is not None
    return {
        "judge": {k: v for k, v in (("name", answering.judge.name), ("model", answering.judge.model)) if v},
        "judge_temperature": 0.0,
        "judge_prompts": prompts,
        "max_new_tokens": {name: spec.max_tokens for name, spec in answering.specs.items()},
        "seed": seed,
    }


def judged_differences(
    answering: Answering, models: Mapping[str, Any], of: Callable[[str, str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Of a result: the policy against the others, where both have one."""
    pairs = [(one, other) for one, other in answering.pairs if one in models and other in models]
    return {f"{one} - {other}": of(one, other) for one, other in pairs}


def refuse_unused(config: JudgedConfig, why: str, *also: str) -> None:
    """Where no model of a source answers, what is said about its models changes nothing.

    Args:
        why: nothing reads them.
        also: other keys of ``config`` that are not read then.

    Raises:
        UserError: one of them is given.
    """
    for key in ("base", "chat_template", "concurrency", *also):
        if key in config.model_fields_set:
            raise UserError(
                f"{why}: --{key.replace('_', '-')} changes nothing.",
                "Leave it out. An endpoint's own settings stand behind it: URL#MODEL,concurrency=4.",
            )


def refuse_no_judge(config: JudgedConfig) -> None:
    if config.judge is None:
        raise UserError(
            "no judge is given.",
            "Add --judge URL#MODEL, as in http://localhost:11434/v1#llama3.2 (or a folder with a model).",
        )
