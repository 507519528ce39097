"""Verdicts as figures: rates by model, differences between models, a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..mt_bench.scores import mean, standard_error
from .files import Annotation, read_difficulty
from .score import LEAST, length_controlled, win_rate

NO_DIFFICULTY = (
    "the length-controlled rate is without the instructions' difficulty (--difficulty): not AlpacaEval's number"
)


@dataclass
class Alpaca:
    """What a run made: model → rates, the result's body, what is not done, and the files that were written."""

    models: dict[str, dict[str, Any]]
    body: dict[str, Any]
    unfinished: str = ""
    files: list[Path] = field(default_factory=list)


def score_files(annotations: Sequence[Annotation], difficulty: Path | None = None, where: Path | None = None) -> Alpaca:
    """The rates of annotations that are there already; by annotator too, where there are several.

    Raises:
        UserError: none of the preferences counts.
    """
    if not any_counts(annotations):
        raise UserError(
            f"{where}: none of the {len(annotations)} preferences lies between 1 and 2.", "Look at the file."
        )
    known = None if difficulty is None else read_difficulty(difficulty)
    if known is not None:
        difficulty_of(known, [a.index for a in annotations], str(difficulty))
    name = annotations[0].generator_2 or "the model"
    models = {name: rates(annotations, known)}
    annotators = list(dict.fromkeys(a.annotator for a in annotations))
    if len(annotators) > 1:
        for annotator in annotators:
            own = [a for a in annotations if a.annotator == annotator]
            if any_counts(own):
                models[f"{name}, by {annotator or 'nobody'}"] = rates(own, known)
    body = {
        "models": models,
        "settings": {"annotators": annotators, "baseline": sorted({a.generator_1 for a in annotations})},
        "data": {"annotations": str(where)},
        "notes": notes_on(models, known is not None),
    }
    return Alpaca(models, body)


def notes_on(models: dict[str, dict[str, Any]], with_difficulty: bool) -> list[str]:
    """What stands between the length-controlled rates and AlpacaEval's."""
    if not any(body["length_controlled"] for body in models.values()):
        return [f"no length-controlled rate: it takes {LEAST} verdicts, and answers that differ in length"]
    return [] if with_difficulty else [NO_DIFFICULTY]


def rates(annotations: Sequence[Annotation], difficulty: dict[int, float] | None = None) -> dict[str, Any]:
    """One model's: the win rate, its standard error, ties, and the length-controlled rate."""
    preferences = [a.preference for a in annotations]
    controlled = length_controlled(
        preferences,
        [len(a.output_1) for a in annotations],
        [len(a.output_2) for a in annotations],
        None if difficulty is None else difficulty_of(difficulty, [a.index for a in annotations], "difficulty"),
    )
    result: dict[str, Any] = dict(win_rate(preferences).as_dict())
    result["length_controlled"] = None
    if controlled is not None:
        result["length_controlled"] = {
            "win_rate": controlled.win_rate,
            "standard_error": controlled.standard_error,
            "length_coefficient": controlled.length_coefficient,
            "with_difficulty": controlled.with_difficulty,
        }
    result["mean_length"] = mean(len(a.output_2) for a in annotations)
    result["mean_length_of_baseline"] = mean(len(a.output_1) for a in annotations)
    return result


def table(models: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["", "win rate", "± s.e.", "length-controlled", "wins", "losses", "ties", "left out", "letters"]
    rows = []
    for name, body in models.items():
        controlled = body["length_controlled"]
        error = body["standard_error"]
        rows.append(
            [
                name,
                f"{body['win_rate']:.2f} %",
                "-" if error is None else f"{error:.2f}",
                "-" if controlled is None else f"{controlled['win_rate']:.2f} % ± {controlled['standard_error']:.2f}",
                *(f"{body[key]:,}" for key in ("n_wins", "n_wins_base", "n_draws")),
                f"{body['n_left_out'] + body.get('n_not_answered', 0):,}",
                f"{body['mean_length']:,.0f} ({body['mean_length_of_baseline']:,.0f})",
            ]
        )
    return header, rows


def difference(one: Sequence[Annotation], other: Sequence[Annotation]) -> dict[str, Any]:
    """Of the win rates, in percent, over the instructions that both have verdicts on."""
    first = {a.index: a.preference for a in one if 1 <= a.preference <= 2}
    values = [100 * (first[a.index] - a.preference) for a in other if a.index in first and 1 <= a.preference <= 2]
    return {"difference": mean(values), "standard_error": standard_error(values), "instructions": len(values)}


def any_counts(annotations: Sequence[Annotation]) -> bool:
    return any(a.preference == 0 or 1 <= a.preference <= 2 for a in annotations)


def difficulty_of(known: dict[int, float], indices: Sequence[int], where: str) -> list[float]:
    missing = [index for index in indices if index not in known]
    if missing:
        raise UserError(
            f"{where}: has no difficulty for row {missing[0]} (counted from 0).",
            "It belongs to AlpacaEval's 805 instructions in their order.",
        )
    return [known[index] for index in indices]
