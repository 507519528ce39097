"""Which rows a step takes, and how they are split into micro-batches: functions of the configuration and the lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..config.load import RunConfig
from ..data.packing import best_fit

Lengths = Sequence[int] | np.ndarray


def step_schedule(config: RunConfig, rows: int) -> tuple[int, int]:
    """(steps in an epoch, steps in all). The last step of an epoch may be a partial one."""
    per_epoch = math.ceil(rows / config.batch_size)
    total = config.max_steps or max(1, math.ceil(config.num_train_epochs * per_epoch))
    return per_epoch, total


def rows_of_step(config: RunConfig, rows: int, step: int) -> list[int]:
    """Which rows step number ``step`` (from 0) takes: a permutation an epoch, drawn from the seed and the epoch alone."""
    per_epoch = math.ceil(rows / config.batch_size)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)).tolist()
    return order[place * config.batch_size : (place + 1) * config.batch_size]


def micro_batches(examples: Sequence[int], lengths: Lengths, tokens: int) -> list[list[int]]:
    """Split a step's examples into groups of at most ``tokens`` tokens (an example longer than that runs alone)."""
    places = np.asarray(examples, dtype=np.int64)
    sizes = np.minimum(np.asarray(lengths)[places], tokens)
    return [places[group].tolist() for group in best_fit(sizes, tokens)]


def largest_micro_batches(lengths: Lengths, tokens: int) -> list[list[int]]:
    """Of the groups that packing all examples gives, the one with the longest example; then, where another has more tokens,
    the fullest."""
    groups = micro_batches(range(len(lengths)), lengths, tokens)
    longest = max(groups, key=lambda group: max(int(lengths[i]) for i in group))
    fullest = max(groups, key=lambda group: sum(int(lengths[i]) for i in group))
    return [longest] if fullest == longest else [longest, fullest]
