"""A stage that is opened but not trained, and the loss and gradients of one of its steps."""

import torch

from tests.train.test_train import dpo_words
from zephyr_lite.config.load import load_config
from zephyr_lite.train.loop import TrainState, accumulate_gradients
from zephyr_lite.train.setup import setup_stage

PLAIN = {"load_in_4bit": "false"}  # float32, so that a merge rounds nothing


def open_dpo(base, run, rows, **changes):
    loaded = load_config("dpo", None, dpo_words(base, run, rows, **{**PLAIN, **changes}))
    return setup_stage("dpo", loaded)


def moved(stage):
    """As after some training: B is not zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in stage.stack.parameters().values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def step_of(stage, task, tokens, step):
    plan = type(stage.plan)(tokens, ("all",) * len(stage.plan.keep))
    task.oom.follow(plan)
    stage.config.max_grad_norm = 1e9  # unclipped
    state = TrainState(stage, task)
    return accumulate_gradients(state, step), {n: p.grad.clone() for n, p in state.parameters.items()}
