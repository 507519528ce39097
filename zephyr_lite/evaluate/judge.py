"""What MT-Bench and AlpacaEval share: models answer, a judge gives its verdicts, scores are written.

``Benchmark`` is the skeleton; a benchmark has its items, the judge's prompts and its scores.
"""

from __future__ import annotations

import math
import re
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from ..client.client import ModelClient, Request, RequestFailed, seed_of
from ..client.cost import CostClient, cost_lines
from ..client.endpoints import EndpointKey, EndpointSpec, Message, parse_endpoint
from ..client.jobs import CONTINUES, JobConfig, Meter, in_order, nothing_made, refuse_equal_names, run_job
from ..client.local_model import Weights
from ..config.load import DatasetSpec
from ..data.sources import open_source
from ..errors import UserError
from ..io.text import shown
from .results import head_of_weights, result_folder, write_result

R = TypeVar("R")
JUDGE_TOKENS = 2048  # of a judge's reply, unless its endpoint says otherwise
NO_VERDICT = "no verdict: "  # before the reason why a judgment failed
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
    judge: EndpointKey | None = None
    max_new_tokens: int = Field(1024, ge=1)  # of an answer, unless its endpoint says otherwise
    concurrency: int = Field(8, ge=1)  # batch size of the source's models


@dataclass
class Answering:
    """The models that answer, and the judge."""

    specs: dict[str, EndpointSpec]  # by name, in the order of the tables; the first is compared with the others
    weights: Weights | None  # of the source; None if only endpoints answer
    judge: EndpointSpec  # its name differs from those of all models
    head: dict[str, Any] = field(default_factory=dict)  # of the result: identifies the source's models

    def endpoints(self) -> list[EndpointSpec]:
        return [*self.specs.values(), self.judge]


def who_answers(config: JudgedConfig, temperature: float, existing: bool = False) -> Answering:
    """The models that answer, and the judge; nothing is loaded yet. A name of the source's models takes precedence over a
    folder.

    Args:
        temperature: of an endpoint that sets none, in requests that set none.
        existing: the answers exist already, so that only the judge is asked.
    """
    judge = config.judge
    if judge is None:
        raise UserError(
            "no judge is given.",
            "Add --judge URL#MODEL, as in http://localhost:11434/v1#llama3.2 (or a folder with a model).",
        )
    if "max_tokens" not in judge.model_fields_set:
        judge = judge.model_copy(update={"max_tokens": JUDGE_TOKENS})
    words, own = config.models, list[str]()
    weights, head = None, {}
    named = config.source or config.stage or config.adapters
    if not existing and (named or not words or not all(map(_is_endpoint, words))):
        weights = Weights(
            config.source,
            stage=config.stage,
            adapters=config.adapters,
            base=config.base,
            chat_template=config.chat_template,
        )
        head, own = head_of_weights(weights, config.chat_template), list(weights.models)
        words = words or list(dict.fromkeys([own[-1], own[max(0, len(own) - 2)], own[0]]))
    usual = {"max_tokens": config.max_new_tokens, "temperature": temperature}
    specs = []
    for word in words:
        if weights is not None and (word in own or not _is_endpoint(word)):
            weights.identity(word)  # raises for an unknown name
            where = {"name": word, "path": weights.source, "model": word, "concurrency": config.concurrency}
            specs.append(EndpointSpec.model_validate({**where, **usual}))
        else:
            spec = parse_endpoint(word)
            specs.append(spec.model_copy(update={k: v for k, v in usual.items() if k not in spec.model_fields_set}))
    refuse_equal_names(specs)
    by_name = {spec.name: spec for spec in specs}
    if judge.name in by_name:
        judge = judge.model_copy(update={"name": f"{judge.name} (judge)"})
    return Answering(by_name, weights, judge, head)


def _is_endpoint(word: str) -> bool:
    place = word.split(",")[0]
    return bool(re.match(r"https?://", word, re.IGNORECASE)) or "#" in place or Path(place).expanduser().is_dir()


def read_rows(place: str | Path, parse: Callable[[dict[str, Any]], R]) -> list[R]:
    """``parse`` of each row of a file, or of a data set of the hub."""
    parsed = []
    for number, row in enumerate(open_source(DatasetSpec(path=str(place))), 1):
        try:
            parsed.append(parse(row))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{place} row {number}: {what}; found {shown(row)}.", "Is this the right file?") from None
    if not parsed:
        raise UserError(f"{place}: is empty.", "Give a JSON list of objects, or JSONL.")
    return parsed


def mean(values: Iterable[float]) -> float | None:
    """None for no value."""
    found = list(values)
    return statistics.fmean(found) if found else None


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# -- the skeleton ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A question or an instruction."""

    key: str  # its name within the benchmark
    turns: tuple[str, ...]  # what the user says
    category: str


@dataclass(frozen=True)
class Grade:
    """The judge's verdict on one answer."""

    question: str  # the item's key
    category: str
    model: str
    turn: int  # from 1
    score: float | None  # None: no answer, or no verdict
    judgment: str  # the judge's reply, or why there is none


@dataclass
class Outcome:
    """The outcome of one item with one model."""

    item: Any
    answers: list[str] = field(default_factory=list)  # to its turns; fewer if the model failed
    cut: int = 0  # number of answers that ended at max_tokens
    grades: list[Grade] = field(default_factory=list)  # of each turn


def difference(
    one: Sequence[Grade], other: Sequence[Grade], scale: float = 1.0, unit: str = "questions"
) -> dict[str, Any]:
    """Mean paired difference (one - other) of the scores, times ``scale``, over the items that both have scores for in the
    same turns, its standard error, and the number of these items under the key ``unit``."""
    first = {(g.question, g.turn): g.score for g in one if g.score is not None}
    pairs: dict[str, list[float]] = {}
    for g in other:
        if g.score is not None and (g.question, g.turn) in first:
            pairs.setdefault(g.question, []).append(scale * (first[g.question, g.turn] - g.score))
    means = [statistics.fmean(found) for found in pairs.values()]
    return {"difference": mean(means), "standard_error": standard_error(means), unit: len(means)}


@dataclass
class Judged:
    """A result."""

    body: dict[str, Any]  # of the JSON file; "models" are the scores by name
    unfinished: str = ""  # what the budget did not reach
    files: list[Path] = field(default_factory=list)  # that were written; none if the result is not complete


class Benchmark(ABC):
    """A benchmark and the models that it is run on; nothing is asked before ``run``.

    Args:
        answering: who answers and judges.
        items: to ask.
        whole: number of items without a limit.
        outputs: model → {item's key: an answer that exists already}.
    """

    kind: str  # name of the command, of the job's folder and of the result's file
    unit: str  # of the items
    scale: float  # of the scores' differences
    why: str  # key of a model's scores: reasons why verdicts are missing
    note: str  # what is asked, in a line
    notes: Sequence[str] = ()  # how the scores differ from published ones
    part: Sequence[str] = ()  # in the name of a file on some of the items
    settings: dict[str, Any]  # for the result
    data: dict[str, Any]  # for the result

    def __init__(
        self,
        config: JudgedConfig,
        answering: Answering,
        items: list[Any],
        whole: int,
        outputs: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.config, self.answering, self.items, self.whole = config, answering, items, whole
        self.outputs = outputs or {}
        if config.out:
            self.folder = Path(config.out)
        elif answering.weights is None:
            raise UserError("no model of a run answers, so there is no place for the result.", "Add --out FOLDER.")
        else:
            self.folder = result_folder(answering.weights.source, answering.weights.chain)
        self.job = self.folder / self.kind

    @abstractmethod
    def judge_messages(self, item: Any, answers: Sequence[str]) -> tuple[Message, ...]:
        """The request for the verdict on the last of the answers."""

    @abstractmethod
    def read_verdict(self, item: Any, text: str) -> float:
        """The verdict in a reply. Raises ValueError if there is none."""

    @abstractmethod
    def scores(self, model: str, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
        """A model's scores; None if there is no verdict."""

    @abstractmethod
    def write_texts(self, folder: Path, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        """Write answers and judgments, in the form of the benchmark's own tools."""

    def temperature(self, item: Any) -> float | None:
        """Of an answer; None: the endpoint's."""
        return None

    def without_judge(self, item: Any, answers: Sequence[str]) -> tuple[float, str] | None:
        """A verdict that needs no judge, and why."""
        return None

    def models(self) -> list[str]:
        return [*self.answering.specs, *self.outputs]

    def dry_run_lines(self) -> list[str]:
        """Upper bounds of what the job costs, with every answer of ``max_tokens``."""

        async def work(client: CostClient) -> None:
            for model in self.models():
                for item in self.items:
                    await self._outcome(client, model, item)

        return cost_lines(self.answering.endpoints(), work, self.config.budget, self.job)

    def run(self, meter: Meter) -> Judged:
        """Ask models and judge, and write the result and all texts; the result only if the budget reached all items.

        Raises:
            UserError: the job's folder holds something else, an endpoint cannot answer at all, or there is no verdict.
        """
        config, answering, judge = self.config, self.answering, self.answering.judge
        outcomes: dict[str, list[Outcome]] = {model: [] for model in self.models()}
        spent: list[str] = []  # a message for each item that the budget did not reach, or reached in part
        # enough items to keep every endpoint busy, and few enough that little is half done when a budget ends
        window = 2 * max(spec.concurrency for spec in answering.endpoints())

        async def work(client: ModelClient) -> dict[str, Any]:
            pairs = [(model, item) for model in outcomes for item in self.items]
            async for (model, _), found in in_order(pairs, lambda pair: self._outcome(client, *pair), window):
                if isinstance(found, Outcome):
                    outcomes[model].append(found)
                else:
                    spent.append(str(found))
                meter.count_one()
            return client.totals.as_dict()

        command, endpoints = f"eval {self.kind}", answering.endpoints()
        totals = run_job(config, command, work, meter, self.job, endpoints, answering.weights)
        asked = len(self.items)
        ending = "" if asked == self.whole else "".join(f"-{name}" for name in self.part) + f"-limit-{asked}"
        self.write_texts(self.job / ending[1:], outcomes)
        models, grades = {}, {}
        lost: Counter[str] = Counter()  # reasons why verdicts are missing
        for model, found in outcomes.items():
            grades[model] = [grade for outcome in found for grade in outcome.grades]
            reasons = Counter(grade.judgment for grade in grades[model] if grade.score is None)
            lost += reasons
            if scores := self.scores(model, found):
                cut = sum(outcome.cut for outcome in found)
                models[model] = {**scores, "answers_cut_at_max_tokens": cut, self.why: dict(reasons)}
        if not models:
            told = [f"{reason.removeprefix(NO_VERDICT)} ({count})" for reason, count in lost.most_common(3)]
            raise nothing_made(self.job, "verdict", [*told, *spent[-1:]])
        first, *others = models
        differences = {
            f"{first} - {other}": difference(grades[first], grades[other], self.scale, self.unit) for other in others
        }
        body = {
            "models": models,
            "differences": differences,
            "settings": {
                "judge": {k: v for k, v in (("name", judge.name), ("model", judge.model)) if v},
                "judge_temperature": 0.0,
                "max_new_tokens": {name: spec.max_tokens for name, spec in answering.specs.items()},
                "seed": config.seed,
                **self.settings,
            },
            "data": {**self.data, "asked": asked, "of": self.whole},
            "notes": list(self.notes),
            "spent": totals,
        }
        if spent:
            left = f"{len(spent):,} {self.unit} are not done: {spent[-1]}"
            return Judged(body, f"{left} {CONTINUES} No result is written before all are done.")
        return Judged(body, files=[write_result(self.folder, self.kind + ending, body, answering.head)])

    async def _outcome(self, client: ModelClient | CostClient, model: str, item: Any) -> Outcome:
        """All turns of an item, then the verdicts on them. Raises BudgetSpent."""
        outcome, said, lost = Outcome(item), list[Message](), ""
        # the turn's number is part of a request's name where there are several
        parts = [(n,) if len(item.turns) > 1 else () for n in range(1, len(item.turns) + 1)]
        for text, part in zip(item.turns, parts):
            said.append({"role": "user", "content": text})
            if model in self.outputs:
                answer = self.outputs[model][item.key]
            else:
                key = "/".join(map(str, ("answer", item.key, *part)))
                seed = seed_of(self.config.seed, self.kind, item.key, *part)
                try:
                    reply = await client.ask(Request(key, model, tuple(said), self.temperature(item), seed=seed))
                except RequestFailed as failed:
                    lost = f"no answer: {failed.reason}"
                    break
                answer = reply.text
                outcome.cut += reply.finish_reason == "length"
            outcome.answers.append(answer)
            said.append({"role": "assistant", "content": answer})
        for n, part in enumerate(parts):
            answers = outcome.answers[: n + 1]
            score: float | None = None
            if len(answers) <= n:
                judgment = lost
            elif (known := self.without_judge(item, answers)) is not None:
                score, judgment = known
            else:
                key = "/".join(map(str, ("judge", model, item.key, *part)))
                request = Request(key, self.answering.judge.name, self.judge_messages(item, answers), temperature=0.0)
                try:
                    score, judgment = await client.ask_parsed(
                        request, lambda text: (self.read_verdict(item, text), text), tries=JUDGE_TRIES
                    )
                except RequestFailed as failed:
                    judgment = f"{NO_VERDICT}{failed.reason}"
            outcome.grades.append(Grade(item.key, item.category, model, n + 1, score, judgment))
        return outcome
