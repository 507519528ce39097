"""MT-Bench's scores: means of the judge's grades by category and turn, differences between models, a radar plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.atomic import bytes_aside

LOWEST, HIGHEST = 1, 10
MIN_CATEGORIES = 3  # of a radar plot
# Okabe and Ito's colours, for colour-blind readers; a line style each, for prints in grey
LOOKS = (
    ("#0072B2", "-", "o"),
    ("#E69F00", "--", "s"),
    ("#555555", ":", "^"),
    ("#009E73", "-.", "D"),
    ("#CC79A7", "-", "v"),
    ("#D55E00", "--", "P"),
)


@dataclass(frozen=True)
class Grade:
    """The outcome of one turn of one question.

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
    """None for no value."""
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    middle = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))


def model_scores(grades: Sequence[Grade]) -> dict[str, Any]:
    """One model's scores; ``score`` is the mean over all graded turns, as MT-Bench's is."""
    graded = [g for g in grades if g.score is not None]
    by_question: dict[str, list[float]] = {}
    for g in graded:
        by_question.setdefault(g.question, []).append(g.score or 0.0)
    means = _means(graded)
    return {
        "score": means.pop("score"),
        "standard_error": _rounded(standard_error([math.fsum(s) / len(s) for s in by_question.values()])),
        **means,
        "categories": {
            name: _means([g for g in graded if g.category == name])
            for name in dict.fromkeys(g.category for g in grades)
        },
        "graded": len(graded),
        "not_graded": len(grades) - len(graded),
    }


def _means(graded: Sequence[Grade]) -> dict[str, float | None]:
    turns = {"score": (1, 2), "turn_1": (1,), "turn_2": (2,)}
    return {
        name: _rounded(mean(g.score for g in graded if g.turn in of and g.score is not None))
        for name, of in turns.items()
    }


def difference(one: Sequence[Grade], other: Sequence[Grade]) -> dict[str, Any]:
    """Mean paired difference (one - other) over the questions that both have grades for in the same turns, and its
    standard error."""
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


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def draw_radar(path: Path, models: dict[str, dict[str, Any]], title: str) -> None:
    """Write a PNG with a radar plot for each turn, and a line for each model.

    Args:
        models: name → ``model_scores``, with at least ``MIN_CATEGORIES`` categories.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    categories = list(next(iter(models.values()))["categories"])
    angles = [2 * math.pi * place / len(categories) for place in range(len(categories))]
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    lines: dict[str, Any] = {}
    for turn in (1, 2):
        axes: Any = figure.add_subplot(1, 2, turn, projection="polar")
        axes.set_theta_offset(math.pi / 2)
        axes.set_theta_direction(-1)
        axes.set_ylim(0, HIGHEST)
        axes.set_yticks(range(2, HIGHEST + 1, 2))
        axes.tick_params(axis="y", labelsize=8, labelcolor="#666666")
        axes.set_xticks(angles, categories, fontsize=11)
        axes.tick_params(axis="x", pad=6)
        for label, angle in zip(axes.get_xticklabels(), angles):  # beside the circle, not across it
            across = round(math.sin(angle), 6)
            label.set_horizontalalignment("center" if not across else "left" if across > 0 else "right")
        axes.set_title(f"turn {turn}", fontsize=12, pad=18)
        for (name, body), (colour, style, marker) in zip(models.items(), LOOKS * (1 + len(models) // len(LOOKS))):
            scores = [body["categories"][category][f"turn_{turn}"] for category in categories]
            points = [math.nan if score is None else score for score in scores]  # a gap, not a zero
            how: dict[str, Any] = {"color": colour, "linestyle": style, "marker": marker, "markersize": 4}
            lines[name] = axes.plot([*angles, angles[0]], [*points, points[0]], linewidth=1.8, **how)[0]
            if not any(map(math.isnan, points)):
                axes.fill(angles, points, color=colour, alpha=0.08)
    labels = [f"{n} ({'-' if b['score'] is None else format(b['score'], '.2f')})" for n, b in models.items()]
    figure.legend(list(lines.values()), labels, loc="outside lower center", ncols=min(3, len(models)), frameon=False)
    with bytes_aside(path) as file:
        figure.savefig(file, format="png", dpi=120)
