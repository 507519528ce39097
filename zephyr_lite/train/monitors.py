"""Monitors of a run's numbers: steps whose loss or gradients are not finite, and a DPO run that collapses."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .checkpoint import MetricsLog

logger = logging.getLogger(__name__)

# a run ends after so many steps in a row that are not finite
IN_A_ROW = 3
Kind = Literal["applied", "searching", "bad"]
# in the stage's folder: the skipped steps and their rows
LEFT_OUT = "left_out.jsonl"


class SkippedSteps:
    """Counts the steps that were skipped because their loss or gradients were not finite, and records them and their rows in
    ``left_out.jsonl`` (not_finite_alone: whether these rows are not finite by themselves; null: not tested).

    float16 needs a loss scale at which no gradient overflows; the scaler finds it by halving from 65,536 after each overflow.
    Until the first update that search is no fault: the loss is finite, only the scaled gradients are not.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.log = MetricsLog(folder / LEFT_OUT, writes=writes)
        self.count = 0  # skipped steps, those of the scaler's search included
        self.in_a_row = 0  # since the last update, without those of the search
        self.settled = False  # an update was applied, so the scaler has found its scale

    def kind(self, metrics: Mapping[str, float], scale: float | None) -> Kind:
        """Classify a step; ``scale``: the loss scale after it, None without a scaler; a search below 1 has failed."""
        if not math.isfinite(metrics["loss"]):
            return "bad"
        if math.isfinite(metrics["grad_norm"]):
            return "applied"
        return "searching" if scale is not None and scale >= 1 and not self.settled else "bad"

    def count_step(self, kind: Kind) -> None:
        if kind == "applied":
            self.settled, self.in_a_row = True, 0
            return
        self.count += 1
        self.in_a_row += kind == "bad"

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "in_a_row": self.in_a_row, "settled": self.settled}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def add(
        self, step: int, metrics: Mapping[str, float], rows: Sequence[str], kept: str, *, alone: bool | None
    ) -> UserError | None:
        """Record and print a step (from 1) and its rows; returns the error that ends the run after ``IN_A_ROW``.

        Args:
            kept: a sentence about the checkpoint from before.
            alone: whether these rows are not finite by themselves; None: not tested.
        """
        loss, norm = metrics["loss"], metrics["grad_norm"]
        self.log.append({"step": step, "loss": loss, "grad_norm": norm, "not_finite_alone": alone, "rows": list(rows)})
        named = f"{', '.join(rows[:3])}{', …' if len(rows) > 3 else ''}"
        which = {True: "Not finite", False: "Each of its rows is finite alone", None: "Its rows"}[alone]
        logger.warning(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: step left out. {which}: {named}.")
        if self.in_a_row < IN_A_ROW:
            return None
        return UserError(
            f"step {step}: loss or gradients were not finite three times in a row; rows of the last: {named}. {kept}".rstrip(),
            f"{self.log.path} names the rows of each such step. If the rows are sound, lower learning_rate (in another "
            "output_dir: a run keeps its learning_rate).",
        )


class DpoCollapseMonitor:
    """Warns once of a DPO run that makes both answers ever less likely.

    DPO's loss depends only on the difference of the two log-ratios (Rafailov et al. 2023, equation 7), so both may fall
    without end as long as the rejected one falls faster (Pal et al. 2024, arXiv 2402.13228; Rafailov et al. 2024,
    arXiv 2404.12358). The implicit rewards β·log(π/π_ref) show it before the loss does.

    The warning comes if over the last ``WINDOW`` steps both rewards are below zero and lower in the second half than in the
    first, the accuracy is at least ``ACCURACY``, and the margin grows above ``MARGIN`` (where the sigmoid's gradient is
    below 0.7 % of its maximum).
    """

    WINDOW = 20
    ACCURACY = 0.99
    MARGIN = 5.0
    KEYS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")

    def __init__(self) -> None:
        self.steps: deque[tuple[float, ...]] = deque(maxlen=self.WINDOW)
        self.warned = False

    def saw(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Add a step's metrics; returns the warning, once."""
        self.steps.append(tuple(float(metrics[key]) for key in self.KEYS))
        if self.warned or len(self.steps) < self.WINDOW:
            return None
        half = self.WINDOW // 2
        steps = list(self.steps)
        (c1, r1, a1, m1), (c2, r2, a2, m2) = (
            [sum(x) / half for x in zip(*part)] for part in (steps[:half], steps[half:])
        )
        falling = max(c1, r1, c2, r2) < 0 and c2 < c1 and r2 < r1
        if not (falling and min(a1, a2) >= self.ACCURACY and (m1 + m2) / 2 > self.MARGIN and m2 > m1):
            return None
        self.warned = True
        return (
            f"step {step}: this looks like a collapse. Over {self.WINDOW} steps the log-probabilities of chosen and "
            f"rejected answers fell together (rewards {(c1 + c2) / 2:.2f} and {(r1 + r2) / 2:.2f}), while the accuracy is "
            f"{(a1 + a2) / 2:.2f} and the margin {(m1 + m2) / 2:.2f} grows.\n"
            "Known cures: a larger beta, a lower learning_rate, fewer steps (early_stopping_patience, "
            "load_best_model_at_end), label_smoothing=0.1, loss_type=ipo, rpo_alpha=0.2. Read some answers of the model before "
            "you use it."
        )
