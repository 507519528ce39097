"""AlpacaEval's win rate, its standard error, and a length-controlled win rate.

A preference is 1 where the baseline's output is better and 2 where the model's is, or between for a judge's probability;
0 is an older form of a tie (1.5). Anything outside 1 to 2, nan included, is no verdict and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .alpaca_files import Annotation, read_difficulty
from .judge import Judged
from .mt_bench_scores import mean, standard_error

TIE = 1.5
RIDGE = 1e-6  # on the squared coefficients: if every comparison is won, the best fit is at infinity
MIN_VERDICTS = 20  # a curve through fewer fits them perfectly, with an error of 0.00
NO_DIFFICULTY = (
    "the length-controlled rate is without the instructions' difficulty (--difficulty): not AlpacaEval's number"
)


@dataclass(frozen=True)
class WinRate:
    """Rates in percent.

    Attributes:
        standard_error: of the rate, from the sample's standard deviation (n - 1); nan for one comparison.
        discrete_win_rate: the same with each preference rounded to a win, a loss or a tie.
        n_total: verdicts that count.
        n_left_out: that do not.
    """

    win_rate: float
    standard_error: float
    discrete_win_rate: float
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    n_left_out: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no nan."""
        return {key: None if math.isnan(value) else value for key, value in asdict(self).items()}


def win_rate(preferences: Sequence[float]) -> WinRate:
    """AlpacaEval's ``get_winrate`` of [n] preferences.

    Raises:
        ValueError: none of them counts.
    """
    values = [TIE if value == 0 else float(value) for value in preferences]
    kept = [value - 1 for value in values if 1 <= value <= 2]
    if not kept:
        raise ValueError("no preference between 1 and 2")
    discrete = [_rounded(float(value)) for value in preferences if math.isfinite(value)]
    kept_discrete = [value - 1 for value in discrete if 1 <= value <= 2]
    error = standard_error(kept)
    return WinRate(
        win_rate=100 * math.fsum(kept) / len(kept),
        standard_error=math.nan if error is None else 100 * error,
        discrete_win_rate=100 * math.fsum(kept_discrete) / len(kept_discrete) if kept_discrete else math.nan,
        n_wins=sum(value > 0.5 for value in kept),
        n_wins_base=sum(value < 0.5 for value in kept),
        n_draws=sum(value == TIE for value in values),
        n_total=len(kept),
        n_left_out=len(values) - len(kept),
    )


def _rounded(value: float) -> float:
    """To 1 or 2 (halves to the even number); a tie, and anything that rounds to 0, is a tie. So 0.7 and 2.4, which the win
    rate leaves out, count here, as in AlpacaEval."""
    whole = 0 if value == TIE else round(value)
    return TIE if whole == 0 else float(whole)


@dataclass(frozen=True)
class LengthControlled:
    """The win rate if both outputs had one length, in percent.

    Attributes:
        standard_error: of the estimate (delta method over a robust covariance).
        length_coefficient: of tanh((baseline's length - model's) / their standard deviation), in log-odds; negative
            where the judge prefers the longer output.
        with_difficulty: whether each instruction's difficulty was a predictor.
    """

    win_rate: float
    standard_error: float
    length_coefficient: float
    with_difficulty: bool


def length_controlled(
    preferences: Sequence[float],
    lengths_1: Sequence[int],
    lengths_2: Sequence[int],
    difficulty: Sequence[float] | None = None,
) -> LengthControlled | None:
    """Logistic regression of the verdicts on the difference in length, read at no difference (arXiv 2404.04475, eq. 3):
    P(model wins) = σ(θ + φ tanh(Δ / sd(Δ)) [+ ψ difficulty]).

    Unlike AlpacaEval's published estimate it has no L1 penalty chosen by cross-validation and no artificial baselines
    to regularize with; and, unless given, no difficulty, which takes many models' verdicts on the same instructions.

    Args:
        preferences: [n] as annotated; those that do not count are not fitted.
        lengths_1, lengths_2: [n] characters of the baseline's and the model's outputs.
        difficulty: [n] of the instructions.

    Returns:
        None if there is nothing to fit: fewer than ``MIN_VERDICTS`` verdicts, or no difference in length.
    """
    wins = np.array([TIE if value == 0 else value for value in preferences], dtype=np.float64) - 1
    delta = np.asarray(lengths_1, dtype=np.float64) - np.asarray(lengths_2, dtype=np.float64)
    spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
    counts = (wins >= 0) & (wins <= 1)
    if counts.sum() < MIN_VERDICTS or spread == 0:
        return None
    columns = [np.ones(len(delta)), np.tanh(delta / spread)]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, dtype=np.float64))
    design = np.stack(columns, axis=1)
    theta, covariance = _logistic(design[counts], wins[counts])
    level = design.copy()
    level[:, 1] = 0.0  # no difference in length
    predicted = _sigmoid(level @ theta)
    gradient = (level * (predicted * (1 - predicted))[:, None]).mean(axis=0)
    error = math.sqrt(max(0.0, float(gradient @ covariance @ gradient)))
    return LengthControlled(100 * float(predicted.mean()), 100 * error, float(theta[1]), difficulty is not None)


def _logistic(design: np.ndarray, wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [k] and their covariance [k, k], by Newton's method with halved steps. Targets may be between 0 and 1;
    the covariance's sandwich estimate holds for them too."""
    theta = np.zeros(design.shape[1])

    def objective(at: np.ndarray) -> float:
        scores = design @ at
        return float((np.logaddexp(0, scores) - wins * scores).sum() + 0.5 * RIDGE * at @ at)

    def derivatives(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fitted = _sigmoid(design @ at)
        hessian = (design * (fitted * (1 - fitted))[:, None]).T @ design + RIDGE * np.eye(len(at))
        return fitted, hessian

    for _ in range(200):
        fitted, hessian = derivatives(theta)
        gradient = design.T @ (fitted - wins) + RIDGE * theta
        step, now = np.linalg.solve(hessian, gradient), objective(theta)
        while objective(theta - step) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        theta = theta - step
        if np.abs(step).max() < 1e-10:
            break
    fitted, hessian = derivatives(theta)
    residual = design * (wins - fitted)[:, None]
    inverse = np.linalg.inv(hessian)
    return theta, inverse @ (residual.T @ residual) @ inverse


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -scores))


# -- annotations -----------------------------------------------------------------------------------------------------


def score_files(annotations: Sequence[Annotation], difficulty: Path | None, where: Path) -> Judged:
    """The rates of existing annotations; by annotator too, if there are several.

    Raises:
        UserError: none of the preferences counts.
    """
    if not has_verdict(annotations):
        message = f"{where}: none of the {len(annotations)} preferences is between 1 and 2."
        raise UserError(message, "Look at the file.")
    known = None if difficulty is None else read_difficulty(difficulty)
    name = annotations[0].generator_2 or "the model"
    models = {name: rates(annotations, known)}
    annotators = list(dict.fromkeys(a.annotator for a in annotations))
    if len(annotators) > 1:
        for annotator in annotators:
            own = [a for a in annotations if a.annotator == annotator]
            if has_verdict(own):
                models[f"{name}, by {annotator or 'unknown'}"] = rates(own, known)
    body = {
        "models": models,
        "settings": {"annotators": annotators, "baseline": sorted({a.generator_1 for a in annotations})},
        "data": {"annotations": str(where)},
        "notes": notes_on(models, known is not None),
    }
    return Judged(models, body)


def notes_on(models: dict[str, dict[str, Any]], with_difficulty: bool) -> list[str]:
    """How the length-controlled rates differ from AlpacaEval's."""
    if not any(body["length_controlled"] for body in models.values()):
        return [f"no length-controlled rate: it takes {MIN_VERDICTS} verdicts, and answers that differ in length"]
    return [] if with_difficulty else [NO_DIFFICULTY]


def rates(annotations: Sequence[Annotation], difficulty: dict[int, float] | None = None) -> dict[str, Any]:
    """One model's win rate, its standard error, ties, and the length-controlled rate."""
    preferences = [a.preference for a in annotations]
    lengths = [len(a.output_1) for a in annotations], [len(a.output_2) for a in annotations]
    known = None if difficulty is None else difficulty_of(difficulty, [a.index for a in annotations])
    controlled = length_controlled(preferences, *lengths, known)
    return {
        **win_rate(preferences).as_dict(),
        "length_controlled": None if controlled is None else asdict(controlled),
        "mean_length": mean(lengths[1]),
        "mean_length_of_baseline": mean(lengths[0]),
    }


def table(models: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["", "win rate", "± s.e.", "length-controlled", "wins", "losses", "ties", "left out", "letters"]
    rows = []
    for name, body in models.items():
        controlled, error = body["length_controlled"], body["standard_error"]
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
    """Difference of two win rates, in percent, over the instructions that both have verdicts on."""
    first = {a.index: a.preference for a in one if 1 <= a.preference <= 2}
    values = [100 * (first[a.index] - a.preference) for a in other if a.index in first and 1 <= a.preference <= 2]
    return {"difference": mean(values), "standard_error": standard_error(values), "instructions": len(values)}


def has_verdict(annotations: Sequence[Annotation]) -> bool:
    return any(a.preference == 0 or 1 <= a.preference <= 2 for a in annotations)


def difficulty_of(known: dict[int, float], indices: Sequence[int]) -> list[float]:
    """The difficulties of the rows. Raises UserError if one is missing."""
    missing = [index for index in indices if index not in known]
    if missing:
        raise UserError(
            f"--difficulty: the file has no difficulty for row {missing[0]} (counted from 0).",
            "It belongs to AlpacaEval's 805 instructions in their order.",
        )
    return [known[index] for index in indices]
