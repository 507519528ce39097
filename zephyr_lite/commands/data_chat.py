"""``zephyr-lite data chat``."""

from __future__ import annotations

from ..errors import UserError


def chat() -> None:
    """Raw conversations → a cleaned set like ultrachat_200k."""
    raise UserError("not built yet.")
