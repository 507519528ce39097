"""``--dry-run``: everything that a run does before its second step, without writing to the disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import numpy as np

from ..config.load import Loaded, Method
from ..errors import UserError
from ..io.logging import RESULT
from ..memory.machine import peak_memory, reset_peak_memory
from .dpo import preference_objective
from .loop import TrainState, accumulate_gradients, update, warmup_largest_batch
from .setup import setup_stage
from .sft import SftObjective
from .stage import Objective, Stage
from .steps import rows_of_step

logger = logging.getLogger(__name__)

Spans = list[tuple[str, bool]]
SHOWN_TOKENS = 400


def run_dry(method: Method, loaded: Loaded, *, show: Callable[[str, Spans], None] | None) -> None:
    """Print the plan, the first row with what is supervised, and the first step's time.

    Nothing is written but the libraries' caches: no run folder, no reference file, no tracker's run.

    Args:
        show: prints a title and runs of text, each with whether it is supervised; None: the row is not printed.

    Raises:
        UserError, StageComplete: as the run itself would.
    """
    if loaded.config.engine != "fused":
        raise UserError(
            f"--dry-run plans the fused engine; this configuration asks for engine {loaded.config.engine}.",
            "Add engine=fused to look at the rows, or run it with max_steps=1 in an output_dir of its own.",
        )
    loaded.config = loaded.config.model_copy(update={"report_to": []})  # a tracker would start a run
    stage = setup_stage(method, loaded, claim=False)
    for line in stage.plan.lines():
        logger.info(line, extra=RESULT)
    # the run computes all pairs' reference and writes it; here the first step's pairs have a live one, in a pass of its own
    if cached := stage.config.precompute_ref_log_probs is True:
        stage.config = stage.config.model_copy(update={"precompute_ref_log_probs": False})
        stage.plan = replace(stage.plan, reference="own")
    if show is not None:
        for title, spans in first_row(stage):
            show(title, spans)
    objective: Objective = SftObjective(stage) if method == "sft" else preference_objective(stage)
    state = TrainState(stage, objective)
    if stage.base.device.type == "cuda":
        warmup_largest_batch(state)
    reset_peak_memory(stage.base.device)
    started = time.perf_counter()
    metrics = accumulate_gradients(state, 0)
    update(state, metrics)
    seconds = time.perf_counter() - started
    logger.info(
        f"first step: loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.4g}, "
        f"{seconds:.2f} s (warm-up included), {peak_memory(stage.base.device) / 2**30:.2f} GiB at most, "
        f"{stage.plan.peak / 2**30:.2f} planned",
        extra=RESULT,
    )
    logger.info(
        f"at this pace {state.total:,} steps take {timedelta(seconds=round(seconds * state.total))} at most, "
        f"{'the reference included, ' * cached}evaluations aside; nothing was written to {loaded.config.output_dir}",
        extra=RESULT,
    )
    logger.info(f"`zephyr-lite suggest {method} …` explains the values and can probe learning rates")


def first_row(stage: Stage) -> list[tuple[str, Spans]]:
    """The first conversation or pair of the first step: (title, runs of text with whether they are supervised), each
    cut to ``SHOWN_TOKENS`` tokens."""
    row = stage.data.rows[rows_of_step(stage.config, len(stage.data.rows), 0)[0]]
    example = stage.data.examples[row[0]]
    if stage.method == "sft":
        parts = [("", example.ids, example.mask)]
    else:
        given, nothing = example.prompt_ids, np.zeros(len(example.prompt_ids), dtype=bool)
        parts = [
            (f", prompt and {name}", np.concatenate([given, ids]), np.concatenate([nothing, mask]))
            for name, ids, mask in (
                ("chosen", example.chosen_ids, example.chosen_mask),
                ("rejected", example.rejected_ids, example.rejected_mask),
            )
            if len(ids)
        ]
    shown = []
    for part, ids, mask in parts:
        tokens, targets = ids[:SHOWN_TOKENS], mask[:SHOWN_TOKENS]
        edges = [0, *np.flatnonzero(np.diff(targets)) + 1, len(tokens)]
        spans = [(stage.template.tokenizer.decode(tokens[a:b]), bool(targets[a])) for a, b in pairwise(edges)]
        shown.append((f"{example.where}{part}:", spans))
    return shown
