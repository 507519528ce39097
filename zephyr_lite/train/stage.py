"""The parts of a training run: the stage, its objective (SFT, DPO, KTO), its observers and its outcome."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config.load import Method, RunConfig
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset
from ..io.logging import output_fault
from ..io.run_dir import StageDir
from ..io.sync import Mirror
from ..memory.plan import Plan
from ..memory.workload import Workload
from ..model.adapters import AdapterStack
from ..model.base import Base
from ..model.decoder import Decoder
from ..model.peft_io import AdapterFile
from .distributed import sum_by_name
from .oom import OomRetry

if TYPE_CHECKING:
    from .monitors import DpoCollapseMonitor

logger = logging.getLogger(__name__)
Metrics = dict[str, float]


@dataclass
class Stage:
    """A stage that is ready to train."""

    method: Method
    config: RunConfig  # resolved
    dir: StageDir
    base: Base
    template: ChatTemplate
    stack: AdapterStack
    decoder: Decoder  # runs batches through the stack
    data: TokenizedDataset
    eval_data: TokenizedDataset | None  # the held-out rows
    workload: Workload  # what a step needs
    plan: Plan  # how it is split
    frozen: list[AdapterFile]  # the adapters below, from the bottom up
    info: dict[str, Any]  # the content of stage.json
    mirror: Mirror | None = None  # copies checkpoints to ``sync``
    forget_best: bool = False  # the best checkpoint so far was judged on other held-out rows
    draws_samples: bool = True  # False once samples could not be drawn
    writes: bool = True  # this process writes the folder: not in a dry run, and in one of several processes


class Objective:
    """Losses and metrics of a method."""

    unit: str  # what throughput counts: "tokens", "pairs" or "answers"
    collapse: DpoCollapseMonitor | None = None  # looks at every step's metrics

    def __init__(self, stage: Stage) -> None:
        self.stage, self.data, self.decoder = stage, stage.data, stage.decoder
        self.oom = OomRetry(stage)  # holds the plan, and replaces it by a smaller one where memory runs out

    def num_targets(self, examples: Sequence[int]) -> Any:
        """The denominator of a step's loss: the number of supervised tokens, or ``PairTotals``."""
        raise NotImplementedError

    def begin_step(self, examples: Sequence[int]) -> None:
        """Before a step's micro-batches: compute what its losses depend on beside their own rows; by default nothing."""

    def loss(self, examples: Sequence[int], step: int, total: Any) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """A micro-batch's share of the step's loss, differentiable, and sums for the metrics (tensors, so that no step waits
        for the device).

        Args:
            examples: indices of the micro-batch.
            step: from 0; decides dropout.
            total: ``num_targets`` of the whole step.
        """
        raise NotImplementedError

    def metrics(self, sums: Metrics, total: Any) -> Metrics:
        """The step's metrics from the sums over its micro-batches and processes."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Sums over this process's share of the held-out rows."""
        assert self.stage.eval_data is not None
        return sum_by_name(self.oom.groups(self.stage.eval_data, self.eval_sums))

    def eval_sums(self, group: list[int]) -> Metrics:
        """Sums over some of the held-out rows."""
        raise NotImplementedError

    def eval_metrics(self, sums: Metrics) -> Metrics:
        """``eval_loss`` and other metrics from the sums over all held-out rows."""
        raise NotImplementedError


@dataclass
class Outcome:
    """The result of a run."""

    step: int  # optimizer steps done
    metrics: Metrics  # of the last step
    best: tuple[float, int] | None  # the lowest eval_loss and its step
    seconds: float  # of training in this process
    skipped: int = 0  # steps skipped because loss or gradients were not finite, of the whole run
    evaluations: list[Metrics] = field(default_factory=list)  # of the whole run
    warnings: list[str] = field(default_factory=list)  # printed about the run's numbers
    stopped: str | None = None  # the signal that came during the last step
    step_seconds: list[float] = field(default_factory=list)  # of each step of this process, evaluations aside
    # on general text, ``before`` and ``after`` the stage, and the text's hash; None: not measured
    general_loss: dict[str, Any] | None = None

    def warn(self, warning: str) -> None:
        self.warnings.append(warning)
        logger.warning(warning)


@dataclass(frozen=True)
class Sample:
    """An answer of the model under training."""

    step: int  # optimizer steps done; 0 is before the first
    prompt: str  # the conversation up to the answer, as the template wrote it
    answer: str  # drawn greedily, cut at ``sample_tokens``
    reference: str  # what the held-out row has in its place (dpo: the chosen response)


class Observer:
    """Called during training in the process that writes; every method does nothing by default."""

    def on_train_begin(self, stage: Stage, unit: str, total: int, step: int) -> None:
        """Training begins, or is resumed after ``step`` steps of ``total``; ``unit``: the objective's."""

    def on_step_begin(self, step: int) -> None:
        """A step begins after ``step`` steps."""

    def on_step_end(self, step: int, metrics: Metrics) -> None:
        """A step is done, logged or not; ``metrics`` has the names of ``metrics.jsonl``. Must be cheap."""

    def on_log(self, step: int, metrics: Metrics) -> None:
        """A step or an evaluation was logged."""

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        """The held-out rows were evaluated and logged."""

    def on_save(self, step: int) -> None:
        """A checkpoint was written."""

    def on_sample(self, step: int, samples: Sequence[Sample]) -> None:
        """Samples were drawn and logged."""

    def on_train_end(self, stage: Stage, outcome: Outcome) -> None:
        """The stage is complete and its adapter written."""


class Observers:
    """Tells observers of events. With ``sft | tee log``, Ctrl-C ends the reader of their output too, and the run must still
    write its checkpoint: an OSError does not end it in the middle of a step.

    Attributes:
        fault: the first OSError, of a message too.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers
        self._fault: OSError | None = None

    @property
    def fault(self) -> OSError | None:
        return self._fault or output_fault()

    def tell(self, event: str, *values: Any) -> None:
        """Call a method of each observer."""
        for observer in self.observers:
            try:
                getattr(observer, event)(*values)
            except OSError as error:
                self._fault = self._fault or error
