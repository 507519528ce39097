"""``zephyr-lite suggest``: values for a user's rows, each with its reason and source; and a probe of learning rates."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..config.load import Loaded, Method, RunConfig
from ..config.resolve import AUTOMATIC
from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..io.text import counted
from ..memory.workload import AdapterSpec
from ..model.families import Shape
from .below import open_template
from .dpo import preference_objective
from .loop import TrainState, accumulate_gradients, update
from .setup import setup_stage
from .sft import SftObjective
from .small_data import STEPS, WIDTH, prepare_parts, row_sizes, settle
from .stage import Objective
from .steps import step_schedule

logger = logging.getLogger(__name__)
SUGGESTED = AUTOMATIC - {"val_size"} | {"lora_r"}
SOURCES = (
    "[1] Schulman et al. 2025, LoRA Without Regret, and Tinker's LoRA primer",
    "[2] Biderman et al. 2024, LoRA Learns Less and Forgets Less, arXiv 2405.09673",
    "[3] Hu et al. 2021, LoRA, arXiv 2106.09685",
    "[4] Tunstall et al. 2023, Zephyr, arXiv 2310.16944, and its QLoRA recipe",
)
MOST_RANK, PROBE_STEPS, MOST_RATES = 256, 20, 5
HORIZON = 0.32  # the best rate falls with the steps of a run to this power


def suggest(method: Method, loaded: Loaded, own: set[str]) -> tuple[list[tuple[str, str, str]], dict[str, Any]]:
    """Choose values for the keys ``SUGGESTED`` except ``own``, which the user set; returns key, value and reason of each, and
    ``row_sizes``."""
    template, base_config, notes = open_template(method, loaded.config)
    for note in (*loaded.notes, *notes):
        logger.info(note)
    loaded.automatic |= SUGGESTED - own
    parts = prepare_parts(method, loaded, template)
    rows, report, loaded.automatic = choose(method, loaded, own, parts, base_config), parts[0].report, set()
    logger.info(f"{counted(report.kept, report.unit)}, {report.tokens:,} tokens:")
    return rows, row_sizes(method, loaded.config, parts)


def choose(
    method: Method, loaded: Loaded, own: set[str], parts: Sequence[TokenizedDataset], base_config: Any
) -> list[tuple[str, str, str]]:
    """Choose the keys of ``loaded.automatic``: the rank of SFT, and the others by ``settle``, as a run does."""
    recipe, data, width, sft = loaded.config, parts[0], base_config.hidden_size, method == "sft"
    report, shape = data.report, Shape.of(base_config)
    settle(method, loaded, parts, width)
    per_rank = sum(AdapterSpec.fresh(shape, 1, recipe.lora_target_modules).tensors(shape))
    if sft and "lora_r" in loaded.automatic:
        enough: int = 2 ** math.ceil(math.log2(max(1.0, report.supervised / per_rank)))
        enough = max(recipe.lora_r, min(MOST_RANK, enough))
        loaded.config = loaded.config.model_copy(update={"lora_r": enough})
    config, count = loaded.config, len(data.rows)
    steps = counted(step_schedule(config, count)[1], "step")
    tokens = report.tokens / count * min(config.batch_size, count)
    covered = "the highest that is suggested"
    if config.lora_r < MOST_RANK:
        covered = f"at least one for each of {report.supervised:,} supervised tokens [1]"
    if not sft:
        covered = "the recipe's [4]; a pair tells about one bit, so a lower rank works, too [1]"
    rate = f"ten times full fine-tuning's {'2e-5' if sft else '5e-6' if 'orpo' in recipe.losses else '5e-7'} [1, 2, 4]"
    if config.learning_rate != recipe.learning_rate:
        why = f"hidden size {width:,} instead of {WIDTH:,} [1]" if sft else f"a run of {steps}"
        rate += f", × {config.learning_rate / recipe.learning_rate:.2g} for {why}"
    lowered = f", lowered from {recipe.batch_size} for more steps" * (config.batch_size < recipe.batch_size)
    repeated = f", raised from {recipe.num_train_epochs:g}" * (config.num_train_epochs > recipe.num_train_epochs)
    reasons = {
        "lora_target_modules": "attention alone learns less, even with as many parameters [1, 2]",
        "lora_r": f"{per_rank * config.lora_r:,} parameters: {covered}",
        "lora_alpha": "kept when lora_r changes: with the scale alpha / r the best learning rate hardly depends on r [1, 3]",
        "learning_rate": rate,
        "batch_size": f"{tokens:,.0f} tokens a step{lowered}; LoRA loses more by large batches than full fine-tuning [1]",
        "num_train_epochs": f"{steps} in all{repeated}",
        "max_length": "the longest conversation, so that none is cut",
        "warmup_ratio": "few steps: none is spent on a low rate",
        "eval_steps": "four evaluations and checkpoints in the run",
    }
    for key in reasons:
        if key in own:
            reasons[key] = "set by you" if key in loaded.typed else "set in the configuration file"
        elif getattr(config, key) == getattr(recipe, key) and key in ("max_length", "warmup_ratio", "eval_steps"):
            reasons[key] = "the recipe's [4]"
    return [(key, _shown(getattr(config, key)), reason) for key, reason in reasons.items()]


def table_lines(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """The rows as a table of at most 80 columns, and the sources."""
    lines = []
    for key, value, reason in rows:
        first, *rest = textwrap.wrap(reason, 46)
        lines += [f"  {key:<20} {value:<10} {first}", *(" " * 33 + line for line in rest)]
    return [*lines, "", *SOURCES, ""]


def changed_words(config: RunConfig, recipe: RunConfig) -> list[str]:
    """``key=value`` of the suggested values that differ from those before."""
    values, before = vars(config), vars(recipe)
    return [f"{key}={_shown(values[key])}" for key in values if key in SUGGESTED and values[key] != before[key]]


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


# -- the probe of learning rates ------------------------------------------------------------------------------------------


def short_runs(method: Method, loaded: Loaded) -> tuple[Callable[[float, int], float], int]:
    """(a function of learning rate and steps; the steps of the whole run). The function trains from the same start on the same rows
    with a whole schedule and writes nothing; it returns the held-out loss, infinite if a step was not finite."""
    config = loaded.config
    if not config.eval_dataset:
        raise UserError(
            "--probe compares held-out losses, and no rows are held out.", "Set val_size=0.1, or name an eval_dataset."
        )
    # a stage of another name: the run's own may be there already
    alone = {"stage": "probe", "engine": "fused", "precompute_ref_log_probs": False, "report_to": []}
    stage = setup_stage(method, replace(loaded, config=config.model_copy(update=alone), notes=[]), claim=False)
    start = stage.stack.weights("probe")

    def loss(rate: float, steps: int) -> float:
        stage.config = stage.config.model_copy(update={"learning_rate": rate, "max_steps": steps})
        stage.stack.load("probe", start)
        objective: Objective = SftObjective(stage) if method == "sft" else preference_objective(stage)
        state = TrainState(stage, objective)
        finite = all(update(state, accumulate_gradients(state, step)) for step in range(steps))
        found = objective.eval_metrics(objective.evaluate())["eval_loss"] if finite else math.inf
        logger.info(f"probe: held-out loss {found:.4f} after {counted(steps, 'step')} at learning_rate={rate:g}")
        return found if math.isfinite(found) else math.inf

    return loss, step_schedule(config, len(stage.data.rows))[1]


def search(loss: Callable[[float], float], first: float) -> dict[float, float]:
    """{learning rate: loss} of at most ``MOST_RATES`` rates: from ``first`` by factors of 4 while the loss falls, then by a factor
    of 2 on both sides of the best one."""
    losses = {rate: loss(rate) for rate in (first, 4 * first)}
    step = 4.0 if losses[4 * first] < losses[first] else 0.25
    while len(losses) < MOST_RATES - 1 and (rate := min(losses, key=losses.__getitem__) * step) not in losses:
        losses[rate] = loss(rate)
    best = min(losses, key=losses.__getitem__)
    for side in sorted((2.0, 0.5), key=lambda side: losses.get(best * side**2, math.inf)):
        if len(losses) < MOST_RATES:
            losses[best * side] = loss(best * side)
    return dict(sorted(losses.items()))


def pick(losses: Mapping[float, float], before: float, steps: int) -> float | None:
    """The rate for a run of so many steps from ``search``'s losses; None: no rate lowered the loss of the start.

    After 60 steps the short runs' best rate was within 1.3 % of a grid's best loss (bench/results/learning-rate-*.json). Longer
    runs need lower rates: by tokens to the power of -0.32 (Bjorck et al. 2024, arXiv 2409.19913, in pre-training)."""
    best = min(losses, key=losses.__getitem__)
    return float(f"{best * min(1.0, STEPS / steps) ** HORIZON:.2g}") if losses[best] < before else None


def probe(method: Method, loaded: Loaded) -> list[str]:
    """Probe learning rates and set the one for the run; returns the table of losses."""
    first = loaded.config.learning_rate
    loss, total = short_runs(method, loaded)
    steps, before = min(PROBE_STEPS, total), loss(first, 0)
    losses = search(lambda rate: loss(rate, steps), first)
    chosen, best = pick(losses, before, total), min(losses, key=losses.__getitem__)
    lines = ["", f"held-out loss after {counted(steps, 'step')} (before: {before:.4f})"]
    lines += [f"  learning_rate {rate:<10g} {losses[rate]:.4f}{'  best' * (rate == best)}" for rate in losses]
    if chosen is None:
        return [*lines, f"  no rate lowers it; learning_rate stays {first:g}", ""]
    loaded.config = loaded.config.model_copy(update={"learning_rate": chosen})
    lines.append(f"  picked for {counted(total, 'step')}: {chosen:g}")
    if total > STEPS:
        lines.append(f"  ({best:g} × ({STEPS} / {total:,})^{HORIZON}: longer runs need lower rates, arXiv 2409.19913)")
    return [*lines, ""]
