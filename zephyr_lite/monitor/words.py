"""What screens say in words."""

from __future__ import annotations

from ..io.words import duration
from ..train.objective import Outcome
from ..train.stage import Stage


def end_line(stage: Stage, outcome: Outcome) -> str:
    """How a stage ended, in one line: where its adapter is, how long it took, what the held-out rows say."""
    parts = [f"{stage.dir.adapter}: {outcome.step:,} steps"]
    if outcome.seconds > 0:
        parts[0] += f", {duration(outcome.seconds)}"
    last = outcome.evaluations[-1] if outcome.evaluations else {}
    for name, key in (
        ("held-out loss", "eval_loss"),
        ("accuracy", "eval_rewards/accuracies"),
        ("margin", "eval_rewards/margins"),
    ):
        if key in last:
            parts.append(f"{name} {float(last[key]):.4f}")
    if outcome.best is not None and outcome.best[1] != outcome.step:
        parts.append(f"best held-out loss {outcome.best[0]:.4f} at step {outcome.best[1]:,}")
    if outcome.skipped:
        parts.append(f"{outcome.skipped:,} steps left out")
    return "; ".join(parts)
