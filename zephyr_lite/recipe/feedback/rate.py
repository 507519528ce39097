"""One prompt: its completions, their ratings, and the row in UltraFeedback's raw schema."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...client.types import BudgetSpent, Desk, EndpointSpec, Message, Reply, Request, RequestFailed
from .draw import Slot, draw_slots, seed_of
from .files import valid
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
from .pool import cancel
from .prompts import Prompt
from .specs import FeedbackConfig

T = TypeVar("T")
FAILED = Rating(NOT_RATED, "")


@dataclass
class Tally:
    """What a report counts. Ratings: (who, aspect) → how often each was given."""

    completions: Counter[str] = field(default_factory=Counter)  # by model
    cut: Counter[str] = field(default_factory=Counter)  # by model: ended by max_tokens
    failed: Counter[str] = field(default_factory=Counter)  # completions that are missing, by reason
    principles: Counter[str] = field(default_factory=Counter)
    ratings: defaultdict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    places: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by place in the list
    unread: Counter[str] = field(default_factory=Counter)  # the judge's requests that came to nothing, by aspect
    critiques: int = 0


class NoRow(Exception):
    """A prompt that gives no row; ``str(error)`` is the reason under which it is counted."""


@dataclass(frozen=True)
class Answered:
    """A completion that is there."""

    slot: Slot
    text: str
    cut: bool


async def rate_prompt(
    desk: Desk, config: FeedbackConfig, principles: Mapping[str, Sequence[str]], prompt: Prompt, tally: Tally
) -> dict[str, Any]:
    """Ask for the completions of a prompt, then for their ratings.

    Fewer completions than were asked for make a row as long as there are two. An aspect whose ratings cannot be read is
    "N/A" for each of them; a row without a single rating is none.

    Returns:
        The row: source, instruction, models, completions, correct_answers, incorrect_answers.

    Raises:
        NoRow: fewer than two completions, or no rating. BudgetSpent, UserError: of the desk.
    """
    slots = draw_slots(prompt.id, config.models, config.completions, principles, config.principles, config.seed)
    replies = await together(_complete(desk, prompt, slot) for slot in slots)
    answered = []
    for slot, reply in zip(slots, replies):
        if isinstance(reply, Answered):
            answered.append(reply)
        else:
            tally.failed[f"{slot.endpoint}: {reply.reason}"] += 1
    if len(answered) < 2:
        raise NoRow("fewer than two completions")
    texts = [one.text for one in answered]
    rated = await together(_rate(desk, config, prompt, aspect, texts) for aspect in ASPECTS)
    by_aspect: dict[str, list[Rating]] = {}
    for aspect, ratings in zip(ASPECTS, rated):
        if isinstance(ratings, RequestFailed):
            tally.unread[aspect.name] += 1
            by_aspect[aspect.name] = [FAILED] * len(answered)
        else:
            by_aspect[aspect.name] = ratings
    overall: Sequence[Overall | RequestFailed | None] = [None] * len(answered)
    if config.overall:
        overall = await together(_score(desk, config, prompt, one) for one in answered)
    if all(r.rating == NOT_RATED for ratings in by_aspect.values() for r in ratings):
        raise NoRow("the judge rated nothing")
    _count(tally, config, prompt, answered, by_aspect, overall)
    return {
        "source": prompt.source,
        "instruction": prompt.text,
        "models": [one.slot.endpoint for one in answered],
        "completions": [
            _completion(one, {name: ratings[place] for name, ratings in by_aspect.items()}, overall[place])
            for place, one in enumerate(answered)
        ],
        "correct_answers": list(prompt.correct),
        "incorrect_answers": list(prompt.incorrect),
    }


async def together(work: Iterable[Awaitable[T]]) -> list[T | RequestFailed]:
    """All at once; what failed by itself stands in its place. Everything has ended when this returns or raises.

    Raises:
        BudgetSpent: of any, when all have ended. Any other error at once: the rest is cancelled.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        running = set(tasks)
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is not None and not isinstance(error, (RequestFailed, BudgetSpent)):
                    raise error
    finally:
        await cancel(tasks)  # those that have ended too: asyncio prints an error that nobody has looked at
    found: list[T | RequestFailed] = []
    for task in tasks:
        error = task.exception()
        found.append(error if isinstance(error, RequestFailed) else task.result())
    return found


# -- requests --------------------------------------------------------------------------------------------------------


def completion_request(prompt: Prompt, slot: Slot) -> Request:
    """The prompt under the slot's system prompt."""
    system: tuple[Message, ...] = ({"role": "system", "content": slot.system},) if slot.system else ()
    return Request(
        key=f"completion/{prompt.id[:16]}/{slot.number}/{slot.endpoint}",
        endpoint=slot.endpoint,
        messages=(*system, {"role": "user", "content": prompt.text}),
        seed=slot.seed,
    )


def judge_temperature(judge: EndpointSpec) -> float | None:
    """0, unless the configuration says otherwise: a rating is no matter of chance."""
    return None if "temperature" in judge.model_fields_set else 0.0


def aspect_request(config: FeedbackConfig, prompt: Prompt, aspect: Aspect, texts: Sequence[str]) -> Request:
    """All completions on one aspect, in the order drawn for it."""
    order = shown_order(prompt.id, aspect.name, len(texts), config.seed)
    return Request(
        key=f"rating/{prompt.id[:16]}/{aspect.name}",
        endpoint=config.judge.name,
        messages=aspect_messages(aspect, prompt.text, [texts[place] for place in order]),
        temperature=judge_temperature(config.judge),
        seed=seed_of(config.seed, prompt.id, aspect.name),
    )


async def _complete(desk: Desk, prompt: Prompt, slot: Slot) -> Answered:
    reply: Reply = await desk.ask(completion_request(prompt, slot))
    text = valid(reply.text).strip()
    if not text:
        raise RequestFailed("the answer is empty", "an empty answer")
    return Answered(slot, text, reply.finish_reason == "length")


async def _rate(
    desk: Desk, config: FeedbackConfig, prompt: Prompt, aspect: Aspect, texts: Sequence[str]
) -> list[Rating]:
    """The ratings, in the order of ``texts``."""
    shown = await desk.ask_parsed(
        aspect_request(config, prompt, aspect, texts),
        lambda text: parse_ratings(text, len(texts), bool(aspect.not_rated)),
    )
    order = shown_order(prompt.id, aspect.name, len(texts), config.seed)
    ratings = [FAILED] * len(texts)
    for place, rating in zip(order, shown):
        ratings[place] = rating
    return ratings


async def _score(desk: Desk, config: FeedbackConfig, prompt: Prompt, one: Answered) -> Overall:
    request = Request(
        key=f"overall/{prompt.id[:16]}/{one.slot.number}/{one.slot.endpoint}",
        endpoint=config.judge.name,
        messages=overall_messages(prompt.text, one.text),
        temperature=judge_temperature(config.judge),
        seed=seed_of(config.seed, prompt.id, "overall", one.slot.number),
    )
    return await desk.ask_parsed(request, parse_overall)


# -- the row ---------------------------------------------------------------------------------------------------------


def _completion(
    one: Answered, ratings: Mapping[str, Rating], overall: Overall | RequestFailed | None
) -> dict[str, Any]:
    given = [int(r.rating) for r in ratings.values() if r.rating != NOT_RATED]
    scored = overall if isinstance(overall, Overall) else None
    return {
        "annotations": {name: {"Rating": r.rating, "Rationale": r.rationale} for name, r in ratings.items()},
        "custom_system_prompt": one.slot.system,
        "model": one.slot.endpoint,
        "principle": one.slot.principle,
        "response": one.text,
        "critique": scored.critique if scored else "",
        "overall_score": scored.score if scored else None,
        "fine-grained_score": sum(given) / len(given) if given else None,
    }


def _count(
    tally: Tally,
    config: FeedbackConfig,
    prompt: Prompt,
    answered: Sequence[Answered],
    by_aspect: Mapping[str, Sequence[Rating]],
    overall: Sequence[Overall | RequestFailed | None],
) -> None:
    for one in answered:
        tally.completions[one.slot.endpoint] += 1
        tally.cut[one.slot.endpoint] += one.cut
        tally.principles[one.slot.principle or "none"] += 1
    for name, ratings in by_aspect.items():
        for one, rating in zip(answered, ratings):
            tally.ratings[one.slot.endpoint, name][rating.rating] += 1
        for place, index in enumerate(shown_order(prompt.id, name, len(answered), config.seed)):
            tally.places[place][ratings[index].rating] += 1
    tally.critiques += sum(isinstance(score, Overall) for score in overall)
    tally.unread["overall"] += sum(isinstance(score, RequestFailed) for score in overall)
