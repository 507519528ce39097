"""Steps whose loss or gradients are not finite: which rows did it, what is written down, when a run ends for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError
from ..model.adapters import total_norm
from .checkpoint import MetricsLog
from .monitors import NonFiniteMonitor
from .objective import Objective

# in the stage's folder: the steps that were left out, and their rows
LEFT_OUT = "left_out.jsonl"


class SkippedSteps:
    """The steps of a stage that were left out.

    Attributes:
        watch: counts them.
        log: ``left_out.jsonl``: step, loss, grad_norm, rows; ``not_finite_alone`` says whether these rows are not finite
            by themselves (true), or each of them is and only all of them together are not (false); null: not looked at.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], *, writes: bool = True) -> None:
        self.watch, self.log, self.say = NonFiniteMonitor(), MetricsLog(folder / LEFT_OUT, writes=writes), say

    def add(self, step: int, metrics: Mapping[str, float], rows: Sequence[str], *, alone: bool | None) -> str:
        """Write a step (from 1) down and say it; returns the first of its rows' names."""
        loss, norm = metrics["loss"], metrics.get("grad_norm", float("nan"))
        self.log.append({"step": step, "loss": loss, "grad_norm": norm, "not_finite_alone": alone, "rows": list(rows)})
        named = f"{', '.join(rows[:3])}{', …' if len(rows) > 3 else ''}"
        which = {True: "Not finite", False: "Each of its rows is finite alone", None: "Its rows"}[alone]
        self.say(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: step left out. {which}: {named}.")
        return named

    def end(self, step: int, named: str, kept: str) -> UserError:
        """What ends a run after too many of them in a row.

        Args:
            kept: which checkpoint there is.
        """
        return UserError(
            f"step {step}: loss or gradients were not finite three times in a row; rows of the last: {named}. {kept}",
            f"{self.log.path} names the rows of each such step. If the rows are sound, lower learning_rate (in another "
            "output_dir: it binds a run that has begun).",
        )


def suspects(
    task: Objective, step: int, examples: Sequence[int], parameters: Iterable[nn.Parameter], undo: Callable[[], None]
) -> tuple[list[str], bool]:
    """The rows of a step that are not finite by themselves, in loss or gradients, and True; where each is finite alone, all
    of the step's and False. Leaves no gradients behind.

    Args:
        step: from 0.
        undo: forgets all gradients.
    """
    total, parameters = task.count(examples), list(parameters)

    def work() -> list[int]:
        found = []
        for example in examples:
            undo()
            loss, _ = task.loss([example], step, total)
            loss.backward()
            norm = total_norm([p.grad for p in parameters if p.grad is not None])
            if not (torch.isfinite(loss.detach()) and torch.isfinite(norm)):
                found.append(example)
            del loss
        return found

    found = task.guard(work, undo)
    undo()
    return [task.where(example) for example in found or examples], bool(found)
