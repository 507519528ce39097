"""Optimizers, their state, and schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import get_scheduler

from ..config.load import RunConfig
from ..errors import UserError

# keys of a parameter group that a checkpoint does not restore: they choose the implementation
IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable", "maximize"}


def make_optimizer(config: RunConfig, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the adapter's float32 weights, with its state allocated, so that what does not
    fit shows before the first step.

    ``adamw_8bit`` keeps both moments in 8 bits (Dettmers et al. 2022; tensors under 4,096 elements stay in 32); the paged
    ones let CUDA move the state to the host when the card is full.

    """
    groups = list(parameters.values())
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw_8bit":
        optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(groups, **settings)
    elif config.optim == "paged_adamw_8bit":
        optimizer = bnb.optim.PagedAdamW8bit(groups, **settings)
    elif config.optim == "paged_adamw_32bit" and groups[0].is_cuda:  # bitsandbytes has no 32-bit AdamW for CPUs
        optimizer = bnb.optim.PagedAdamW32bit(groups, **settings)
    else:
        # It needs no memory during a step; torch's default on a GPU (foreach) takes several copies of all parameters.
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    for place, parameter in enumerate(groups):
        if isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit):
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, place)
            continue
        state = optimizer.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return optimizer


@torch.no_grad()
def restore_state(
    optimizer: torch.optim.Optimizer, states: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> None:
    """Copy a checkpoint's state into the allocated one, which may be paged.

    Args:
        states: one per parameter, in the optimizer's order, on the CPU. An empty one (its parameter had no gradient yet)
            leaves the fresh state.
        groups: ``param_groups`` of ``state_dict()``, possibly from JSON.

    Raises:
        ValueError: it is another optimizer's state.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, found in zip(parameters, states, strict=True):
        mine = optimizer.state[parameter]
        if found and found.keys() != mine.keys():
            raise ValueError(f"it has {', '.join(sorted(found))}; this one {', '.join(sorted(mine))}")
        for key, value in found.items():
            if isinstance(value, torch.Tensor):
                mine[key].copy_(value)
            else:
                mine[key] = value
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        # JSON has no tuples, and an optimizer's betas are one
        group.update({k: tuple(v) if k == "betas" else v for k, v in saved.items() if k not in IMPLEMENTATION})


def make_scheduler(config: RunConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """transformers' schedule, with warm-up over ``warmup_steps``, or the first ``warmup_ratio`` of the steps.

    Raises:
        UserError: there is no schedule of that name, or it needs more than a name.
    """
    # a run of one step would be all warm-up, whose first learning rate is 0
    share = min(int(-(-total_steps * config.warmup_ratio // 1)), total_steps - 1)
    warmup = share if config.warmup_steps is None else config.warmup_steps
    try:
        if config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError("follows a metric, not the steps")
        return get_scheduler(
            config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"lr_scheduler_type {config.lr_scheduler_type!r}: {error}", "Try cosine, linear, constant_with_warmup."
        ) from None
