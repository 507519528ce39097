"""What the judge gave, as figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .judge import ASPECTS, NOT_RATED
from .rate import Tally


def places(reasons: Mapping[str, list[str]], first: int = 20) -> dict[str, Any]:
    """{reason: {count, first}}: how many, and where the first of them are."""
    return {reason: {"count": len(where), "first": where[:first]} for reason, where in reasons.items()}


def mean(ratings: Mapping[str, int]) -> float | None:
    """Of the ratings that are numbers."""
    given = {int(rating): count for rating, count in ratings.items() if rating != NOT_RATED}
    count = sum(given.values())
    return sum(rating * often for rating, often in given.items()) / count if count else None


def tally_report(tally: Tally) -> dict[str, Any]:
    """For report.json. ``mean_rating_by_place`` shows whether the judge favours a place of its list: with orders drawn
    at random the means are alike but for chance."""
    return {
        "completions": dict(sorted(tally.completions.items())),
        "completions_cut_at_max_tokens": {model: count for model, count in sorted(tally.cut.items()) if count},
        "completions_failed": dict(tally.failed.most_common()),
        "principles": dict(sorted(tally.principles.items())),
        "ratings": {
            model: {
                aspect.name: {
                    "mean": _rounded(mean(tally.ratings[model, aspect.name])),
                    "counts": dict(sorted(tally.ratings[model, aspect.name].items())),
                }
                for aspect in ASPECTS
            }
            for model in sorted(tally.completions)
        },
        "mean_rating_by_place": [_rounded(mean(tally.places[place])) for place in sorted(tally.places)],
        "judge_replies_not_readable_or_failed": {name: count for name, count in tally.unread.items() if count},
        "critiques": tally.critiques,
    }


def ratings_table(tally: Tally) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each model's mean rating on each aspect, the best model first."""
    header = ["model", *(aspect.name.replace("_", " ") for aspect in ASPECTS), "mean", "completions"]
    rows = []
    for model in tally.completions:
        means = [mean(tally.ratings[model, aspect.name]) for aspect in ASPECTS]
        total: Counter[str] = Counter()
        for aspect in ASPECTS:
            total += tally.ratings[model, aspect.name]
        of_all = mean(total)
        texts = ["-" if value is None else f"{value:.2f}" for value in (*means, of_all)]
        rows.append((-(of_all or 0.0), model, [model, *texts, f"{tally.completions[model]:,}"]))
    return header, [row for _, _, row in sorted(rows)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
