"""What a stage gives to the loop, and what the loop gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..memory.plan import Plan
from .oom import OomRetry
from .steps import Lengths

Metrics = dict[str, float]
# a micro-batch's; what is still a tensor is read when the step is over, so that nobody waits for the device before
Shares = Mapping[str, float | Tensor]


class Objective(Protocol):
    """What a stage gives to the loop."""

    unit: str  # what throughput counts: "tokens" or "pairs"
    guard: OomRetry  # has the plan, and a smaller one where memory runs out

    def follow(self, plan: Plan) -> None:
        """Split and compute as this plan says, from the next micro-batch on."""

    def rows(self) -> Sequence[Sequence[int]]:
        """The recipe's rows, each a list of examples' indices."""

    def lengths(self) -> Lengths:
        """Tokens of each example."""

    def count(self, examples: Sequence[int]) -> int:
        """What a step's loss is normalized by: supervised tokens, or pairs."""

    def loss(self, examples: Sequence[int], step: int, total: int) -> tuple[Tensor, Shares]:
        """A micro-batch's share of the step's loss, with a graph, and metrics that sum up over micro-batches. Tells the
        guard what runs."""

    def summarize(self, sums: Metrics, total: int) -> Metrics:
        """The step's metrics from the sums over its micro-batches."""

    def where(self, example: int) -> str:
        """An example's place in its source."""

    def measure(self) -> Metrics:
        """Sums over this process's share of the held-out rows; empty where there are none."""

    def evaluation(self, sums: Metrics) -> Metrics:
        """Metrics on the held-out rows, with ``eval_loss`` among them, from the sums over all of them; empty of empty ones."""


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        step: optimizer steps done.
        metrics: the last step's.
        best: the lowest eval_loss and its step, or None.
        seconds: of training in this process.
        skipped: steps left out because loss or gradients were not finite, of the whole run.
        evaluations: of the whole run.
        warnings: what was said about its numbers.
        stopped: the signal that came when nothing was left to stop; None: none did.
    """

    step: int
    metrics: Metrics
    best: tuple[float, int] | None
    seconds: float
    skipped: int = 0
    evaluations: list[Metrics] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stopped: str | None = None
