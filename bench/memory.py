"""What runs take of a card's memory against what the plan said, on a Mistral-7B.

    python -m bench.memory --out memory.json                    # on one NVIDIA card; smaller ones are imitated
    python -m bench.memory --cards 8 6

The model has random weights (built once, 4 GB, see ``mistral``). Every case is a process of its own, which opens a stage
as a user's run does, under a cap on PyTorch's allocator: a card's nominal size less 0.7 GiB for the CUDA context. The
whole takes ``--minutes``; what there is no time for is listed as such.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import command
from zephyr_lite.model.allocator import set_allocator


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    from bench.memory_parts import CARDS

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cards", type=float, nargs="+", default=list(CARDS), help="GiB of the cards imitated")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--rows", type=int, default=8, help="rows of 2048 tokens, or pairs, in a step")
    parser.add_argument("--layers", type=int, default=32, help="fewer than Mistral's, for a small card")
    parser.add_argument("--base", type=Path, help="the model's folder, built if it does not exist; default: a cache")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in one process, on a CPU too: does it run?")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_allocator()  # as the commands do
    from bench.memory_parts import run, table

    results = run(args)
    print("\n".join(table(results)))
    return results


if __name__ == "__main__":
    command.run(main)
