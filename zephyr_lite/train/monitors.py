"""Numbers that go wrong: steps whose loss or gradients are not finite, and a preference optimization that collapses."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

# so many steps without finite numbers in a row end a run
IN_A_ROW = 3


class NonFiniteMonitor:
    """Counts the steps that were left out because their loss or their gradients were not finite.

    float16 needs a loss scale that lets no gradient overflow; the scaler finds it by halving after each overflow, from
    65,536 down. Until the first update that search is no fault: the loss is finite, only the scaled gradients are not.

    Attributes:
        count: steps left out, the scaler's search included.
        in_a_row: of them, those since the last update that were no part of the search.
        settled: an update was applied, so the scaler has found its scale.
    """

    def __init__(self) -> None:
        self.count = self.in_a_row = 0
        self.settled = False

    def saw(self, *, applied: bool, finite_loss: bool, scale: float | None) -> Literal["applied", "searching", "bad"]:
        """What a step was.

        Args:
            applied: its update was.
            finite_loss: its loss is finite.
            scale: the loss scaler's, after the step; None where nothing is scaled. Below 1 nothing is found any more.
        """
        if applied:
            self.settled, self.in_a_row = True, 0
            return "applied"
        self.count += 1
        if finite_loss and scale is not None and scale >= 1 and not self.settled:
            return "searching"
        self.in_a_row += 1
        return "bad"

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "in_a_row": self.in_a_row, "settled": self.settled}

    def load(self, state: Mapping[str, Any]) -> None:
        self.count, self.in_a_row = int(state.get("count", 0)), int(state.get("in_a_row", 0))
        self.settled = bool(state.get("settled", False))


class DpoCollapseMonitor:
    """Notices a DPO run that no longer learns which answer is better, but to make every answer unlikely.

    DPO's loss depends on the difference of the two log-ratios alone (Rafailov et al. 2023, equation 7), so that both may
    fall without end as long as the rejected one falls faster (Pal et al. 2024, arXiv 2402.13228; Rafailov et al. 2024,
    arXiv 2404.12358). It shows in the implicit rewards β·log(π/π_ref) before it shows in the loss.

    Over the last ``WINDOW`` steps all of these hold: both rewards are below zero, and lower in the second half than in
    the first; the accuracy is at least ``ACCURACY``; the margin is above ``MARGIN`` (there the sigmoid's gradient is
    below 0.7 % of its largest) and grows.
    """

    WINDOW = 20
    ACCURACY = 0.99
    MARGIN = 5.0
    KEYS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")

    def __init__(self) -> None:
        self.steps: deque[tuple[float, ...]] = deque(maxlen=self.WINDOW)
        self.warned = False

    def saw(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A step's metrics; the warning, the first time that there is reason for one."""
        self.steps.append(tuple(float(metrics[key]) for key in self.KEYS))
        if self.warned or len(self.steps) < self.WINDOW or not self._collapses():
            return None
        self.warned = True
        chosen, rejected, accuracy, margin = (sum(column) / self.WINDOW for column in zip(*self.steps))
        return (
            f"step {step}: this looks like a collapse. Over {self.WINDOW} steps the log-probabilities of chosen and "
            f"rejected answers fell together (rewards {chosen:.2f} and {rejected:.2f}), while the accuracy is {accuracy:.2f} "
            f"and the margin {margin:.2f} grows.\n"
            "Known cures: a larger beta, a lower learning_rate, fewer steps (early_stopping_patience, "
            "load_best_model_at_end), label_smoothing=0.1, loss_type=ipo. Read some answers of the model before you use it."
        )

    def _collapses(self) -> bool:
        half = self.WINDOW // 2
        first, second = list(self.steps)[:half], list(self.steps)[half:]
        (c1, r1, a1, m1), (c2, r2, a2, m2) = ([sum(x) / half for x in zip(*part)] for part in (first, second))
        falling = max(c1, r1, c2, r2) < 0 and c2 < c1 and r2 < r1
        return falling and min(a1, a2) >= self.ACCURACY and (m1 + m2) / 2 > self.MARGIN and m2 > m1

    def state(self) -> dict[str, Any]:
        return {"steps": [list(step) for step in self.steps], "warned": self.warned}

    def load(self, state: Mapping[str, Any]) -> None:
        self.steps.clear()
        self.steps.extend(tuple(step) for step in state.get("steps", []))
        self.warned = bool(state.get("warned", False))
