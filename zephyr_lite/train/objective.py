"""The interface between a method (SFT, DPO) and the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..data.dataset import TokenizedDataset
from .monitors import DpoCollapseMonitor
from .oom import OomRetry

Metrics = dict[str, float]
# sums of a micro-batch; tensors are read when the step is over, so that no step waits for the device
Shares = Mapping[str, float | Tensor]


class Objective(Protocol):
    """Losses and metrics of a method.

    Attributes:
        unit: what throughput counts: "tokens" or "pairs".
        data: the training rows.
        oom: holds the plan, and replaces it by a smaller one where memory runs out.
        collapse: looks at every step's metrics, or None.
    """

    unit: str
    data: TokenizedDataset
    oom: OomRetry
    collapse: DpoCollapseMonitor | None

    def num_targets(self, examples: Sequence[int]) -> int:
        """What a step's loss is divided by: supervised tokens, or pairs."""

    def loss(self, examples: Sequence[int], step: int, total: int) -> tuple[Tensor, Shares]:
        """A micro-batch's share of the step's loss, differentiable, and sums for the metrics.

        Args:
            examples: indices of the micro-batch.
            step: from 0; decides dropout.
            total: ``num_targets`` of the whole step.
        """

    def metrics(self, sums: Metrics, total: int) -> Metrics:
        """The step's metrics from the sums over its micro-batches and processes."""

    def evaluate(self) -> Metrics:
        """Sums over this process's share of the held-out rows; empty where there are none."""

    def eval_metrics(self, sums: Metrics) -> Metrics:
        """``eval_loss`` and other metrics from the sums over all held-out rows; empty if these are."""


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        step: optimizer steps done.
        metrics: of the last step.
        best: the lowest eval_loss and its step, or None.
        seconds: of training in this process.
        skipped: steps skipped because loss or gradients were not finite, of the whole run.
        evaluations: of the whole run.
        warnings: printed about the run's numbers.
        stopped: the signal that came during the last step, or None.
    """

    step: int
    metrics: Metrics
    best: tuple[float, int] | None
    seconds: float
    skipped: int = 0
    evaluations: list[Metrics] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stopped: str | None = None
