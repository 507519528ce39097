"""The trackers of ``report_to``, and other callbacks of transformers, as an observer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..config.load import RunConfig
from ..errors import UserError
from .distributed import world
from .stage import Metrics, Observer, Outcome, Stage
from .steps import step_schedule

# keys that transformers' arguments have too, which trackers log
SAME = (
    *("num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "logging_steps", "seed"),
)


def trackers(config: RunConfig) -> list[TrainerCallback]:
    """transformers' callbacks for the trackers of ``report_to``; none in processes that do not write."""
    names = config.report_to if world().is_main_process else []
    try:
        return [cls() for cls in get_reporting_integration_callbacks(names)]
    except (ImportError, RuntimeError, ValueError) as error:
        extras = "trackers (tensorboard), wandb, trackio"
        raise UserError(
            f"report_to: {error}", f"Install it (extras of zephyr-lite: {extras}), or leave it out."
        ) from None


def open_wandb(stage: Stage) -> None:
    """Open the stage's W&B run, or continue it under the id in stage.json; transformers' callback uses the open run."""
    if "wandb" not in stage.config.report_to:
        return
    import wandb

    if wandb.run is None:
        name = f"{stage.dir.run.name}-{stage.dir.path.name}"
        run_id = os.getenv("WANDB_RUN_ID") or f"{stage.info['id']}-{stage.dir.path.name}"
        resume = os.getenv("WANDB_RESUME") or "allow"
        wandb.init(project=os.getenv("WANDB_PROJECT", "huggingface"), name=name, id=run_id, resume=resume)


class Callbacks(Observer):
    """transformers' callbacks as an observer, called as its Trainer calls them.

    Args:
        callbacks: trackers, for instance.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback]) -> None:
        self.callbacks, self.control = callbacks, TrainerControl()

    def on_train_begin(self, stage: Stage, unit: str, total: int, step: int) -> None:
        config, run_name = stage.config, f"{stage.dir.run.name}-{stage.dir.path.name}"
        # transformers' integrations read their settings from its own arguments, and send these to the tracker
        self.arguments = TrainingArguments(
            output_dir=str(stage.dir.path),
            report_to=config.report_to or "none",
            run_name=run_name,
            project="zephyr-lite",  # trackio's; wandb reads its own variable
            per_device_train_batch_size=config.batch_size,
            max_steps=total,
            **{key: getattr(config, key) for key in SAME},
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            save_strategy="no",  # the loop saves and evaluates by itself
            eval_strategy="no",
        )
        open_wandb(stage)
        self.handler = CallbackHandler([DefaultFlowCallback(), *self.callbacks], stage.stack.model, None, None, None)
        self.per_epoch, _ = step_schedule(config, len(stage.data.rows))
        self.state = TrainerState(max_steps=total, num_train_epochs=math.ceil(config.num_train_epochs))
        self.state.is_local_process_zero = self.state.is_world_process_zero = True
        self._call("on_train_begin", step)

    def on_step_begin(self, step: int) -> None:
        self._call("on_step_begin", step)

    def on_step_end(self, step: int, metrics: Metrics) -> None:
        self._call("on_step_end", step)

    def on_log(self, step: int, metrics: Metrics) -> None:
        self.state.log_history.append({"step": step, **metrics})
        self._call("on_log", step, dict(metrics))

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        self._call("on_evaluate", step, metrics)

    def on_save(self, step: int) -> None:
        self._call("on_save", step)

    def on_train_end(self, stage: Stage, outcome: Outcome) -> None:
        self._call("on_train_end", outcome.step)

    def _call(self, event: str, step: int, *values: Any) -> None:
        self.state.global_step, self.state.epoch = step, step / self.per_epoch
        getattr(self.handler, event)(self.arguments, self.state, self.control, *values)
