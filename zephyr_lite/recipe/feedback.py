"""``zephyr-lite feedback``: prompts → completions → ratings → rows in UltraFeedback's raw schema, and pairs of them."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, RootModel, model_validator

from .. import __version__
from ..client.client import BudgetSpent, Request, RequestFailed, seed_of
from ..client.cost import Client, cost_lines
from ..client.endpoints import EndpointKey, EndpointSpec, Message, validated
from ..client.jobs import (
    CONTINUES,
    JobConfig,
    Meter,
    NotBlank,
    distinct_name,
    in_order,
    json_line,
    nothing_made,
    refuse_equal_names,
    run_job,
)
from ..client.request_log import Totals
from ..config.strict_yaml import read_yaml
from ..data.load import first_places, summarise
from ..errors import UserError
from ..io.atomic import file_aside, write_json
from .judge import (
    ASPECTS,
    NOT_RATED,
    Aspect,
    Overall,
    aspect_messages,
    overall_messages,
    parse_overall,
    parse_ratings,
    shown_order,
)
from .prompts import Prompt, Prompts, PromptsKey
from .ultrafeedback import PairRules, make_pairs, report_lines

T = TypeVar("T")
COMMAND = "feedback"
ROWS, REPORT, PAIRS = "train.jsonl", "report.json", "pairs"
PRINCIPLES = Path(__file__).parent / "principles.yaml"
PLACES = 20  # of left out prompts, in the report


class FeedbackConfig(JobConfig):
    """Completions of several models, rated by a judge: the keys of --config."""

    prompts: PromptsKey
    models: Annotated[
        list[EndpointKey],
        Field(min_length=1),
        BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    ]
    judge: EndpointKey
    completions: int = Field(4, ge=2, le=16)  # for each prompt
    # system prompts that ask for one virtue. auto: where a server's model answers a prompt more than once (a local folder
    # is sampled without, on-policy); all: always, as UltraFeedback did
    principles: Literal["auto", "all", "none"] = "auto"
    principles_file: str | None = None  # YAML, {name: [system prompts]}, instead of the built-in ones
    overall: bool = False  # a critique and a score from 1 to 10 for each completion: one more request for each

    @model_validator(mode="after")
    def _named(self) -> FeedbackConfig:
        refuse_equal_names(self.models)
        self.judge = distinct_name(self.judge, self.models, "judge")
        return self


# -- requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One completion to ask for."""

    number: int  # its place among the prompt's completions, from 0
    endpoint: str  # the name of the model that answers
    principle: str  # the name of the virtue that its system prompt asks for, or ""
    system: str  # the system prompt as it is sent, with the endpoint's own, or ""
    seed: int

    def request(self, prompt: Prompt) -> Request:
        system: tuple[Message, ...] = ({"role": "system", "content": self.system},) if self.system else ()
        return Request(
            key=f"completion/{prompt.id[:16]}/{self.number}/{self.endpoint}",
            endpoint=self.endpoint,
            messages=(*system, {"role": "user", "content": prompt.text}),
            seed=self.seed,
        )


class PrinciplesFile(RootModel[dict[str, list[str]]]):
    """A YAML file of principles: names, each with a list of system prompts."""

    root: dict[str, Annotated[list[NotBlank], Field(min_length=1)]] = Field(min_length=1)


def read_principles(path: Path | None = None) -> dict[str, list[str]]:
    """{principle: its system prompts}, from a YAML file or the built-in one."""
    path = path or PRINCIPLES
    return validated(PrinciplesFile, read_yaml(path), str(path)).root


def draw_slots(config: FeedbackConfig, principles: Mapping[str, Sequence[str]], prompt_id: str) -> list[Slot]:
    """The completions of one prompt, by a draw that depends on the prompt's id and the seed alone.

    With at least as many models as completions each completion is another model's; otherwise every model answers about
    equally often. Every principle is used once before one is used again. More completions begin with the fewer.
    """
    seed = config.seed
    rng = random.Random(f"models {seed} {prompt_id}")
    order: list[EndpointSpec] = []
    while len(order) < config.completions:
        order.extend(rng.sample(config.models, len(config.models)))
    order = order[: config.completions]
    often = Counter(spec.name for spec in order)
    names = list(principles)
    rng = random.Random(f"principles {seed} {prompt_id}")
    rng.shuffle(names)
    slots = []
    for number, spec in enumerate(order):
        name = names[number % len(names)]
        text = rng.choice(list(principles[name]))  # drawn in any case, so that later draws do not depend on it
        use = config.principles
        steered = use == "all" or (use == "auto" and spec.path is None and often[spec.name] > 1)
        system = "\n\n".join(part for part in (spec.system, text if steered else None) if part)
        slots.append(Slot(number, spec.name, name if steered else "", system, seed_of(seed, prompt_id, number)))
    return slots


# -- the job ---------------------------------------------------------------------------------------------------------


async def together(work: Iterable[Awaitable[T]]) -> list[T | RequestFailed]:
    """All results, with RequestFailed in the place of those that failed by it; any other error is raised."""
    results: list[T | RequestFailed] = []
    for found in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(found, BaseException) and not isinstance(found, RequestFailed):
            raise found
        results.append(found)
    return results


class FeedbackJob:
    """Completions and ratings of prompts, and what is counted meanwhile.

    Args:
        read: the prompts.

    Attributes:
        rows: number of rows in train.jsonl.
        dropped: reason → the places of the prompts without a row.
        unreached: number of prompts that the budget did not reach, or reached in part.
        failed: missing completions by reason, the judge's ratings by aspect.
        completions: number of each model's completions.
        ratings: how often each rating was given, by (model, aspect).
    """

    def __init__(self, config: FeedbackConfig, read: Prompts) -> None:
        self.config, self.read, self.out = config, read, Path(config.out)
        self.principles = read_principles(Path(config.principles_file) if config.principles_file else None)
        self.rows, self.unreached, self.budget_message, self.totals = 0, 0, "", Totals()
        self.dropped: dict[str, list[str]] = {}
        self.failed: Counter[str] = Counter()
        self.completions: Counter[str] = Counter()
        self.ratings: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def cost_lines(self) -> list[str]:
        """What the job costs at most."""

        async def work(client: Client) -> None:
            for prompt in self.read.prompts:
                with suppress(RequestFailed):  # nothing is rated
                    await self.rate(client, prompt)

        return cost_lines(self.config.endpoints(), work, self.config.budget, self.out)

    def run(self, meter: Meter) -> None:
        """Make the data set in ``config.out``: train.jsonl, report.json, requests.sqlite, config.yaml.

        The rows are in the prompts' order, and the same however many requests run at once and however often the job was
        interrupted, if the servers give the same replies.

        Raises:
            UserError: the folder holds something else, an endpoint cannot answer at all, or no row came out.
        """
        run_job(self.config, COMMAND, partial(self._write_rows, meter.count_one), meter)
        self.totals = meter.totals
        write_json(self.out / REPORT, self.report())

    async def _write_rows(self, on_prompt: Callable[[], None], client: Client) -> None:
        prompts, config = self.read.prompts, self.config
        # enough prompts in progress to keep all endpoints busy, and few enough that little is half done when the budget ends
        answering = math.ceil(sum(spec.concurrency for spec in config.models) / config.completions)
        window = 2 * (answering + math.ceil(config.judge.concurrency / len(ASPECTS)))
        with file_aside(self.out / ROWS) as file:
            async for prompt, row in in_order(prompts, partial(self.rate, client), window):
                if isinstance(row, BudgetSpent):
                    self.unreached += 1
                    self.budget_message = str(row)
                elif isinstance(row, RequestFailed):
                    self.dropped.setdefault(row.reason, []).append(prompt.where)
                else:
                    self._count(row)
                    file.write(json_line(row))
                on_prompt()
            if not self.rows:  # an earlier file stays as it is
                failures = ", ".join(f"{reason}: {count:,}" for reason, count in self.failed.items())
                reasons = [summarise(self.dropped), self.budget_message, failures]
                raise nothing_made(self.out, f"row came out of {len(prompts):,} prompts", reasons)

    async def rate(self, client: Client, prompt: Prompt) -> dict[str, Any]:
        """Ask for the completions of a prompt, then for their ratings; returns the row in UltraFeedback's raw schema.

        Two completions are enough for a row. An aspect whose ratings cannot be parsed is "N/A" for all of them.

        Raises:
            RequestFailed: fewer than two completions, or no rating. BudgetSpent, UserError: of the client.
        """
        slots = draw_slots(self.config, self.principles, prompt.id)
        answered: list[tuple[Slot, dict[str, Any]]] = []
        for slot, reply in zip(slots, await together(client.ask(slot.request(prompt)) for slot in slots)):
            if isinstance(reply, RequestFailed) or not reply.text.strip():
                reason = reply.reason if isinstance(reply, RequestFailed) else "an empty answer"
                self.failed[f"{slot.endpoint}: {reason}"] += 1
                continue
            completion: dict[str, Any] = {
                "annotations": {},
                "custom_system_prompt": slot.system,
                "model": slot.endpoint,
                "principle": slot.principle,
                "response": reply.text.strip(),
                "critique": "",
                "overall_score": None,
            }
            answered.append((slot, completion))
        if len(answered) < 2:
            raise RequestFailed("fewer than two completions")
        completions = [completion for _, completion in answered]
        texts = [completion["response"] for completion in completions]
        for aspect, found in zip(ASPECTS, await together(self._rate(client, prompt, texts, a) for a in ASPECTS)):
            if isinstance(found, RequestFailed):
                self.failed[f"judge, {aspect.name}"] += 1
                found = [{"Rating": NOT_RATED, "Rationale": ""} for _ in texts]
            for completion, annotation in zip(completions, found):
                completion["annotations"][aspect.name] = annotation
        if self.config.overall:
            scores = await together(self._score(client, prompt, slot, each["response"]) for slot, each in answered)
            for completion, score in zip(completions, scores):
                if isinstance(score, RequestFailed):
                    self.failed[f"judge, overall: {score.reason}"] += 1
                else:
                    completion["critique"], completion["overall_score"] = score.critique, score.overall_score
        for completion in completions:
            ratings = Counter(annotation["Rating"] for annotation in completion["annotations"].values())
            completion["fine-grained_score"] = _mean(ratings)
        if all(completion["fine-grained_score"] is None for completion in completions):
            raise RequestFailed("the judge rated nothing")
        return {
            "source": prompt.source,
            "instruction": prompt.text,
            "models": [slot.endpoint for slot, _ in answered],
            "completions": completions,
            "correct_answers": prompt.correct,
            "incorrect_answers": prompt.incorrect,
        }

    async def _rate(self, client: Client, prompt: Prompt, texts: Sequence[str], aspect: Aspect) -> list[dict[str, str]]:
        """Each text's rating on one aspect; the judge sees them in a drawn order."""
        order = shown_order(prompt.id, aspect.name, len(texts), self.config.seed)
        messages = aspect_messages(aspect, prompt.text, [texts[place] for place in order])
        request = self._judge_request(f"rating/{prompt.id[:16]}/{aspect.name}", messages, prompt.id, aspect.name)
        na = bool(aspect.not_rated)
        shown = await client.ask_parsed(request, lambda reply: parse_ratings(reply, len(texts), na))
        rated = {place: {"Rating": str(r.rating), "Rationale": r.rationale} for place, r in zip(order, shown)}
        return [rated[place] for place in range(len(texts))]

    async def _score(self, client: Client, prompt: Prompt, slot: Slot, text: str) -> Overall:
        key = f"overall/{prompt.id[:16]}/{slot.number}/{slot.endpoint}"
        request = self._judge_request(key, overall_messages(prompt.text, text), prompt.id, "overall", slot.number)
        return await client.ask_parsed(request, parse_overall)

    def _judge_request(self, key: str, messages: tuple[Message, ...], *seed: object) -> Request:
        """At temperature 0, unless the configuration sets another."""
        judge = self.config.judge
        temperature = None if "temperature" in judge.model_fields_set else 0.0
        return Request(key, judge.name, messages, temperature, seed=seed_of(self.config.seed, *seed))

    def _count(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        for completion in row["completions"]:
            self.completions[completion["model"]] += 1
            for name, annotation in completion["annotations"].items():
                self.ratings[completion["model"], name][annotation["Rating"]] += 1

    def report(self) -> dict[str, Any]:
        """For report.json."""
        ratings: dict[str, dict[str, Any]] = {}
        for model in sorted(self.completions):
            counts = {aspect.name: self.ratings[model, aspect.name] for aspect in ASPECTS}
            ratings[model] = {
                name: {"mean": _mean(given), "counts": dict(sorted(given.items()))} for name, given in counts.items()
            }
        return {
            "command": COMMAND,
            "version": __version__,
            "prompts": {
                "source": self.read.label,
                "rows": self.read.read,
                "prompts": len(self.read.prompts),
                "left_out": first_places(self.read.dropped, PLACES),
            },
            "rows": self.rows,
            "dropped": first_places(self.dropped, PLACES),
            "not_reached_by_the_budget": self.unreached,
            "completions": dict(sorted(self.completions.items())),
            "failed": dict(self.failed.most_common()),
            "ratings": ratings,
            "spent": self.totals.as_dict(),
        }

    def lines(self) -> list[str]:
        """The result, one fact a line."""
        result = [f"{self.out / ROWS}: {self.rows:,} rows of {len(self.read.prompts):,} prompts"]
        if self.dropped:
            result.append(f"dropped: {summarise(self.dropped)}")
        if self.unreached:
            result.append(f"{self.unreached:,} prompts are not done: {self.budget_message} {CONTINUES}")
        return result

    def ratings_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: each model's mean rating on each aspect, the best model first."""
        header = ["model", *(aspect.name.replace("_", " ") for aspect in ASPECTS), "mean", "completions"]
        rows = []
        for model, completions in self.completions.items():
            counts = [self.ratings[model, aspect.name] for aspect in ASPECTS]
            means = [_mean(each) for each in (*counts, sum(counts, Counter()))]
            texts = ["-" if value is None else f"{value:.2f}" for value in means]
            rows.append((-(means[-1] or 0.0), model, [model, *texts, f"{completions:,}"]))
        return header, [row for _, _, row in sorted(rows)]


def _mean(ratings: Mapping[str, int]) -> float | None:
    """The mean of the ratings that are numbers."""
    given = Counter({int(rating): count for rating, count in ratings.items() if rating != NOT_RATED})
    return statistics.fmean(given.elements()) if given else None


def make_pair_folder(config: FeedbackConfig) -> list[str]:
    """``OUT/pairs`` from ``OUT/train.jsonl``, as ``data pairs`` makes it by default; returns lines about the result.

    Rows without any pair are no error: the ratings are kept, and other rules may find pairs.
    """
    rows, pairs = Path(config.out, ROWS), Path(config.out, PAIRS)
    try:
        report = make_pairs([str(rows)], pairs, PairRules(seed=config.seed), overwrite=True)
    except UserError as error:
        earlier = f" {pairs} is from an earlier run." if pairs.exists() else ""
        return [f"no pairs: {error.message}{earlier}", f"With other rules: zephyr-lite data pairs {rows} --out {pairs}"]
    assert report is not None  # overwritten
    return [*report_lines(report), f"Next: zephyr-lite dpo dataset.path={pairs} dataset.split=train_prefs"]
