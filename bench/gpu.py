"""The fused engine, TRL and Unsloth on a Mistral-7B in NF4 on one NVIDIA card: tokens/s (SFT), pairs/s (DPO), peak memory.

    python -m bench.gpu --out gpu.json                    # a consumer card of 24 GiB, imitated on a larger one
    python -m bench.gpu --cap 24 12 --out gpu.json

The model has random weights (built once, 4 GB, see ``mistral``), the rows have the lengths of real ones (``rows``).
Every engine tries its settings (micro-batches, recomputation on and off); its fastest that fits counts (``contest``). A
setting that does not fit, and an engine that is missing or refuses, is a result. The whole takes ``--minutes``: where time
is short, settings and rounds are dropped, never an engine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import command
from zephyr_lite.errors import UserError
from zephyr_lite.model.allocator import set_allocator

# Engines' processes import this file too, before anything else: nothing heavy may be imported here (see ``process``).


ENGINES, METHODS = ("fused", "trl", "unsloth"), ("sft", "dpo")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--cap", type=float, nargs="+", default=[24.0], help="GiB of the card imitated; several in turn"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; rounds are dropped to keep it")
    parser.add_argument("--engines", default="fused,trl,unsloth")
    parser.add_argument("--methods", default="sft,dpo")
    parser.add_argument("--dropout", type=float, default=0.0, help="of SFT; DPO has none, as the recipe")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of every engine, where time allows")
    parser.add_argument("--per-device", type=int, nargs="+", default=[1, 2, 4], help="micro-batches that baselines try")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sft-rows", type=int, default=4, help="packed rows of 2048 tokens in a step")
    parser.add_argument("--dpo-pairs", type=int, default=8, help="pairs in a step")
    parser.add_argument("--layers", type=int, default=32, help="fewer than Mistral's, for a small card")
    parser.add_argument("--base", type=Path, help="the model's folder, built if it does not exist; default: a cache")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in one process, on a CPU too: does it run?")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(words)
    for name, given, known in (("engines", args.engines, ENGINES), ("methods", args.methods, METHODS)):
        if not set(given.split(",")) <= set(known):
            raise UserError(f"--{name} {given}: known are {', '.join(known)}.")
    if any(args.sft_rows % n or args.dpo_pairs % n for n in args.per_device):
        raise UserError(f"--per-device {args.per_device}: must divide --sft-rows and --dpo-pairs.")
    return args


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(words)
    # no downloads and no telemetry; set before the engines' processes start
    for name in ("HF_HUB_OFFLINE", "UNSLOTH_DISABLE_STATISTICS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_allocator()  # as the commands do; the peers have it too
    from bench.contest import run, table

    results = run(args)
    print("\n".join(table(results)))
    return results


if __name__ == "__main__":
    command.run(main)
