"""`zephyr-lite suggest --probe` against a grid: the held-out loss of a whole run at the probe's learning rate and at others.

    python -m bench.learning_rate TRAIN HELD_OUT [--steps 60] [--out learning-rate.json]

TRAIN and HELD_OUT: files of conversations, such as the demo's. The base is SmolLM2-135M in bfloat16; a step has one packed row
of 192 tokens. Every run begins from the same adapter and takes the same rows in the same order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.command import header, run, save
from bench.mistral import tiny_base

RATE = 9e-4  # the suggested one for this base
FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0)


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="of a whole run")
    parser.add_argument("--tiny", type=Path, help="an empty folder for a tiny random model: does the bench run?")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(words)
    from zephyr_lite.config.load import load_config
    from zephyr_lite.demo.base import demo_base
    from zephyr_lite.train.suggest import PROBE_STEPS, pick, search, short_runs

    settings = {
        "model_name_or_path": tiny_base(args.tiny) if args.tiny else demo_base(),
        "dataset": args.train,
        "eval_dataset": args.held_out,
        "load_in_4bit": "false",
        "batch_size": 1,
        "max_length": 192,
        "dtype": "bfloat16",
        "max_steps": args.steps,
        "warmup_ratio": 0,
    }
    loss, _ = short_runs("sft", load_config("sft", None, [f"{key}={value}" for key, value in settings.items()]))
    before = loss(RATE, 0)
    probed = search(lambda rate: loss(rate, min(PROBE_STEPS, args.steps)), RATE)
    picked = pick(probed, before, args.steps)
    grid = {RATE * factor: loss(RATE * factor, args.steps) for factor in FACTORS}
    grid[picked] = grid.get(picked) or loss(picked, args.steps)
    result = {
        **header(),
        "steps": args.steps,
        "before": before,
        "probe": probed,
        "picked": picked,
        "grid": dict(sorted(grid.items())),
        "above_the_best": grid[picked] / min(grid.values()) - 1,
    }
    print(json.dumps(result, indent=1))
    save(args.out, result)
    return result


if __name__ == "__main__":
    run(main)
