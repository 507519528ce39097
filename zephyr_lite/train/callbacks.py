"""transformers' callbacks and the trackers of ``report_to`` around the loop."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..config.load import RunConfig
from ..errors import UserError
from .distributed import world
from .stage import Stage

if TYPE_CHECKING:
    from .loop import TrainState

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
    names = config.report_to if world().is_main_process else []
    for name in names:
        extra, packages = EXTRAS.get(name, ("", ()))
        # a plain folder of the package's name, which a tracker leaves, has no origin
        if extra and not any((spec := find_spec(package)) and spec.origin for package in packages):
            raise UserError(
                f"report_to: {name} is not installed.", f'Run: pip install "zephyr-lite[{extra}]", or leave it out.'
            )
    try:
        return [cls() for cls in get_reporting_integration_callbacks(names)]
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"report_to {names}: {error}", "Install the tracker, or leave it out.") from None


def name_wandb_run(stage: Stage) -> None:
    """Let W&B continue the stage's run, under the id in stage.json, unless the user has named another."""
    os.environ.setdefault("WANDB_RUN_ID", f"{stage.info['id']}-{stage.config.stage}")
    os.environ.setdefault("WANDB_RESUME", "allow")


class Callbacks:
    """transformers' callbacks, called as its Trainer calls them.

    Args:
        train: the run, with callbacks of its own beside the trackers.

    Attributes:
        control: what they ask for: to stop, to save.
    """

    def __init__(self, train: TrainState) -> None:
        self.train, self.control = train, TrainerControl()
        stage, config = train.stage.dir, train.stage.config
        callbacks = [*trackers(config), *train.callbacks]
        self.handler: CallbackHandler | None = None
        if not callbacks:
            return
        # transformers' integrations read their settings from its own arguments, and send these to the tracker
        self.arguments = TrainingArguments(
            output_dir=str(stage.path),
            report_to=config.report_to or "none",
            logging_steps=config.logging_steps,
            run_name=f"{stage.run.name}-{stage.path.name}",
            project="zephyr-lite",  # trackio's; wandb reads its own variable
            per_device_train_batch_size=config.batch_size,
            num_train_epochs=config.num_train_epochs,
            max_steps=train.total,
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
        name_wandb_run(train.stage)
        self.handler = CallbackHandler(
            [DefaultFlowCallback(), *callbacks], train.stage.stack.model, None, train.optimizer, train.scheduler
        )
        self.state = TrainerState(max_steps=train.total, num_train_epochs=math.ceil(config.num_train_epochs))
        self.state.is_local_process_zero = self.state.is_world_process_zero = True

    def __call__(self, event: str, *values: Any) -> None:
        """Call every callback.

        Args:
            event: "on_step_end", for instance.
            values: what that event has besides arguments, state and control.
        """
        if self.handler is None:
            return
        self.state.global_step, self.state.epoch = self.train.step, self.train.step / self.train.per_epoch
        if event == "on_log":
            self.state.log_history.append({"step": self.train.step, **values[0]})
        self.control = getattr(self.handler, event)(self.arguments, self.state, self.control, *values)
