"""``zephyr-lite feedback``."""

from __future__ import annotations

from ..errors import UserError


def feedback() -> None:
    """AI feedback from scratch: completions by several models, rated by a judge."""
    raise UserError("not built yet.")
