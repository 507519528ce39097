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
from .oom import is_out_of_memory

# keys of a parameter group that a checkpoint does not restore: they choose the implementation
IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable", "maximize"}


def make_optimizer(config: RunConfig, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the adapter's float32 weights, with its state allocated, so that what does not
    fit shows before the first step.

    ``adamw_8bit`` keeps both moments in 8 bits (Dettmers et al. 2022; tensors under 4,096 elements stay in 32); the paged
    ones let CUDA move the state to the host when the card is full.

    Raises:
        UserError: the state does not fit into memory.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }
    groups = list(parameters.values())
    # The fused one needs no memory during a step; torch's default on a GPU (foreach) takes several copies of all parameters.
    if config.optim == "adamw_torch":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    elif config.optim == "adamw_8bit":
        optimizer = bnb.optim.AdamW8bit(groups, **settings)
    elif config.optim == "paged_adamw_8bit":
        optimizer = bnb.optim.PagedAdamW8bit(groups, **settings)
    elif groups[0].is_cuda:
        optimizer = bnb.optim.PagedAdamW32bit(groups, **settings)
    else:
        # bitsandbytes has no 32-bit AdamW for CPUs
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    try:
        allocate_state(optimizer)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"optim {config.optim}: its state for {sum(p.numel() for p in groups):,} trained parameters does not fit into "
            f"memory ({str(error).splitlines()[0]}).",
            "Set optim=paged_adamw_8bit, whose state moves to main memory when the card is full, or lower lora_r.",
        ) from None
    return optimizer


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate what the first step would: moments of zero, and the number of steps."""
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            state = optimizer.state[parameter]
            if state:
                continue
            if isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit):
                optimizer.init_state(group, parameter, index, place)
                continue
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


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
    if len(groups) != len(optimizer.param_groups) or len(states) != len(parameters):
        raise ValueError(f"{len(states)} tensors in {len(groups)} groups")
    for parameter, found in zip(parameters, states):
        mine = optimizer.state[parameter]
        if not found:
            continue
        if found.keys() != mine.keys():
            raise ValueError(f"it has {', '.join(sorted(found))}; this one {', '.join(sorted(mine))}")
        for key, value in found.items():
            if not isinstance(mine[key], torch.Tensor):
                mine[key] = value
            elif mine[key].shape == value.shape and mine[key].dtype == value.dtype:
                mine[key].copy_(value)
            else:
                raise ValueError(f"its {key} is {value.dtype} {list(value.shape)}")
    for group, saved in zip(optimizer.param_groups, groups):
        # JSON has no tuples, and an optimizer's betas are one
        group.update({k: tuple(v) if k == "betas" else v for k, v in saved.items() if k not in IMPLEMENTATION})


def check_schedule(config: RunConfig) -> None:
    """Check the schedule before anything is loaded; raises as ``make_scheduler``."""
    make_scheduler(config, torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate), 10)


def make_scheduler(config: RunConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """transformers' schedule, with warm-up over ``warmup_steps``, or the first ``warmup_ratio`` of the steps.

    Raises:
        UserError: there is no schedule of that name, or it needs more than a name.
    """
    if config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # these want a metric at every step
        raise UserError(
            f"lr_scheduler_type {config.lr_scheduler_type!r}: follows a metric, not the steps.",
            "Try cosine, linear, constant_with_warmup.",
        )
    # a run of one step would be all warm-up, whose first learning rate is 0
    share = min(int(-(-total_steps * config.warmup_ratio // 1)), total_steps - 1)
    warmup = share if config.warmup_steps is None else config.warmup_steps
    try:
        return get_scheduler(
            config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"lr_scheduler_type {config.lr_scheduler_type!r}: {error}", "Try cosine, linear, constant_with_warmup."
        ) from None
