"""The same run on other trainers: stock TRL (``engine: trl``), or Unsloth under TRL's trainers (``engine: unsloth``). Same
rows in the same order, same hyperparameters, same run folder.

Nothing heavy is imported here: Unsloth has to be imported before transformers.
"""

from .unsloth import start_unsloth, unsloth_conflicts

__all__ = ["start_unsloth", "unsloth_conflicts"]
