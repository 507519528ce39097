"""``zephyr-lite feedback``: prompts → completions → ratings → rows in UltraFeedback's raw schema, and pairs of them."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from ... import __version__
from ...client.client import BudgetSpent, ModelClient, Request, RequestFailed, open_client, seed_of
from ...client.cost import Bound, Meter, has_prices, prompt_bound
from ...client.endpoints import EndpointSpec, Message
from ...client.jobs import NotBlank, claim_folder, in_order, json_line, run_job, together, validated
from ...client.request_log import Reply, Totals
from ...config.strict_yaml import read_yaml
from ...data.load import summarise
from ...errors import UserError
from ...io.atomic import file_aside, write_json
from .config import FeedbackConfig
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
from .prompts import Prompt, Prompts

COMMAND = "feedback"
ROWS, REPORT, PAIRS = "train.jsonl", "report.json", "pairs"
PRINCIPLES = Path(__file__).parent / "principles.yaml"
PARSED_TRIES = 3  # draws of a rating that cannot be parsed
FAILED = Rating(NOT_RATED, "")
PLACES = 20  # of left out prompts, in the report


# -- the completions to ask for --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One completion to ask for.

    Attributes:
        number: its place among the prompt's completions, from 0.
        endpoint: the name of the model that answers.
        principle: the name of the virtue that its system prompt asks for, or "".
        system: the system prompt as it is sent, with the endpoint's own, or "".
        seed: for sampling.
    """

    number: int
    endpoint: str
    principle: str
    system: str
    seed: int


class PrinciplesFile(RootModel[dict[str, list[str]]]):
    """A YAML file of principles: names, each with a list of system prompts."""

    root: dict[str, Annotated[list[NotBlank], Field(min_length=1)]] = Field(min_length=1)


def read_principles(path: Path | None = None) -> dict[str, list[str]]:
    """{principle: its system prompts}, from a YAML file or the built-in one.

    Raises:
        UserError: the file cannot be read, or has no list of texts under each name.
    """
    path = path or PRINCIPLES
    return validated(PrinciplesFile, read_yaml(path), str(path)).root


def draw_slots(
    prompt_id: str,
    models: Sequence[EndpointSpec],
    completions: int,
    principles: Mapping[str, Sequence[str]],
    use: Literal["auto", "all", "none"],
    seed: int,
) -> list[Slot]:
    """The completions of one prompt, by a draw that depends on the prompt's id and the seed alone.

    With at least as many models as completions each completion is another model's; otherwise every model answers about
    equally often. Every principle is used once before one is used again. More completions begin with the fewer.

    Args:
        models: of different names.
        principles: of ``read_principles``.
        use: which completions get a principle, see ``FeedbackConfig.principles``.
    """
    rng = random.Random(f"models {seed} {prompt_id}")
    order: list[EndpointSpec] = []
    while len(order) < completions:
        order.extend(rng.sample(list(models), len(models)))
    order = order[:completions]
    names = list(principles)
    rng = random.Random(f"principles {seed} {prompt_id}")
    rng.shuffle(names)
    often = Counter(spec.name for spec in order)
    slots = []
    for number, spec in enumerate(order):
        name = names[number % len(names)]
        text = rng.choice(list(principles[name]))  # drawn in any case, so that later draws do not depend on it
        steered = use == "all" or (use == "auto" and spec.path is None and often[spec.name] > 1)
        system = "\n\n".join(part for part in (spec.system, text if steered else None) if part)
        slots.append(
            Slot(number, spec.name, name if steered else "", system, seed_of(seed, prompt_id, number)),
        )
    return slots


def completion_request(prompt: Prompt, slot: Slot) -> Request:
    """The prompt under the slot's system prompt."""
    system: tuple[Message, ...] = ({"role": "system", "content": slot.system},) if slot.system else ()
    return Request(
        key=f"completion/{prompt.id[:16]}/{slot.number}/{slot.endpoint}",
        endpoint=slot.endpoint,
        messages=(*system, {"role": "user", "content": prompt.text}),
        seed=slot.seed,
    )


# -- one prompt ------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts for the report. Ratings: (model, aspect) → how often each was given."""

    completions: Counter[str] = field(default_factory=Counter)  # by model
    cut: Counter[str] = field(default_factory=Counter)  # by model: ended at max_tokens
    failed: Counter[str] = field(default_factory=Counter)  # missing completions, by reason
    principles: Counter[str] = field(default_factory=Counter)
    ratings: defaultdict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    places: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by place in the list
    unread: Counter[str] = field(default_factory=Counter)  # the judge's failed requests, by aspect
    critiques: int = 0

    def add(self, row: Mapping[str, Any], prompt_id: str, seed: int) -> None:
        """Count a row."""
        completions = row["completions"]
        for completion in completions:
            self.completions[completion["model"]] += 1
            self.principles[completion["principle"] or "none"] += 1
            self.critiques += completion["overall_score"] is not None
            for name, annotation in completion["annotations"].items():
                self.ratings[completion["model"], name][annotation["Rating"]] += 1
        for aspect in ASPECTS:
            for place, index in enumerate(shown_order(prompt_id, aspect.name, len(completions), seed)):
                self.places[place][completions[index]["annotations"][aspect.name]["Rating"]] += 1


class NoRow(Exception):
    """A prompt that gives no row; ``str(error)`` is the reason under which it is counted."""


async def rate_prompt(
    client: ModelClient, config: FeedbackConfig, principles: Mapping[str, Sequence[str]], prompt: Prompt, tally: Tally
) -> dict[str, Any]:
    """Ask for the completions of a prompt, then for their ratings.

    Two completions are enough for a row. An aspect whose ratings cannot be parsed is "N/A" for all of them.

    Returns:
        The row: source, instruction, models, completions, correct_answers, incorrect_answers.

    Raises:
        NoRow: fewer than two completions, or no rating. BudgetSpent, UserError: of the client.
    """
    slots = draw_slots(prompt.id, config.models, config.completions, principles, config.principles, config.seed)
    answered: list[tuple[Slot, Reply]] = []
    for slot, reply in zip(slots, await together(_complete(client, prompt, slot) for slot in slots)):
        if isinstance(reply, RequestFailed):
            tally.failed[f"{slot.endpoint}: {reply.reason}"] += 1
        else:
            answered.append((slot, reply))
    if len(answered) < 2:
        raise NoRow("fewer than two completions")
    texts = [reply.text for _, reply in answered]
    ratings: dict[str, list[Rating]] = {}
    for aspect, rated in zip(ASPECTS, await together(_rate(client, config, prompt, a, texts) for a in ASPECTS)):
        tally.unread[aspect.name] += isinstance(rated, RequestFailed)
        ratings[aspect.name] = [FAILED] * len(texts) if isinstance(rated, RequestFailed) else rated
    scores: list[Overall | None] = [None] * len(texts)
    if config.overall:
        scored = await together(_score(client, config, prompt, slot, reply.text) for slot, reply in answered)
        tally.unread["overall"] += sum(isinstance(score, RequestFailed) for score in scored)
        scores = [None if isinstance(score, RequestFailed) else score for score in scored]
    if all(r.rating == NOT_RATED for rated in ratings.values() for r in rated):
        raise NoRow("the judge rated nothing")
    for slot, reply in answered:
        tally.cut[slot.endpoint] += reply.finish_reason == "length"
    return {
        "source": prompt.source,
        "instruction": prompt.text,
        "models": [slot.endpoint for slot, _ in answered],
        "completions": [
            _completion(slot, reply.text, {name: rated[place] for name, rated in ratings.items()}, scores[place])
            for place, (slot, reply) in enumerate(answered)
        ],
        "correct_answers": list(prompt.correct),
        "incorrect_answers": list(prompt.incorrect),
    }


async def _complete(client: ModelClient, prompt: Prompt, slot: Slot) -> Reply:
    reply = await client.ask(completion_request(prompt, slot))
    if not reply.text.strip():
        raise RequestFailed("the answer is empty", "an empty answer")
    return replace(reply, text=reply.text.strip())


def _judge_temperature(judge: EndpointSpec) -> float | None:
    """0, unless the configuration says otherwise."""
    return None if "temperature" in judge.model_fields_set else 0.0


async def _rate(
    client: ModelClient, config: FeedbackConfig, prompt: Prompt, aspect: Aspect, texts: Sequence[str]
) -> list[Rating]:
    """The ratings of all completions on one aspect, shown in a drawn order and returned in that of ``texts``."""
    order = shown_order(prompt.id, aspect.name, len(texts), config.seed)
    request = Request(
        key=f"rating/{prompt.id[:16]}/{aspect.name}",
        endpoint=config.judge.name,
        messages=aspect_messages(aspect, prompt.text, [texts[place] for place in order]),
        temperature=_judge_temperature(config.judge),
        seed=seed_of(config.seed, prompt.id, aspect.name),
    )
    may_be_na = bool(aspect.not_rated)
    shown = await client.ask_parsed(request, lambda text: parse_ratings(text, len(texts), may_be_na), PARSED_TRIES)
    ratings = [FAILED] * len(texts)
    for place, rating in zip(order, shown):
        ratings[place] = rating
    return ratings


async def _score(client: ModelClient, config: FeedbackConfig, prompt: Prompt, slot: Slot, text: str) -> Overall:
    request = Request(
        key=f"overall/{prompt.id[:16]}/{slot.number}/{slot.endpoint}",
        endpoint=config.judge.name,
        messages=overall_messages(prompt.text, text),
        temperature=_judge_temperature(config.judge),
        seed=seed_of(config.seed, prompt.id, "overall", slot.number),
    )
    return await client.ask_parsed(request, parse_overall, PARSED_TRIES)


def _completion(slot: Slot, text: str, ratings: Mapping[str, Rating], score: Overall | None) -> dict[str, Any]:
    given = [int(r.rating) for r in ratings.values() if r.rating != NOT_RATED]
    return {
        "annotations": {name: {"Rating": r.rating, "Rationale": r.rationale} for name, r in ratings.items()},
        "custom_system_prompt": slot.system,
        "model": slot.endpoint,
        "principle": slot.principle,
        "response": text,
        "critique": score.critique if score else "",
        "overall_score": score.score if score else None,
        "fine-grained_score": sum(given) / len(given) if given else None,
    }


# -- all prompts -----------------------------------------------------------------------------------------------------


@dataclass
class Feedback:
    """The result of a run.

    Attributes:
        rows: written to train.jsonl.
        dropped: reason → the places of the prompts without a row.
        unreached: prompts that the budget did not reach, or reached in part.
        budget_message: why it did not, or "".
        totals: what the job has spent in all.
    """

    out: Path
    read: Prompts
    tally: Tally = field(default_factory=Tally)
    rows: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    unreached: int = 0
    budget_message: str = ""
    totals: Totals = field(default_factory=Totals)

    def report(self, config: FeedbackConfig) -> dict[str, Any]:
        """For report.json."""
        tally = self.tally
        return {
            "command": COMMAND,
            "version": __version__,
            "prompts": {
                "source": self.read.label,
                "rows": self.read.read,
                "prompts": len(self.read.prompts),
                "left_out": _places(self.read.dropped),
            },
            "rows": self.rows,
            "dropped": _places(self.dropped),
            "not_reached_by_the_budget": self.unreached,
            "completions": dict(sorted(tally.completions.items())),
            "completions_cut_at_max_tokens": {model: count for model, count in sorted(tally.cut.items()) if count},
            "completions_failed": dict(tally.failed.most_common()),
            "principles": dict(sorted(tally.principles.items())),
            "ratings": {
                model: {aspect.name: _rating_report(tally.ratings[model, aspect.name]) for aspect in ASPECTS}
                for model in sorted(tally.completions)
            },
            # shows whether the judge favours a place of its list
            "mean_rating_by_place": [_rating_report(tally.places[place])["mean"] for place in sorted(tally.places)],
            "judge_replies_not_readable_or_failed": {name: count for name, count in tally.unread.items() if count},
            "critiques": tally.critiques,
            "spent": self.totals.as_dict(),
            "prices_given": has_prices(config.endpoints().values()),
        }

    def lines(self) -> list[str]:
        """The result, one fact a line."""
        result = [f"{self.out / ROWS}: {self.rows:,} rows of {len(self.read.prompts):,} prompts"]
        if self.dropped:
            result.append(f"dropped: {summarise(self.dropped)}")
        if self.unreached:
            result.append(
                f"{self.unreached:,} prompts are not done: {self.budget_message} "
                "The same command with a larger budget continues the job and sends no answered request again."
            )
        return result

    def ratings_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: each model's mean rating on each aspect, the best model first."""
        header = ["model", *(aspect.name.replace("_", " ") for aspect in ASPECTS), "mean", "completions"]
        rows = []
        for model, completions in self.tally.completions.items():
            counts = [self.tally.ratings[model, aspect.name] for aspect in ASPECTS]
            means = [_mean(each) for each in (*counts, sum(counts, Counter()))]
            texts = ["-" if value is None else f"{value:.2f}" for value in means]
            rows.append((-(means[-1] or 0.0), model, [model, *texts, f"{completions:,}"]))
        return header, [row for _, _, row in sorted(rows)]


def _places(reasons: Mapping[str, list[str]]) -> dict[str, Any]:
    return {reason: {"count": len(where), "first": where[:PLACES]} for reason, where in reasons.items()}


def _mean(ratings: Mapping[str, int]) -> float | None:
    """The mean of the ratings that are numbers."""
    given = {int(rating): count for rating, count in ratings.items() if rating != NOT_RATED}
    count = sum(given.values())
    return sum(rating * often for rating, often in given.items()) / count if count else None


def _rating_report(ratings: Mapping[str, int]) -> dict[str, Any]:
    mean = _mean(ratings)
    return {"mean": None if mean is None else round(mean, 4), "counts": dict(sorted(ratings.items()))}


def run_feedback(config: FeedbackConfig, read: Prompts, meter: Meter, *, back_off: float = 1.0) -> Feedback:
    """Make the data set in ``config.out``: train.jsonl, report.json, requests.sqlite, config.yaml.

    The rows are in the prompts' order, and the same however many requests run at once and however often the job was
    interrupted, if the servers give the same replies.

    Args:
        read: of ``read_prompts``.
        back_off: of ``open_client``.

    Raises:
        UserError: the folder holds something else, an endpoint cannot answer at all, or no row came out. All replies
            are in the request log in each case.
    """
    out = Path(config.out)
    principles = read_principles(Path(config.principles_file) if config.principles_file else None)
    claim_folder(out, COMMAND, config)
    result = Feedback(out, read)
    run_job(_run(config, principles, result, meter, back_off))
    write_json(out / REPORT, result.report(config))
    return result


async def _run(
    config: FeedbackConfig, principles: dict[str, list[str]], result: Feedback, meter: Meter, back_off: float
) -> None:
    async with open_client(
        list(config.endpoints().values()),
        result.out,
        max_requests=config.budget.requests,
        max_tokens=config.budget.tokens,
        on_progress=meter.totals,
        back_off=back_off,
    ) as client:
        result.totals = client.totals

        async def row_of(prompt: Prompt) -> dict[str, Any] | NoRow | BudgetSpent:
            try:
                return await rate_prompt(client, config, principles, prompt, result.tally)
            except (NoRow, BudgetSpent) as reason:
                return reason

        with file_aside(result.out / ROWS) as file:
            async for prompt, row in in_order(result.read.prompts, row_of, window_of(config)):
                if isinstance(row, BudgetSpent):
                    result.unreached += 1
                    result.budget_message = str(row)
                elif isinstance(row, NoRow):
                    result.dropped.setdefault(str(row), []).append(prompt.where)
                else:
                    result.tally.add(row, prompt.id, config.seed)
                    file.write(json_line(row))
                    result.rows += 1
                meter.advance()
            if not result.rows:
                raise _no_rows(result)  # an earlier file stays as it is


def window_of(config: FeedbackConfig) -> int:
    """Number of prompts in progress: enough to keep all endpoints busy, and few enough that little is half done when
    the budget ends."""
    answering = math.ceil(sum(spec.concurrency for spec in config.models) / config.completions)
    return 2 * (answering + math.ceil(config.judge.concurrency / len(ASPECTS)))


def _no_rows(result: Feedback) -> UserError:
    failed = Counter(result.tally.failed)
    failed.update({f"judge, {name}": count for name, count in result.tally.unread.items() if count})
    reasons = [
        summarise(result.dropped),
        result.budget_message,
        ", ".join(f"{reason}: {count:,}" for reason, count in failed.items()),
    ]
    return UserError(
        f"{result.out}: no row came out of {len(result.read.prompts):,} prompts: {'; '.join(filter(None, reasons))}",
        ("Give a larger budget" if result.unreached else "Look at the reasons")
        + "; the same command continues the job, and all replies so far are kept.",
    )


def feedback_bounds(
    config: FeedbackConfig, prompts: Iterable[Prompt], principles: Mapping[str, Sequence[str]]
) -> dict[str, Bound]:
    """{endpoint: upper bounds of what a job costs}; the judge reads a completion as its ``max_tokens``."""
    specs = config.endpoints()
    bounds = {name: Bound() for name in specs}
    judge = config.judge

    def add_judged(messages: Sequence[Message], completion_tokens: int) -> None:
        prompt_tokens = prompt_bound(judge, messages, completion_tokens)
        bounds[judge.name].add(judge, prompt_tokens, judge.max_tokens, tries=PARSED_TRIES)

    for prompt in prompts:
        slots = draw_slots(prompt.id, config.models, config.completions, principles, config.principles, config.seed)
        lengths = [specs[slot.endpoint].max_tokens for slot in slots]
        for slot, length in zip(slots, lengths):
            spec = specs[slot.endpoint]
            bounds[spec.name].add(spec, prompt_bound(spec, completion_request(prompt, slot).messages), length)
            if config.overall:
                add_judged(overall_messages(prompt.text, ""), length)
        for aspect in ASPECTS:
            add_judged(aspect_messages(aspect, prompt.text, [""] * len(slots)), sum(lengths))
    return bounds


def make_pair_folder(config: FeedbackConfig) -> list[str]:
    """``OUT/pairs`` from ``OUT/train.jsonl``, as ``data pairs`` makes it by default; returns lines about the result.

    Rows without any pair are no error: the ratings are kept, and other rules may find pairs.
    """
    from ..pairs import make_pairs
    from ..ultrafeedback import PairRules

    rows, pairs = Path(config.out, ROWS), Path(config.out, PAIRS)
    try:
        report = make_pairs([str(rows)], pairs, PairRules(seed=config.seed), overwrite=True)
    except UserError as error:
        earlier = f" {pairs} is from an earlier run." if pairs.exists() else ""
        return [f"no pairs: {error.message}{earlier}", f"With other rules: zephyr-lite data pairs {rows} --out {pairs}"]
    assert report is not None  # overwritten
    return [*report.lines(), f"Next: zephyr-lite dpo dataset.path={pairs} dataset.split=train_prefs"]
