"""Settings that follow from a user's rows: the recipe's are made for 200,000 conversations and 60,000 pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config.load import Loaded, Method, RunConfig
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset, prepare
from ..data.load import NothingHeldOut
from ..data.packing import best_fit
from ..data.sources import local_path
from ..io.text import counted
from ..model.files import local_folder
from .below import open_template
from .steps import step_schedule

logger = logging.getLogger(__name__)
STEPS = 60  # that a run has at least, if ``MOST_EPOCHS`` are enough for them
EPOCHS: dict[Method, int] = {"sft": 10, "dpo": 4}  # that the smallest batches are chosen for
MOST_EPOCHS = 10
EVALUATIONS = 4
# The recipe's rates are Mistral's, whose hidden size is WIDTH. LoRA's best rate falls with the hidden size to this power
# (Schulman et al. 2025, "LoRA Without Regret", fitted over Llama models).
WIDTH, POWER = 4096, 0.78
# DPO at the recipe's rate hardly moves in fewer steps: the rate rises as they become fewer, up to DPO_MOST times
DPO_STEPS, DPO_MOST = 600, 4


def prepare_parts(method: Method, loaded: Loaded, template: ChatTemplate) -> list[TokenizedDataset]:
    """The training rows and, if there are any, the held-out ones; ``val_size: auto`` becomes 0 where it holds nothing out."""
    config = loaded.config
    kind = config.row_kind(method)
    parts = [prepare(config.dataset, kind, config, template, what="training")]
    try:
        if config.eval_dataset:
            parts.append(prepare(config.eval_dataset, kind, config, template, what="held-out"))
    except NothingHeldOut as nothing:
        logger.info(nothing.message)
        loaded.config = _with(config, {"val_size": 0.0})
    return parts


def settle(method: Method, loaded: Loaded, parts: Sequence[TokenizedDataset], width: int) -> list[str]:
    """Choose the keys of ``loaded.automatic`` for the training rows: the learning rate, and if the recipe's values would give too
    few steps the others; the rows are packed again. Returns lines that say what was chosen.

    Args:
        parts: of ``prepare_parts``.
        width: the base's hidden size.
    """
    recipe, free, data = loaded.config, loaded.automatic, parts[0]
    chosen = _for_steps(method, recipe, free, parts)
    config = _with(recipe, chosen)
    if "max_length" in chosen:
        for part in parts:
            part.pack(config.max_length)
    steps = step_schedule(config, len(data.rows))[1]
    if "learning_rate" in free:
        factor = (WIDTH / width) ** POWER if method == "sft" else min(DPO_MOST, max(1.0, DPO_STEPS / steps))
        if factor != 1:
            chosen["learning_rate"] = float(f"{recipe.learning_rate * factor:.0e}")
    loaded.config = config = _with(recipe, chosen)
    changed = [key for key in chosen if key[-5:] != "steps" and getattr(config, key) != getattr(recipe, key)]
    if not changed:
        return []
    words, others = (" ".join(f"{key}={getattr(each, key):g}" for key in changed) for each in (config, recipe))
    rows = counted(len(data.lengths), data.report.unit)
    return [
        f"chosen for {rows}: {words}",
        f"(a key that you set is kept; the recipe has {others})",
    ]


def settle_before(method: Method, loaded: Loaded) -> dict[str, Any] | None:
    """As ``settle``, for a plan: without lines, and only where base and rows are in local folders and files. Returns
    ``row_sizes``, or None."""
    config = loaded.config
    if None in (local_folder(config.model_name_or_path), *map(local_path, config.dataset)):
        return None
    template, base_config, _ = open_template(method, config)
    parts = prepare_parts(method, loaded, template)
    settle(method, loaded, parts, base_config.hidden_size)
    loaded.automatic = set()
    return row_sizes(method, loaded.config, parts)


def row_sizes(method: Method, config: RunConfig, parts: list[TokenizedDataset]) -> dict[str, Any]:
    """The fields of ``Workload`` that depend on the training rows, the first of the parts, and the held-out ones."""
    data = parts[0]
    rows = np.array([int(data.lengths[row].sum()) for row in data.rows])
    per_epoch, steps = step_schedule(config, len(rows))
    in_a_step = min(config.batch_size, len(rows)) * rows.mean()
    columns = ["supervised"] if method == "sft" else ["supervised", "prompt_ids"]
    table = pa.concat_tables([part.examples.columns(*columns)[:] for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    found: dict[str, Any] = {
        "longest": int(max(lengths.max(), 0 if config.engine == "fused" else rows.max())),  # TRL takes whole rows
        "step_tokens": int(np.ceil(in_a_step)),
        "step_most": int(np.sort(rows)[-config.batch_size :].sum()),
        "run_tokens": int(steps * in_a_step),
        "steps": steps,
        "epochs": steps / per_epoch,
        "segment": max(1, int(data.lengths.mean() / (1 if method == "sft" else data.answers().sum(1).mean()))),
        "targets": _largest_share(table["supervised"].to_numpy(), lengths),
    }
    if method == "dpo":
        # a prompt's keys are gathered twice if it has two answers
        pairs = np.concatenate([part.answers().all(1) for part in parts])
        found["keys"] = 1 + _largest_share(pc.list_value_length(table["prompt_ids"]).to_numpy() * pairs, lengths)
    return found


def _largest_share(counted: np.ndarray, lengths: np.ndarray) -> float:
    """The share of a micro-batch's tokens that is counted: of all examples together, or of a long one, which may run alone,
    whichever is larger."""
    long = lengths >= 0.75 * lengths.max()
    return float(max((counted[long] / lengths[long]).max(), counted.sum() / lengths.sum()))


def _with(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({**config.model_dump(), **values})


def _for_steps(method: Method, config: RunConfig, free: set[str], parts: Sequence[TokenizedDataset]) -> dict[str, Any]:
    """Values that give the run at least ``STEPS`` steps; {} if the recipe's do, or if max_steps is set."""
    rows, batch = len(parts[0].rows), config.batch_size
    if config.max_steps is not None or step_schedule(config, rows)[1] >= STEPS:
        return {}
    chosen: dict[str, Any] = {}
    if method == "sft" and "max_length" in free:
        chosen["max_length"] = max(part.report.longest for part in parts)  # nothing is cut
        rows = len(best_fit(parts[0].lengths, chosen["max_length"]))
    epochs = EPOCHS[method] if "num_train_epochs" in free else config.num_train_epochs
    if "batch_size" in free:
        least = 4 if config.row_kind(method) == "kto" else 1  # for KTO's z0, as TRL's documentation advises
        chosen["batch_size"] = batch = max(least, min(batch, int(rows * epochs / STEPS)))
    per_epoch = math.ceil(rows / batch)
    if "num_train_epochs" in free:
        chosen["num_train_epochs"] = epochs = min(MOST_EPOCHS, math.ceil(STEPS / per_epoch))
    if "warmup_ratio" in free and config.warmup_steps is None:
        chosen["warmup_ratio"] = 0.0  # a warm-up would begin at a learning rate of 0
    for key in {"eval_steps", "save_steps"} & free:  # together: the best checkpoint is one that was evaluated
        chosen[key] = math.ceil(epochs * per_epoch / EVALUATIONS)
    return chosen
