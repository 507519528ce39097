"""The win rate as AlpacaEval counts it, and a length-controlled one.

A preference is 1 where the baseline's output is better and 2 where the model's is, or between for a judge's probability;
0 is an older way to write a tie (1.5). Whatever lies outside 1 to 2, nan among it, is no verdict, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

TIE = 1.5
# Of the sum of squares of the coefficients: where every comparison is won, the best fit lies at infinity.
RIDGE = 1e-6
LEAST = 20  # verdicts: a curve through fewer fits them perfectly, and says 0.00 ± 0.00


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
    """
    Args:
        preferences: [n], as annotated.

    Raises:
        ValueError: none of them counts.
    """
    values = [TIE if value == 0 else float(value) for value in preferences]
    kept = [value - 1 for value in values if 1 <= value <= 2]
    if not kept:
        raise ValueError("no preference between 1 and 2")
    rate, error = _mean_and_error(kept)
    discrete = [_rounded(float(value)) for value in preferences if math.isfinite(value)]
    kept_discrete = [value - 1 for value in discrete if 1 <= value <= 2]
    return WinRate(
        win_rate=100 * rate,
        standard_error=100 * error,
        discrete_win_rate=100 * math.fsum(kept_discrete) / len(kept_discrete) if kept_discrete else math.nan,
        n_wins=sum(value > 0.5 for value in kept),
        n_wins_base=sum(value < 0.5 for value in kept),
        n_draws=sum(value == TIE for value in values),
        n_total=len(kept),
        n_left_out=len(values) - len(kept),
    )


def _rounded(value: float) -> float:
    """To 1 or 2 (halves to the even number, as everywhere); a tie, and what rounds to 0, is a tie. So 0.7 and 2.4, which
    the win rate leaves out, count here: that is how AlpacaEval has it."""
    whole = 0 if value == TIE else round(value)
    return TIE if whole == 0 else float(whole)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    middle = math.fsum(values) / len(values)
    if len(values) < 2:
        return middle, math.nan
    return middle, math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))


@dataclass(frozen=True)
class LengthControlled:
    """The win rate if both outputs were of one length, in percent.

    Attributes:
        standard_error: of the estimate (delta method over a robust covariance).
        length_coefficient: of tanh((baseline's length - model's) / their standard deviation), in log-odds; negative
            where the judge prefers what is longer.
        with_difficulty: whether each instruction's difficulty was among the predictors.
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
    """Logistic regression of the verdicts on the difference in length, read where there is none (arXiv 2404.04475,
    equation 3): P(model wins) = σ(θ + φ tanh(Δ / sd(Δ)) [+ ψ difficulty]).

    What is left out of AlpacaEval's published estimate: its L1 penalty chosen by cross-validation, and the artificial
    baselines that it regularizes with; and, unless given, the instructions' difficulty, which needs many models'
    verdicts on the same instructions.

    Args:
        preferences: [n] as annotated; those that do not count are left out of the fit.
        lengths_1, lengths_2: [n] letters of the baseline's and the model's outputs.
        difficulty: [n] of the instructions.

    Returns:
        None where there is nothing to fit: fewer than ``LEAST`` verdicts, or no difference in length.
    """
    wins = np.array([TIE if value == 0 else value for value in preferences], dtype=np.float64) - 1
    delta = np.asarray(lengths_1, dtype=np.float64) - np.asarray(lengths_2, dtype=np.float64)
    spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
    counts = (wins >= 0) & (wins <= 1)
    if counts.sum() < LEAST or spread == 0:
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
    """Coefficients [k] and their covariance [k, k], by Newton's method with halved steps; the targets may lie between 0
    and 1, for which the sandwich estimate of the covariance holds too."""
    theta = np.zeros(design.shape[1])

    def objective(at: np.ndarray) -> float:
        scores = design @ at
        return float((np.logaddexp(0, scores) - wins * scores).sum() + 0.5 * RIDGE * at @ at)

    for _ in range(200):
        fitted = _sigmoid(design @ theta)
        gradient = design.T @ (fitted - wins) + RIDGE * theta
        hessian = (design * (fitted * (1 - fitted))[:, None]).T @ design + RIDGE * np.eye(len(theta))
        step, now = np.linalg.solve(hessian, gradient), objective(theta)
        while objective(theta - step) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        theta = theta - step
        if np.abs(step).max() < 1e-10:
            break
    fitted = _sigmoid(design @ theta)
    hessian = (design * (fitted * (1 - fitted))[:, None]).T @ design + RIDGE * np.eye(len(theta))
    residual = design * (wins - fitted)[:, None]
    inverse = np.linalg.inv(hessian)
    return theta, inverse @ (residual.T @ residual) @ inverse


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -scores))
