"""``zephyr-lite feedback``: prompts → completions → ratings → rows in UltraFeedback's raw schema, and pairs of them."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, RootModel, model_validator

from .. import __version__
from ..client.client import BudgetSpent, ModelClient, Request, RequestFailed, seed_of
from ..client.cost import Bound, CostClient, Meter
from ..client.endpoints import EndpointKey, EndpointSpec, Message
from ..client.jobs import (
    CONTINUES,
    JobConfig,
    NotBlank,
    claim_folder,
    distinct_name,
    in_order,
    json_line,
    nothing_made,
    refuse_equal_names,
    run_job,
    validated,
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
    Rating,
    aspect_messages,
    overall_messages,
    parse_overall,
    parse_ratings,
    shown_order,
)
from .prompts import Prompt, Prompts, PromptsKey
from .ultrafeedback import PairRules, make_pairs

T = TypeVar("T")
COMMAND = "feedback"
ROWS, REPORT, PAIRS = "train.jsonl", "report.json", "pairs"
PRINCIPLES = Path(__file__).parent / "principles.yaml"
PARSED_TRIES = 3  # draws of a rating that cannot be parsed
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


# -- one prompt ------------------------------------------------------------------------------------------------------


@dataclass
class Feedback:
    """The result of a run."""

    out: Path
    read: Prompts
    rows: int = 0  # written to train.jsonl
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason → the places of the prompts without a row
    unreached: int = 0  # prompts that the budget did not reach, or reached in part
    budget_message: str = ""
    totals: Totals = field(default_factory=Totals)
    completions: Counter[str] = field(default_factory=Counter)  # by model
    # missing completions by reason, the judge's ratings by aspect
    failed: Counter[str] = field(default_factory=Counter)
    # how often each rating was given, by (model, aspect)
    ratings: defaultdict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row."""
        self.rows += 1
        for completion in row["completions"]:
            self.completions[completion["model"]] += 1
            for name, annotation in completion["annotations"].items():
                self.ratings[completion["model"], name][annotation["Rating"]] += 1

    def report(self) -> dict[str, Any]:
        """For report.json."""
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
            "ratings": {
                model: {aspect.name: _rating_report(self.ratings[model, aspect.name]) for aspect in ASPECTS}
                for model in sorted(self.completions)
            },
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
    given = {int(rating): count for rating, count in ratings.items() if rating != NOT_RATED}
    count = sum(given.values())
    return sum(rating * often for rating, often in given.items()) / count if count else None


def _rating_report(ratings: Mapping[str, int]) -> dict[str, Any]:
    mean = _mean(ratings)
    return {"mean": None if mean is None else round(mean, 4), "counts": dict(sorted(ratings.items()))}


async def together(work: Iterable[Awaitable[T]]) -> list[T | RequestFailed]:
    """All results, with RequestFailed in the place of those that failed by it; any other error is raised."""
    results: list[T | RequestFailed] = []
    for found in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(found, BaseException) and not isinstance(found, RequestFailed):
            raise found
        results.append(found)
    return results


async def rate_prompt(
    client: ModelClient | CostClient,
    config: FeedbackConfig,
    principles: Mapping[str, Sequence[str]],
    result: Feedback,
    prompt: Prompt,
) -> dict[str, Any]:
    """Ask for the completions of a prompt, then for their ratings; returns the row in UltraFeedback's raw schema.

    Two completions are enough for a row. An aspect whose ratings cannot be parsed is "N/A" for all of them.

    Raises:
        RequestFailed: fewer than two completions, or no rating. BudgetSpent, UserError: of the client.
    """
    slots = draw_slots(config, principles, prompt.id)
    answered: list[Slot] = []
    completions: list[dict[str, Any]] = []
    for slot, reply in zip(slots, await together(client.ask(slot.request(prompt)) for slot in slots)):
        text = "" if isinstance(reply, RequestFailed) else reply.text.strip()
        if not text:
            reason = reply.reason if isinstance(reply, RequestFailed) else "an empty answer"
            result.failed[f"{slot.endpoint}: {reason}"] += 1
            continue
        answered.append(slot)
        completions.append(
            {
                "annotations": {},
                "custom_system_prompt": slot.system,
                "model": slot.endpoint,
                "principle": slot.principle,
                "response": text,
                "critique": "",
                "overall_score": None,
            }
        )
    if len(completions) < 2:
        raise RequestFailed("fewer than two completions")
    texts = [completion["response"] for completion in completions]

    def judge_request(key: str, messages: tuple[Message, ...], *parts: object) -> Request:
        """At temperature 0, unless the configuration sets another."""
        temperature = None if "temperature" in config.judge.model_fields_set else 0.0
        return Request(key, config.judge.name, messages, temperature, seed=seed_of(config.seed, prompt.id, *parts))

    async def rate(aspect: Aspect) -> list[tuple[int, Rating]]:
        """(place among the completions, rating) on one aspect; they are shown to the judge in a drawn order."""
        order = shown_order(prompt.id, aspect.name, len(texts), config.seed)
        messages = aspect_messages(aspect, prompt.text, [texts[place] for place in order])
        request = judge_request(f"rating/{prompt.id[:16]}/{aspect.name}", messages, aspect.name)
        na = bool(aspect.not_rated)
        shown = await client.ask_parsed(request, lambda reply: parse_ratings(reply, len(texts), na), PARSED_TRIES)
        return list(zip(order, shown))

    async def score(slot: Slot, text: str) -> Overall:
        key = f"overall/{prompt.id[:16]}/{slot.number}/{slot.endpoint}"
        request = judge_request(key, overall_messages(prompt.text, text), "overall", slot.number)
        return await client.ask_parsed(request, parse_overall, PARSED_TRIES)

    rated_any = False
    for aspect, rated in zip(ASPECTS, await together(rate(aspect) for aspect in ASPECTS)):
        for completion in completions:
            completion["annotations"][aspect.name] = {"Rating": NOT_RATED, "Rationale": ""}
        if isinstance(rated, RequestFailed):
            result.failed[f"judge, {aspect.name}"] += 1
            continue
        for place, rating in rated:
            annotation = {"Rating": str(rating.rating), "Rationale": rating.rationale}
            completions[place]["annotations"][aspect.name] = annotation
            rated_any = rated_any or annotation["Rating"] != NOT_RATED
    if config.overall:
        scores = await together(score(slot, text) for slot, text in zip(answered, texts))
        for completion, found in zip(completions, scores):
            if isinstance(found, RequestFailed):
                result.failed[f"judge, overall: {found.reason}"] += 1
            else:
                completion["critique"], completion["overall_score"] = found.critique, found.overall_score
    if not rated_any:
        raise RequestFailed("the judge rated nothing")
    for completion in completions:
        ratings = Counter(annotation["Rating"] for annotation in completion["annotations"].values())
        completion["fine-grained_score"] = _mean(ratings)
    return {
        "source": prompt.source,
        "instruction": prompt.text,
        "models": [slot.endpoint for slot in answered],
        "completions": completions,
        "correct_answers": prompt.correct,
        "incorrect_answers": prompt.incorrect,
    }


# -- all prompts -----------------------------------------------------------------------------------------------------


def run_feedback(config: FeedbackConfig, read: Prompts, meter: Meter) -> Feedback:
    """Make the data set in ``config.out``: train.jsonl, report.json, requests.sqlite, config.yaml.

    The rows are in the prompts' order, and the same however many requests run at once and however often the job was
    interrupted, if the servers give the same replies.

    Raises:
        UserError: the folder holds something else, an endpoint cannot answer at all, or no row came out.
    """
    out = Path(config.out)
    principles = read_principles(Path(config.principles_file) if config.principles_file else None)
    claim_folder(out, COMMAND, config)
    result = Feedback(out, read)
    # enough prompts in progress to keep all endpoints busy, and few enough that little is half done when the budget ends
    answering = math.ceil(sum(spec.concurrency for spec in config.models) / config.completions)
    window = 2 * (answering + math.ceil(config.judge.concurrency / len(ASPECTS)))

    async def run() -> None:
        async with config.client() as client:
            result.totals = meter.totals = client.totals
            rate = partial(rate_prompt, client, config, principles, result)
            with file_aside(out / ROWS) as file:
                async for prompt, row in in_order(read.prompts, rate, window):
                    if isinstance(row, BudgetSpent):
                        result.unreached += 1
                        result.budget_message = str(row)
                    elif isinstance(row, RequestFailed):
                        result.dropped.setdefault(row.reason, []).append(prompt.where)
                    else:
                        result.add(row)
                        file.write(json_line(row))
                    meter.advance()
                if not result.rows:  # an earlier file stays as it is
                    failures = ", ".join(f"{reason}: {count:,}" for reason, count in result.failed.items())
                    reasons = [summarise(result.dropped), result.budget_message, failures]
                    what = f"row came out of {len(read.prompts):,} prompts"
                    raise nothing_made(out, what, reasons)

    run_job(run())
    write_json(out / REPORT, result.report())
    return result


def feedback_bounds(
    config: FeedbackConfig, prompts: Iterable[Prompt], principles: Mapping[str, Sequence[str]]
) -> dict[str, Bound]:
    """{endpoint: upper bounds of what a job costs}."""
    client = CostClient(config.endpoints())
    unused = Feedback(Path(config.out), Prompts(""))

    async def ask_all() -> None:
        for prompt in prompts:
            with suppress(RequestFailed):  # nothing is rated
                await rate_prompt(client, config, principles, unused, prompt)

    asyncio.run(ask_all())
    return client.bounds


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
    return [*report.lines(), f"Next: zephyr-lite dpo dataset.path={pairs} dataset.split=train_prefs"]
