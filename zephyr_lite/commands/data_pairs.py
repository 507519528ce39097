"""``zephyr-lite data pairs``."""

from __future__ import annotations

from ..errors import UserError


def pairs() -> None:
    """Scored completions (UltraFeedback's raw schema) → preference pairs."""
    raise UserError("not built yet.")
