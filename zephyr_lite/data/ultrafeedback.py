"""Raw UltraFeedback (a prompt with four scored completions) → preference pairs.

The paper takes the completion with the highest mean of the four aspects' ratings and a random one of the other
three; the published script takes the highest ``overall_score``.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

ChosenBy = Literal["mean", "overall"]
Rejected = Literal["random", "worst"]

# 2,628 completions of the raw set carry an overall score of 10 that was meant as 1: their mean rating is at most 2.
_WRONG_OVERALL, _RIGHT_OVERALL, _LOW_MEAN = 10.0, 1.0, 2.0


def to_pairs(
    rows: Iterable[Mapping[str, Any]],
    chosen_by: ChosenBy = "mean",
    rejected: Rejected = "random",
    seed: int = 42,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Preference pairs in the schema of ``ultrafeedback_binarized``.

    Args:
        rows: in the schema of ``openbmb/UltraFeedback``: ``source``, ``instruction``, ``completions`` of
            {response, annotations: {aspect: {Rating}}, overall_score}. Ratings are text, and may be "N/A".
        chosen_by: ``mean`` of the aspects' ratings, or ``overall`` score. Of equal scores the first is chosen.
        rejected: a ``random`` one of the others, or the ``worst``.
        seed: of the random draw. Each row draws by itself, from the seed and its instruction: neither the order of
            the rows nor how they are split over processes changes a pair.

    Returns:
        pairs {prompt, prompt_id, chosen, rejected, messages, score_chosen, score_rejected}, and counts: ``rows``,
        ``pairs``, ``overall score repaired`` (completions), and the reasons for which rows were dropped.
    """
    counts: Counter[str] = Counter({"rows": 0, "pairs": 0})
    pairs = []
    for row in rows:
        counts["rows"] += 1
        if row.get("source") == "truthful_qa":
            counts["source is truthful_qa"] += 1
            continue
        prompt = str(row.get("instruction") or "")
        if not prompt.strip():
            counts["no instruction"] += 1
            continue
        scored = []
        for completion in row.get("completions") or []:
            score = _score(completion, chosen_by, counts)
            response = completion.get("response")
            if score is not None and isinstance(response, str) and response.strip():
                scored.append((score, response))
        if len(scored) < 2:
            counts["fewer than two rated completions"] += 1
            continue
        best = max(range(len(scored)), key=lambda i: scored[i][0])  # max keeps the first of equals
        others = [i for i in range(len(scored)) if i != best]
        prompt_id = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
        if rejected == "worst":
            other = min(others, key=lambda i: scored[i][0])
        else:
            other = random.Random(f"{seed} {prompt_id}").choice(others)
        if scored[best][0] == scored[other][0]:
            counts["equal scores"] += 1
            continue
        if scored[best][1].strip() == scored[other][1].strip():
            counts["equal responses"] += 1
            continue
        pairs.append(_pair(prompt, prompt_id, scored[best], scored[other]))
        counts["pairs"] += 1
    return pairs, dict(counts)


def _pair(prompt: str, prompt_id: str, best: tuple[float, str], other: tuple[float, str]) -> dict[str, Any]:
    def conversation(response: str) -> list[dict[str, str]]:
        return [{"content": prompt, "role": "user"}, {"content": response, "role": "assistant"}]

    return {
        "prompt": prompt,
        "prompt_id": prompt_id,
        "chosen": conversation(best[1]),
        "rejected": conversation(other[1]),
        "messages": conversation(best[1]),
        "score_chosen": best[0],
        "score_rejected": other[0],
    }


def _score(completion: Mapping[str, Any], chosen_by: ChosenBy, counts: Counter[str]) -> float | None:
    mean = _mean_rating(completion)
    if chosen_by == "mean":
        return mean
    overall = _number(completion.get("overall_score"))
    if overall == _WRONG_OVERALL and mean is not None and mean <= _LOW_MEAN:
        counts["overall score repaired"] += 1
        return _RIGHT_OVERALL
    return overall


def _mean_rating(completion: Mapping[str, Any]) -> float | None:
    """The mean of the aspects that have a rating; None if none has."""
    ratings = [
        rating
        for aspect in (completion.get("annotations") or {}).values()
        if isinstance(aspect, Mapping) and (rating := _number(aspect.get("Rating"))) is not None
    ]
    return sum(ratings) / len(ratings) if ratings else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):  # "N/A"
        return None
    return number if math.isfinite(number) else None
