"""The same run on other trainers: stock TRL (``engine: trl``), or Unsloth under TRL's trainers (``engine: unsloth``). Same
rows in the same order, same hyperparameters, same run folder.

Nothing heavy is imported here: Unsloth has to be imported before transformers.
"""

from typing import Any

from .unsloth import start_unsloth, unsloth_conflicts

__all__ = ["start_unsloth", "unsloth_conflicts"]


def __getattr__(name: str) -> Any:
    if name == "run_baseline":
        from .trl import run_baseline

        return run_baseline
    raise AttributeError(name)
