"""A stage's configuration, made small for a rehearsal, and what the whole stage will take by what the small one took."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...config.load import DatasetSpec, Loaded, Method, RunConfig
from ...config.resolve import INHERITED
from ...data.load import load_rows
from ...data.opening import open_source
from ...evaluate.rows import stage_config
from ...io.atomic import file_aside
from ...io.run_dir import StageDir
from ...merge.base_files import BaseFiles
from ...model.chain import chain_of_run
from ...model.fetch import fetch_base

STEPS = 20
KILLED_AFTER = 10  # the first checkpoint's step
BELOW_STEPS = 5  # of an SFT stage that only has to be there
TOKENS_AT_ONCE = 8192  # what cards of up to 24 GB run at once of a 7B model
HELD_OUT = 8

Metrics = dict[str, Any]


def small_stage(config: RunConfig, method: Method, run: Path, *, steps: int = STEPS) -> RunConfig:
    """The same stage on few rows, for few steps, in another run, and sent nowhere.

    What decides memory stays: base, lengths, adapters, optimizer. A step has as many rows as may run at once.
    """
    longest = config.max_length * (1 if method == "sft" else 2)
    batch = min(config.batch_size, max(1, math.ceil(TOKENS_AT_ONCE / longest)))
    # conversations are shorter than the rows they are packed into
    rows = steps * batch * (2 if method == "sft" else 1)
    return config.model_copy(
        update={
            "output_dir": str(run),
            "stage": method,
            "dataset": [_few(spec, rows) for spec in config.dataset],
            "eval_dataset": [_few(spec, HELD_OUT) for spec in config.eval_dataset],
            "batch_size": batch,
            "max_steps": steps,
            "eval_steps": steps,
            "save_steps": KILLED_AFTER,
            "logging_steps": 1,
            "save_total_limit": 2,
            "load_best_model_at_end": False,
            "early_stopping_patience": None,
            "samples": min(config.samples, 1),
            "report_to": [],
            "push_to_hub": None,
            "sync": None,
        }
    )


def _few(spec: DatasetSpec, rows: int) -> DatasetSpec:
    return spec.model_copy(update={"limit": min(rows, spec.limit or rows)})


def on_what(loaded: Loaded) -> tuple[RunConfig, bool]:
    """A DPO stage's configuration with the adapters that the real run will have below it, and whether there are none
    yet, so that an SFT stage has to be made for it."""
    config = loaded.config
    if config.adapters:
        return config, False
    below = StageDir(Path(config.output_dir) / "sft")
    if below.complete():
        chain = chain_of_run(config.output_dir, stage="sft")
        return config.model_copy(update={"adapters": [str(adapter.path) for adapter in chain.adapters]}), False
    if below.config.is_file():  # it is being trained: its base is the one
        theirs = stage_config(below)
        taken = {key: getattr(theirs, key) for key in INHERITED if key not in loaded.given}
        config = config.model_copy(update=taken)
    return config, True


def stage_below(config: RunConfig, run: Path, rows: Path) -> RunConfig:
    """An SFT stage for a DPO stage to stand on: a few steps on its own chosen answers, which ``rows`` is written with."""
    few = small_stage(config, "dpo", run, steps=BELOW_STEPS)
    pairs = load_rows(few.dataset, "dpo", seed=config.seed, system=config.system)
    with file_aside(rows) as file:
        for pair in pairs.values():
            file.write(json.dumps({"messages": [*pair["prompt"], *pair["chosen"]], "tools": pair.get("tools")}) + "\n")
    shared = {
        key: getattr(config, key) for key in (*INHERITED, "engine", "seed", "chat_template", "max_length", "memory")
    }
    whole = RunConfig(**{**shared, "dataset": [DatasetSpec(path=str(rows))], "eval_dataset": []})
    return small_stage(whole, "sft", run, steps=BELOW_STEPS)


def first_prompt(config: RunConfig, method: Method) -> str:
    """What the user of the first row asks."""
    specs = [_few(spec, 1) for spec in config.dataset[:1]]
    row = next(load_rows(specs, method, seed=config.seed).values())
    turns = row["messages" if method == "sft" else "prompt"]
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    return asked[0] if asked else turns[0]["content"]


def merged_bytes(config: RunConfig) -> int:
    """What the merged model takes on the disk."""
    files = BaseFiles(config.model_name_or_path, fetch_base(config.model_name_or_path, config.model_revision))
    return sum(entry.nbytes for entry in files.entries.values())


def speed(metrics: Sequence[Metrics], began: Sequence[int]) -> tuple[float, str] | None:
    """(tokens or pairs a second, which) over the steps, without the first one of each process, which warms up.

    Args:
        metrics: the records of ``metrics.jsonl``.
        began: the steps that processes began after.
    """
    steps = [m for m in metrics if "loss" in m and m["step"] - 1 not in began and m.get("seconds")]
    seconds = sum(m["seconds"] for m in steps)
    unit = "pairs" if any("pairs_per_second" in m for m in steps) else "tokens"
    done = sum(m.get(f"num_{unit}", 0.0) for m in steps)
    return (done / seconds, unit) if seconds and done else None


def whole_stage(config: RunConfig, data: dict[str, Any], rate: float, unit: str) -> tuple[int, float] | None:
    """(steps, seconds) of the real stage's steps, at the rate that the rehearsal had.

    Args:
        config: the real stage's.
        data: what the rehearsal's ``stage.json`` says of its rows.
    """
    if not data.get("read") or not data.get("rows"):
        return None
    read = 0.0
    for spec in config.dataset:
        total = len(open_source(spec))
        read += min(total, spec.limit or total) * spec.weight
    rows = read * data["rows"] / data["read"]
    steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * math.ceil(rows / config.batch_size)))
    done = steps * config.batch_size if config.max_steps else rows * config.num_train_epochs
    return steps, done * (data["tokens"] / data["rows"] if unit == "tokens" else 1.0) / rate
