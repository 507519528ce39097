"""One row of raw UltraFeedback (a prompt with four scored completions) → a preference pair, or the reason why not.

The paper (Tunstall et al. 2023, arXiv 2310.16944) takes the completion with the highest mean of the four aspects' ratings
and a random one of the other three; the published script takes the highest ``overall_score``.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..data.formats import Message, RowError
from .questions import Questions

ChosenBy = Literal["mean", "overall"]
Rejected = Literal["random", "worst", "margin"]
SystemPrompt = Literal["omit", "keep"]

TRUTHFUL_QA = "truthful_qa"
# The first release gave 2,628 completions an overall score of 10, many of which the judge had meant as 1 (github
# OpenBMB/UltraFeedback, issue 8). Its authors then set those to 1 whose mean rating is at most 2, asked the judge again
# about those up to 4, left the others, and added the column ``fine-grained_score``.
_WRONG_OVERALL, _RIGHT_OVERALL, _LOW_MEAN, _HIGH_MEAN = 10.0, 1.0, 2.0, 4.0
_CORRECTED = "fine-grained_score"
_RATINGS, _OVERALLS = (1.0, 5.0), (0.0, 10.0)
# as floats, 4⅓ − 1 is less than 3⅓
_ROUNDING = 1e-9

# notes, counted per completion
REPAIRED = "overall score repaired"
DOUBTFUL = "overall score of 10 not used: nothing confirms it"
PARTLY = "completions rated in some aspects only"
UNRATED = "completions without a score, left aside"
ODD = "ratings or scores that are no number of their scale, left aside"
EMPTY = "completions without text, left aside"
NOTES = (REPAIRED, DOUBTFUL, PARTLY, UNRATED, ODD, EMPTY)


@dataclass(frozen=True)
class PairRules:
    """How the two completions of a pair are chosen.

    Attributes:
        chosen_by: ``mean`` of the aspects that have a rating ("N/A" is none), or ``overall`` score. Of equal scores the first
            is chosen.
        rejected: a ``random`` one of the others (a row whose draw has the same score is dropped), the ``worst``, or
            ``margin``: a random one of those at least ``margin`` below the chosen one (a row without any is dropped).
        margin: in points of ``chosen_by``'s scale: 1 to 5 for the mean, 1 to 10 for the overall score.
        system_prompt: each completion was made under a system prompt of its own. ``omit`` leaves them out, as the
            published pairs do; ``keep`` makes the chosen one's the system turn, and rejects only completions made under the
            same.
        seed: of the draws. Each row draws from the seed and its instruction, so that neither the order of the rows nor the
            number of processes changes a pair.
    """

    chosen_by: ChosenBy = "mean"
    rejected: Rejected = "random"
    margin: float = 1.0
    system_prompt: SystemPrompt = "omit"
    seed: int = 42


@dataclass(frozen=True)
class _Scored:
    score: float
    response: str
    system: str


def pair_of_row(
    row: Mapping[str, Any], rules: PairRules, counts: Counter[str], questions: Questions | None = None
) -> dict[str, Any]:
    """A preference pair in the schema of ``ultrafeedback_binarized``.

    Args:
        row: in the schema of ``openbmb/UltraFeedback``: ``source``, ``instruction``, ``completions`` of {response,
            custom_system_prompt, annotations: {aspect: {Rating}}, overall_score}. Ratings are text, or numbers, or "N/A".
        counts: ``NOTES`` are counted here.
        questions: excluded prompts; rows of the source truthful_qa are always excluded.

    Returns:
        {prompt, prompt_id (SHA-256 of the prompt), chosen, rejected, messages, score_chosen, score_rejected}.

    Raises:
        RowError: the row has no pair; the message is one of a few, to be counted.
    """
    if row.get("source") == TRUTHFUL_QA:
        raise RowError("source is truthful_qa")
    prompt = row.get("instruction")
    if prompt is not None and not isinstance(prompt, str):
        raise RowError("instruction is not a text")
    if not prompt or not prompt.strip():
        raise RowError("no instruction")
    if questions is not None and (reason := questions.found_in(prompt)):
        raise RowError(reason)
    scored = _scored(row.get("completions"), rules, counts)
    if len(scored) < 2:
        raise RowError("fewer than two rated completions")
    best = max(scored, key=lambda c: c.score)  # max keeps the first of equals
    others = [c for c in scored if c is not best]
    if rules.system_prompt == "keep":
        others = [c for c in others if c.system == best.system]
        if not others:
            raise RowError("no other completion was made under the chosen one's system prompt")
    prompt_id = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    other = _rejected(best, others, rules, prompt_id)
    if other.score >= best.score:
        raise RowError("equal scores")
    if other.response.strip() == best.response.strip():
        raise RowError("equal responses")
    return _pair(prompt, prompt_id, best, other, best.system if rules.system_prompt == "keep" else "")


def _rejected(best: _Scored, others: list[_Scored], rules: PairRules, prompt_id: str) -> _Scored:
    if rules.rejected == "worst":
        return min(others, key=lambda c: c.score)
    if rules.rejected == "margin":
        others = [c for c in others if c.score <= best.score - rules.margin + _ROUNDING]
        if not others:
            raise RowError(f"no completion at least {rules.margin:g} below the chosen one")
    return random.Random(f"{rules.seed} {prompt_id}").choice(others)


def _pair(prompt: str, prompt_id: str, best: _Scored, other: _Scored, system: str) -> dict[str, Any]:
    def conversation(response: str) -> list[Message]:
        turns = [{"content": prompt, "role": "user"}, {"content": response, "role": "assistant"}]
        return [{"content": system, "role": "system"}, *turns] if system.strip() else turns

    return {
        "prompt": prompt,
        "prompt_id": prompt_id,
        "chosen": conversation(best.response),
        "rejected": conversation(other.response),
        "messages": conversation(best.response),
        "score_chosen": best.score,
        "score_rejected": other.score,
    }


def to_pairs(
    rows: Iterable[Mapping[str, Any]],
    chosen_by: ChosenBy = "mean",
    rejected: Rejected = "random",
    seed: int = 42,
    *,
    margin: float = 1.0,
    system_prompt: SystemPrompt = "omit",
    questions: Questions | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The pairs of rows that are in memory; see ``pair_of_row`` and ``PairRules``.

    Returns:
        pairs, and counts: ``rows``, ``pairs``, each reason for which rows were dropped, and the scores of 10 that were not
        taken as they are (``REPAIRED``, ``DOUBTFUL``).
    """
    rules = PairRules(chosen_by, rejected, margin, system_prompt, seed)
    counts: Counter[str] = Counter({"rows": 0, "pairs": 0})
    notes: Counter[str] = Counter()
    pairs = []
    for row in rows:
        counts["rows"] += 1
        try:
            pairs.append(pair_of_row(row, rules, notes, questions))
        except RowError as reason:
            counts[str(reason)] += 1
        else:
            counts["pairs"] += 1
    return pairs, {**counts, **{note: notes[note] for note in (REPAIRED, DOUBTFUL) if notes[note]}}


# -- scores --------------------------------------------------------------------------------------------------------------


def _scored(completions: Any, rules: PairRules, counts: Counter[str]) -> list[_Scored]:
    if completions is not None and not isinstance(completions, list):
        raise RowError("completions is not a list")
    found = []
    for completion in completions or []:
        if not isinstance(completion, Mapping):
            raise RowError("a completion is not an object")
        response = completion.get("response")
        if not isinstance(response, str) or not response.strip():
            counts[EMPTY] += 1
            continue
        doubtful = counts[DOUBTFUL]
        score = _score(completion, rules.chosen_by, counts)
        if score is None:
            if counts[DOUBTFUL] == doubtful:  # which are counted already
                counts[UNRATED] += 1
            continue
        system = completion.get("custom_system_prompt")
        found.append(_Scored(score, response, system if isinstance(system, str) else ""))
    return found


def _score(completion: Mapping[str, Any], chosen_by: ChosenBy, counts: Counter[str]) -> float | None:
    by_mean = chosen_by == "mean"
    # notes on ratings matter only if they decide
    mean = _mean_rating(completion, counts if by_mean else Counter())
    if by_mean:
        return mean
    overall = _number(completion.get("overall_score"), _OVERALLS, counts)
    if overall == _WRONG_OVERALL and mean is not None and mean <= _HIGH_MEAN:
        if mean <= _LOW_MEAN:
            counts[REPAIRED] += 1
            return _RIGHT_OVERALL
        if completion.get(_CORRECTED) is None:
            counts[DOUBTFUL] += 1
            return None
    return overall


def _mean_rating(completion: Mapping[str, Any], counts: Counter[str]) -> float | None:
    """The mean of the aspects that have a rating; None if none has."""
    annotations = completion.get("annotations")
    if not isinstance(annotations, Mapping):
        return None
    # Arrow adds aspects that a row lacks as null
    aspects = [aspect for aspect in annotations.values() if isinstance(aspect, Mapping)]
    ratings = [r for aspect in aspects if (r := _number(aspect.get("Rating"), _RATINGS, counts)) is not None]
    if not ratings:
        return None
    if len(ratings) < len(aspects):
        counts[PARTLY] += 1
    return sum(ratings) / len(ratings)


def _number(value: Any, scale: tuple[float, float], counts: Counter[str]) -> float | None:
    """A rating as a number; None for "N/A" and null, and, counted in ``ODD``, for a value that is not of the scale."""
    if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A", "NA", "NONE", "NULL")):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not scale[0] <= number <= scale[1]:  # not a number either
        counts[ODD] += 1
        return None
    return number
