"""Confidence intervals by the bootstrap over rows: the percentile interval of Efron (1979).

Each resample draws as many rows as there are, with replacement. Every statistic is a ratio of sums over rows (loss per token,
share of pairs), and all of them are computed on the same resamples, so the interval of a difference between two models is a
paired one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

# (numerators, denominators), [n] float64 each; the statistic is the ratio of their sums
Ratio = tuple[np.ndarray, np.ndarray]
Key = TypeVar("Key", bound=Hashable)
_CHUNK = 4_000_000  # random numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval; no ends if there is only one row."""

    value: float
    low: float | None
    high: float | None

    def exp(self) -> Interval:
        """The interval of the perplexity, for a loss; capped at e^700."""
        ends = (None if x is None else math.exp(min(x, 700.0)) for x in (self.low, self.high))
        return Interval(math.exp(min(self.value, 700.0)), *ends)

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)

    def text(self, form: str = ".4f") -> str:
        """``1.2345 [1.2001, 1.2690]``."""
        ends = "" if self.low is None else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{ends}"


@dataclass(frozen=True)
class Bootstrap:
    """Number of resamples, level of confidence (0.95 cuts off 2.5 % of the resamples at either end), and random seed."""

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def intervals(self, ratios: Mapping[Key, Ratio]) -> dict[Key, Interval]:
        """An interval for each ratio of sums, all over the same n rows and the same resamples."""
        above = np.stack([ratio[0] for ratio in ratios.values()], axis=1).astype(np.float64)
        below = np.stack([ratio[1] for ratio in ratios.values()], axis=1).astype(np.float64)
        rows = len(above)
        values = above.sum(0) / below.sum(0)
        if rows == 1:
            return {name: Interval(float(value), None, None) for name, value in zip(ratios, values)}
        generator = np.random.default_rng(self.seed)
        size = max(1, _CHUNK // rows)
        drawn = []
        for start in range(0, self.resamples, size):
            # how often each row is drawn
            counts = generator.multinomial(rows, np.full(rows, 1 / rows), size=min(size, self.resamples - start))
            drawn.append((counts.astype(np.float64) @ above) / (counts.astype(np.float64) @ below))
        tail = (1 - self.level) / 2
        low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail], axis=0)
        return {name: Interval(*map(float, ends)) for name, *ends in zip(ratios, values, low, high)}

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "over": "rows, percentile, paired"}
