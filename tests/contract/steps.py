"""A stage that is opened but not trained, and the loss and gradients of one of its steps."""

import torch

from tests.train.test_train import dpo_words, quiet
from zephyr_lite.config.load import load_config
from zephyr_lite.train.loop import Loop
from zephyr_lite.train.setup import setup_stage

PLAIN = {"load_in_4bit": "false"}  # float32, so that a merge rounds nothing


def open_dpo(base, run, rows, **changes):
    loaded = load_config("dpo", None, dpo_words(base, run, rows, **{**PLAIN, **changes}))
    return setup_stage("dpo", loaded, say=quiet)


def moved(stage):
    """As after some training: B is not zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in stage.stack.parameters().values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def step_of(stage, task, tokens, step):
    plan = type(stage.plan)(tokens, ("all",) * len(stage.plan.keep))
    loop = Loop(stage.config, stage.dir, stage.stack, task, plan, say=quiet)
    loop.optimizer.zero_grad()
    sums, total = loop.gradients(step)
    return loop.task.summarize(sums, total), {n: p.grad.clone() for n, p in loop.parameters.items()}
