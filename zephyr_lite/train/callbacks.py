"""transformers' callbacks and trackers around the loop."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..config.load import RunConfig
from ..errors import UserError
from ..io.run_dir import StageDir
from .distributed import world

# tracker → the extra that installs it, and the packages of which one is needed
EXTRAS = {
    "tensorboard": ("trackers", ("tensorboard", "tensorboardX")),
    "wandb": ("wandb", ("wandb",)),
    "trackio": ("trackio", ("trackio",)),
}


def trackers(config: RunConfig) -> list[TrainerCallback]:
    """transformers' callbacks for the trackers of ``report_to``; none in processes that do not write.

    Raises:
        UserError: transformers knows no such tracker, or it is not installed.
    """
    names = config.report_to if world().writes else []
    for name in names:
        extra, packages = EXTRAS.get(name, ("", ()))
        if extra and not any(_installed(package) for package in packages):
            raise UserError(
                f"report_to: {name} is not installed.", f'Run: pip install "zephyr-lite[{extra}]", or leave it out.'
            )
    try:
        return [cls() for cls in get_reporting_integration_callbacks(names)]
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"report_to {names}: {error}", "Install the tracker, or leave it out.") from None


def _installed(package: str) -> bool:
    """Whether a package can be imported; a plain folder of its name, which a tracker leaves, does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def open_wandb(reporting: Sequence[TrainerCallback], stage: StageDir) -> None:
    """Open the stage's W&B run, or continue it under the id in stage.json; transformers' callback uses the open run."""
    info = stage.info()
    if not any(type(callback).__name__ == "WandbCallback" for callback in reporting) or not info:
        return
    import wandb

    if wandb.run is None:
        wandb.init(
            project=os.getenv("WANDB_PROJECT", "huggingface"),
            name=f"{stage.run.name}-{stage.path.name}",
            id=os.getenv("WANDB_RUN_ID") or f"{info['id']}-{stage.path.name}",
            resume=os.getenv("WANDB_RESUME") or "allow",
        )


class Callbacks:
    """transformers' callbacks, called as its Trainer calls them.

    Args:
        config: of the stage.
        stage: its folder.
        model: the live model.
        total: steps of the run.
        callbacks: beside the trackers of ``report_to``.

    Attributes:
        state: what callbacks read: the step, the epoch, what was logged.
        control: what they ask for: to stop, to save.

    Raises:
        UserError: a tracker is not installed.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: StageDir,
        model: Any,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        total: int,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        # transformers' integrations read their settings from its own arguments, and send these to the tracker
        self.arguments = TrainingArguments(
            output_dir=str(stage.path),
            report_to=config.report_to or "none",
            logging_steps=config.logging_steps,
            run_name=f"{stage.run.name}-{stage.path.name}",
            project="zephyr-lite",  # trackio's; wandb reads its own variable
            per_device_train_batch_size=config.batch_size,
            num_train_epochs=config.num_train_epochs,
            max_steps=total,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            save_strategy="no",  # the loop saves and evaluates by itself
            eval_strategy="no",
        )
        reporting = trackers(config)
        open_wandb(reporting, stage)
        self.handler = CallbackHandler(
            [DefaultFlowCallback(), *reporting, *callbacks], model, None, optimizer, scheduler
        )
        self.state = TrainerState(max_steps=total, num_train_epochs=math.ceil(config.num_train_epochs))
        self.state.is_local_process_zero = self.state.is_world_process_zero = True
        self.control = TrainerControl()

    def __call__(self, event: str, *values: Any) -> None:
        """Call every callback.

        Args:
            event: "on_step_end", for instance.
            values: what that event has besides arguments, state and control.
        """
        self.control = getattr(self.handler, event)(self.arguments, self.state, self.control, *values)
