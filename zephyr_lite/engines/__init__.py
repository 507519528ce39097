"""The same run on other people's trainers: stock TRL (``engine: trl``), or Unsloth under TRL's trainers (``engine:
unsloth``). Same rows in the same order, same hyperparameters, same run folder.

    run.py      a stage from its opening to its adapter; the trainer and its hyperparameters
    rows.py     our rows in TRL's collators, our order in its trainers
    trl.py      what TRL trains on: adapters below, the initial weights
    unsloth.py  the same with Unsloth's loader, kernels and checkpointing
    early.py    its import, which has to come before everybody else's

Nothing is imported here: Unsloth has to come before transformers, and who asks for it comes through this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

WHERE = {
    "run_baseline": "run",
    "make_trainer": "run",
    "Rows": "rows",
    "Pairs": "rows",
    "places": "rows",
    "sees_only_itself": "rows",
    "start_unsloth": "early",
    "unsloth_conflicts": "early",
}
__all__ = sorted(WHERE)


def __getattr__(name: str) -> Any:
    if name in WHERE:
        return getattr(import_module(f".{WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
