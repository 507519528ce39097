"""Optimizers, their state, and schedules."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from ..config.load import RunConfig
from ..errors import UserError
from ..io.text import short
from ..ops.lora import ALIGNMENT, SMALL

# keys of a parameter group that a checkpoint does not restore: they choose the implementation
IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable", "maximize"}
# the state's tensors that have a number for each of the parameter's
MOMENTS = {"exp_avg", "exp_avg_sq", "state1", "state2"}
# Numbers that one call updates at most: bitsandbytes counts in 32 bits, and moves a paged buffer's moments to the card all
# at once, for which a full card has little room.
LARGEST = 2**26
# arguments of transformers' schedules that are not options
GIVEN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def make_buffers(config: RunConfig, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, nn.Parameter], Tensor]:
    """The ranges of an adapter's buffer (see ``AdapterStack``) that an optimizer updates in one call each: one for every
    ``LARGEST`` numbers; A and B apart with ``loraplus_lr_ratio``; those apart that an 8-bit optimizer keeps in 32 bits.

    Returns:
        the ranges for ``make_optimizer``, with their gradients; all gradients in one tensor, laid out as the buffer.
    """
    ordered = sorted(parameters.items(), key=lambda item: item[1].storage_offset())
    first = ordered[0][1].detach()
    whole = first.as_strided((first.untyped_storage().nbytes() // first.itemsize,), (1,), 0)
    starts: list[tuple[str, int]] = []
    for name, parameter in ordered:
        assert parameter.untyped_storage().data_ptr() == whole.data_ptr(), f"{name} is not in the adapter's buffer"
        kind = "lora_B" if config.loraplus_lr_ratio is not None and "lora_B" in name else "lora_A"
        kind += ".small" if "8bit" in config.optim and parameter.numel() < SMALL else ""
        start = parameter.storage_offset()
        if not starts or kind != starts[-1][0] or start + parameter.numel() - starts[-1][1] > LARGEST:
            starts.append((kind, start))
    gradients, buffers = torch.zeros_like(whole), {}
    for (kind, start), (_, end) in pairwise([*starts, ("", len(whole))]):
        buffer = buffers[f"{start}.{kind}"] = nn.Parameter(whole[start:end])
        buffer.grad = gradients[start:end]
    return buffers, gradients


def make_optimizer(config: RunConfig, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the adapter's float32 weights, with its state allocated, so that what does not
    fit shows before the first step.

    ``adamw_8bit`` keeps both moments in 8 bits (Dettmers et al. 2022; tensors under 4,096 elements stay in 32); the paged
    ones let CUDA move the state to the host when the card is full. With ``loraplus_lr_ratio`` (LoRA+, Hayou et al. 2024,
    arXiv 2402.12354) every B is in a second group, with its own learning rate.

    Args:
        parameters: by name; or buffers of them (``make_buffers``), of which bitsandbytes' optimizers, which wait for the
            card after each tensor, have few.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters.values())}]
    if config.loraplus_lr_ratio is not None:
        a, b = ([p for name, p in parameters.items() if ("lora_B" in name) == is_b] for is_b in (False, True))
        groups = [{"params": a}, {"params": b, "lr": config.learning_rate * config.loraplus_lr_ratio}]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw_8bit":
        optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(groups, **settings)
    elif config.optim == "paged_adamw_8bit":
        optimizer = bnb.optim.PagedAdamW8bit(groups, **settings)
    elif config.optim == "paged_adamw_32bit" and groups[0]["params"][0].is_cuda:
        # bitsandbytes has no 32-bit AdamW for CPUs
        optimizer = bnb.optim.PagedAdamW32bit(groups, **settings)
    else:
        # It needs no memory during a step; torch's default on a GPU (foreach) takes several copies of all parameters.
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    small = {parameter for name, parameter in parameters.items() if name.endswith(".small")}
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit):
                optimizer.args.min_8bit_size = parameter.numel() + 1 if parameter in small else SMALL
                optimizer.init_state(group, parameter, index, place)
                continue
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
    return optimizer


def _buffer_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> nn.Parameter:
    """The tensor that the optimizer updates of which a parameter is a part, or the whole."""
    pointer = parameter.data_ptr()
    return next(buffer for buffer in optimizer.state if 0 <= pointer - buffer.data_ptr() < buffer.nbytes)


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The optimizer's state of a parameter: its parts of the buffer's tensors, as views."""
    buffer = _buffer_of(optimizer, parameter)
    start, count = (parameter.data_ptr() - buffer.data_ptr()) // buffer.itemsize, parameter.numel()
    state = dict(optimizer.state[buffer])
    for key, value in state.items():
        if key in MOMENTS:
            state[key] = value.view(-1)[start : start + count].view(parameter.shape)
        elif key.startswith("absmax"):
            state[key] = value[start // ALIGNMENT :][: -(-count // ALIGNMENT)]
    return state


@torch.no_grad()
def restore_state(
    optimizer: torch.optim.Optimizer, states: Mapping[nn.Parameter, dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> None:
    """Copy a checkpoint's state into the allocated one, which may be paged.

    Args:
        states: of each parameter, on the CPU. An empty one (its parameter had no gradient yet) leaves the fresh state.
        groups: ``param_groups`` of ``state_dict()``, possibly from JSON.

    Raises:
        ValueError: it is another optimizer's state.
    """
    for parameter, found in states.items():
        mine = state_of(optimizer, parameter)
        if found and found.keys() != mine.keys():
            raise ValueError(f"it has {', '.join(sorted(found))}; this one {', '.join(sorted(mine))}")
        for key, value in found.items():
            if isinstance(value, torch.Tensor):
                mine[key].copy_(value)
            else:
                optimizer.state[_buffer_of(optimizer, parameter)][key] = value
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        # JSON has no tuples, and an optimizer's betas are one
        group.update({k: tuple(v) if k == "betas" else v for k, v in saved.items() if k not in IMPLEMENTATION})


def make_scheduler(config: RunConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """transformers' schedule, with warm-up over ``warmup_steps``, or the first ``warmup_ratio`` of the steps.

    Raises:
        UserError: there is no schedule of that name, or it has no such option as one of ``lr_scheduler_kwargs``.
    """
    # a run of one step would be all warm-up, whose first learning rate is 0
    share = min(int(-(-total_steps * config.warmup_ratio // 1)), total_steps - 1)
    warmup = share if config.warmup_steps is None else config.warmup_steps
    hint = "Try cosine, linear, constant_with_warmup."
    try:
        if config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError("follows a metric, not the steps")
        function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(config.lr_scheduler_type)]
        options = [name for name in inspect.signature(function).parameters if name not in GIVEN]
        hint = f"The options of this schedule, in lr_scheduler_kwargs: {', '.join(options) or 'none'}."
        if unknown := config.lr_scheduler_kwargs.keys() - options:
            raise ValueError(f"it has no option {short(min(unknown))}")
        return get_scheduler(config.lr_scheduler_type, optimizer, warmup, total_steps, config.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(f"lr_scheduler_type {config.lr_scheduler_type!r}: {error}", hint) from None
