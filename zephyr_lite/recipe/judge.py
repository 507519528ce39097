"""The judge's prompts, and the parsing of its JSON.

One request rates all completions of a prompt on one aspect, since a judge distinguishes them better side by side. Their order
is drawn for every aspect, because judges favour places. The rationale precedes the rating in the reply, so that the rating
can follow from it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from ..client.endpoints import Message
from ..config.strict_yaml import read_yaml

NOT_RATED = "N/A"
_RATIONALE, _CRITIQUE = "one or two sentences", "two to six sentences"
_MARK = re.compile(r"\[(?:End of (?:the )?(?:answer|instruction)|Answer\b|Instruction\])", re.IGNORECASE)


class Aspect(BaseModel):
    """One of UltraFeedback's four scales: the question, the meaning of 1 to 5, and when it does not apply."""

    name: str
    question: str
    scale: list[str]
    not_rated: str = ""  # when the reply is NOT_RATED


_TEXTS = read_yaml(Path(__file__).parent / "judge.yaml")
SYSTEM: str = _TEXTS["system"]
ASPECTS = [Aspect.model_validate(aspect) for aspect in _TEXTS["aspects"]]


def _filled(text: str) -> str:
    if text.strip() in ("", _RATIONALE, _CRITIQUE):
        raise ValueError("it is empty, or the form's own words")
    return text.strip()


def _not_rated(value: Any) -> Any:
    return NOT_RATED if isinstance(value, str) and value.strip().upper() in ("NA", NOT_RATED) else value


Text = Annotated[str, AfterValidator(_filled)]


class Rating(BaseModel):
    """The judge's rating of the answer with the number ``id``."""

    id: int
    rationale: Text
    rating: Annotated[Annotated[int, Field(ge=1, le=5)] | Literal["N/A"], BeforeValidator(_not_rated)]


class _Ratings(BaseModel):
    ratings: list[Rating]


class Overall(BaseModel):
    """A critique and a score."""

    critique: Text
    overall_score: Annotated[float, Field(ge=1, le=10)]


def shown_order(prompt_id: str, aspect: str, count: int, seed: int) -> list[int]:
    """The completion at each place of the judge's list, by a seeded draw."""
    order = list(range(count))
    random.Random(f"order {seed} {aspect} {prompt_id}").shuffle(order)
    return order


def aspect_messages(aspect: Aspect, instruction: str, texts: Sequence[str]) -> tuple[Message, ...]:
    """The request that rates ``texts``, in the order shown."""
    lines = [f"{number}: {meaning}" for number, meaning in enumerate(aspect.scale, 1)]
    if aspect.not_rated:
        lines.append(f'"{NOT_RATED}": {aspect.not_rated}')
    shown = "\n\n".join(
        f"[Answer {number}]\n{_within(text)}\n[End of answer {number}]" for number, text in enumerate(texts, 1)
    )
    # a rating of 0 is off the scale: a model that only copies the form gives no rating
    form = ", ".join(f'{{"id": {n}, "rationale": "{_RATIONALE}", "rating": 0}}' for n in range(1, len(texts) + 1))
    values = {
        "count": len(texts),
        "question": aspect.question,
        "scale": "\n".join(lines),
        "answers": shown,
        "form": form,
    }
    return _messages("rate", instruction=_within(instruction), **values)


def overall_messages(instruction: str, text: str) -> tuple[Message, ...]:
    """The request for a critique of one completion and a score from 1 to 10."""
    return _messages("score", instruction=_within(instruction), answer=_within(text), critique=_CRITIQUE)


def _messages(name: str, **values: Any) -> tuple[Message, ...]:
    return {"role": "system", "content": SYSTEM}, {"role": "user", "content": _TEXTS[name].format(**values)}


def _within(text: str) -> str:
    """The text with a backslash before any mark that begins or ends an answer."""
    return _MARK.sub(r"\\\g<0>", text)


def parse_ratings(text: str, count: int, may_be_na: bool) -> list[Rating]:
    """The ratings of the answers 1 to ``count``; a code fence, words and reasoning around the object are ignored.

    Raises:
        ValueError: there is no such object, an id is missing, twice or unknown, or a rating is off the scale.
    """
    ratings = _Ratings.model_validate(_object(text, "ratings")).ratings
    ratings.sort(key=lambda rating: rating.id)
    if [rating.id for rating in ratings] != list(range(1, count + 1)):
        raise ValueError(f"the answers 1 to {count} have the ids {[rating.id for rating in ratings]}")
    if not may_be_na and any(rating.rating == NOT_RATED for rating in ratings):
        raise ValueError(f"{NOT_RATED} is no rating on this scale")
    return ratings


def parse_overall(text: str) -> Overall:
    """Raises ValueError: there is no such object, no critique, or the score is off the scale."""
    return Overall.model_validate(_object(text, "overall_score"))


def _object(text: str, key: str) -> dict[str, Any]:
    """The JSON object with the key in a text. Raises ValueError: none, or two that differ: one may be quoted from an answer."""
    text = text.rpartition("</think>")[2]
    found: list[dict[str, Any]] = []
    place = text.find("{")
    while place >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            found += [value] if key in value else []
        place = text.find("{", end)
    if not found:
        raise ValueError(f"no JSON object with {key!r}")
    if any(value != found[0] for value in found):
        raise ValueError(f"several different JSON objects with {key!r}")
    return found[0]
