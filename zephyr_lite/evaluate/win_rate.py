"""AlpacaEval's win rate and a length-controlled win rate of verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from .judge import standard_error

TIE = 1.5
RIDGE = 1e-6  # on the squared coefficients: if every comparison is won, the best fit is at infinity
MIN_VERDICTS = 20  # a curve through fewer fits them perfectly, with an error of 0.00


@dataclass(frozen=True)
class WinRate:
    """Rates in percent."""

    win_rate: float
    standard_error: float  # from the sample's standard deviation (n - 1); nan for one comparison
    discrete_win_rate: float  # each preference rounded to a win, a loss or a tie
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int  # verdicts that count
    n_left_out: int  # verdicts that do not


def win_rate(preferences: Sequence[float]) -> WinRate:
    """AlpacaEval's ``get_winrate`` of [n] preferences. Raises ValueError: none of them counts."""
    values = [TIE if value == 0 else float(value) for value in preferences]
    kept = [value - 1 for value in values if 1 <= value <= 2]
    if not kept:
        raise ValueError("no preference between 1 and 2")
    # rounded to 1 or 2 (halves to the even number); a tie, and anything that rounds to 0, is a tie. So 0.7 and 2.4, which
    # the win rate leaves out, count here, as in AlpacaEval.
    rounded = [0 if value == TIE else round(value) for value in preferences if math.isfinite(value)]
    discrete = [(whole or TIE) - 1 for whole in rounded if whole in (0, 1, 2)]
    error = standard_error(kept)
    return WinRate(
        win_rate=100 * fmean(kept),
        standard_error=math.nan if error is None else 100 * error,
        discrete_win_rate=100 * fmean(discrete) if discrete else math.nan,
        n_wins=sum(value > 0.5 for value in kept),
        n_wins_base=sum(value < 0.5 for value in kept),
        n_draws=sum(value == TIE for value in values),
        n_total=len(kept),
        n_left_out=len(values) - len(kept),
    )


@dataclass(frozen=True)
class LengthControlled:
    """The win rate if both outputs had one length, in percent."""

    win_rate: float
    standard_error: float  # delta method over a robust covariance
    # of tanh((baseline's length - model's) / their standard deviation), in log-odds; negative: longer outputs are preferred
    length_coefficient: float
    with_difficulty: bool  # whether each instruction's difficulty was a predictor


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
    theta, ridge = np.zeros(design.shape[1]), RIDGE * np.eye(design.shape[1])

    def loss(at: np.ndarray) -> float:
        scores = design @ at
        return float((np.logaddexp(0, scores) - wins * scores).sum() + 0.5 * RIDGE * at @ at)

    for _ in range(200):
        fitted = _sigmoid(design @ theta)
        hessian = (design * (fitted * (1 - fitted))[:, None]).T @ design + ridge
        step = np.linalg.solve(hessian, design.T @ (fitted - wins) + RIDGE * theta)
        if np.abs(step).max() < 1e-10:
            break
        now = loss(theta)
        while loss(theta - step) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        theta = theta - step
    residual = design * (wins - fitted)[:, None]
    inverse = np.linalg.inv(hessian)
    return theta, inverse @ (residual.T @ residual) @ inverse


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -scores))
