"""The plan of a stage, made from its configuration, its rows and the base's config.json before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.load import Method, RunConfig
from ..data.dataset import TokenizedDataset
from ..memory.forecast import forecast_lines
from ..memory.machine import this_machine
from ..memory.plan import Plan, make_plan
from ..memory.workload import Workload, make_workload, storage_of
from ..model.base import compute_device, compute_dtype
from ..model.peft_io import AdapterFile
from .steps import step_schedule

logger = logging.getLogger(__name__)


def stage_workload(
    method: Method,
    config: RunConfig,
    base_config: Any,
    folder: Path,
    frozen: Sequence[AdapterFile],
    data: TokenizedDataset,
    eval_data: TokenizedDataset | None,
) -> Workload:
    """The workload of a stage.

    Raises:
        UserError: the base is stored quantized in another way than NF4.
    """
    dtype = compute_dtype(config.dtype, compute_device())
    return make_workload(
        config,
        method,
        base_config,
        dtype,
        frozen=[adapter.modules for adapter in frozen],
        storage=storage_of(config, base_config, folder, dtype),
        **of_rows(method, config, data, eval_data),
    )


def of_rows(
    method: Method, config: RunConfig, data: TokenizedDataset, eval_data: TokenizedDataset | None
) -> dict[str, Any]:
    """The fields of ``Workload`` that depend on the rows."""
    rows = np.array([int(data.lengths[row].sum()) for row in data.rows])
    _, steps = step_schedule(config, len(rows))
    in_a_step = config.batch_size * rows.mean()
    found: dict[str, Any] = {
        "longest": int(max(data.lengths.max(), eval_data.lengths.max() if eval_data else 0)),
        "step_tokens": int(np.ceil(in_a_step)),
        "step_most": int(np.sort(rows)[-config.batch_size :].sum()),
        "run_tokens": int(steps * in_a_step),
        "steps": steps,
        "segment": max(1, int(data.lengths.mean() / (1 if method == "sft" else 2))),
    }
    parts = [data, *([eval_data] if eval_data else [])]
    if method == "dpo":
        # a prompt's keys are gathered twice
        found["keys"] = 1 + _share(parts, found["longest"], lambda pair: len(pair.prompt_ids))
        found["targets"] = _share(
            parts, found["longest"], lambda pair: int(pair.chosen_mask.sum() + pair.rejected_mask.sum())
        )
    else:
        found["targets"] = _share(parts, found["longest"], lambda example: int(example.mask[1:].sum()))
    return found


def _share(parts: Sequence[TokenizedDataset], longest: int, count: Callable[[Any], int]) -> float:
    """The share of a micro-batch's tokens that is counted: of all examples together, or of a long one, which may run alone,
    whichever is larger."""
    counted = tokens = 0
    most = 0.0
    for part in parts:
        for example, length in zip(part.examples, part.lengths):
            here, length = count(example), int(length)
            counted, tokens = counted + here, tokens + length
            if length >= 0.75 * longest:
                most = max(most, here / length)
    return max(most, counted / max(1, tokens))


def plan_stage(job: Workload, config: RunConfig) -> Plan:
    """Make the plan for this machine, and print it.

    Raises:
        UserError: nothing fits.
    """
    machine = this_machine(compute_device(), job.dtype, config.memory, measure=config.engine == "fused")
    plan = make_plan(job, machine, config.memory)
    if config.engine != "fused":
        free = f"; {plan.free_bytes / 2**30:.1f} GiB free" if plan.free_bytes else ""
        first, *rest = plan.lines()
        lines = [first + free, *rest]
    else:
        lines = forecast_lines(job, machine, plan, config)
    for line in lines:
        logger.info(line)
    return plan
