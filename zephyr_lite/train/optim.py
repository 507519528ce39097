"""Optimizers and schedules."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import get_scheduler

from ..config import RunConfig
from ..errors import UserError


def make_optimizer(config: RunConfig, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the adapter's float32 master weights.

    ``adamw_8bit`` keeps both moments in 8 bits (Dettmers et al. 2022; tensors under 4,096 elements stay in 32);
    the paged ones let CUDA move the state to the host when the card is full.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }
    groups = list(parameters.values())
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(groups, **settings)
    if config.optim == "adamw_8bit":
        return bnb.optim.AdamW8bit(groups, **settings)
    if config.optim == "paged_adamw_8bit":
        return bnb.optim.PagedAdamW8bit(groups, **settings)
    if groups[0].is_cuda:
        return bnb.optim.PagedAdamW32bit(groups, **settings)
    # bitsandbytes' 32-bit AdamW exists for GPUs; without one there is nothing to page out of either
    return torch.optim.AdamW(groups, **settings)


def make_scheduler(config: RunConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """transformers' schedule of that name, with warm-up over the first ``warmup_ratio`` of the steps.

    Raises:
        UserError: there is no schedule of that name, or it needs more than a name.
    """
    if config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # these want a metric at every step
        raise UserError(
            f"lr_scheduler_type {config.lr_scheduler_type!r}: follows a metric, not the steps.",
            "Try cosine, linear, constant_with_warmup.",
        )
    # a run of one step would be all warm-up, whose first learning rate is 0
    warmup = min(int(-(-total_steps * config.warmup_ratio // 1)), total_steps - 1)
    try:
        return get_scheduler(
            config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"lr_scheduler_type {config.lr_scheduler_type!r}: {error}", "Try cosine, linear, constant_with_warmup."
        ) from None
