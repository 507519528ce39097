"""``zephyr-lite distill``."""

from __future__ import annotations

from ..errors import UserError


def distill() -> None:
    """Dialogues grown from seed prompts by a teacher model."""
    raise UserError("not built yet.")
