"""What the judge's grades say: means by category and turn, and differences between models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grade:
    """What became of one turn of one question.

    Attributes:
        score: from 1 to 10; None: no answer, or no grade.
        judgment: the judge's reply, or why there is none.
    """

    question: str
    category: str
    model: str
    turn: int
    score: float | None
    judgment: str


def mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def standard_error(values: Sequence[float]) -> float | None:
    """Of their mean; None for fewer than two."""
    if len(values) < 2:
        return None
    middle = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))


def model_scores(grades: Sequence[Grade]) -> dict[str, Any]:
    """One model's: ``score`` is the mean over all graded turns, as MT-Bench's is."""
    graded = [g for g in grades if g.score is not None]
    categories = list(dict.fromkeys(g.category for g in grades))
    by_question = list(_by_question(graded).values())
    return {
        "score": _rounded(mean(_of(graded))),
        "standard_error": _rounded(standard_error(by_question)),
        **{f"turn_{turn}": _rounded(mean(_of(g for g in graded if g.turn == turn))) for turn in (1, 2)},
        "categories": {
            name: {
                "score": _rounded(mean(_of(g for g in graded if g.category == name))),
                **{
                    f"turn_{turn}": _rounded(mean(_of(g for g in graded if (g.category, g.turn) == (name, turn))))
                    for turn in (1, 2)
                },
            }
            for name in categories
        },
        "graded": len(graded),
        "not_graded": len(grades) - len(graded),
    }


def difference(one: Sequence[Grade], other: Sequence[Grade]) -> dict[str, Any]:
    """Mean difference (one - other) over the questions that both have grades for in the same turns, and its standard
    error: questions differ more than models do, so that the pairs say more than the two means."""
    first = {(g.question, g.turn): g.score for g in one if g.score is not None}
    pairs: dict[str, list[float]] = {}
    for g in other:
        if g.score is not None and (g.question, g.turn) in first:
            pairs.setdefault(g.question, []).append(first[g.question, g.turn] - g.score)
    means = [math.fsum(found) / len(found) for found in pairs.values()]
    return {
        "difference": _rounded(mean(means)),
        "standard_error": _rounded(standard_error(means)),
        "questions": len(means),
    }


def table(models: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a category a row, a model a column; "turn 1 / turn 2" behind each mean."""
    header = ["", *models]
    first = next(iter(models.values()))
    rows = [[name, *(_cell(body["categories"][name]) for body in models.values())] for name in first["categories"]]
    rows.append(["all", *(_cell(body) for body in models.values())])
    errors = [body["standard_error"] for body in models.values()]
    rows.append(["standard error", *("-" if e is None else f"{e:.2f}" for e in errors)])
    if any(body["not_graded"] for body in models.values()):
        rows.append(["turns without a grade", *(str(body["not_graded"]) for body in models.values())])
    return header, rows


def _cell(body: dict[str, Any]) -> str:
    values = ["-" if body[key] is None else f"{body[key]:.2f}" for key in ("score", "turn_1", "turn_2")]
    return f"{values[0]}  ({values[1]} / {values[2]})"


def _by_question(grades: Iterable[Grade]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for g in grades:
        if g.score is not None:
            found.setdefault(g.question, []).append(g.score)
    return {question: math.fsum(scores) / len(scores) for question, scores in found.items()}


def _of(grades: Iterable[Grade]) -> list[float]:
    return [g.score for g in grades if g.score is not None]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
