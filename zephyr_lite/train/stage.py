"""The parts of a training run: the stage, its objective (SFT, DPO, KTO), its observers and its outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ..config.load import Method, RunConfig
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset
from ..io.run_dir import StageDir
from ..memory.plan import Plan
from ..memory.workload import Workload
from ..model.adapters import AdapterStack
from ..model.base import Base
from ..model.decoder import Decoder
from ..model.peft_io import AdapterFile
from .oom import OomRetry

if TYPE_CHECKING:
    from ..io.sync import Mirror
    from .monitors import DpoCollapseMonitor

Metrics = dict[str, float]


@dataclass
class Stage:
    """A stage that is ready to train.

    Attributes:
        method: sft or dpo.
        config: its resolved configuration.
        dir: its folder.
        base: the loaded base.
        template: how conversations are rendered.
        stack: the live adapters.
        decoder: runs batches through them.
        data, eval_data: rows to train on, and held-out ones (or None).
        workload, plan: what a step needs, and how it is split.
        frozen: the adapters below, from the bottom up.
        info: the content of stage.json.
        mirror: copies checkpoints to ``sync``, or None.
        forget_best: the best checkpoint so far was judged on other held-out rows.
        draws_samples: False once samples could not be drawn.
        writes: this process writes the folder: not in a dry run, and in one of several processes.
    """

    method: Method
    config: RunConfig
    dir: StageDir
    base: Base
    template: ChatTemplate
    stack: AdapterStack
    decoder: Decoder
    data: TokenizedDataset
    eval_data: TokenizedDataset | None
    workload: Workload
    plan: Plan
    frozen: list[AdapterFile]
    info: dict[str, Any] = field(default_factory=dict)
    mirror: Mirror | None = None
    forget_best: bool = False
    draws_samples: bool = True
    writes: bool = True


class Objective(Protocol):
    """Losses and metrics of a method.

    Attributes:
        unit: what throughput counts: "tokens", "pairs" or "answers".
        data: the training rows.
        oom: holds the plan, and replaces it by a smaller one where memory runs out.
        collapse: looks at every step's metrics, or None.
    """

    unit: str
    stage: Stage
    data: TokenizedDataset
    decoder: Decoder
    oom: OomRetry
    collapse: DpoCollapseMonitor | None = None

    def __init__(self, stage: Stage) -> None:
        self.stage, self.data, self.decoder, self.oom = stage, stage.data, stage.decoder, OomRetry(stage)

    def num_targets(self, examples: Sequence[int]) -> Any:
        """The denominator of a step's loss: the number of supervised tokens, or ``PairTotals``."""

    def begin_step(self, examples: Sequence[int]) -> None:
        """Before a step's micro-batches: compute what its losses depend on beside their own rows; by default nothing."""
        return

    def loss(self, examples: Sequence[int], step: int, total: Any) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """A micro-batch's share of the step's loss, differentiable, and sums for the metrics (tensors, so that no step waits
        for the device).

        Args:
            examples: indices of the micro-batch.
            step: from 0; decides dropout.
            total: ``num_targets`` of the whole step.
        """

    def metrics(self, sums: Metrics, total: Any) -> Metrics:
        """The step's metrics from the sums over its micro-batches and processes."""

    def evaluate(self) -> Metrics:
        """Sums over this process's share of the held-out rows."""

    def eval_metrics(self, sums: Metrics) -> Metrics:
        """``eval_loss`` and other metrics from the sums over all held-out rows."""


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
        general_loss: on general text, ``before`` and ``after`` the stage, and the text's hash; None: not measured.
    """

    step: int
    metrics: Metrics
    best: tuple[float, int] | None
    seconds: float
    skipped: int = 0
    evaluations: list[Metrics] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stopped: str | None = None
    general_loss: dict[str, Any] | None = None


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
        fault: the first OSError.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers
        self.fault: OSError | None = None

    def tell(self, event: str, *values: Any) -> None:
        """Call a method of each observer."""
        for observer in self.observers:
            try:
                getattr(observer, event)(*values)
            except OSError as error:
                self.fault = self.fault or error
