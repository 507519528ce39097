"""Observers of a stage under training: the console's panel, the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .objective import Metrics, Outcome

if TYPE_CHECKING:
    from .stage import Stage


@dataclass(frozen=True)
class Sample:
    """An answer of the model under training.

    Attributes:
        step: optimizer steps done; 0 is before the first.
        prompt: the conversation up to the answer, as the template wrote it.
        answer: drawn greedily, cut at ``sample_tokens``.
        reference: what the held-out row has in its place (dpo: the chosen response).
    """

    step: int
    prompt: str
    answer: str
    reference: str

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Observer:
    """Called during training, in the process that writes; every method does nothing by default."""

    def on_train_begin(self, stage: Stage, unit: str, total: int, step: int) -> None:
        """Training begins, or is resumed after ``step`` steps of ``total``; ``unit``: "tokens" or "pairs"."""

    def on_step_end(self, step: int, metrics: Metrics) -> None:
        """A step is done, logged or not; ``metrics`` has the names of ``metrics.jsonl``. Must be cheap."""

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        """The held-out rows were evaluated and logged."""

    def on_sample(self, step: int, samples: Sequence[Sample]) -> None:
        """Samples were drawn and logged."""

    def on_train_end(self, stage: Stage, outcome: Outcome) -> None:
        """The stage is complete and its adapter written."""
