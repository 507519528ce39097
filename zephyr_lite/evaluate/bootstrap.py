"""Confidence intervals by the bootstrap over rows: how much would a number move with other rows of the same kind?

The percentile interval of Efron (1979): rows are drawn with replacement as often as there are rows, and what is asked for is
computed of each draw. Every statistic here is a ratio of sums over rows (a loss a token, a share of pairs), and all of them are
computed of the same draws; a difference of two models is one of these ratios, so its interval is a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

# (numerators, denominators), [n] float64 each; the statistic is their sums' ratio
Ratio = tuple[np.ndarray, np.ndarray]
Key = TypeVar("Key", bound=Hashable)
_CHUNK = 4_000_000  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval.

    Attributes:
        value: of the rows as they are.
        low, high: the interval's ends; None for a single row, of which nothing can be said.
    """

    value: float
    low: float | None
    high: float | None

    def exp(self) -> Interval:
        """Of a loss its perplexity: a monotone function takes the interval's ends along."""
        return self._by(_exp)

    def scaled(self, factor: float) -> Interval:
        """Times a positive factor."""
        return self._by(lambda x: x * factor)

    def _by(self, change: Callable[[float], float]) -> Interval:
        low, high = (None if end is None else change(end) for end in (self.low, self.high))
        return Interval(change(self.value), low, high)

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}

    def text(self, form: str = ".4f") -> str:
        """``1.2345 [1.2001, 1.2690]``."""
        if self.low is None or self.high is None:
            return f"{self.value:{form}}"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        resamples: draws.
        level: of confidence: 0.95 leaves 2.5 % of the draws out on either side.
        seed: of the draws.
    """

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def intervals(self, ratios: Mapping[Key, Ratio]) -> dict[Key, Interval]:
        """An interval for each ratio of sums, all of them over the same n rows and the same draws.

        Raises:
            ValueError: the arrays are not all [n], or n is 0.
        """
        shapes = {array.shape for ratio in ratios.values() for array in ratio}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or shape[0] == 0:
            raise ValueError("the ratios are not over the same rows, or over none")
        (rows,) = shape
        above = np.stack([ratio[0] for ratio in ratios.values()], axis=1).astype(np.float64)
        below = np.stack([ratio[1] for ratio in ratios.values()], axis=1).astype(np.float64)
        values = above.sum(0) / below.sum(0)
        if rows == 1:
            return {name: Interval(float(value), None, None) for name, value in zip(ratios, values)}
        generator = np.random.default_rng(self.seed)
        drawn = []
        left = self.resamples
        while left:
            some = min(left, max(1, _CHUNK // rows))
            # how often each row is drawn
            counts = generator.multinomial(rows, np.full(rows, 1 / rows), size=some).astype(np.float64)
            drawn.append((counts @ above) / (counts @ below))
            left -= some
        tail = (1 - self.level) / 2
        low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail], axis=0)
        return {name: Interval(*map(float, ends)) for name, *ends in zip(ratios, values, low, high)}

    def as_dict(self) -> dict[str, Any]:
        return {"resamples": self.resamples, "level": self.level, "seed": self.seed, "over": "rows, percentile, paired"}


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # a loss of 700 nats: nobody can tell e^700 from what is beyond it
